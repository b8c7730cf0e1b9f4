"""The window of one optimizer step: its micro-batches, to be run again exactly as they ran the first time."""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn


class RandomState:
    """The random generators of Python, NumPy, and torch on the CPU and on `devices`, as they stand when it is made."""

    def __init__(self, devices: list[torch.device]):
        self.devices = devices
        self.python = random.getstate()
        self.numpy = np.random.get_state()
        self.cpu = torch.get_rng_state()
        self.accelerators = [_device_module(device).get_rng_state(*_index(device)) for device in devices]

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for device, state in zip(self.devices, self.accelerators, strict=True):
            _device_module(device).set_rng_state(state, *_index(device))


def _device_module(device: torch.device):
    return torch.get_device_module(device.type)


def _index(device: torch.device) -> tuple:
    return () if device.type == "mps" else (device,)  # the one device type with a single generator


def random_devices(model: nn.Module, n_gpu: int = 1) -> list[torch.device]:
    """The accelerators that draw random numbers in a forward of `model`: those of its parameters."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    if n_gpu > 1:  # DataParallel runs replicas on every visible device
        devices |= {torch.device("cuda", index) for index in range(n_gpu)}
    return sorted(devices, key=str)


@dataclass
class MicroBatch:
    """One call of `training_step`: its arguments, and what stood around it."""

    inputs: Any
    num_items_in_batch: torch.Tensor | int | None
    accumulation_steps: int | None
    random_state: RandomState
    versions: list[int]
    loss: torch.Tensor | None = None


class Window:
    """
    The micro-batches since the last optimizer step.

    A micro-batch is held by reference; its containers are new, so keys that a first pass adds or pops do not show.
    Where `copy_inputs` is set its tensors are copied too, which a loss that changes its inputs in place needs;
    elsewhere such a change is noticed by the tensors' version counters, and refused.
    """

    def __init__(self, devices: list[torch.device], copy_inputs: bool = False):
        self.devices = devices
        self.copy_inputs = copy_inputs
        self.micro_batches: list[MicroBatch] = []

    def record(
        self, inputs: Any, num_items_in_batch: torch.Tensor | int | None, accumulation_steps: int | None
    ) -> MicroBatch:
        """Remember a micro-batch, before its first pass."""
        inputs = map_tensors(torch.clone if self.copy_inputs else lambda tensor: tensor, inputs)
        state = RandomState(self.devices)
        micro_batch = MicroBatch(inputs, num_items_in_batch, accumulation_steps, state, _versions(inputs))
        self.micro_batches.append(micro_batch)
        return micro_batch

    def loss(self) -> torch.Tensor:
        """The clean loss of the window: the sum over its micro-batches, as `Trainer` sums them."""
        return sum(micro_batch.loss for micro_batch in self.micro_batches)

    @contextlib.contextmanager
    def replay(self) -> Iterator[Iterator[tuple[MicroBatch, bool]]]:
        """
        The micro-batches again, each with whether it is the last, each under the random state that it had. On leaving,
        the generators stand where the first pass left them.
        """
        end = RandomState(self.devices)
        try:
            yield self._replayed()
        finally:
            end.restore()

    def _replayed(self) -> Iterator[tuple[MicroBatch, bool]]:
        for index, micro_batch in enumerate(self.micro_batches):
            if _versions(micro_batch.inputs) != micro_batch.versions:
                raise RuntimeError(
                    "The first pass changed its inputs in place, so the second pass of the gradient-norm penalty "
                    "would not see the same ones: clone them in the model or the data collator before changing them."
                )
            micro_batch.random_state.restore()
            yield micro_batch, index == len(self.micro_batches) - 1

    def clear(self) -> None:
        self.micro_batches.clear()


def map_tensors(function: Callable[[torch.Tensor], Any], data: Any) -> Any:
    """`data` in new containers, those that `Trainer._prepare_input` descends into, with `function` of its tensors."""
    if isinstance(data, Mapping):
        return type(data)({key: map_tensors(function, value) for key, value in data.items()})
    if isinstance(data, tuple | list):
        return type(data)(map_tensors(function, value) for value in data)
    return function(data) if isinstance(data, torch.Tensor) else data


def _versions(inputs: Any) -> list[int]:
    versions: list[int] = []
    map_tensors(lambda tensor: versions.append(_version(tensor)), inputs)
    return versions


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Buffer(NamedTuple):
    """A buffer of a module: the tensor, and a copy of what it held. Both are None for a buffer that is None."""

    module: nn.Module
    name: str
    tensor: torch.Tensor | None
    value: torch.Tensor | None

    @classmethod
    def now(cls, module: nn.Module, name: str) -> "Buffer":
        tensor = getattr(module, name)
        return cls(module, name, tensor, None if tensor is None else tensor.clone())

    def put_back(self) -> None:
        if self.tensor is not None:
            self.tensor.copy_(self.value)
        if getattr(self.module, self.name) is not self.tensor:  # a forward replaced it
            setattr(self.module, self.name, self.tensor)

    def differs(self) -> torch.Tensor | bool:
        now = getattr(self.module, self.name)
        if now is None or self.value is None or now.shape != self.value.shape:
            return now is not self.value
        return (now != self.value).any()


class RunningBuffers:
    """
    The buffers that a training forward moves: BatchNorm's statistics, power-iteration vectors, usage counters. Neither
    names nor version counters tell which, so all are copied before the first pass, and compared after it.
    """

    def __init__(self, model: nn.Module):
        self._places = [(module, name) for module in model.modules() for name in module._buffers]
        self._start: list[Buffer] = []

    def start(self) -> None:
        """Before the first pass."""
        self._start = [Buffer.now(module, name) for module, name in self._places]

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """Around the second pass: it starts from the buffers that the first pass started from, and moves none."""
        self._start = _moved(self._start)
        end = [Buffer.now(buffer.module, buffer.name) for buffer in self._start]
        try:
            _put_back(self._start)
            yield
        finally:
            _put_back(end)
            self._start = []


@torch.no_grad()
def _put_back(buffers: list[Buffer]) -> None:
    for buffer in buffers:
        buffer.put_back()


def _moved(buffers: list[Buffer]) -> list[Buffer]:
    if not buffers:
        return []
    device = next((b.value.device for b in buffers if b.value is not None), None)
    differ = torch.stack([torch.as_tensor(buffer.differs(), device=device) for buffer in buffers]).tolist()
    return [buffer for buffer, differs in zip(buffers, differ, strict=True) if differs]
