"""Gradient-norm penalty (and SAM) for the Hugging Face `Trainer`, on one process or sharded over many."""

from .arguments import GNPArguments, GNPTrainingArguments
from .sharpness import SharpnessCallback, plot_loss_surface
from .trainer import GNPMixin, GNPTrainer


__version__ = "0.1.0"

__all__ = [
    "GNPArguments",
    "GNPMixin",
    "GNPTrainer",
    "GNPTrainingArguments",
    "SharpnessCallback",
    "__version__",
    "plot_loss_surface",
]
