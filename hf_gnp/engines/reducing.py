"""DDP's communication hooks, and the mean over ranks of gradients that no backward has reduced."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import is_compiled_module
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel

from hf_gnp import penalty
from hf_gnp.tensors import gradient_of

from .support import POWER_SGD


BUCKET = 25 * 2**20  # bytes, as DDP's


def ddp_of(model: nn.Module) -> DistributedDataParallel | None:
    """Return the DDP wrapper of a prepared model, or None."""
    inner: Any = model.get_submodule("_orig_mod") if is_compiled_module(model) else model
    return inner if isinstance(inner, DistributedDataParallel) else None


def has_communication_hook(ddp: DistributedDataParallel) -> bool:
    """Return whether a communication hook changes gradients, and refuse PowerSGD."""
    hooks = ddp._comm_hooks  # torch has no public name for it
    if any(isinstance(state, PowerSGDState) for _, state in hooks):
        raise NotImplementedError(f"The gradient-norm penalty does not run with {POWER_SGD}, or set gnp_alpha=0.")
    return bool(hooks)


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], some_unused: bool) -> None:
    """
    Replace each parameter's whole gradient by its mean over ranks. A collective. A missing gradient counts as 0.

    Args:
        some_unused: Whether to leave parameters without gradient if no rank's loss has reached them.
    """
    if some_unused and parameters:
        flags = [p.grad is not None for p in parameters]
        used = torch.tensor(flags, device=parameters[0].device).float()
        dist.all_reduce(used)
        parameters = [p for p, count in zip(parameters, used.tolist(), strict=True) if count > 0]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for gradients in _buckets([gradient_of(p) for p in parameters]):
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([gradient.numel() for gradient in gradients])
        penalty.copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield lists of tensors of one dtype, each list of at most `BUCKET` bytes or one tensor."""
    for dtype in {tensor.dtype: None for tensor in tensors}:
        of_dtype = [tensor for tensor in tensors if tensor.dtype == dtype]
        yield from penalty.in_groups(of_dtype, lambda tensor: tensor.nbytes, BUCKET)
