"""The moments that an optimizer keeps, as a direction (MSAM) or as a metric: who has them, and where."""

import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn


# As optimizers call them: Adam's family, and SGD and Muon. AMSGrad divides by the maximum.
FIRST = ("exp_avg", "momentum_buffer")
SECOND = ("max_exp_avg_sq", "exp_avg_sq")
# By class name: they divide by a running estimate of the gradient's size.
ADAPTIVE = "ada|lamb|rmsprop|prodigy|apollo|sophia"
NAMES = {"gnp_direction=momentum": FIRST, "gnp_precondition": SECOND}
SENTENCE = (
    "{argument} takes a moment of the optimizer ({names}), and {optimizer} keeps none that can be used, or a "
    "quantised one: use AdamW{instead}, or leave out {argument}."
)


class SecondMoment(NamedTuple):
    """
    Adam's second moment of one local tensor, whose metric is D = √(v/correction) + ε.

    `moment` is v, of the tensor's shape; `correction` is 1 - β₂ᵗ.
    """

    moment: torch.Tensor
    correction: torch.Tensor | float
    eps: float

    def inverse_metric(self) -> torch.Tensor:
        """D⁻¹; 0 for elements that have not had a gradient yet, and so have no metric: they do not move."""
        metric = (self.moment.float() / self.correction).sqrt_().add_(self.eps)
        return metric.reciprocal_().masked_fill_(self.moment == 0, 0.0)

    def sq_norm(self, gradient: torch.Tensor) -> torch.Tensor:
        """gᵀD⁻¹g of a local gradient g of the same shape."""
        metric = self.inverse_metric()
        return torch.dot(gradient.to(metric.device).float().square().flatten(), metric.flatten())

    def rows(self, start: int, end: int) -> "SecondMoment":
        return self._replace(moment=self.moment[start:end])


def needed(args: Any) -> str | None:
    """The gnp argument that asks for a moment of the optimizer; None if none does."""
    if args.gnp_direction == "momentum":
        return "gnp_direction=momentum"
    return "gnp_precondition" if args.gnp_precondition else None


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that steps, inside accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def is_adaptive(optimizer: Any) -> bool:
    return re.search(ADAPTIVE, type(unwrapped(optimizer)).__name__, re.IGNORECASE) is not None


def refuse_optimizer(argument: str, name: str) -> NoReturn:
    """
    Raises:
        ValueError: that the optimizer called `name` has not what `argument` needs.
    """
    instead = " or SGD with momentum" if NAMES[argument] is FIRST else ""
    names = " or ".join(reversed(NAMES[argument]))
    raise ValueError(SENTENCE.format(argument=argument, names=names, optimizer=name, instead=instead))


def check_optimizer(argument: str, cls: type, kwargs: Mapping[str, Any], name: str) -> None:
    """
    Refuse an optimizer class without the moment that `argument` needs: what it keeps of one small parameter is looked
    at. One that cannot step on that is looked at when it has made a step of the run.

    Raises:
        ValueError: by the optimizer's name.
    """
    parameter = nn.Parameter(torch.zeros(64, 128))
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizer = cls([parameter], **kwargs)
        optimizer.step()
        state = optimizer.state[parameter]
    except Exception:  # it asks for groups of its own, or for an accelerator
        return
    found = moment_of(state, NAMES[argument], parameter.shape)
    if found is None or (NAMES[argument] is SECOND and not has_second(state, optimizer.param_groups[0])):
        refuse_optimizer(argument, name)


def check_optimizer_of(trainer: Any, argument: str) -> None:
    """`check_optimizer` of what a trainer will train with, as far as it is known before it trains."""
    optimizer = unwrapped(trainer.optimizer)
    if isinstance(optimizer, torch.optim.Optimizer):
        cls, group = type(optimizer), optimizer.param_groups[0]
        accepted = inspect.signature(cls).parameters
        kwargs = {name: value for name, value in group.items() if name in accepted and name != "params"}
        check_optimizer(argument, cls, kwargs, cls.__name__)
    elif optimizer is None and not _is_made_by_deepspeed(trainer):
        cls, kwargs = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(
            trainer.args, trainer.model
        )
        name = cls.__name__ if trainer.optimizer_cls_and_kwargs else f"optim={trainer.args.optim.value}"
        check_optimizer(argument, cls, kwargs, name)


def _is_made_by_deepspeed(trainer: Any) -> bool:
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and "optimizer" in plugin.deepspeed_config


def moment_of(state: Mapping[str, Any], names: tuple[str, ...], shape: torch.Size) -> torch.Tensor | None:
    """The first of the named tensors that a parameter's state has; None where none is whole and unquantised."""
    for name in names:
        moment: Any = state.get(name)
        is_plain = type(moment) in (torch.Tensor, nn.Parameter) or hasattr(moment, "device_mesh")
        if is_plain and moment.dtype.is_floating_point and moment.dtype.itemsize > 1 and moment.shape == shape:
            return moment
    return None


def has_second(state: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Whether all is there by which Adam corrects its second moment."""
    return {"betas", "eps"} <= group.keys() and ("step" in state or "step" in group)


def with_step_of_group(
    values: Mapping[str, Any], group: Mapping[str, Any], state: Mapping[nn.Parameter, Mapping[str, Any]]
) -> Mapping[str, Any]:
    """What an optimizer keeps of one parameter: DeepSpeed's FusedAdam counts a group's steps in its last one's."""
    if type(values.get("step")) is not int or values["step"] > 0:
        return values
    steps = (state[parameter]["step"] for parameter in reversed(group["params"]) if "step" in state.get(parameter, {}))
    return {**values, "step": next((step for step in steps if step > 0), 0)}


def second_moment_of(moment: torch.Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> SecondMoment:
    """
    Adam's v̂ of a local tensor.

    Args:
        moment: v of this tensor.
        state, group: The optimizer's, which have the step t, β₂ and ε.
    """
    step = state["step"] if "step" in state else group["step"]
    return SecondMoment(moment, 1 - group["betas"][1] ** step, group["eps"])
