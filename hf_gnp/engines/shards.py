"""This rank's part of one parameter, as every engine shows it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn


class Shard(NamedTuple):
    """
    This rank's part of one parameter, without padding: tensors of one shape, on any devices and of any dtypes.

    Args:
        number: The place of the parameter in the model, the same on all ranks.
        weight: What the forward sees, or is gathered from.
        master: θ: the fp32 master of `weight` where there is one, the copy of `keep_weights`, or `weight` itself.
        gradient: None where the loss did not reach the parameter.
        coordinates: Which part it is. Ranks that hold the same part have the same.
        part_of: Returns the same part of any whole tensor of the parameter's shape.
        copies: How many ranks hold the same part, of those that `sum_over_ranks` sums over.
    """

    parameter: nn.Parameter
    number: int
    weight: torch.Tensor
    master: torch.Tensor
    gradient: Any  # a tensor, or None
    coordinates: tuple[int, ...] = ()
    part_of: Callable[[torch.Tensor], torch.Tensor] = lambda whole: whole
    copies: int = 1

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the whole parameter, where ZeRO-3 leaves an empty one."""
        return tuple(getattr(self.parameter, "ds_shape", self.parameter.shape))


def run_of(whole: torch.Tensor, start: int, size: int) -> torch.Tensor:
    """Return `size` elements of a flattened tensor: the part that a rank has under ZeRO."""
    return whole.reshape(-1).narrow(0, start, size)


def parameters_outside(parameters: list[nn.Parameter], optimizer: Any) -> list[nn.Parameter]:
    """Return the parameters of the optimizer that are none of `parameters`, such as a loss's own."""
    inside = {id(parameter) for parameter in parameters}
    groups = [] if optimizer is None else optimizer.param_groups
    return [parameter for group in groups for parameter in group["params"] if id(parameter) not in inside]
