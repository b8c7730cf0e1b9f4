"""Buffers that a forward moves: put back for the second pass, and after it."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn


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
