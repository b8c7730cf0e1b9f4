"""Restoration of attribute values that a pass may change in place: containers, tensors, arrays, generators."""

import functools
import operator
import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_gnp.tensors import local_part


SMALL = 2**14  # elements: tensors up to this size are copied with the attributes, larger ones by `RunningTensors`
LONG = 2**12  # items: longer containers are not inspected
DEEP = 6  # containers within containers
TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)
VALUES = (int, float, complex, str, bytes, type(None), torch.Tensor, np.ndarray)
OPAQUE = {  # most attributes have these types, and nothing in them can change
    *(int, float, complex, str, bytes, type(None), bool),
    *(types.FunctionType, types.MethodType, types.BuiltinFunctionType, torch.dtype, torch.device),
}
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
CONTAINERS = (dict, list, tuple, set, deque)


def items(container: Any) -> Iterable[Any]:
    """Return the values in a container, or nothing if it is long."""
    if len(container) > LONG:
        return ()
    return list(container.values()) if isinstance(container, dict) else list(container)


def is_dense(tensor: torch.Tensor) -> bool:
    """Return whether the elements can be copied, compared as bytes and written in place: not sparse, not quantised."""
    local = local_part(tensor)
    if type(local) not in TENSORS or local.layout != torch.strided:
        return False
    if local.is_quantized or local.is_nested or local.is_inference() or local.device.type == "meta":
        return False
    # An expanded tensor has one element in several places, and cannot be written in place.
    return all(stride > 0 or size == 1 for stride, size in zip(local.stride(), local.shape, strict=True))


def storage_address(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's storage, which its views share. 0 if the tensor is not dense."""
    return local_part(tensor).untyped_storage().data_ptr() if is_dense(tensor) else 0


def addresses(tensors: Iterable[torch.Tensor | None]) -> set[int]:
    """Return the storage addresses of the dense tensors."""
    return {storage_address(tensor) for tensor in tensors if tensor is not None} - {0}


def is_state(tensor: torch.Tensor) -> bool:
    """Return whether the tensor is neither part of a graph, nor a parameter that ZeRO-3 gathers and releases."""
    return type(tensor) in TENSORS and tensor.grad_fn is None and not hasattr(tensor, "ds_id")


def is_small(value: torch.Tensor | np.ndarray) -> bool:
    """Return whether the elements are copied with the attributes."""
    if isinstance(value, np.ndarray):
        return value.size <= SMALL
    return is_state(value) and value.numel() <= SMALL


class Budget:
    """
    Decides which values to hold until the window ends, so that an attribute can be set to them again.

    Large tensors and arrays are held as long as all of them together fit into the bytes that `size` returns.
    """

    def __init__(self, size: Callable[[], int]):
        self._size = size
        self._left: int | None = None
        self._counted: set[int] = set()

    def holds(self, value: Any) -> bool:
        if not isinstance(value, torch.Tensor | np.ndarray) or is_small(value) or id(value) in self._counted:
            return True
        if self._left is None:
            self._left = self._size()
        if value.nbytes > self._left:
            return False
        self._left -= value.nbytes
        self._counted.add(id(value))
        return True


def restorers(
    value: Any, aliases: Callable[[], set[int]], holds: Callable[[Any], bool], seen: set[int], depth: int = DEEP
) -> Iterator[Callable[[], Any]]:
    """
    Yield functions that restore, in place, the present contents of `value`.

    Args:
        aliases: Returns the storage addresses of weights and gradients. Tensors that share them are not restored.
        holds: Decides which values of a dictionary to hold.
        seen: Ids of the values so far. This function adds to it.
    """
    if type(value) in OPAQUE or id(value) in seen or depth == 0:
        return
    seen.add(id(value))
    if isinstance(value, CONTAINERS):
        if len(value) > LONG:
            return
        if isinstance(value, dict):
            yield functools.partial(_put_back_dict, value, list(value), {k: v for k, v in value.items() if holds(v)})
        elif not isinstance(value, tuple):
            yield functools.partial(_put_back_items, value, list(value))
        for item in items(value):
            if type(item) not in OPAQUE:
                yield from restorers(item, aliases, holds, seen, depth - 1)
    elif isinstance(value, torch.Tensor):
        if is_small(value) and is_dense(value) and storage_address(value) not in aliases():
            yield functools.partial(torch.no_grad()(value.copy_), value.detach().clone())
    elif isinstance(value, np.ndarray):
        if is_small(value) and value.dtype != object and value.flags.writeable:
            yield functools.partial(operator.setitem, value, ..., value.copy())
    elif isinstance(value, GENERATORS):
        yield restorer_of_generator(value)


def restorer_of_generator(generator: Any) -> Callable[[], Any]:
    """Return a function that sets a generator to its present state."""
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.Generator):
        return functools.partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    return functools.partial(generator.set_state, generator.get_state())


def _put_back_dict(value: dict[Any, Any], keys: list[Any], held: dict[Any, Any]) -> None:
    is_same = len(value) == len(keys) and all(map(operator.is_, value, keys))
    if is_same and all(value[key] is item for key, item in held.items()):
        return
    # The methods of its own class may refuse, such as those of a ModelOutput.
    own: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    now = dict(value)
    own.clear(value)
    for key in keys:
        if key in held or key in now:
            own.__setitem__(value, key, held.get(key, now.get(key)))


def _put_back_items(value: Any, held: list[Any]) -> None:
    if len(held) != len(value) or not all(map(operator.is_, held, value)):
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(held)
