"""Whose state a forward may move: the trainer, its modules, the user's objects, and what the user's functions name."""

import functools
import inspect
import itertools
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_gnp.engines.shards import parameters_beside

from .contents import CONTAINERS, GENERATORS, MANY, OPAQUE, items, large_tensors


LIBRARIES = sys.stdlib_module_names | {
    "accelerate",
    "bitsandbytes",
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
# Of a library's objects those that a loss may have for an adversary of its own.
STEPPED = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
OF_EVERY_MODULE = set(vars(nn.Module()))
# The books that DeepSpeed and FSDP keep on modules.
OF_ENGINES = ("ds_", "_ds_", "_fsdp", "_external_params", "_original_parameters", "_in_forward")


def find_owners(trainer: Any) -> list[Any]:
    """
    Objects with a `__dict__`: the trainer, its state and arguments, the modules that it holds with the model's config,
    and the user's own objects on them. Generators, and what the user's functions are bound to.
    """
    found: dict[int, Any] = {}
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler  # what only the step itself moves
    own = (optimizer, getattr(optimizer, "optimizer", None), scheduler, getattr(scheduler, "scheduler", None))
    found.update((id(value), None) for value in own)
    # Not `trainer.control`: what a signal handler or a timer asks for while a second pass runs would be lost.
    roots = [trainer, trainer.state, trainer.args, getattr(trainer.model, "config", None)]
    for root in (*roots, *_held_by_functions(trainer)):
        _collect(root, found, depth=4)
    return [owner for owner in found.values() if owner is not None]


def find_modules(owners: Iterable[Any]) -> list[nn.Module]:
    """The modules whose forward may be part of a step: the model, losses, teachers, reference models."""
    return [owner for owner in owners if isinstance(owner, nn.Module)]


def find_trained(trainer: Any) -> list[nn.Parameter]:
    """The parameters that a step moves or mixes: of the model, and those that the optimizer has beside it."""
    optimizer = None if trainer.is_deepspeed_enabled else trainer.optimizer  # DeepSpeed's groups are flat partitions
    parameters = (*trainer.model.parameters(), *parameters_beside(trainer.model, optimizer))
    return [parameter for parameter in parameters if parameter.requires_grad]


def find_parameters_beside(trainer: Any, owners: Sequence[Any], trained: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those that may have a gradient, and that no step of the trainer's moves: an adversary's, a multiplier."""
    groups = () if trainer.optimizer is None else trainer.optimizer.param_groups
    found = {id(parameter) for parameter in (*trained, *(p for group in groups for p in group["params"]))}
    registered = (parameter for module in find_modules(owners) for parameter in module._parameters.values())
    others = (owner for owner in owners if not isinstance(owner, nn.Module))
    attributes = (item for value in _values(others) for item in items(value))
    beside = []
    for value in (*registered, *attributes):
        is_parameter = issubclass(type(value), torch.Tensor) and isinstance(value, nn.Parameter)
        if is_parameter and value.requires_grad and id(value) not in found:
            found.add(id(value))
            beside.append(value)
    return beside


def find_large_tensors(owners: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Those in attributes, or in containers in attributes, that `PythonState` does not look into."""
    for value in _values(owners):
        yield from large_tensors(value)


def _values(owners: Iterable[Any]) -> Iterator[Any]:
    """Of attributes that may be state of a step, those in which there may be something."""
    for owner in owners:
        for _, value in () if isinstance(owner, GENERATORS) else watched(owner):
            if type(value) not in OPAQUE:
                yield value


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
    """Add `value` if it is an owner or a generator, what hangs on it, and the children of a module."""
    if depth == 0 or type(value) in OPAQUE:
        return
    if issubclass(type(value), CONTAINERS):
        for item in itertools.islice(items(value), MANY):
            _collect(item, found, depth - 1)
    elif id(value) not in found:
        if issubclass(type(value), GENERATORS):
            found[id(value)] = value
        elif _is_owner(value, is_root=depth == 4):
            found[id(value)] = value
            within = 2 if isinstance(value, nn.Module) else depth - 1  # wherever a module was found
            for _, attribute in list(watched(value)):
                if type(attribute) not in OPAQUE:
                    _collect(attribute, found, within)
        if isinstance(value, nn.Module):
            for child in value._modules.values():
                _collect(child, found, depth=3)


def _is_owner(value: Any, is_root: bool) -> bool:
    if issubclass(type(value), nn.Module):
        return not _is_wrapper(value)
    if inspect.isclass(value) or inspect.ismodule(value) or inspect.isroutine(value):
        return False
    return (is_root or not _is_of_library(value)) and hasattr(value, "__dict__")


def is_users_object(value: Any) -> bool:
    """Whether it is an object with attributes, of a class of the user's, and no module."""
    return not isinstance(value, nn.Module) and _is_owner(value, is_root=False)


def _is_of_library(value: Any) -> bool:
    kind = type(value)  # not its own `__class__`, which some look up
    return _library(kind) in LIBRARIES and not issubclass(kind, STEPPED)


def _is_wrapper(module: nn.Module) -> bool:
    """What an engine puts around a model, with counters of its own."""
    is_parallel = isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel)
    return is_parallel or _library(type(module)) == "deepspeed" or type(module).__name__ == "OptimizedModule"


def _library(named: Any) -> str:
    """Of a class or a function."""
    return (named.__module__ or "").partition(".")[0]


@functools.cache
def _is_users(module: str) -> bool:
    """Whether a module, by name, is the user's: of no library, and not installed."""
    file = getattr(sys.modules.get(module), "__file__", None)
    is_installed = file is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
    return module.partition(".")[0] not in LIBRARIES and not is_installed


def _held_by_functions(trainer: Any) -> Iterator[Any]:
    """
    What the user's functions may draw from or count in: of the loss, of the collator, of hooks, and of the methods of
    the user's trainer and modules. That is the object that a function is, or is bound to; what a `partial` binds; and
    the generators and modules that it, or another one of the user's that it calls, closes over, has as defaults, or
    names in its script, or that are attributes of its class. Not numbers and lists there, where people keep what they
    observe.
    """
    modules = _with_children([trainer.model])
    classes = {type(trainer), *(type(module) for module in modules)}
    of_user = {base for cls in classes for base in cls.__mro__ if _library(base) not in LIBRARIES}
    methods = (types.FunctionType, staticmethod, classmethod)
    left = [trainer.compute_loss_func, getattr(trainer, "compute_loss", None), trainer.data_collator]
    for value in (value for cls in of_user for value in vars(cls).values()):
        if isinstance(value, methods):
            left.append(value)
        elif isinstance(value, (*GENERATORS, nn.Module)):
            yield value
    left += [hook for hook in _hooks(modules) if _is_users(getattr(hook, "__module__", None) or "torch")]
    seen: set[int] = set()
    while left:
        function = left.pop()
        while isinstance(function, functools.partial):
            yield from (*function.args, *function.keywords.values())
            function = function.func
        if is_users_object(bound_to := getattr(function, "__self__", None)):
            yield bound_to
        function = inspect.unwrap(getattr(function, "__func__", function)) if callable(function) else None
        if function is None or id(function) in seen:
            continue
        seen.add(id(function))
        if not inspect.isfunction(function):
            yield function
            continue
        cells = (cell.cell_contents for cell in function.__closure__ or () if cell != type(cell)())  # not empty ones
        names, script = _names(function.__code__), function.__globals__
        imported = [vars(m) for m in map(script.get, names) if inspect.ismodule(m) and _is_users(m.__name__)]
        named = (space[name] for space in (script, *imported) for name in names if name in space)
        for value in (*cells, *(function.__defaults__ or ()), *named):
            if isinstance(value, (*GENERATORS, nn.Module)):
                yield value
            elif inspect.isfunction(value) and _library(value) not in LIBRARIES:
                left.append(value)


def _hooks(modules: Iterable[nn.Module]) -> Iterator[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for module in modules:
        for kind in kinds:
            yield from getattr(module, kind, {}).values()
        for parameter in module._parameters.values():
            if parameter is not None and parameter._backward_hooks:
                yield from parameter._backward_hooks.values()


@functools.cache
def _names(code: types.CodeType) -> tuple[str, ...]:
    """What a function names, and those within it."""
    within = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return (*code.co_names, *(name for names in within for name in names))


@functools.cache  # of the few names that attributes have; asked for each attribute of each module
def _is_watched(name: str, of_module: bool) -> bool:
    if of_module and (name.startswith(OF_ENGINES) or name in OF_EVERY_MODULE):
        return False
    return name not in NOT_OF_A_STEP and not name.startswith(("_gnp", "__"))


def watched(owner: Any) -> Iterator[tuple[str, Any]]:
    """The attributes that may be state of a step."""
    of_module = isinstance(owner, nn.Module)
    return ((name, value) for name, value in vars(owner).items() if _is_watched(name, of_module))
