"""What DDP, FSDP2 and torch.compile put around a model: what is inside, and when gradients are reduced."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from accelerate.utils import is_compiled_module
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from .private import DDP, require
from .support import POWER_SGD


def without_compile(model: nn.Module) -> nn.Module:
    """What accelerate compiled, which it does last: DDP itself where there is one."""
    return model.get_submodule("_orig_mod") if is_compiled_module(model) else model


def has_communication_hook(model: nn.Module) -> bool:
    """
    Raises:
        NotImplementedError: for one that carries something from one gradient to the next.
    """
    model = without_compile(model)
    if not isinstance(model, DistributedDataParallel):
        return False
    # DDP has no public way to ask.
    require("torch", model, DDP, "DistributedDataParallel")
    if any(isinstance(state, PowerSGDState) for _, state in model._comm_hooks):
        raise NotImplementedError(f"The gradient-norm penalty does not run with {POWER_SGD}, or set gnp_alpha=0.")
    return bool(model._comm_hooks)


@contextlib.contextmanager
def reducing(model: nn.Module, fsdp_modules: Iterable[FSDPModule]) -> Iterator[None]:
    """
    Gradients are reduced, also within the `no_sync` that `Trainer` puts around all but the last micro-batch.

    Args:
        fsdp_modules: Those of the model, also within what torch.compile and PEFT put around them.
    """
    for module in fsdp_modules:
        module.set_requires_gradient_sync(True, recurse=False)
    ddp = without_compile(model)
    if not isinstance(ddp, DistributedDataParallel):
        yield
        return
    before = ddp.require_backward_grad_sync
    ddp.require_backward_grad_sync = True
    try:
        yield
    finally:
        ddp.require_backward_grad_sync = before


@contextlib.contextmanager
def defer_reduction(model: Any) -> Iterator[None]:
    """`no_sync` for a model that transformers sharded at load time; HSDP defers only the sum over replicas."""
    replicated = model.config.distributed_config.dp_replicate_size > 1
    defer = model.set_requires_all_reduce if replicated else model.set_requires_gradient_sync
    defer(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
