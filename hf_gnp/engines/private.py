"""Private names of torch. `require` checks those that are assigned, as assigning a missing name is silent."""

import contextlib
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch.nn.utils import parametrize

from hf_gnp.momentum import unwrapped


# The releases of the tests.
TESTED = {"torch": "2.13.0", "deepspeed": "0.19.8"}


def require(package: str, owner: Any, name: str) -> None:
    """Raise a RuntimeError if `owner` has no attribute `name` in the installed release of `package`."""
    if not hasattr(owner, name):
        raise RuntimeError(
            f"The gradient-norm penalty uses {type(owner).__name__}.{name}, which {package} {version(package)}, the "
            f"installed release, does not have: it was tested with {package} {TESTED[package]}. Install that one, or "
            "train with gnp_alpha=0."
        )


def forget_casts() -> None:
    """Clear the caches of autocast and of `torch.nn.utils.parametrize.cached` after a change of weights."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()


def optimizer_that_skips(optimizer: Any, device: torch.device) -> torch.optim.Optimizer | None:
    """Return the optimizer inside accelerate's wrapper, or None if no flag on `device` can make it skip a step."""
    inner = unwrapped(optimizer)
    # In a skipped first step fused SGD leaves its momentum uninitialised.
    if type(inner) not in (torch.optim.Adam, torch.optim.AdamW):
        return None
    groups = inner.param_groups
    if not all(group["fused"] for group in groups):
        return None
    # A CPU does not wait for a flag on a GPU.
    is_near = all(p.is_cpu == (device.type == "cpu") for group in groups for p in group["params"])
    return inner if is_near else None


@contextlib.contextmanager
def next_step_skipped(optimizer: torch.optim.Optimizer, flag: torch.Tensor) -> Iterator[None]:
    """Make the next step of a fused optimizer do nothing if `flag` is true, as a loss scaler does."""

    def forget(*_: Any) -> None:
        vars(optimizer).pop("found_inf", None)

    handle = optimizer.register_step_post_hook(forget)
    optimizer.found_inf = flag.float()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        handle.remove()  # not within the hook, while the optimizer iterates over its hooks
        forget()
