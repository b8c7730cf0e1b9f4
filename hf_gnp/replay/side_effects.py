"""
The Python state that a forward may change: counters, metrics and generators that a trainer, a loss or a module keeps.

What is looked at are the attributes of the trainer and of its state, of every module that the trainer holds, of the
user's own objects that hang on these, and the modules and generators that the user's loss function names. What a
library keeps inside its own objects (datasets, optimizers, accelerate) is not. Tensors are looked at if they are small
and not part of a graph; buffers and parameters are for `buffers.py`.
"""

import functools
import inspect
import operator
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn


# A small tensor or array: a counter, a table of weights; larger ones are activations that a module keeps to look at.
SMALL = 2**14
# A longer list is only cut back to its length, which undoes what a metric appends.
LONG = 2**12
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
IMMUTABLE = (int, float, complex, str, bytes, type(None))
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


class PythonState:
    """
    The state of all that `find_owners` finds, as it stands when this is made; `put_back` makes it so again.

    Args:
        owners: Objects with a `__dict__`, and generators.
    """

    def __init__(self, owners: Iterable[Any]):
        self._attributes: list[tuple[dict[str, Any], set[str], dict[str, Any]]] = []
        self._contents: list[Callable[[], Any]] = []
        for owner in owners:
            if isinstance(owner, GENERATORS):
                self._contents += _contents(owner)
            else:
                attributes = vars(owner)
                kept = {name: value for name, value in attributes.items() if _is_watched(name) and _can_keep(value)}
                self._attributes.append((attributes, set(attributes), kept))
                for value in kept.values():
                    self._contents += _contents(value)

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
    roots = [trainer, trainer.state, trainer.control, *_held_by_functions(trainer)]
    for root in roots:
        _collect(root, found, depth=4)
    for module in [owner for owner in found.values() if isinstance(owner, nn.Module)]:
        for child in module.modules():
            _collect(child, found, depth=2)
    return list(found.values())


def find_modules(trainer: Any) -> list[nn.Module]:
    """The modules whose forward may be part of a step: the model first, then losses, teachers, reference models."""
    modules = [trainer.model]
    for value in (*vars(trainer).values(), *_held_by_functions(trainer)):
        modules += [item for item in _items(value) if isinstance(item, nn.Module) and not _is_wrapper(item)]
    return list(dict.fromkeys(module for root in modules for module in root.modules()))


def _collect(value: Any, found: dict[int, Any], depth: int) -> None:
    """Add `value` if it is an owner or a generator, and what hangs on it."""
    if isinstance(value, IMMUTABLE) or depth == 0:
        return
    if isinstance(value, dict | list | tuple | set | deque):
        for item in _items(value):
            _collect(item, found, depth - 1)
    elif id(value) not in found and (isinstance(value, GENERATORS) or _is_owner(value, is_root=depth == 4)):
        found[id(value)] = value
        if not isinstance(value, GENERATORS):
            for name, attribute in list(vars(value).items()):
                if _is_watched(name) and not isinstance(attribute, IMMUTABLE):
                    _collect(attribute, found, depth - 1)


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return list(value.values()) if len(value) <= LONG else []
    if isinstance(value, list | tuple | set | deque):
        return list(value) if len(value) <= LONG else []
    return [value]


def _is_owner(value: Any, is_root: bool) -> bool:
    if isinstance(value, nn.Module):
        return not _is_wrapper(value)
    if inspect.isclass(value) or inspect.ismodule(value) or inspect.isroutine(value):
        return False
    return hasattr(value, "__dict__") and (is_root or _library(type(value)) not in LIBRARIES)


def _is_wrapper(module: nn.Module) -> bool:
    """What an engine puts around a model, with counters of its own."""
    is_parallel = isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel)
    return is_parallel or _library(type(module)) == "deepspeed" or type(module).__name__ == "OptimizedModule"


