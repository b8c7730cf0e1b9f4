"""
The private names of torch and accelerate that hf_gnp uses. Those that are assigned are checked when an engine is made:
an assignment to a name that a release has dropped would be silent. DeepSpeed's are in deepspeed/private.py.
"""

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.utils import parametrize

from hf_gnp.momentum import unwrapped


# The releases that the tests ran with.
TESTED = {"torch": "2.13.0", "accelerate": "1.15.0", "deepspeed": "0.19.8"}

# Of torch's DistributedDataParallel: the hooks that gradients go through, and the switch that `no_sync` turns.
DDP = ("_comm_hooks", "require_backward_grad_sync")


# Of torch's fused optimizers: they ask for a flag by which a loss scaler tells them, on the device, not to step.
SKIPS, SKIP_FLAG = "_step_supports_amp_scaling", "found_inf"


def require(package: str, owner: Any, names: Iterable[str], what: str) -> None:
    """
    Raise where `owner` lacks one of `names`.

    Args:
        what: The owner in words, for the message.

    Raises:
        RuntimeError: for the first name that is missing, with the installed and the tested release.
    """
    for name in names:
        if not hasattr(owner, name):
            raise RuntimeError(missing(package, f"{what}.{name}"))


def look_up(package: str, module: str, name: str) -> Any:
    """
    `name` of a module of `package`.

    Raises:
        RuntimeError: where either is missing, with the installed and the tested release.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(missing(package, f"{module}.{name}")) from error


def missing(package: str, name: str) -> str:
    """The sentence for a private name that the installed release does not have."""
    return (
        f"The gradient-norm penalty uses {name}, which {package} {version(package)}, the installed release, does not "
        f"have: it was tested with {package} {TESTED[package]}. Install that one, or train with gnp_alpha=0."
    )


def check_private_names(accelerator: Accelerator) -> None:
    """Raise a RuntimeError where accelerate lacks the private name that every engine calls."""
    # Trainer itself calls it before each micro-batch: accelerate has no public setter.
    require("accelerate", accelerator.gradient_state, ["_set_sync_gradients"], "GradientState")


def forget_casts() -> None:
    """Forget what autocast and `torch.nn.utils.parametrize.cached` keep of weights, as these have changed."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()


def has_unreduced_gradient(fsdp_modules: Iterable[Any]) -> bool:
    """Whether a gradient waits in FSDP2 for the backward that reduces it: no `grad` shows it."""
    parameters = list(_fsdp_parameters(fsdp_modules))
    waiting = (p.unsharded_accumulated_grad for p in parameters)
    whole = (p._unsharded_param.grad for p in parameters if hasattr(p, "_unsharded_param"))
    return any(gradient is not None for gradient in (*waiting, *whole))


def drop_unreduced_gradients(fsdp_modules: Iterable[Any]) -> None:
    """Drop the gradients that wait in FSDP2, which `reset_iter_state` of torch 2.13 promises and leaves."""
    for parameter in _fsdp_parameters(fsdp_modules):
        parameter.unsharded_accumulated_grad = None
        if hasattr(parameter, "_unsharded_param"):  # since its first forward
            parameter._unsharded_param.grad = None


def _fsdp_parameters(modules: Iterable[Any]) -> Iterator[Any]:
    """What FSDP2 knows of each parameter that it has sharded."""
    for module in modules:
        require("torch", module, ["_get_fsdp_state"], "FSDPModule")
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # older releases of torch: one a module
            require("torch", state, ["_fsdp_param_group"], "FSDPState")
            groups = [state._fsdp_param_group]
        for group in filter(None, groups):
            require("torch", group, ["fsdp_params"], "FSDPParamGroup")
            for parameter in group.fsdp_params:
                require("torch", parameter, ["unsharded_accumulated_grad"], "FSDPParam")
                yield parameter


def optimizer_that_skips(optimizer: Any, device: torch.device) -> torch.optim.Optimizer | None:
    """
    The optimizer inside accelerate's wrapper if it can skip a step by a flag on the device, without the host knowing;
    else None. Of torch's fused ones it is Adam and AdamW, whose state is as before then (SGD's first momentum would be
    left unwritten). For weights on a CPU they would not wait for a flag that comes from a GPU.
    """
    inner = unwrapped(optimizer)
    if type(inner) not in (torch.optim.Adam, torch.optim.AdamW) or not getattr(inner, SKIPS, False):
        return None
    groups = inner.param_groups
    is_near = all(parameter.device.type == device.type for group in groups for parameter in group["params"])
    return inner if is_near and all(group.get("fused") for group in groups) else None


@contextlib.contextmanager
def next_step_skipped(optimizer: torch.optim.Optimizer, flag: torch.Tensor) -> Iterator[None]:
    """Inside, the next step of an optimizer that skips will be none where the flag, on its device, is set."""

    def forget(*_: Any) -> None:
        vars(optimizer).pop(SKIP_FLAG, None)

    handle = optimizer.register_step_post_hook(forget)
    setattr(optimizer, SKIP_FLAG, flag.float())
    try:
        yield
    finally:
        handle.remove()  # not in the hook: others of the optimizer's may come after it
        forget()


@contextlib.contextmanager
def sync_gradients_set(accelerator: Accelerator, is_last: bool) -> Iterator[None]:
    """Inside, accelerate takes the next backward for the last of a window, or for one of those before."""
    before = accelerator.sync_gradients
    accelerator.gradient_state._set_sync_gradients(is_last)
    try:
        yield
    finally:
        accelerator.gradient_state._set_sync_gradients(before)
