"""The shard: this rank's part of one parameter, on every engine."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn


class Shard(NamedTuple):
    """
    Hold this rank's part of one parameter, without padding.

    Its tensors have one shape, and may differ in device and dtype.

    Args:
        number: The index of the parameter in the model, equal on all ranks.
        weight: The tensor that the forward uses or gathers.
        master: θ: the fp32 master of `weight` where there is one, the copy of `keep_weights`, or `weight` itself.
        gradient: None where the loss did not reach the parameter.
        coordinates: The place of the part, equal on ranks with the same part.
        part_of: Returns the same part of any whole tensor of the parameter's shape.
        copies: The number of ranks with the same part, among those of `sum_over_ranks`.
    """

    parameter: nn.Parameter
    number: int
    weight: torch.Tensor
    master: torch.Tensor
    gradient: Any  # torch.Tensor | None
    coordinates: tuple[int, ...] = ()
    part_of: Callable[[torch.Tensor], torch.Tensor] = lambda whole: whole
    copies: int = 1

    def kept(self, theta: torch.Tensor) -> "Shard":
        """Return this shard with θ as its master, without gradient. `_replace` takes twice as long."""
        return Shard(
            self.parameter, self.number, self.weight, theta, None, self.coordinates, self.part_of, self.copies
        )

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Return the shape of the whole parameter. Under ZeRO-3 the parameter itself is empty."""
        return tuple(getattr(self.parameter, "ds_shape", self.parameter.shape))


def run_of(whole: torch.Tensor, start: int, size: int) -> torch.Tensor:
    """Return `size` elements of a flattened tensor, from `start` on. Under ZeRO a rank has such a part."""
    return whole.reshape(-1).narrow(0, start, size)
