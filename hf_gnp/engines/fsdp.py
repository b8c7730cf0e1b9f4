"""The engine of FSDP2: it drops gathered weights, defers reductions, and knows gradients that are not in `.grad`."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_gnp.perturbation import Perturbation

from .engine import OTHER_BACKWARD
from .native import Gradients, NativeEngine
from .private import require


class Fsdp2Engine(NativeEngine):
    """Run a step of a model that accelerate, or transformers at load time, sharded with `fully_shard`."""

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation, model: nn.Module, optimizer: Any = None):
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        within = {id(child) for module in self._modules for child in module.modules() if child is not module}
        self._roots = [module for module in self._modules if id(module) not in within]
        list(self._fsdp_parameters())  # refuses torch releases with other private names
        super().__init__(accelerator, perturbation, model, optimizer)

    def reshard(self) -> None:
        """Drop gathered weights (reshard_after_backward=False keeps them), which would miss changes of a shard."""
        for module in self._modules:
            module.reshard()

    publish = reshard

    @contextlib.contextmanager
    def reducing(self) -> Iterator[None]:
        for module in self._modules:  # `no_sync` sets it back
            module.set_requires_gradient_sync(True, recurse=False)
        yield

    def no_sync(self) -> AbstractContextManager[None]:
        return super().no_sync() if self.accelerator.is_fsdp2 else self._deferred_reduction()

    @contextlib.contextmanager
    def _deferred_reduction(self) -> Iterator[None]:
        """Do what `no_sync` does, for a model that transformers sharded. HSDP defers only the all-reduce."""
        model: Any = self.model
        replicated = model.config.distributed_config.dp_replicate_size > 1
        defer = model.set_requires_all_reduce if replicated else model.set_requires_gradient_sync
        defer(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    @contextlib.contextmanager
    def probed(self) -> Iterator[None]:
        with super().probed():
            yield
        self._forget_forward()
        self.publish()

    def _forget_forward(self) -> None:
        """Forget the last forward, of which no backward follows. A layer whose forward failed would stay gathered."""
        for module in self._roots:
            if hasattr(module, "reset_iter_state"):  # not in older releases of torch
                module.reset_iter_state()

    def sets_gradients_aside(self) -> bool:
        # Before the window's last backward FSDP2 does not set `.grad`.
        return self.accelerator.sync_gradients and not self.hides_gradient()

    def take_gradient(self) -> Gradients:
        if self.hides_gradient():
            raise NotImplementedError(OTHER_BACKWARD)
        return super().take_gradient()

    def hides_gradient(self) -> bool:
        """Return whether there is a gradient that is not in `.grad`."""
        parameters = list(self._fsdp_parameters())
        waiting = (p.unsharded_accumulated_grad for p in parameters)
        whole = (p._unsharded_param.grad for p in parameters if hasattr(p, "_unsharded_param"))
        return any(gradient is not None for gradient in (*waiting, *whole))

    def discard_gradient(self) -> None:
        super().discard_gradient()
        for parameter in self._fsdp_parameters():  # `reset_iter_state` of torch 2.13 leaves these gradients
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):  # since its first forward
                parameter._unsharded_param.grad = None

    def abandon(self) -> None:
        self._forget_forward()
        super().abandon()

    def _fsdp_parameters(self) -> Iterator[Any]:
        """Yield the private FSDPParam of each parameter."""
        for module in self._modules:
            state: Any = module._get_fsdp_state()
            # Older releases of torch have one group a module.
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for group in filter(None, groups):
                for parameter in group.fsdp_params:
                    require("torch", parameter, "unsharded_accumulated_grad")
                    yield parameter
