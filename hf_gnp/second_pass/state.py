"""
State around the second pass: it begins in the state before the first pass, and ends in the state after it.

docs/second_pass.md is the contract: it lists what is restored, what is not, and what to write instead. This file
restores attributes and generators. running_tensors.py restores buffers, frozen parameters and large tensors.
"""

import functools
import operator
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerState

from hf_gnp.tensors import local_part, modules_of, parameters_of, split_by_optimizer

from .randomness import global_generators
from .running_tensors import SMALL, Pair, is_plain, put_back, storage_address, storage_addresses


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
OF_EVERY_MODULE = set(vars(nn.Module()))
# How the attributes begin that DeepSpeed and FSDP set on modules and parameters.
OF_ENGINES = (
    *("ds_id", "ds_grads_remaining", "ds_inflight", "ds_recompute", "ds_external", "ds_model_", "_ds_"),
    *("_fsdp", "_external_params", "_original_parameters", "_in_forward", "_local_tensor"),
)

SCALARS = (int, float, complex, str, bytes, type(None))
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)
OPAQUE = {*SCALARS, *FUNCTIONS, bool, torch.dtype, torch.device}  # most attributes: nothing in them can change
CONTAINERS = (dict, list, tuple, set, deque)
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
STEPPED = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)  # a loss may step its own, as for an adversary
LONG = 2**12  # items: longer containers are not inspected
DEPTH = 3  # objects within objects


def _has_own_base(cls: type) -> bool:
    return any((base.__module__ or "").partition(".")[0] not in LIBRARIES for base in cls.__mro__)


is_users: Callable[[type], bool] = functools.cache(_has_own_base)  # whether a base is outside of `LIBRARIES`


@functools.cache
def _is_watched(name: str, kind: type) -> bool:
    if issubclass(kind, nn.Module):
        return not (name.startswith(OF_ENGINES) or name in OF_EVERY_MODULE)
    is_trainers = issubclass(kind, Trainer | TrainerState)
    return not (name.startswith("__") or (is_trainers and (name in NOT_OF_A_STEP or name.startswith("_gnp"))))


def attributes_of(owner: Any) -> dict[str, Any]:
    """Return the attributes that a step may change."""
    kind: Any = type(owner)
    return {name: value for name, value in vars(owner).items() if _is_watched(name, kind)}


def values_in(values: Iterable[Any], seen: set[int]) -> Iterator[Any]:
    """Yield values and what their containers contain, each once. `seen` gains their ids."""
    left = list(values)
    while left:
        value = left.pop()
        kind = type(value)  # not `__class__`, which some objects compute
        if kind in OPAQUE or id(value) in seen:
            continue
        seen.add(id(value))
        if issubclass(kind, CONTAINERS):
            if len(value) > LONG:
                continue
            left.extend(value.values() if issubclass(kind, dict) else value)
        yield value


class Found:
    """Find the objects that a step of a trainer may change."""

    def __init__(self, trainer: Any):
        self.modules: dict[nn.Module, None] = {}  # of the model, and of losses, teachers and critics in attributes
        self.tensors: list[torch.Tensor] = []  # large ones in attributes
        optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler  # only the trainer's own step changes these
        own = (optimizer, getattr(optimizer, "optimizer", None), scheduler, getattr(scheduler, "scheduler", None))
        seen = {id(value) for value in (*own, trainer, trainer.state)}
        loss_function = trainer.compute_loss_func
        of_loss = SimpleNamespace(held=held_by(loss_function) if loss_function else [])
        owners = [(root, DEPTH) for root in (trainer, trainer.state, of_loss)] + self._add_module(trainer.model)
        of_model = len(self.modules)
        mine = parameters_of(self.modules)
        # DeepSpeed's optimizer has flat partitions.
        moving, outside = split_by_optimizer(mine, None if trainer.is_deepspeed_enabled else optimizer)
        self.trained = [parameter for parameter in (*moving, *outside) if parameter.requires_grad]
        mine += outside
        others: list[nn.Parameter] = []
        for owner, depth in owners:  # grows
            for value in values_in(attributes_of(owner).values(), seen):
                kind = type(value)
                if issubclass(kind, nn.Module):
                    owners += self._add_module(value)
                elif issubclass(kind, torch.Tensor):
                    if isinstance(value, nn.Parameter):
                        others.append(value)
                    if value.numel() > SMALL and _is_state(value):
                        self.tensors.append(value)
                elif (
                    depth
                    and (is_users(kind) or issubclass(kind, STEPPED))
                    and not issubclass(kind, type)
                    and hasattr(value, "__dict__")
                ):
                    owners.append((value, depth - 1))
        others += parameters_of(list(self.modules)[of_model:])
        known = set(map(id, mine)) if others else set()
        self.owners = [owner for owner, _ in owners]  # whose attributes are restored
        # The trainer's optimizer does not step these.
        self.others = [p for p in others if p.requires_grad and id(p) not in known]

    def _add_module(self, module: nn.Module) -> list[tuple[Any, int]]:
        """Add a module and its children, and return those whose attributes are restored."""
        new = [] if module in self.modules else [m for m in modules_of(module) if m not in self.modules]
        self.modules.update(dict.fromkeys(new))
        # In transformers an attribute may belong to a buffer, as in dynamic RoPE.
        return [
            (module, DEPTH - 1)
            for module in new
            if is_users(type(module)) or (module._buffers and not type(module).__module__.startswith("torch."))
        ]


