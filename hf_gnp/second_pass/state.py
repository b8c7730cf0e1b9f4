"""
State around the second pass: it begins in the state before the first pass, and ends in the state after it.

Restored, besides inputs (inputs.py) and the global random generators (randomness.py):

- attributes of the trainer, its `state`, the loss object, modules of a user's class, and objects of a user's class in
  these attributes: numbers, containers, small tensors and arrays, generators. Also optimizers and learning-rate
  schedulers other than the trainer's, such as a critic's.
- buffers and frozen parameters of all modules, and large tensors in these attributes (running_tensors.py).
- gradients of parameters that the trainer's optimizer does not step, such as a Lagrange multiplier.

A user's class has a base outside of `LIBRARIES`. The probe stops a run if the restored state does not give the same
loss (probe.py). docs/second_pass.md lists what is not restored, and what to write instead.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from hf_gnp.tensors import modules_of, parameters_of, parameters_outside

from .contents import (
    CONTAINERS,
    DEEP,
    GENERATORS,
    OPAQUE,
    SMALL,
    VALUES,
    addresses,
    is_small,
    is_state,
    items,
    restorers,
)


# The packages of torch, transformers, engines, quantised weights and data.
LIBRARIES = sys.stdlib_module_names | {
    *("torch", "transformers", "accelerate", "deepspeed", "hf_gnp"),
    *("bitsandbytes", "torchao", "numpy", "datasets", "tokenizers"),
}
# Attributes of the trainer that are not restored: those that no step changes, those that only `log` changes, and the
# methods that are replaced in a pass. Restoring `control` would lose the request of a signal handler.
NOT_OF_A_STEP = {
    *("train_dataset", "eval_dataset", "log_history", "callback_handler", "stateful_callbacks", "control"),
    *("compute_loss", "log", "_prepare_inputs", "_tr_loss"),
}
# A library's objects that a loss may step itself, such as for an adversary.
STEPPED = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
OF_EVERY_MODULE = set(vars(nn.Module()))
# The attributes that DeepSpeed and FSDP set on modules and parameters.
OF_ENGINES = ("ds_", "_ds_", "_fsdp", "_external_params", "_original_parameters", "_in_forward", "_local_tensor")
OBJECTS = 3  # objects within objects


def is_users(value: Any) -> bool:
    """Return whether the value's class has a base outside of `LIBRARIES`."""
    cls: Any = type(value)
    return _is_users(cls)  # not `__class__`, which some objects compute


@functools.cache
def _is_users(cls: Any) -> bool:
    return any((base.__module__ or "").partition(".")[0] not in LIBRARIES for base in getattr(cls, "__mro__", ()))


@functools.cache
def _is_watched(name: str, of_module: bool) -> bool:
    if of_module and (name.startswith(OF_ENGINES) or name in OF_EVERY_MODULE):
        return False
    return name not in NOT_OF_A_STEP and not name.startswith(("_gnp", "__"))


def attributes_of(owner: Any) -> Iterator[tuple[str, Any]]:
    """Yield the attributes that a step may change."""
    of_module = isinstance(owner, nn.Module)
    return ((name, value) for name, value in vars(owner).items() if _is_watched(name, of_module))


class Found:
    """
    Find the objects that a step of a trainer may change.

    Attributes:
        owners: Objects whose attributes are restored.
        modules: The model's modules, and modules in these attributes with their children: losses, teachers, critics.
        tensors: Large tensors in these attributes.
        trained: Trainable parameters of the model, and other parameters of the trainer's optimizer.
        others: Trainable parameters that the trainer's optimizer does not step.
    """

    def __init__(self, trainer: Any):
        self.owners: list[Any] = []
        self.modules: list[nn.Module] = []
        self.tensors: list[torch.Tensor] = []
        self._parameters: list[nn.Parameter] = []
        optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler  # only the trainer's own step changes these
        own = (optimizer, getattr(optimizer, "optimizer", None), scheduler, getattr(scheduler, "scheduler", None))
        self._seen = {id(value) for value in (*own, trainer, trainer.state)}
        self._add_module(trainer.model)
        of_model = len(self.modules)
        for root in (trainer, trainer.state):
            self._add_owner(root, OBJECTS)
        if held := held_by(trainer.compute_loss_func):
            self._add_owner(SimpleNamespace(held=held), OBJECTS)
        mine = parameters_of(self.modules[:of_model])
        mine += parameters_outside(mine, None if trainer.is_deepspeed_enabled else optimizer)  # flat partitions
        self.trained = [parameter for parameter in mine if parameter.requires_grad]
        others = self._parameters + parameters_of(self.modules[of_model:])
        known = set(map(id, mine)) if others else set()
        self.others = [p for p in others if p.requires_grad and id(p) not in known]

    def _add_module(self, module: nn.Module) -> None:
        for part in modules_of(module):
            if id(part) not in self._seen:
                self._seen.add(id(part))
                self.modules.append(part)
                if is_users(part):
                    self._add_owner(part, OBJECTS - 1)

    def _add_owner(self, owner: Any, objects: int) -> None:
        self.owners.append(owner)
        for _, value in list(attributes_of(owner)):
            if type(value) not in OPAQUE:
                self._add(value, objects, DEEP)

    def _add(self, value: Any, objects: int, depth: int) -> None:
        kind = type(value)
        if kind in OPAQUE or depth == 0 or id(value) in self._seen:
            return
        if issubclass(kind, nn.Module):
            self._add_module(value)
        elif issubclass(kind, torch.Tensor):
            if isinstance(value, nn.Parameter) and value.requires_grad:
                self._parameters.append(value)
            if is_state(value) and value.numel() > SMALL:
                self.tensors.append(value)
        elif issubclass(kind, CONTAINERS):
            self._seen.add(id(value))
            for item in items(value):
                self._add(item, objects, depth - 1)
        elif objects and not issubclass(kind, type) and (is_users(value) or issubclass(kind, STEPPED)):
            self._seen.add(id(value))
            if hasattr(value, "__dict__"):
                self._add_owner(value, objects - 1)


