"""Whether a forward that runs again is the same forward."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from .first_pass import replaced
from .window import MicroBatch, copied


# Of a loss, what may differ when the same forward runs again on an accelerator, whose kernels add in any order.
TOLERANCE = 1e-3
TOLERANCE_CPU = 2e-6  # of a few operations that add from several threads
TOLERANCE_LOW = 5e-2  # in 16 bit


def probe(
    trainer: Any, model: nn.Module, micro_batch: MicroBatch, around: AbstractContextManager[Any], is_low: bool
) -> None:
    """
    Run the forward of a micro-batch again, whose state is put back: its loss must be that of the first pass.

    Args:
        around: The engine's, for a forward without backward.
        is_low: Whether the engine computes in 16 bit, whatever the weights' dtype.

    Raises:
        RuntimeError: where it is another, with both and with where to look.
    """
    inputs = copied(micro_batch.inputs)
    model.train()  # as `Trainer.training_step` does: a loss may have left it otherwise
    with around, replaced(trainer, log=not_logged), trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=micro_batch.num_items_in_batch)
    first: Any = micro_batch.forward_loss
    loss, expected = loss.detach().double(), first.double()
    tolerance = _tolerance(model, first.device.type, is_low)
    if torch.allclose(loss, expected, rtol=tolerance, atol=tolerance * 1e-3, equal_nan=True):
        return
    raise RuntimeError(
        f"The loss of a micro-batch was {expected.mean().item()} and is {loss.mean().item()} when it is run "
        "again at the same weights, with the same inputs, random numbers, buffers and Python state: something "
        "else moves between two forwards, and the second pass of the gradient-norm penalty would see another "
        f"loss than the first. Look in {type(trainer).__name__}.compute_loss and in the model's forward for "
        "state out of sight (an iterator, a file, an object with __slots__, a generator of another library), "
        "keep it in an attribute of the model or of the trainer, or set gnp_alpha=0."
    )


def _tolerance(model: nn.Module, device_type: str, is_low: bool) -> float:
    if device_type == "cpu":
        return TOLERANCE_CPU
    is_low = is_low or any(p.requires_grad and p.dtype.itemsize <= 2 for p in model.parameters())
    return TOLERANCE_LOW if is_low else TOLERANCE


def not_logged(original: Any, *args: Any, **kwargs: Any) -> None:
    """In place of `log` where only the gradient of a pass is to stay."""