def _is_state(tensor: torch.Tensor) -> bool:
    """Return whether the elements can be restored, and are not part of a graph."""
    return tensor.grad_fn is None and is_plain(tensor)


def held_by(function: Any) -> list[Any]:
    """Return the object of a method, or the arguments of a `functools.partial` and what its function holds."""
    if isinstance(function, functools.partial):
        return [*function.args, *function.keywords.values(), *held_by(function.func)]
    return [function.__self__] if hasattr(function, "__self__") else []


class Snapshot:
    """Record the random generators, and the attributes of `found.owners`, at construction."""

    def __init__(self, found: Found, devices: list[torch.device]):
        self._attributes: list[tuple[Any, set[str], dict[str, Any]]] = []
        self._contents = global_generators(devices)
        self._tensors: list[Pair] = []
        self._uncopied: list[tuple[torch.Tensor, int]] = []  # large or with a graph; with version counters
        self._detached: set[int] = set()  # ids of attributes without their graph
        weights = functools.cache(lambda: storage_addresses(t for p in found.trained for t in (p, p.grad)))
        seen: set[int] = set()
        for owner in found.owners:
            attributes = attributes_of(owner)
            for value in values_in(attributes.values(), seen):
                if not isinstance(value, torch.Tensor):
                    self._contents += restorers(value)
                elif value.numel() <= SMALL and _is_state(value):
                    if storage_address(value) not in weights():
                        self._tensors.append((local_part(value), local_part(value).detach().clone()))
                elif not value.is_inference():
                    self._uncopied.append((value, value._version))
            tensors = [(name, value) for name, value in attributes.items() if isinstance(value, torch.Tensor)]
            detached = {name: tensor.detach() for name, tensor in tensors if tensor.grad_fn is not None}
            self._uncopied += [(tensor, tensor._version) for tensor in detached.values()]
            self._detached |= set(map(id, detached.values()))
            self._attributes.append((owner, set(vars(owner)), attributes | detached))

    def put_back(self, is_first: bool = True) -> None:
        """Restore all of it. After the first micro-batch, uncopied tensors of the second pass itself may stay."""
        stale = {id(tensor) for tensor, version in self._uncopied if tensor._version != version and not is_first}
        for owner, names, held in self._attributes:
            attributes = vars(owner)
            for name, value in held.items():
                now = attributes.get(name, held)
                has_graph = id(value) in self._detached and getattr(now, "grad_fn", None) is not None
                is_same = now is value or (has_graph and now.data_ptr() == value.data_ptr())
                if now is held or not (is_same or id(value) in stale):
                    attributes[name] = value
            if not names.issuperset(attributes):
                new = [name for name in attributes_of(owner) if name not in names]
                if all(_is_made_anew(attributes[name]) for name in new):
                    for name in new:
                        del attributes[name]  # the pass created it
        put_back(self._tensors)
        for restore in self._contents:
            restore()


def restorers(value: Any) -> Iterator[Callable[[], Any]]:
    """Yield what restores, in place, the present contents of a container, an array or a generator."""
    if isinstance(value, dict):
        yield functools.partial(_put_back_dict, value, dict(value.items()))
    elif isinstance(value, list | set | deque):
        yield functools.partial(_put_back_items, value, list(value))
    elif isinstance(value, np.ndarray):
        if value.size <= SMALL and value.dtype != object and value.flags.writeable:
            yield functools.partial(operator.setitem, value, ..., value.copy())
    elif isinstance(value, random.Random):
        yield functools.partial(value.setstate, value.getstate())
    elif isinstance(value, np.random.Generator):
        yield functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    elif isinstance(value, torch.Generator | np.random.RandomState):
        generator: Any = value
        yield functools.partial(generator.set_state, generator.get_state())


def _put_back_dict(value: dict[Any, Any], held: dict[Any, Any]) -> None:
    is_same = len(value) == len(held) and all(map(operator.is_, value, held))
    if is_same and all(map(operator.is_, value.values(), held.values())):
        return
    # The methods of its own class may refuse, such as those of a ModelOutput.
    own: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    own.clear(value)
    for key, item in held.items():
        own.__setitem__(value, key, item)


def _put_back_items(value: Any, held: list[Any]) -> None:
    if len(held) != len(value) or not all(map(operator.is_, held, value)):
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(held)


def _is_made_anew(value: Any) -> bool:
    """Return whether a pass creates a missing attribute again. False for modules and objects of libraries."""
    is_value = isinstance(value, (*SCALARS, torch.Tensor, np.ndarray, *CONTAINERS, *GENERATORS))
    return is_value or (is_users(type(value)) and not isinstance(value, nn.Module))


def tensors_on_parameters(parameters: Sequence[nn.Parameter]) -> dict[tuple[int, str], tuple[int, int]]:
    """Return a mark of each tensor and each list that is an attribute of a parameter. A write changes the mark."""
    return {
        (id(parameter), name): (id(value), value._version if isinstance(value, torch.Tensor) else len(value))
        for parameter in parameters
        for name, value in parameter.__dict__.items()
        if isinstance(value, torch.Tensor | list) and not name.startswith(OF_ENGINES)
    }
