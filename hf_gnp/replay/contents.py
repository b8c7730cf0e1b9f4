"""What is in a value that a forward may change in place, and how to put it back."""

import functools
import operator
import random
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from .buffers import is_dense, storage_address


# A small tensor or array: a counter, a table of weights; larger ones are activations that a module keeps to look at.
SMALL = 2**14
# A longer list is only cut back to its length, which undoes what a metric appends.
LONG = 2**12
IMMUTABLE = (int, float, complex, str, bytes, type(None))
# Most attributes of a model's modules are of these: nothing in them is looked at, and asking their type is enough.
OPAQUE = {*IMMUTABLE, bool, types.FunctionType, types.MethodType, types.BuiltinFunctionType, torch.dtype, torch.device}
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
CONTAINERS = (dict, list, tuple, set, deque)
WITH_CONTENTS = (*CONTAINERS, torch.Tensor, np.ndarray, *GENERATORS)


def items(value: Any) -> Iterable[Any]:
    """What a container that is not long holds; of anything else, itself."""
    if isinstance(value, dict):
        return list(value.values()) if len(value) <= LONG else []
    if isinstance(value, list | tuple | set | deque):
        return list(value) if len(value) <= LONG else []
    return [value]


def is_small(value: torch.Tensor | np.ndarray) -> bool:
    """Whether it may be held until the window ends: not an activation, and not part of a graph."""
    if isinstance(value, np.ndarray):
        return value.size <= SMALL
    return type(value) is torch.Tensor and value.numel() <= SMALL and value.grad_fn is None


def _can_write(value: torch.Tensor | np.ndarray) -> bool:
    """Whether what is in it can be copied, and put back in place."""
    if isinstance(value, np.ndarray):
        return value.dtype != object and value.flags.writeable
    return is_dense(value)


def keeps_small(value: Any) -> bool:
    """Of tensors and arrays the small ones, of anything else all."""
    return not isinstance(value, torch.Tensor | np.ndarray) or is_small(value)


def keeps_any(value: Any) -> bool:
    return True


def is_opaque(value: Any) -> bool:
    """Whether nothing in it is put back: a number, a function, an object (whose attributes are, if it is an owner)."""
    # Not isinstance, which asks the object for its __class__, and a transformers' config answers slowly.
    return type(value) in OPAQUE or not issubclass(type(value), WITH_CONTENTS)


def restorers(value: Any, moved: set[int], can_keep: Callable[[Any], bool]) -> Iterator[Callable[[], Any]]:
    """Functions that put back, in place, what is in `value` now and may change there."""
    if is_opaque(value):
        return
    if isinstance(value, dict) and len(value) <= LONG:
        yield functools.partial(_put_back_dict, value, {k: v for k, v in value.items() if can_keep(v)}, can_keep)
    elif isinstance(value, list | deque) and len(value) <= LONG:
        yield functools.partial(_put_back_list, value, list(value))
    elif isinstance(value, list):
        yield functools.partial(operator.delitem, value, slice(len(value), None))
    elif isinstance(value, set):
        yield functools.partial(_put_back_set, value, set(value))
    elif (
        isinstance(value, torch.Tensor)
        and is_small(value)
        and _can_write(value)
        and storage_address(value) not in moved
    ):
        yield functools.partial(torch.no_grad()(value.copy_), value.detach().clone())
    elif isinstance(value, np.ndarray) and is_small(value) and _can_write(value):
        yield functools.partial(operator.setitem, value, ..., value.copy())
    elif isinstance(value, torch.Generator | np.random.RandomState):
        yield functools.partial(value.set_state, value.get_state())  # type: ignore[arg-type]
    elif isinstance(value, random.Random):
        yield functools.partial(value.setstate, value.getstate())
    elif isinstance(value, np.random.Generator):
        yield functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, dict | list | tuple | deque):
        for item in items(value):
            if type(item) not in OPAQUE:
                yield from restorers(item, moved, can_keep)


def _put_back_dict(value: dict[Any, Any], kept: dict[Any, Any], can_keep: Callable[[Any], bool]) -> None:
    others = {key: item for key, item in value.items() if key not in kept and not can_keep(item)}
    if list(value) != [*kept, *others] or any(value[key] is not item for key, item in kept.items()):
        value.clear()
        value.update(kept | others)


def _put_back_list(value: Any, kept: list[Any]) -> None:
    if len(kept) != len(value) or not all(map(operator.is_, kept, value)):
        value.clear()
        value.extend(kept)


def _put_back_set(value: set[Any], kept: set[Any]) -> None:
    value.clear()
    value.update(kept)
