"""The window of one perturbation: its micro-batches as prepared, to be run again exactly as the first time."""

import contextlib
import copy
import functools
import types
from collections import UserDict, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from hf_gnp.engines.dtensors import gradients_hidden

from .buffers import RunningTensors, addresses, budget_of
from .contents import GENERATORS, OPAQUE, Held
from .owners import (
    find_large_tensors,
    find_modules,
    find_owners,
    find_parameters_beside,
    find_trained,
    is_users_object,
)
from .randomness import RandomState, random_devices
from .side_effects import PythonState


@dataclass
class MicroBatch:
    """One call of `compute_loss` by `Trainer.training_step`: its arguments, copied, and what stood around it."""

    inputs: Any
    num_items_in_batch: torch.Tensor | int | None
    accumulation_steps: int | None
    random_state: RandomState
    python_state: PythonState
    forward_loss: torch.Tensor | None = None  # what compute_loss returned
    loss: torch.Tensor | None = None  # what training_step returned
    has_gradient: bool = False  # whether its backward has ended
    first_rows: Any = None  # the inputs of the first pass, if it ran on a part of them only

    @property
    def inputs_of_first_pass(self) -> Any:
        return self.inputs if self.first_rows is None else self.first_rows


class Deferred(NamedTuple):
    """A call of `compute_loss` that waits for the weights to be moved: the one pass of its micro-batch."""

    inputs: Any
    num_items_in_batch: torch.Tensor | int | None
    accumulation_steps: int | None
    inputs_of_first_pass: None = None


class Window:
    """
    The micro-batches since the last penalised step, and the state that their passes move: those that had a first pass,
    and those that wait.

    Inputs are copied before the first pass, which may write into them: some stock models clamp theirs in place.

    Args:
        trainer: Whose attributes, modules and generators are put back after a second pass.
    """

    def __init__(self, trainer: Any, model: torch.nn.Module):
        self._trainer = trainer
        self.devices = random_devices(trainer, model)
        self.micro_batches: list[MicroBatch] = []
        self.deferred: list[Deferred] = []
        self.tensors = RunningTensors()
        self._owners: list[Any] = []
        self._trained: list[torch.nn.Parameter] = []
        self._weights: set[int] = set()  # their storage addresses
        self._beside: list[torch.nn.Parameter] = []
        self._holds = Held(0)

    def record(
        self,
        inputs: Any,
        num_items_in_batch: torch.Tensor | int | None,
        accumulation_steps: int | None,
        is_penalised: bool,
    ) -> MicroBatch:
        """Remember a micro-batch, before its first pass; what that moves, if there will be a second."""
        if not self.micro_batches:
            self._owners = find_owners(self._trainer)
            self._trained = find_trained(self._trainer)
            self._weights = addresses(self._trained)
            self._holds = Held(budget_of(self._trained))
            if is_penalised:
                large = find_large_tensors(self._owners)
                self.tensors.start(find_modules(self._owners), self._trained, large, self._trainer.state.global_step)
                self._beside = find_parameters_beside(self._trainer, self._owners, self._trained)
        state = RandomState(self.devices), self._python_state(self._holds)
        micro_batch = MicroBatch(copied(inputs), num_items_in_batch, accumulation_steps, *state)
        self.micro_batches.append(micro_batch)
        return micro_batch

    def drop_unfinished(self) -> None:
        """Forget the last micro-batch if a subclass has caught what its forward or backward raised."""
        if self.micro_batches and not self.deferred and not self.micro_batches[-1].has_gradient:
            del self.micro_batches[-1]

    def __len__(self) -> int:
        return len(self.micro_batches) + len(self.deferred)

    def loss(self) -> torch.Tensor:
        """The clean loss of the first passes: the sum over micro-batches, as `Trainer` sums them."""
        losses: list[Any] = [micro_batch.loss for micro_batch in self.micro_batches]
        return sum(losses)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """
        Around passes of which only the gradient stays: on leaving, all state is as the first pass left it. What moved
        in it is known (`tensors.end`).
        """
        random_state = RandomState(self.devices)
        python_state = self._python_state(lambda value: True)
        try:
            with self.tensors.kept(), self.gradients_beside_hidden():
                yield
        finally:
            random_state.restore()
            python_state.put_back()

    def gradients_beside_hidden(self) -> contextlib.AbstractContextManager[None]:
        """`gradients_hidden` of the parameters that no step of the trainer's moves."""
        return gradients_hidden(self._beside)

    def _python_state(self, keeps: Callable[[Any], bool]) -> PythonState:
        moved = self._weights | addresses(parameter.grad for parameter in self._trained)
        return PythonState(self._owners, moved, keeps)

    def replayed(self) -> Iterator[MicroBatch]:
        """The micro-batches again, each in the state that it had."""
        if self.micro_batches:
            self.tensors.rewind()
        for number, micro_batch in enumerate(tuple(self.micro_batches)):
            micro_batch.random_state.restore()
            micro_batch.python_state.put_back(written=number == 0)
            yield micro_batch

    def clear(self) -> None:
        self.micro_batches.clear()
        self.deferred.clear()
        self.tensors.drop()
        self._owners, self._trained, self._weights, self._beside = [], [], set(), []
        self._holds = Held(0)


