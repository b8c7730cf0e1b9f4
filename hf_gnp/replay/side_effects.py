"""
The Python state that a forward may change: counters, metrics and generators that a trainer, a loss or a module keeps.

What is looked at are the attributes of the trainer and of its state, of every module that the trainer holds, of the
user's own objects that hang on these, and the modules and generators that the user's loss function names. What a
library keeps inside its own objects (datasets, optimizers, accelerate) is not. What is in a tensor is looked at if it
is small and not part of a graph; buffers, parameters and large attributes are for `buffers.py`.
"""

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from hf_gnp.engines.shards import parameters_beside

from .buffers import Attribute
from .contents import (
    CONTAINERS,
    GENERATORS,
    IMMUTABLE,
    OPAQUE,
    SMALL,
    WITH_CONTENTS,
    is_opaque,
    items,
    keeps_any,
    keeps_small,
    restorers,
)


LIBRARIES = sys.stdlib_module_names | {
    "accelerate",
    "datasets",
    "deepspeed",
    "hf_gnp",
    "numpy",
    "peft",
    "sentence_transformers",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
}
# Of the trainer: what no step changes, what only grows in `log`, which a second pass does not reach, and the methods
# that are replaced on it while a pass runs.
NOT_OF_A_STEP = {
    *("train_dataset", "eval_dataset", "log_history", "callback_handler", "stateful_callbacks"),
    *("compute_loss", "log", "_prepare_inputs"),
}
OF_EVERY_MODULE = set(vars(nn.Module()))


class PythonState:
    """
    The state of all that `find_owners` finds, as it stands when this is made; `put_back` makes it so again.

    Args:
        owners: Objects with a `__dict__`, and generators.
        moved: Where the memory begins (`addresses`) that the engine moves and puts back: of weights and gradients.
            Tensors that share it, such as a kept `weight.data`, are left as they are.
        holds_all: Whether tensors that are large or part of a graph are held too, which attributes are then set to
            again. Of a window's every micro-batch that would be an activation.
    """

    def __init__(self, owners: Iterable[Any], moved: set[int], holds_all: bool = False):
        can_keep = keeps_any if holds_all else keeps_small
        self._attributes: list[tuple[dict[str, Any], set[str], dict[str, Any]]] = []
        self._contents: list[Callable[[], Any]] = []
        for owner in owners:
            if isinstance(owner, GENERATORS):
                self._contents += restorers(owner, moved, can_keep)
            else:
                attributes, kept = vars(owner), {}
                for name, value in attributes.items():
                    if _is_watched(name):
                        if is_opaque(value):
                            kept[name] = value
                        elif can_keep(value):
                            kept[name] = value
                            self._contents += restorers(value, moved, can_keep)
                self._attributes.append((attributes, set(attributes), kept))

    def put_back(self) -> None:
        for attributes, names, kept in self._attributes:
            for name, value in kept.items():
                if name not in attributes or attributes[name] is not value:
                    attributes[name] = value
            for name in [name for name in attributes if name not in names]:
                if _is_watched(name) and _is_plain(attributes[name]):
                    del attributes[name]  # made by the pass whose traces go
        for put_back in self._contents:
            put_back()


def find_owners(trainer: Any) -> list[Any]:
    """The trainer, its state, the modules that it holds, the user's own objects on them, and their generators."""
    found: dict[int, Any] = {}
    # Not `trainer.control`: what a signal handler or a timer asks for while a second pass runs would be lost.
    roots = [trainer, trainer.state, *_held_by_functions(trainer)]
    for root in roots:
        _collect(root, found, depth=4)
    for module in _with_children(owner for owner in found.values() if isinstance(owner, nn.Module)):
        _collect(module, found, depth=2)
    return list(found.values())


def large_attributes(owners: Iterable[Any]) -> Iterator[Attribute]:
    """The tensors in attributes that are too large for `PythonState` to look into, and no part of a graph."""
    for owner in owners:
        attributes = {} if isinstance(owner, GENERATORS) else vars(owner)
        for name, value in attributes.items():
            is_large = type(value) is torch.Tensor and value.numel() > SMALL
            if is_large and value.grad_fn is None and _is_watched(name):
                yield Attribute(attributes, name, value)


def find_modules(trainer: Any) -> list[nn.Module]:
    """The modules whose forward may be part of a step: the model first, then losses, teachers, reference models."""
    modules = [trainer.model]
    for value in (*vars(trainer).values(), *_held_by_functions(trainer)):
        modules += [item for item in items(value) if isinstance(item, nn.Module) and not _is_wrapper(item)]
    return _with_children(modules)