def held_by(function: Any) -> list[Any]:
    """Return the object of a method, or the arguments of a `functools.partial` and what its function holds."""
    if isinstance(function, functools.partial):
        return [*function.args, *function.keywords.values(), *held_by(function.func)]
    return [function.__self__] if hasattr(function, "__self__") else []


class Attributes:
    """
    Record at construction the attributes of `found.owners`, and restore them in `put_back`.

    Args:
        holds: Decides which values to hold, so that `put_back` can set an attribute to the same object again.
    """

    def __init__(self, found: Found, holds: Callable[[Any], bool]):
        self._attributes: list[tuple[Any, set[str], dict[str, Any]]] = []
        self._contents: list[Callable[[], Any]] = []
        self._versions: dict[int, int] = {}  # version counters of large tensors, by id
        aliases = functools.cache(lambda: addresses(t for p in found.trained for t in (p, p.grad)))
        seen: set[int] = set()
        for owner in found.owners:
            held = {}
            for name, value in attributes_of(owner):
                if type(value) in OPAQUE:
                    held[name] = value
                elif holds(value):
                    is_tensor = isinstance(value, torch.Tensor)
                    held[name] = value.detach() if is_tensor and value.grad_fn is not None else value  # without graph
                    self._contents += restorers(value, aliases, holds, seen)
                    if is_tensor and not is_small(value) and not value.is_inference():
                        self._versions[id(held[name])] = value._version
            self._attributes.append((owner, set(vars(owner)), held))

    def put_back(self, written: bool = True) -> None:
        """
        Restore the attributes.

        Args:
            written: Whether to reassign large tensors that were written in place since the record. False after the
                first micro-batch, as the second pass may have created new ones.
        """
        for owner, names, held in self._attributes:
            attributes = vars(owner)
            for name, value in held.items():
                if name in attributes and (attributes[name] is value or _is_same(attributes[name], value)):
                    continue
                if written or id(value) not in self._versions or value._version == self._versions[id(value)]:
                    attributes[name] = value
            if not names.issuperset(attributes):
                for name, value in list(attributes_of(owner)):
                    if name not in names and _is_made_anew(value):
                        del attributes[name]  # the pass created it
        for put_back in self._contents:
            put_back()


def _is_same(value: Any, held: Any) -> bool:
    """Return whether `held` is `value` without its graph."""
    are_tensors = isinstance(held, torch.Tensor) and isinstance(value, torch.Tensor)
    return are_tensors and value.grad_fn is not None and value.data_ptr() == held.data_ptr()


def _is_made_anew(value: Any) -> bool:
    """Return whether a pass creates a missing attribute again. False for modules and objects of libraries."""
    if isinstance(value, nn.Module):
        return False
    return isinstance(value, (*VALUES, *CONTAINERS, *GENERATORS)) or is_users(value)


def tensors_on_parameters(parameters: Sequence[nn.Parameter]) -> dict[tuple[int, str], tuple[int, int]]:
    """Return a mark of each tensor and each list that is an attribute of a parameter. A write changes the mark."""
    return {
        (id(parameter), name): (id(value), value._version if isinstance(value, torch.Tensor) else len(value))
        for parameter in parameters
        for name, value in parameter.__dict__.items()
        if isinstance(value, torch.Tensor | list) and not name.startswith(OF_ENGINES)
    }