def copied(inputs: Any) -> Any:
    """
    `inputs` with new containers, objects of the user's, tensors and arrays; one in two places is one again. Not
    parameters.
    """
    copies: dict[int, torch.Tensor | np.ndarray] = {}

    def copy_tensor(tensor: torch.Tensor | np.ndarray) -> torch.Tensor | np.ndarray:
        if id(tensor) not in copies:
            if isinstance(tensor, np.ndarray):
                copies[id(tensor)] = tensor.copy()
            elif isinstance(tensor, nn.Parameter):
                copies[id(tensor)] = tensor
            elif tensor.grad_fn is not None:
                raise NotImplementedError(
                    "The inputs of compute_loss have a graph: what was computed from weights before cannot be "
                    "computed again at moved ones. Compute it in compute_loss or in the model's forward, detach it, "
                    "or set gnp_alpha=0."
                )
            else:
                copies[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return copies[id(tensor)]

    return map_tensors(copy_tensor, inputs)


def map_tensors(function: Callable[[Any], Any], data: Any, done: dict[int, Any] | None = None) -> Any:
    """
    `data` in new containers and objects of the user's, with `function` of its tensors and arrays.

    Args:
        done: Copies of objects, by the id of the original: an object may refer to what holds it.
    """
    if type(data) in OPAQUE:
        return data
    if isinstance(data, torch.Tensor | np.ndarray):
        return function(data)
    done = {} if done is None else done
    if id(data) in done:
        return done[id(data)]
    mapped = functools.partial(map_tensors, function, done=done)
    if isinstance(data, dict | UserDict):  # whose attributes stay, as those of a BatchEncoding
        result: Any = copy.copy(data)
        for key, value in data.items():
            result[key] = mapped(value)
        return result
    if isinstance(data, Mapping):
        kind: Any = type(data)
        return kind({key: mapped(value) for key, value in data.items()})
    if isinstance(data, tuple | list):
        values = [mapped(value) for value in data]
        return type(data)(*values) if hasattr(data, "_fields") else type(data)(values)
    if isinstance(data, set | deque):
        result = copy.copy(data)
        result.clear()
        (result.update if isinstance(data, set) else result.extend)(map(mapped, data))
        return result
    if isinstance(data, GENERATORS):
        return data.clone_state() if isinstance(data, torch.Generator) else copy.deepcopy(data)
    is_data = is_dataclass(data) and not isinstance(data, type)
    is_object = is_users_object(data) and not isinstance(data, torch.utils.data.Dataset)
    if is_data or is_object or isinstance(data, types.SimpleNamespace):  # a forward may set its attributes
        result = done[id(data)] = _copy_of_object(data)
        if result is data:
            return data
        if is_data:
            for field in fields(data):
                object.__setattr__(result, field.name, mapped(getattr(data, field.name)))
        else:
            vars(result).update((name, mapped(value)) for name, value in vars(data).items())
        return result
    return data


def _copy_of_object(data: Any) -> Any:
    """Itself where it has no copy: a member of an Enum, a handle of an open file."""
    try:
        return copy.copy(data)
    except TypeError:
        return data


def first_rows(inputs: Any, count: Callable[[int], int]) -> Any:
    """
    The first rows of a micro-batch, as views.

    Args:
        count: How many of so many rows.

    Returns:
        `inputs` in new containers.

    Raises:
        ValueError: where not every tensor has the batch in its first dimension.
    """
    sizes: set[int] = set()

    def note_size(data: torch.Tensor | np.ndarray) -> None:
        if isinstance(data, torch.Tensor):
            sizes.add(_rows(data))

    map_tensors(note_size, inputs)
    if len(sizes) != 1 or -1 in sizes:
        found = ", ".join(str(size) if size >= 0 else "a scalar" for size in sorted(sizes))
        raise ValueError(
            "gnp_ascent_fraction without accumulation takes the first rows of a micro-batch, but not every tensor of "
            f"its inputs has the batch in its first dimension (found {found}): set gradient_accumulation_steps to 2 "
            "or more."
        )
    (rows,) = sizes
    first = map_tensors(lambda data: data[: count(rows)] if _rows(data) == rows else data, inputs)
    if isinstance(first, MutableMapping):  # texts beside the tensors
        lists = [name for name, value in first.items() if isinstance(value, list) and len(value) == rows]
        for name in lists:
            first[name] = first[name][: count(rows)]
    return first


def _rows(data: torch.Tensor | np.ndarray) -> int:
    return len(data) if data.ndim else -1
