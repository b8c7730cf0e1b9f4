"""Has transformers' trainer of sequence-to-sequence models, with the penalty."""

from dataclasses import dataclass

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from .arguments import GNPArguments
from .trainer import GNPMixin


@dataclass
class GNPSeq2SeqTrainingArguments(GNPArguments, Seq2SeqTrainingArguments):
    """[`~transformers.Seq2SeqTrainingArguments`] with the arguments of the gradient-norm penalty."""


class GNPSeq2SeqTrainer(GNPMixin, Seq2SeqTrainer):
    """[`~transformers.Seq2SeqTrainer`] with a penalised gradient norm."""
