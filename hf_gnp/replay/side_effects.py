"""
The Python state that a forward may change: counters, metrics and generators that a trainer, a loss or a module keeps.

Whose it is tells `owners.py`. What a library keeps inside its own objects (datasets, accelerate) is not looked at.
What is in a tensor is, if it is small and not part of a graph; buffers, parameters and large tensors are for
`buffers.py`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .contents import GENERATORS, IMMUTABLE, WITH_CONTENTS, is_opaque, is_small, restorers
from .owners import is_users_object, watched


class PythonState:
    """
    The state of all that `find_owners` finds, as it stands when this is made; `put_back` makes it so again.

    Args:
        owners: What `find_owners` returns.
        moved: Where the memory begins (`addresses`) that the engine moves and puts back: of weights and gradients.
            Tensors that share it, such as a kept `weight.data`, are left as they are.
        keeps: Which values are held, so that a name can be set to them again: tensors that are large or part of a
            graph would be, of a window's every micro-batch, activations.
    """

    def __init__(self, owners: Iterable[Any], moved: set[int], keeps: Callable[[Any], bool]):
        self._attributes: list[tuple[Any, dict[str, Any], set[str], dict[str, Any]]] = []
        self._contents: list[Callable[[], Any]] = []
        self._versions: dict[int, int] = {}  # of tensors that `restorers` does not look into, by id
        seen: set[int] = set()
        for owner in owners:
            if isinstance(owner, GENERATORS):
                self._contents += restorers(owner, moved, keeps, seen)
                continue
            attributes, kept = vars(owner), {}
            for name, value in watched(owner):
                if is_opaque(value):
                    kept[name] = value
                elif keeps(value):
                    kept[name] = value
                    self._contents += restorers(value, moved, keeps, seen)
                    if isinstance(value, torch.Tensor) and not is_small(value) and not value.is_inference():
                        self._versions[id(value)] = value._version
            self._attributes.append((owner, attributes, set(attributes), kept))

    def put_back(self, written: bool = True) -> None:
        """
        Args:
            written: Whether a name is set again to a large tensor that was written into since: what is in it is not as
                it was. One that the window made, a bank of features, goes on from what the window's replay left.
        """
        for owner, attributes, names, kept in self._attributes:
            for name, value in kept.items():
                is_other = name not in attributes or attributes[name] is not value
                if is_other and (written or not self._is_written(value)):
                    attributes[name] = value
            if not names.issuperset(attributes):
                for name, value in list(watched(owner)):
                    if name not in names and _is_made_anew(value):
                        del attributes[name]  # made by the pass whose traces go
        for put_back in self._contents:
            put_back()

    def _is_written(self, value: Any) -> bool:
        return id(value) in self._versions and value._version != self._versions[id(value)]


def _is_made_anew(value: Any) -> bool:
    """Whether a forward that finds an attribute absent makes it: not modules, not objects of a library."""
    return isinstance(value, (*IMMUTABLE, *WITH_CONTENTS)) or is_users_object(value)
