"""Gradient-norm penalty (and SAM) for the Hugging Face `Trainer`, on one process or sharded over many."""

from .arguments import GNPArguments, GNPTrainingArguments
from .seq2seq import GNPSeq2SeqTrainer, GNPSeq2SeqTrainingArguments
from .sharpness import SharpnessCallback, plot_loss_surface
from .trainer import GNPMixin, GNPTrainer


__version__ = "0.1.0"

__all__ = [
    "GNPArguments",
    "GNPMixin",
    "GNPSeq2SeqTrainer",
    "GNPSeq2SeqTrainingArguments",
    "GNPTrainer",
    "GNPTrainingArguments",
    "SharpnessCallback",
    "__version__",
    "plot_loss_surface",
]
