"""What an engine says of the weights that a rank holds, and of what belongs to them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_gnp.rounding import Place


class Shard(NamedTuple):
    """
    This rank's part of one parameter (padding, if any, has a zero gradient): tensors of one shape. They may lie on
    different devices (offload) and have different dtypes; `master` is `weight` where there is no master. `place` is
    where they lie in the whole parameter. `copies` ranks hold the same part.
    """

    parameter: nn.Parameter
    weight: torch.Tensor
    gradient: torch.Tensor
    master: torch.Tensor
    place: Place
    copies: int = 1


class HeldShard(NamedTuple):
    """
    This rank's part of one trainable parameter, with or without a gradient, while weights may be moved: `weight` is
    what the forward sees, and `theta`, of the same shape, is θ and stays put. `copies` ranks hold the same part.
    """

    parameter: nn.Parameter
    weight: torch.Tensor
    theta: torch.Tensor
    place: Place
    copies: int = 1


class OptimizerState(NamedTuple):
    """
    What the optimizer keeps of one parameter, or of the flat partition that it lies in.

    `values` and `group` are the optimizer's own; `shape` is that of a moment among the values, and `part` takes of
    such a moment what belongs to the shard.
    """

    values: Mapping[str, Any]
    group: Mapping[str, Any]
    shape: torch.Size
    part: Callable[[torch.Tensor], torch.Tensor]


class GradientNorms(NamedTuple):
    """
    `gradient`: ‖g₁‖. `direction`: the norm by which the move is normalised: ‖g₁‖ again, or that of the gradient of the
    chosen parameters, or ‖θ ⊙ g₁‖, or √(g₁ᵀD⁻¹g₁), or that of the momentum. Global, the same on all ranks, and without
    the loss scale.
    """

    gradient: float
    direction: float


def number_parameters(model: nn.Module) -> dict[int, int]:
    """The place of each parameter in the model's order, by id: what ranks and engines agree on without a word."""
    return {id(parameter): number for number, parameter in enumerate(model.parameters())}


def parameters_beside(model: nn.Module, optimizer: Any) -> list[nn.Parameter]:
    """Those that the optimizer has and the model has not, such as a loss's."""
    in_model = {id(parameter) for parameter in model.parameters()}
    groups = [] if optimizer is None else optimizer.param_groups
    return [parameter for group in groups for parameter in group["params"] if id(parameter) not in in_model]
