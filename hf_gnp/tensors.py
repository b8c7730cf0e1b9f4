"""Functions on tensors, parameters and modules that both the second pass and the engines use."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor  # noqa: TID251, a type and no collective


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, or any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def modules_of(*roots: nn.Module) -> list[nn.Module]:
    """Return the modules and all their descendants, each once, in the order of `nn.Module.modules`."""
    found: dict[nn.Module, None] = {}
    left: list[Any] = list(roots)[::-1]
    while left:
        module = left.pop()
        if module is not None and module not in found:
            found[module] = None
            if module._modules:
                left.extend(reversed(module._modules.values()))
    return list(found)


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters of the modules, each once. Those of their children are not included."""
    return list({id(p): p for module in modules for p in module._parameters.values() if p is not None}.values())


def parameters_outside(parameters: Iterable[nn.Parameter], optimizer: Any) -> list[nn.Parameter]:
    """Return the optimizer's parameters that are not in `parameters`, such as those of a loss."""
    inside = set(map(id, parameters))
    groups = [] if optimizer is None else optimizer.param_groups
    return [parameter for group in groups for parameter in group["params"] if id(parameter) not in inside]


def moving_parameters(parameters: Sequence[nn.Parameter], optimizer: Any) -> Sequence[nn.Parameter]:
    """Return those of the parameters that the optimizer steps. All, if there is none, or if it steps copies."""
    outside = {parameter.shape for parameter in parameters_outside(parameters, optimizer)}
    groups = [] if optimizer is None else optimizer.param_groups
    stepped = {id(parameter) for group in groups for parameter in group["params"]}
    others = [parameter for parameter in parameters if parameter.requires_grad and id(parameter) not in stepped]
    if not others or any(parameter.shape in outside for parameter in others):
        return parameters
    return [parameter for parameter in parameters if id(parameter) in stepped] or parameters


def gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    """Return the gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad


@contextlib.contextmanager
def gradients_hidden(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Hide the gradients of parameters. On leaving, restore them and drop those that were made inside."""
    parameters = list(parameters)
    hidden = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, hidden, strict=True):
            parameter.grad = gradient
