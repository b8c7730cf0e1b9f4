"""
Random generators and attributes: what a step of a trainer may change, and records that restore it.

docs/second_pass.md is the contract: it lists what is restored, what is not, and what to write instead.
"""

import functools
import operator
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerState

from hf_gnp.tensors import local_part, modules_of, parameters_of, split_by_optimizer

from .running_tensors import SMALL, Pair, Restorer, is_plain, put_back, storage_address, storages_of


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
# Most attributes: nothing in them can change.
OPAQUE = {*SCALARS, bool, torch.dtype, torch.device, FunctionType, MethodType, BuiltinFunctionType}
CONTAINERS = (dict, list, tuple, set, deque)
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
STEPPED = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)  # a loss may step its own, as for an adversary
LONG = 2**12  # items: longer containers are not inspected
DEPTH = 3  # objects within objects


def _is_users(kind: type) -> bool:
    packages = [(base.__module__ or "").partition(".")[0] for base in kind.__mro__]
    return not (issubclass(kind, type) or LIBRARIES.issuperset(packages))


is_users: Callable[[type], bool] = functools.cache(_is_users)  # whether the class, or a base, is not of `LIBRARIES`


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
        if kind in OPAQUE or id(value) in seen or (issubclass(kind, CONTAINERS) and len(value) > LONG):
            continue
        seen.add(id(value))
        if issubclass(kind, CONTAINERS):
            left.extend(value.values() if issubclass(kind, dict) else value)
        yield value


class Found:
    """Find the objects that a step of a trainer may change."""

    def __init__(self, trainer: Any):
        self.modules: dict[nn.Module, None] = {}  # of the model, and of losses, teachers and critics in attributes
        self.buffers: list[dict[str, Any]] = []  # those of each module, by name
        self.tensors: list[torch.Tensor] = []  # large ones in attributes
        self.others: list[nn.Parameter] = []  # that the trainer's optimizer does not step
        optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler  # only the trainer's own step changes these
        own = (optimizer, getattr(optimizer, "optimizer", None), scheduler, getattr(scheduler, "scheduler", None))
        seen = {id(value) for value in (*own, trainer, trainer.state)}
        loss: Any = trainer.compute_loss_func
        held: list[Any] = []
        while isinstance(loss, functools.partial):
            loss, held = loss.func, [*held, *loss.args, *loss.keywords.values()]
        roots = (trainer, trainer.state, SimpleNamespace(held=[*held, getattr(loss, "__self__", None)]))
        owners = [(root, DEPTH) for root in roots] + self._add_module(trainer.model)
        mine, self.others = self.others, []  # `_add_module` has added those of the model
        # DeepSpeed's optimizer has flat partitions.
        moving, outside = split_by_optimizer(mine, None if trainer.is_deepspeed_enabled else optimizer)
        self.trained = [parameter for parameter in (*moving, *outside) if parameter.requires_grad]
        devices = {p.device for p in mine} | {trainer.accelerator.device}  # where offloaded parameters compute
        if trainer.args.n_gpu > 1:  # DataParallel runs replicas on every visible device
            devices |= {torch.device("cuda", index) for index in range(trainer.args.n_gpu)}
        self.devices = sorted((device for device in devices if device.type not in ("cpu", "meta")), key=str)
        for owner, depth in owners:  # grows
            for value in values_in(attributes_of(owner).values(), seen):
                kind = type(value)
                if issubclass(kind, nn.Module):
                    owners += self._add_module(value)
                elif issubclass(kind, torch.Tensor):
                    if isinstance(value, nn.Parameter):
                        self.others.append(value)
                    if value.numel() > SMALL and value.grad_fn is None and is_plain(value):
                        self.tensors.append(value)
                elif depth and (is_users(kind) or issubclass(kind, STEPPED)) and hasattr(value, "__dict__"):
                    owners.append((value, depth - 1))
        self.owners = [owner for owner, _ in owners]  # whose attributes are restored
        known = set(map(id, (*mine, *outside))) if self.others else set()
        self.others = [p for p in self.others if p.requires_grad and id(p) not in known]

    def _add_module(self, module: nn.Module) -> list[tuple[Any, int]]:
        """Add a module and its children, and return those whose attributes are restored."""
        new = [] if module in self.modules else [m for m in modules_of(module) if m not in self.modules]
        self.modules.update(dict.fromkeys(new))
        self.others += parameters_of(new)
        self.buffers += [module._buffers for module in new if module._buffers]
        # In transformers an attribute may belong to a buffer, as in dynamic RoPE.
        owners = [m for m in new if is_users(type(m)) or (m._buffers and not type(m).__module__.startswith("torch."))]
        return [(owner, DEPTH - 1) for owner in owners]


