"""The first pass seen from inside: what `Trainer.training_step` hands to `compute_loss` and to backward."""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from transformers import Trainer


TRAINING_STEP = inspect.unwrap(Trainer.training_step).__code__  # that of a profiler's wrapper may hide it later


@contextlib.contextmanager
def replaced(owner: Any, **methods: Callable[..., Any]) -> Iterator[None]:
    """
    Inside, `owner.name(...)` calls `methods[name](original, ...)`. It is an attribute of the one instance, so that it
    is what runs whichever class overrides the method, and nothing else notices.
    """
    kept = {name: vars(owner)[name] for name in methods if name in vars(owner)}
    try:
        for name, method in methods.items():
            setattr(owner, name, functools.partial(method, getattr(owner, name)))
        yield
    finally:
        for name in methods:
            vars(owner).pop(name, None)
        vars(owner).update(kept)


def is_called_by_training_step(depth: int = 2) -> bool:
    """Whether the function that asks was called by `Trainer.training_step` itself, not by a subclass's own step."""
    return sys._getframe(depth).f_code in (TRAINING_STEP, inspect.unwrap(Trainer.training_step).__code__)
