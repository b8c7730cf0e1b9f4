"""The optimizer's first moment, along which `gnp_direction="momentum"` moves (MSAM): who keeps one, and where."""

import inspect
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import nn


# As optimizers call it: Adam's family, and SGD and Muon.
NAMES = ("exp_avg", "momentum_buffer")
# By class name: they divide by a running estimate of the gradient's size.
ADAPTIVE = "ada|lamb|rmsprop|prodigy|apollo|sophia"


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer that steps, inside accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def is_adaptive(optimizer: Any) -> bool:
    return re.search(ADAPTIVE, type(unwrapped(optimizer)).__name__, re.IGNORECASE) is not None


def moment_of(state: Mapping[str, Any], shape: torch.Size) -> torch.Tensor | None:
    """Return the first moment in a parameter's optimizer state. None: there is none that is whole and unquantised."""
    for name in NAMES:
        moment: Any = state.get(name)
        is_plain = type(moment) in (torch.Tensor, nn.Parameter) or hasattr(moment, "device_mesh")
        if is_plain and moment.dtype.is_floating_point and moment.dtype.itemsize > 1 and moment.shape == shape:
            return moment
    return None


def refuse_optimizer(name: str) -> NoReturn:
    """
    Raises:
        ValueError: for an optimizer called `name`, which keeps no first moment.
    """
    raise ValueError(
        f"gnp_direction=momentum moves along the optimizer's first moment (momentum_buffer or exp_avg), and {name} "
        "keeps none that can be used, or a quantised one: use AdamW or SGD with momentum, or leave out "
        "gnp_direction=momentum."
    )


def check_optimizer_of(trainer: Any) -> None:
    """Refuse the optimizer that a trainer will train with, as far as it is known before it trains."""
    optimizer = unwrapped(trainer.optimizer)
    if isinstance(optimizer, torch.optim.Optimizer):
        cls, group = type(optimizer), optimizer.param_groups[0]
        accepted = inspect.signature(cls).parameters
        kwargs = {name: value for name, value in group.items() if name in accepted and name != "params"}
        _check_optimizer(cls, kwargs, cls.__name__)
    elif optimizer is None and not _is_made_by_deepspeed(trainer):
        own = trainer.optimizer_cls_and_kwargs
        cls, kwargs = own or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        _check_optimizer(cls, kwargs, cls.__name__ if own else f"optim={trainer.args.optim.value}")


def _check_optimizer(cls: type, kwargs: Mapping[str, Any], name: str) -> None:
    """Look at what an optimizer keeps of one small parameter. One that cannot step on that is checked in the run."""
    parameter = nn.Parameter(torch.zeros(64, 128))
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizer = cls([parameter], **kwargs)
        optimizer.step()
        state = optimizer.state[parameter]
    except Exception:  # it asks for groups of its own, or for an accelerator
        return
    if moment_of(state, parameter.shape) is None:
        refuse_optimizer(name)


def _is_made_by_deepspeed(trainer: Any) -> bool:
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and "optimizer" in plugin.deepspeed_config
