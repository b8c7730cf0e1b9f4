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


def split_by_optimizer(
    parameters: Sequence[nn.Parameter], optimizer: Any
) -> tuple[Sequence[nn.Parameter], list[nn.Parameter]]:
    """
    Return those of the parameters that the optimizer steps, and its others, such as those of a loss.

    The first are all parameters if there is no optimizer, or if it steps copies of some.
    """
    groups = [] if optimizer is None else optimizer.param_groups
    stepped = {id(parameter): parameter for group in groups for parameter in group["params"]}
    inside = set(map(id, parameters))
    outside = [parameter for number, parameter in stepped.items() if number not in inside]
    rest = {parameter.shape for parameter in parameters if parameter.requires_grad and id(parameter) not in stepped}
    if not rest or not rest.isdisjoint(parameter.shape for parameter in outside):
        return parameters, outside
    return [parameter for parameter in parameters if id(parameter) in stepped] or parameters, outside


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
