"""The modules that FSDP2 shards: what they keep gathered, and the gradients that they keep to themselves."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from .private import require


class ShardedModules:
    """The modules of a model that FSDP2 shards, in `modules`. Without any, no method does anything."""

    def __init__(self, modules: Iterable[nn.Module]):
        self.modules = [module for module in modules if isinstance(module, FSDPModule)]
        within = {id(child) for module in self.modules for child in module.modules() if child is not module}
        self._roots = [module for module in self.modules if id(module) not in within]
        self.has_gradient()  # refuses a release of torch with other names

    def __bool__(self) -> bool:
        return bool(self.modules)

    def reshard(self) -> None:
        """Drop gathered weights, which would not notice a changed shard (reshard_after_backward=False keeps them)."""
        for module in self.modules:
            module.reshard()

    def forget_forward(self) -> None:
        """Wait for no backward of the last forward. A layer whose forward failed would stay gathered."""
        for module in self._roots:
            if hasattr(module, "reset_iter_state"):  # older releases of torch have none
                module.reset_iter_state()

    def has_gradient(self) -> bool:
        """Return whether FSDP2 has a gradient that no backward has reduced yet. No `grad` shows it."""
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
        """Yield FSDP2's own record of each parameter. Its names are private."""
        for module in self.modules:
            state: Any = module._get_fsdp_state()
            # Older releases of torch have one group a module.
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for group in filter(None, groups):
                for parameter in group.fsdp_params:
                    require("torch", parameter, "unsharded_accumulated_grad")
                    yield parameter