class Snapshot:
    """Record the random generators, and the attributes of `found.owners`, at construction."""

    def __init__(self, found: Found, running: Restorer | None = None):
        """
        Args:
            running: Restores the running tensors, for a window's first micro-batch. If None, buffers keep what the
                second pass has written since, and so do attributes that have such tensors.
        """
        self._attributes = [(owner, attributes_of(owner)) for owner in found.owners]
        self.restorers = global_generators(found.devices)
        if running is not None:
            self.restorers += [running, *(restorer for buffers in found.buffers for restorer in restorers(buffers))]
        self._uncopied: list[tuple[torch.Tensor, int]] = []  # large or with a graph; with version counters
        copies: list[Pair] = []
        weights = functools.cache(lambda: storages_of(found.trained))
        values = [value for _, attributes in self._attributes for value in attributes.values()]
        for value in values_in(values, set()):
            if not isinstance(value, torch.Tensor):
                self.restorers += restorers(value)
            elif value.numel() <= SMALL and value.grad_fn is None and is_plain(value):
                if storage_address(value) not in weights():
                    copies.append((value, local_part(value).detach().clone()))
            elif running is None and not value.is_inference():
                self._uncopied.append((value, value._version))
        self.restorers.append(functools.partial(put_back, copies))

    def put_back(self) -> None:
        """Restore all of it."""
        written = {id(tensor) for tensor, version in self._uncopied if tensor._version != version}
        for owner, before in self._attributes:
            now, kind = vars(owner), cast(Any, type(owner))
            new = [name for name in now.keys() - before.keys() if _is_watched(name, kind)]
            if all(_is_made_anew(now[name]) for name in new):
                for name in new:
                    del now[name]  # the pass created it
            now.update({name: value for name, value in before.items() if name not in now or id(value) not in written})
        for restore in self.restorers:
            restore()


def _is_made_anew(value: Any) -> bool:
    """Return whether a pass creates a missing attribute again. False for modules and objects of libraries."""
    is_value = isinstance(value, (*SCALARS, torch.Tensor, np.ndarray, *CONTAINERS, *GENERATORS))
    return is_value or (is_users(type(value)) and not isinstance(value, nn.Module))


def global_generators(devices: list[torch.device]) -> list[Restorer]:
    """Return functions that restore the global generators of Python, NumPy, and torch on the CPU and on `devices`."""
    found: list[Restorer] = [
        functools.partial(random.setstate, random.getstate()),
        functools.partial(np.random.set_state, np.random.get_state()),
        functools.partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    for device in devices:
        module, index = torch.get_device_module(device), () if device.type == "mps" else (device,)  # MPS has one
        found.append(functools.partial(module.set_rng_state, module.get_rng_state(*index), *index))
    return found


def restorers(value: Any) -> Iterator[Restorer]:
    """Yield what restores, in place, the present contents of a container, an array or a generator."""
    if isinstance(value, dict):
        yield functools.partial(_refill, value, dict(value.items()))
    elif isinstance(value, list | set | deque):
        yield functools.partial(_refill, value, list(value))
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


def _refill(container: Any, held: Any) -> None:
    """Put the items back into a container that has others now."""
    is_dict = isinstance(container, dict)
    pairs = [(container, held), (container.values(), held.values())] if is_dict else [(container, held)]
    if len(container) == len(held) and all(all(map(operator.is_, *pair)) for pair in pairs):
        return
    # The methods of its own class may refuse, such as those of a ModelOutput.
    own: Any = next(kind for kind in (OrderedDict, dict, set, list, deque) if isinstance(container, kind))
    own.clear(container)
    (own.update if hasattr(own, "update") else own.extend)(container, held)


def tensors_on_parameters(parameters: Sequence[nn.Parameter]) -> set[tuple[int, str, int, int]]:
    """Return a mark of each tensor and each list that is an attribute of a parameter. A write changes the mark."""
    return {
        (id(parameter), name, id(value), value._version if isinstance(value, torch.Tensor) else len(value))
        for parameter in parameters
        for name, value in parameter.__dict__.items()
        if isinstance(value, torch.Tensor | list) and not name.startswith(OF_ENGINES)
    }
