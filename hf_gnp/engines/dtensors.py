"""Parameters and gradients that may be DTensors: this rank's part of one, and where it lies in the whole."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from hf_gnp.rounding import Place


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    """The gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad


@contextlib.contextmanager
def gradients_hidden(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters have no gradient, and one that is made there is dropped; on leaving, they have their own."""
    hidden = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in hidden:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in hidden:
            parameter.grad = gradient


def local_gradient(parameter: nn.Parameter) -> torch.Tensor:
    return local_part(gradient_of(parameter))


def count_copies(parameter: nn.Parameter) -> int:
    """The number of ranks that hold each element of the parameter: all, divided by what it is sharded over."""
    copies = dist.get_world_size()
    if isinstance(parameter, DTensor):
        for placement, size in zip(parameter.placements, parameter.device_mesh.shape, strict=True):
            if not placement.is_replicate():
                copies //= size
    return copies


def as_sharded(parameter: nn.Parameter, moment: torch.Tensor) -> torch.Tensor:
    """This rank's part of a moment: it may be sharded as its gradient was, and not as its parameter."""
    if isinstance(moment, DTensor) and isinstance(parameter, DTensor) and moment.placements != parameter.placements:
        moment = moment.redistribute(parameter.device_mesh, parameter.placements)
    return local_part(moment)


def shard_gradient_as_weight(parameter: nn.Parameter) -> None:
    """
    Autograd leaves a DTensor's gradient as the backward made it: under tensor parallelism alone that of an embedding
    is whole on each rank, and the weight is sharded. From whole to sharded nothing is communicated.
    """
    gradient = parameter.grad
    if (
        isinstance(gradient, DTensor)
        and isinstance(parameter, DTensor)
        and gradient.placements != parameter.placements
    ):
        parameter.grad = gradient.redistribute(parameter.device_mesh, parameter.placements)


def local_axes(parameter: DTensor) -> tuple[torch.Tensor, ...]:
    """The axes of `Place` for this rank's part: those of the whole, each sharded as the parameter's dimension is."""
    mesh, ndim, axes = parameter.device_mesh, parameter.ndim, []
    # Any: of torch's placements, only those that shard have a `dim`.
    placements: Sequence[Any] = parameter.placements
    sharded = [None if p.is_replicate() else p.dim % ndim for p in placements]
    for dim, axis in enumerate(Place.whole(0, parameter.shape).axes):
        along = [p if d == dim else Replicate() for p, d in zip(placements, sharded, strict=True)]
        assert isinstance(axis, range)  # as those of a whole parameter are
        indices = torch.arange(axis.start, axis.stop, axis.step).view([-1 if d == dim else 1 for d in range(ndim)])
        # Without a source rank each rank takes its own part, and nothing is communicated.
        axes.append(distribute_tensor(indices, mesh, along, src_data_rank=None).to_local())
    return tuple(axes)
