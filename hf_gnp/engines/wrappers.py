"""The wrappers of DDP, FSDP2 and torch.compile around a model, and when they reduce gradients."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from accelerate.utils import is_compiled_module
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from .support import POWER_SGD


def without_compile(model: nn.Module) -> nn.Module:
    """Return the module that accelerate compiled: the DDP wrapper, where there is one."""
    return model.get_submodule("_orig_mod") if is_compiled_module(model) else model


def has_communication_hook(model: nn.Module) -> bool:
    """Return whether a communication hook of DDP changes gradients, and refuse PowerSGD."""
    model = without_compile(model)
    if not isinstance(model, DistributedDataParallel):
        return False
    hooks = model._comm_hooks  # torch has no public name for it
    if any(isinstance(state, PowerSGDState) for _, state in hooks):
        raise NotImplementedError(f"The gradient-norm penalty does not run with {POWER_SGD}, or set gnp_alpha=0.")
    return bool(hooks)


@contextlib.contextmanager
def reducing(model: nn.Module, fsdp_modules: Iterable[FSDPModule]) -> Iterator[None]:
    """Reduce gradients, even within `no_sync`, which `Trainer` enters for all but the last micro-batch."""
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
    """Do what `no_sync` does, for a model that transformers sharded at load time. HSDP defers only the all-reduce."""
    replicated = model.config.distributed_config.dp_replicate_size > 1
    defer = model.set_requires_all_reduce if replicated else model.set_requires_gradient_sync
    defer(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
