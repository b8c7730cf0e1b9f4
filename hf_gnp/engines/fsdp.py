"""The modules that FSDP2 shards, with their gathered weights and their gradients that are not in `.grad`."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from .private import require


class ShardedModules:
    """Control the FSDP2 modules of a model. Without FSDP2 the methods do nothing."""

    def __init__(self, modules: Iterable[nn.Module]):
        self.modules = [module for module in modules if isinstance(module, FSDPModule)]
        within = {id(child) for module in self.modules for child in module.modules() if child is not module}
        self._roots = [module for module in self.modules if id(module) not in within]
        self.has_gradient()  # refuses torch releases with other private names

    def __bool__(self) -> bool:
        return bool(self.modules)

    def reshard(self) -> None:
        """Drop gathered weights (reshard_after_backward=False keeps them), which would miss changes of a shard."""
        for module in self.modules:
            module.reshard()

    def forget_forward(self) -> None:
        """Forget the last forward, of which no backward follows. A layer whose forward failed would stay gathered."""
        for module in self._roots:
            if hasattr(module, "reset_iter_state"):  # not in older releases of torch
                module.reset_iter_state()

    def has_gradient(self) -> bool:
        """Return whether FSDP2 has a gradient that no backward has reduced yet. It is not in `.grad`."""
        parameters = list(self._parameters())
        waiting = (p.unsharded_accumulated_grad for p in parameters)
        whole = (p._unsharded_param.grad for p in parameters if hasattr(p, "_unsharded_param"))
        return any(gradient is not None for gradient in (*waiting, *whole))

    def drop_gradients(self) -> None:
        """Drop the gradients that FSDP2 has not reduced. `reset_iter_state` of torch 2.13 leaves them."""
        for parameter in self._parameters():
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):  # since its first forward
                parameter._unsharded_param.grad = None

    def _parameters(self) -> Iterator[Any]:
        """Yield the private FSDPParam of each parameter."""
        for module in self.modules:
            state: Any = module._get_fsdp_state()
            # Older releases of torch have one group a module.
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for group in filter(None, groups):
                for parameter in group.fsdp_params:
                    require("torch", parameter, "unsharded_accumulated_grad")
                    yield parameter
