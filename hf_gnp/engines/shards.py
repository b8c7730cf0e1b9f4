"""The shard: this rank's part of one parameter, on every engine, and of a DTensor."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


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


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of the whole parameter. Under ZeRO-3 the parameter itself is empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def place_of(parameter: nn.Parameter) -> tuple[tuple[int, ...], int]:
    """Return this rank's coordinates in the mesh dimensions that shard it, and the number of ranks with its shard."""
    if not isinstance(parameter, DTensor):
        return (), dist.get_world_size()
    mesh, is_sharded = parameter.device_mesh, [not placement.is_replicate() for placement in parameter.placements]
    place = zip(mesh.get_coordinate() or (), is_sharded, strict=True)
    parts = math.prod(size for size, is_split in zip(mesh.shape, is_sharded, strict=True) if is_split)
    return tuple(i for i, is_split in place if is_split), dist.get_world_size() // parts


def part_of(parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a whole tensor of the parameter's shape, without communication."""
    if not isinstance(parameter, DTensor):
        return whole
    # Without a source rank each rank takes its part of its own tensor.
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def as_sharded(tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """Return a gradient or moment with the sharding of its parameter."""
    # With tensor parallelism only, an embedding's gradient is whole on each rank. Sharding it communicates nothing.
    if isinstance(tensor, DTensor) and isinstance(parameter, DTensor) and tensor.placements != parameter.placements:
        return tensor.redistribute(parameter.device_mesh, parameter.placements)
    return tensor
