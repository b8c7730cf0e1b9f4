"""The optimizer's first moment, along which `gnp_direction="momentum"` moves (MSAM)."""

import inspect
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import nn


# The names of the first moment in the state of Adam's family, and of SGD and Muon.
NAMES = ("exp_avg", "momentum_buffer")
# Parts of the class names of adaptive optimizers.
ADAPTIVE = "ada|adem|lamb|rmsprop|prodigy|apollo|sophia|came|soap|shampoo|novograd|ranger"


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def is_adaptive(optimizer: Any) -> bool:
    """Return whether the optimizer divides by an estimate of the gradient's size."""
    return re.search(ADAPTIVE, type(unwrapped(optimizer)).__name__, re.IGNORECASE) is not None


def moment_of(state: Mapping[str, Any], shape: torch.Size) -> torch.Tensor | None:
    """Return the first moment in a parameter's optimizer state. None if it is missing, quantised or factored."""
    for name in NAMES:
        moment: Any = state.get(name)
        is_plain = type(moment) in (torch.Tensor, nn.Parameter) or hasattr(moment, "device_mesh")
        if is_plain and moment.dtype.is_floating_point and moment.dtype.itemsize > 1 and moment.shape == shape:
            return moment
    return None


def refuse_optimizer(name: str) -> NoReturn:
    """Raise a ValueError for an optimizer without a usable first moment."""
    raise ValueError(
        f"gnp_direction=momentum moves along the optimizer's first moment (momentum_buffer or exp_avg), and {name} "
        "keeps none that can be used, or a quantised one: use AdamW or SGD with momentum, or leave out "
        "gnp_direction=momentum."
    )


def check_optimizer_of(trainer: Any) -> None:
    """Refuse a trainer's optimizer without a first moment. One that DeepSpeed makes is checked at a step."""
    present, plugin = unwrapped(trainer.optimizer), trainer.accelerator.state.deepspeed_plugin
    if isinstance(present, torch.optim.Optimizer):
        cls, accepted = type(present), inspect.signature(type(present)).parameters.keys() - {"params"}
        kwargs = {name: value for name, value in present.param_groups[0].items() if name in accepted}
        name = cls.__name__
    elif present is None and (plugin is None or "optimizer" not in plugin.deepspeed_config):
        own = trainer.optimizer_cls_and_kwargs
        cls, kwargs = own or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        name = cls.__name__ if own else f"optim={trainer.args.optim.value}"
    else:
        return
    # Step once on a small parameter, and look for the moment in its state.
    parameter = nn.Parameter(torch.zeros(64, 128))
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizer = cls([parameter], **kwargs)
        optimizer.step()
        state = optimizer.state[parameter]
    except Exception:  # it needs its own groups or an accelerator, and is checked later, at a step
        return
    if moment_of(state, parameter.shape) is None:
        refuse_optimizer(name)