def _library(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _held_by_functions(trainer: Any) -> Iterator[Any]:
    """What the user's loss closes over, or names in its module if that is a generator."""
    functions = [trainer.compute_loss_func, getattr(trainer, "compute_loss", None), trainer.data_collator]
    classes = {type(module) for module in trainer.model.modules()}
    functions += [cls.forward for cls in classes if _library(cls) not in LIBRARIES]
    for function in functions:
        while isinstance(function, functools.partial):
            yield from (*function.args, *function.keywords.values())
            function = function.func
        function = inspect.unwrap(getattr(function, "__func__", function)) if callable(function) else None
        if function is None:
            continue
        if not inspect.isfunction(function):
            yield function
            continue
        cells = (cell.cell_contents for cell in function.__closure__ or () if cell != type(cell)())  # not empty ones
        named = (function.__globals__.get(name) for name in function.__code__.co_names)
        for value in (*cells, *(function.__defaults__ or ()), *named):
            if isinstance(value, (*GENERATORS, nn.Module)):
                yield value


def _is_watched(name: str) -> bool:
    # DeepSpeed and FSDP keep their own books on modules.
    is_engine = name.startswith(("ds_", "_ds_", "_fsdp", "_gnp", "__"))
    return not is_engine and name not in NOT_OF_A_STEP and name not in OF_EVERY_MODULE


def _is_small(value: torch.Tensor | np.ndarray) -> bool:
    if isinstance(value, np.ndarray):
        return value.size <= SMALL and value.dtype != object
    if type(value) is not torch.Tensor or value.layout != torch.strided or value.is_quantized or value.is_inference():
        return False
    return value.device.type != "meta" and value.numel() <= SMALL and value.grad_fn is None


def _can_keep(value: Any) -> bool:
    return not isinstance(value, torch.Tensor | np.ndarray) or _is_small(value)


def _is_plain(value: Any) -> bool:
    """Whether a forward that finds an attribute absent makes it anew: not modules, not objects."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return _is_small(value)
    return isinstance(value, (*IMMUTABLE, list, dict, set, tuple, deque))


def _contents(value: Any) -> Iterator[Callable[[], Any]]:
    """Functions that put back, in place, what is in `value` now and may change there."""
    if isinstance(value, IMMUTABLE):
        return
    if isinstance(value, dict) and len(value) <= LONG:
        yield functools.partial(_put_back_dict, value, {k: item for k, item in value.items() if _can_keep(item)})
    elif isinstance(value, list | deque) and len(value) <= LONG:
        yield functools.partial(_put_back_list, value, list(value))
    elif isinstance(value, list):
        yield functools.partial(operator.delitem, value, slice(len(value), None))
    elif isinstance(value, set):
        yield functools.partial(_put_back_set, value, set(value))
    elif isinstance(value, torch.Tensor) and _is_small(value):
        yield functools.partial(torch.no_grad()(value.copy_), value.detach().clone())
    elif isinstance(value, np.ndarray) and _is_small(value):
        yield functools.partial(operator.setitem, value, ..., value.copy())
    elif isinstance(value, torch.Generator | np.random.RandomState):
        yield functools.partial(value.set_state, value.get_state())  # type: ignore[arg-type]
    elif isinstance(value, random.Random):
        yield functools.partial(value.setstate, value.getstate())
    elif isinstance(value, np.random.Generator):
        yield functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, dict | list | tuple | deque):
        for item in _items(value):
            yield from _contents(item)


def _put_back_dict(value: dict[Any, Any], kept: dict[Any, Any]) -> None:
    others = {key: item for key, item in value.items() if key not in kept and not _can_keep(item)}
    if list(value) != [*kept, *others] or any(value[key] is not item for key, item in kept.items()):
        value.clear()
        value.update(kept | others)


def _put_back_list(value: Any, kept: list[Any]) -> None:
    if len(kept) != len(value) or any(a is not b for a, b in zip(kept, value, strict=True)):
        value.clear()
        value.extend(kept)


def _put_back_set(value: set[Any], kept: set[Any]) -> None:
    value.clear()
    value.update(kept)