def find_trained(trainer: Any) -> list[nn.Parameter]:
    """The parameters that a step moves or mixes: of the model, and those that the optimizer has beside it."""
    optimizer = None if trainer.is_deepspeed_enabled else trainer.optimizer  # DeepSpeed's groups are flat partitions
    parameters = (*trainer.model.parameters(), *parameters_beside(trainer.model, optimizer))
    return [parameter for parameter in parameters if parameter.requires_grad]


def _with_children(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules and all that is in them, each once; `modules()` would hand each one up through all its parents."""
    found, left = {}, list(modules)[::-1]
    while left:
        module = left.pop()
        if id(module) not in found:
            found[id(module)] = module
            left += [child for child in module._modules.values() if child is not None][::-1]
    return list(found.values())


def _collect(value: Any, found: dict[int, Any], depth: int) -> None:
    """Add `value` if it is an owner or a generator, and what hangs on it."""
    if depth == 0 or type(value) in OPAQUE:
        return
    if issubclass(type(value), CONTAINERS):
        for item in items(value):
            _collect(item, found, depth - 1)
    elif id(value) not in found:
        if issubclass(type(value), GENERATORS):
            found[id(value)] = value
        elif _is_owner(value, is_root=depth == 4):
            found[id(value)] = value
            for name, attribute in list(vars(value).items()):
                if type(attribute) not in OPAQUE and _is_watched(name):
                    _collect(attribute, found, depth - 1)


def _is_owner(value: Any, is_root: bool) -> bool:
    if issubclass(type(value), nn.Module):
        return not _is_wrapper(value)
    if not is_root and _library(type(value)) in LIBRARIES:  # before its own __getattribute__ is asked
        return False
    if inspect.isclass(value) or inspect.ismodule(value) or inspect.isroutine(value):
        return False
    return hasattr(value, "__dict__")


def _is_wrapper(module: nn.Module) -> bool:
    """What an engine puts around a model, with counters of its own."""
    is_parallel = isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel)
    return is_parallel or _library(type(module)) == "deepspeed" or type(module).__name__ == "OptimizedModule"


def _library(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _held_by_functions(trainer: Any) -> Iterator[Any]:
    """
    What the user's functions may draw from or count in: of the loss, of the collator and of the methods of the user's
    trainer and modules, the object itself if it is one, what a `partial` binds, and the generators and modules that a
    function, or another one of the user's that it calls by name, closes over, has as defaults, or names in its script.
    """
    left = [trainer.compute_loss_func, getattr(trainer, "compute_loss", None), trainer.data_collator]
    classes = {type(trainer), *(type(module) for module in _with_children([trainer.model]))}
    methods = (types.FunctionType, staticmethod, classmethod)
    of_user = {base for cls in classes for base in cls.__mro__ if _library(base) not in LIBRARIES}
    left += [function for cls in of_user for function in vars(cls).values() if isinstance(function, methods)]
    seen = set()
    while left:
        function = left.pop()
        while isinstance(function, functools.partial):
            yield from (*function.args, *function.keywords.values())
            function = function.func
        function = inspect.unwrap(getattr(function, "__func__", function)) if callable(function) else None
        if function is None or id(function) in seen:
            continue
        seen.add(id(function))
        if not inspect.isfunction(function):
            yield function
            continue
        cells = (cell.cell_contents for cell in function.__closure__ or () if cell != type(cell)())  # not empty ones
        named = (function.__globals__.get(name) for name in _names(function.__code__))
        for value in (*cells, *(function.__defaults__ or ()), *named):
            if isinstance(value, (*GENERATORS, nn.Module)):
                yield value
            elif inspect.isfunction(value) and (value.__module__ or "").partition(".")[0] not in LIBRARIES:
                left.append(value)


@functools.cache
def _names(code: types.CodeType) -> tuple[str, ...]:
    """What a function names, and those within it."""
    within = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return (*code.co_names, *(name for names in within for name in names))


@functools.cache  # of the few names that attributes have; asked for each attribute of each module
def _is_watched(name: str) -> bool:
    # DeepSpeed and FSDP keep their own books on modules.
    is_engine = name.startswith(("ds_", "_ds_", "_fsdp", "_gnp", "__"))
    return not is_engine and name not in NOT_OF_A_STEP and name not in OF_EVERY_MODULE


def _is_plain(value: Any) -> bool:
    """Whether a forward that finds an attribute absent makes it anew: not modules, not objects."""
    return isinstance(value, (*IMMUTABLE, *WITH_CONTENTS))
