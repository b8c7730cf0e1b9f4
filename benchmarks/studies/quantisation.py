"""What is lost when trained weights are rounded to few bits, without any retraining."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


BITS = (8, 4, 3, 2)
LAYERS = (nn.Linear, nn.Conv2d)


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest of 2^bits - 1 symmetric levels, spread to the largest weight of each output channel."""
    levels = 2 ** (bits - 1) - 1
    rows = weight.flatten(1)
    scale = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / levels
    return ((rows / scale).round() * scale).view_as(weight)


@contextmanager
def rounded_weights(model: nn.Module, bits: int) -> Iterator[None]:
    """All linear and convolutional weights, the classifier's too, for the time of the context."""
    weights = [module.weight for module in model.modules() if isinstance(module, LAYERS)]
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.copy_(rounded(weight, bits))
        try:
            yield
        finally:
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)


def quantisation(model: nn.Module, accuracy: float, test_accuracy: Callable[[], float]) -> dict[str, float]:
    """The accuracy that is lost at each number of bits."""
    lost = {}
    for bits in BITS:
        with rounded_weights(model, bits):
            lost[f"lost_{bits}_bits"] = accuracy - test_accuracy()
    return lost
