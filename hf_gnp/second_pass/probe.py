"""Replaced methods of a trainer, and the checks that both passes run the same forward at different weights."""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .inputs import copied
from .window import MicroBatch


TRAINING_STEP = inspect.unwrap(Trainer.training_step).__code__  # a profiler's wrapper may hide it later
# Relative tolerances of the loss between two runs of one forward. Kernels of an accelerator add in any order.
TOLERANCE = 1e-3
TOLERANCE_CPU = 2e-6  # a few operations add from several threads
TOLERANCE_LOW = 5e-2  # in 16 bit
TOLERANCE_NORM = 1e-6  # relative, of ‖g₂‖ = ‖g₁‖, each rounded to float32


@contextlib.contextmanager
def replaced(owner: Any, **methods: Callable[..., Any]) -> Iterator[None]:
    """Let `owner.name(...)` call `methods[name](original, ...)`, by an attribute of the instance."""
    kept = {name: vars(owner)[name] for name in methods if name in vars(owner)}
    try:
        for name, method in methods.items():
            setattr(owner, name, functools.partial(method, getattr(owner, name)))
        yield
    finally:
        for name in methods:
            vars(owner).pop(name, None)
        vars(owner).update(kept)


def no_log(*_: Any, **__: Any) -> None:
    """Replace a trainer's `log`, which must be called once a step."""


def is_called_by_training_step() -> bool:
    """Return whether `Trainer.training_step` itself, not a subclass's override, called the caller of this function."""
    return sys._getframe(2).f_code in (TRAINING_STEP, inspect.unwrap(Trainer.training_step).__code__)


def probe_same_forward(
    trainer: Any, model: nn.Module, micro_batch: MicroBatch, around: AbstractContextManager[Any], is_low: bool
) -> None:
    """Run a micro-batch again at θ, in its restored state. Raise a RuntimeError if the loss differs."""
    model.train()  # as `Trainer.training_step` does: a loss may have changed the mode
    inputs, items = copied((micro_batch.inputs, micro_batch.num_items_in_batch))
    with around, replaced(trainer, log=no_log), trainer.compute_loss_context_manager(), micro_batch.autocast():
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=items)
    first: Any = micro_batch.forward_loss
    loss, expected, tolerance = loss.detach().double(), first.double(), TOLERANCE_CPU
    if first.device.type != "cpu":
        is_low = is_low or any(p.requires_grad and p.dtype.itemsize <= 2 for p in model.parameters())
        tolerance = TOLERANCE_LOW if is_low else TOLERANCE
    if not torch.allclose(loss, expected, rtol=tolerance, atol=tolerance * 1e-3, equal_nan=True):
        raise RuntimeError(
            f"The loss of a micro-batch was {expected.mean().item()} and is {loss.mean().item()} when it is run again "
            "at the same weights, with the same inputs, random numbers, buffers and attributes, so something else "
            f"changes. {type(trainer).__name__}.compute_loss or the model's forward uses an iterator, a file, a "
            "global, a closure, another library's generator or an object in the inputs. Keep it in an attribute of "
            "the trainer or of your module, change it only `if not trainer.in_second_pass`, or set gnp_alpha=0. See "
            "docs/second_pass.md."
        )


def is_same_pass(micro_batches: Sequence[MicroBatch], losses: Sequence[torch.Tensor]) -> bool:
    """Return whether both passes have the same losses, bit for bit. Read from the device."""
    return all(torch.equal(loss, first.loss) for first, loss in zip(micro_batches, losses, strict=True))


def refuse_same_pass(first_norm: float, second_norm: float) -> None:
    """Raise a RuntimeError if both norms are equal. Call it where the weights moved and the losses did not change."""
    if abs(second_norm - first_norm) <= TOLERANCE_NORM * first_norm:
        raise RuntimeError(
            "The weights were perturbed, but the second pass has the same losses and gradient as the first, bit for "
            "bit: the move never reached the forward. It computes with copies of the weights (a cast that is kept, a "
            "quantised or shadow copy), or gnp_r is rounded away. Compute with the parameters themselves, raise "
            "gnp_r, or set gnp_alpha=0."
        )
