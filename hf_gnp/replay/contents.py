"""What is in a value that a forward may change in place, and how to put it back."""

import functools
import operator
import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from .buffers import TENSORS, is_dense, storage_address


# A small tensor or array: a counter, a table of weights; larger ones are activations that a module keeps to look at.
SMALL = 2**14
# A longer list is only cut back to its length, which undoes what a metric appends.
LONG = 2**12
DEEP = 16  # containers within containers
MANY = 2**10  # of what is in an attribute no more is looked into, in each micro-batch
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
    """Whether what is in it is copied: it is not large, and not part of a graph."""
    if isinstance(value, np.ndarray):
        return value.size <= SMALL
    return _is_state(value) and value.numel() <= SMALL


def _is_state(value: torch.Tensor) -> bool:
    """Neither a part of a graph, nor a parameter that ZeRO-3 gathers and releases."""
    return type(value) in TENSORS and value.grad_fn is None and not hasattr(value, "ds_id")


class Held:
    """
    Whether a value is held until the window ends: all but large tensors and arrays that do not fit into what is left
    of a budget. Each counts once; one that no pass replaces would be there anyway.
    """

    def __init__(self, budget: float):
        self._left = budget  # bytes
        self._counted: set[int] = set()

    def __call__(self, value: Any) -> bool:
        if isinstance(value, torch.Tensor | np.ndarray) and not is_small(value) and id(value) not in self._counted:
            if value.nbytes > self._left:
                return False
            self._left -= value.nbytes
            self._counted.add(id(value))
        return True


def is_opaque(value: Any) -> bool:
    """Whether nothing in it is put back: a number, a function, an object (whose attributes are, if it is an owner)."""
    # Not isinstance, which asks the object for its __class__, and a transformers' config answers slowly.
    return type(value) in OPAQUE or not issubclass(type(value), WITH_CONTENTS)


def restorers(
    value: Any,
    moved: set[int],
    keeps: Callable[[Any], bool],
    seen: set[int],
    depth: int = DEEP,
    limit: int | None = None,
) -> Iterator[Callable[[], Any]]:
    """
    Functions that put back, in place, what is in `value` now and may change there.

    Args:
        moved: Storage addresses of tensors that are left as they are.
        keeps: What of a dictionary's values is held.
        seen: Ids of values that are done; added to.
        limit: How many those may become; `MANY` more if None.
    """
    limit = len(seen) + MANY if limit is None else limit
    if is_opaque(value) or id(value) in seen or depth == 0 or len(seen) >= limit:
        return
    seen.add(id(value))
    if isinstance(value, dict) and len(value) <= LONG:
        kept = {key: item for key, item in value.items() if keeps(item)}
        yield functools.partial(_put_back_dict, value, list(value), kept)
    elif isinstance(value, list | deque) and len(value) <= LONG:
        yield functools.partial(_put_back_list, value, list(value))
    elif isinstance(value, list):
        yield functools.partial(operator.delitem, value, slice(len(value), None))
    elif isinstance(value, set):
        yield functools.partial(_put_back_set, value, set(value))
    elif isinstance(value, torch.Tensor):
        if is_small(value) and is_dense(value) and storage_address(value) not in moved:
            yield functools.partial(torch.no_grad()(value.copy_), value.detach().clone())
    elif isinstance(value, np.ndarray):
        if is_small(value) and value.dtype != object and value.flags.writeable:
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
                yield from restorers(item, moved, keeps, seen, depth - 1, limit)


def _put_back_dict(value: dict[Any, Any], keys: list[Any], kept: dict[Any, Any]) -> None:
    is_same = len(value) == len(keys) and all(map(operator.is_, value, keys))
    if is_same and all(value[key] is item for key, item in kept.items()):
        return
    # Not by the methods of its own class, which may refuse, as those of a ModelOutput.
    own: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    now = dict(value)
    own.clear(value)
    for key in keys:
        if key in kept or key in now:
            own.__setitem__(value, key, kept.get(key, now.get(key)))


def _put_back_list(value: Any, kept: list[Any]) -> None:
    if len(kept) != len(value) or not all(map(operator.is_, kept, value)):
        value.clear()
        value.extend(kept)


def _put_back_set(value: set[Any], kept: set[Any]) -> None:
    value.clear()
    value.update(kept)


def large_tensors(value: Any, depth: int = 3) -> Iterator[torch.Tensor]:
    """Those in `value`, or in containers in it, that are too large for `restorers`, and no part of a graph."""
    if isinstance(value, torch.Tensor):
        if _is_state(value) and value.numel() > SMALL:
            yield value
    elif depth and issubclass(type(value), CONTAINERS):
        for item in items(value):
            yield from large_tensors(item, depth - 1)
