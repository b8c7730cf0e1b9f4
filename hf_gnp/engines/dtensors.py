"""This rank's part of a DTensor, its place, and the number of ranks that hold it."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def count_copies(parameter: nn.Parameter) -> int:
    """Return the number of ranks that hold the same shard of the parameter."""
    copies = dist.get_world_size()
    if isinstance(parameter, DTensor):
        for placement, size in zip(parameter.placements, parameter.device_mesh.shape, strict=True):
            if not placement.is_replicate():
                copies //= size
    return copies


def coordinates_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return this rank's coordinates in the mesh dimensions over which the parameter is sharded."""
    if not isinstance(parameter, DTensor):
        return ()
    place = parameter.device_mesh.get_coordinate() or ()
    return tuple(i for i, placement in zip(place, parameter.placements, strict=True) if not placement.is_replicate())


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
