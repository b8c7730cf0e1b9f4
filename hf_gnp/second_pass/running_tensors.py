"""
Tensors that a pass changes without a gradient.

Candidates are buffers, parameters that nothing trains (frozen, or not reached by the loss of the last window), and
large tensors in attributes, such as a queue. A momentum teacher has such parameters. Names and version counters do not
tell which change: `batch_norm` and `.data` write without a new version.

- In the first `LEARNING` penalised steps of a run, candidates are copied before the first pass and compared after it.
  The smallest come first, up to `BUDGET` or the size of the trainable weights (that of a teacher) if it is larger.
- From then on, copies are made of those that changed, of small buffers, and of statistics of normalisation layers.
- The others, such as quantised base weights, are watched. One that is replaced, gets a new version, or changes in a
  sample of its elements is copied from the next window on.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from hf_gnp import penalty
from hf_gnp.tensors import local_part

from .contents import addresses, is_dense, storage_address


BUDGET = 2**26  # bytes
SMALL_BUFFER = 2**16  # bytes: buffers up to this size are copied in each window
LEARNING = 2  # penalised steps: a teacher that starts as a copy of the weights does not change in the first
SAMPLE = 256  # elements at most

Pair = tuple[torch.Tensor, torch.Tensor]  # a tensor, and a copy


class _Watched(NamedTuple):
    """Hold a tensor, and its state before the window: a `copy` of all of it, or a `sample` of its elements."""

    tensor: torch.Tensor
    storage: int
    version: int
    copy: torch.Tensor | None
    sample: torch.Tensor | None

    def has_moved(self) -> torch.Tensor | bool:
        local = local_part(self.tensor)
        if (local.data_ptr(), self.tensor._version) != (self.storage, self.version):
            return True  # a write counts even if no element changes, as in a teacher that still equals the weights
        now, before = (local, self.copy) if self.sample is None else (_sample(local), self.sample)
        return before is not None and (_bytes(now) != _bytes(before)).any()


class RunningTensors:
    """Restore buffers, frozen parameters and large attributes before the second pass and after it."""

    def __init__(self) -> None:
        self._moving: set[int] = set()  # ids of tensors that have changed
        self._unreached: set[int] = set()  # ids of parameters that had no gradient in the last window
        self._step: int | None = None
        self._steps = 0  # penalised steps so far
        self._left = 0  # bytes left of the budget
        self.forget()

    def forget(self) -> None:
        """Release all tensors, but remember which change."""
        self._trained: Sequence[nn.Parameter] = ()
        self._buffers: list[tuple[nn.Module, dict[str, torch.Tensor | None]]] = []
        self._always: list[Pair] = []  # copied in each window
        self._watched: list[_Watched] = []
        self._flags: list[torch.Tensor | bool] = []
        self._still: list[Pair] = []

    @torch.no_grad()
    def start(
        self,
        modules: Sequence[nn.Module],
        trained: Sequence[nn.Parameter] = (),
        others: Iterable[torch.Tensor] = (),
        step: int = 0,
    ) -> None:
        """
        Copy or watch all candidates before the first pass of a window.

        Args:
            trained: The trainable parameters of the model and of the optimizer. The engine restores them.
            others: Other tensors that a pass may write into.
            step: The number of the window's step.
        """
        self._steps += step != self._step
        self._step, self._trained = step, trained
        # Buffers of TorchScript modules cannot be replaced, only written in place.
        self._buffers = [(m, dict(m._buffers)) for m in modules if m._buffers and isinstance(m._buffers, dict)]
        self._left = budget_of(trained) if self._steps <= LEARNING else -1
        self._always, self._watched = [], []
        found, always = self._find(modules, others)
        for tensor in sorted(found, key=_size):
            self._left -= _size(tensor)
            if id(tensor) in always or id(tensor) in self._moving:
                self._always.append((local_part(tensor), local_part(tensor).clone()))
                continue
            local = local_part(tensor)
            copy = local.clone() if self._left >= 0 else None
            sample = _sample(local) if copy is None else None
            self._watched.append(_Watched(tensor, local.data_ptr(), tensor._version, copy, sample))

    def _find(
        self, modules: Iterable[nn.Module], others: Iterable[torch.Tensor]
    ) -> tuple[list[torch.Tensor], set[int]]:
        """Return the candidates that share no memory with weights, and the ids of those that are always copied."""
        reached = {id(parameter) for parameter in self._trained} - self._unreached
        found = {id(tensor): tensor for tensor in others}
        always: set[int] = set()
        for module in modules:
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) not in reached and not hasattr(parameter, "ds_id"):
                    found[id(parameter)] = parameter
            if module._buffers:
                is_norm = isinstance(module, _NormBase)
                for buffer in module._buffers.values():
                    if buffer is not None:
                        found[id(buffer)] = buffer
                        if is_norm or _size(buffer) <= SMALL_BUFFER:
                            always.add(id(buffer))
        weights = set()
        if any(tensor.dtype.is_floating_point or tensor.dtype.is_complex for tensor in found.values()):  # as weights
            weights = addresses(parameter for parameter in self._trained if id(parameter) in reached)
        return [t for t in found.values() if is_dense(t) and storage_address(t) not in weights], always

    @torch.no_grad()
    def compare(self) -> torch.Tensor:
        """Return flags on the device that tell which tensors the first pass changed. `end` takes them on the host."""
        self._flags = [watched.has_moved() for watched in self._watched]
        tensors = [flag for flag in self._flags if isinstance(flag, torch.Tensor)]
        return torch.stack([flag.to(tensors[0].device) for flag in tensors]) if tensors else torch.zeros(0)

    @torch.no_grad()
    def end(self, compared: Sequence[bool]) -> None:
        """Learn from the flags of `compare`, read from the device, which tensors the first pass changed."""
        read = iter(compared)
        moved = [next(read) if isinstance(flag, torch.Tensor) else flag for flag in self._flags]
        reached = {id(parameter) for parameter in self._trained if parameter.grad is not None}
        mine = [pair for pair in zip(self._watched, moved, strict=True) if id(pair[0].tensor) not in reached]
        self._watched = [watched for watched, has_moved in mine if has_moved]
        self._moving |= {id(watched.tensor) for watched in self._watched}
        unreached = [p for p in self._trained if id(p) not in reached] if reached else []  # ZeRO keeps no `grad`
        if self._steps <= LEARNING:
            # If a teacher still equals the weights, only the second pass, at θ + e, changes it.
            still = [(local_part(w.tensor), w.copy) for w, has_moved in mine if w.copy is not None and not has_moved]
            self._still = [(tensor, copy) for tensor, copy in still if copy.is_floating_point()]
            self._still += self._copies_of([p for p in unreached if id(p) not in self._unreached])
        self._unreached = {id(parameter) for parameter in unreached}

    def _copies_of(self, tensors: Iterable[torch.Tensor]) -> Iterator[Pair]:
        """Yield copies, of the smallest tensors first, up to the rest of the budget."""
        for tensor in sorted(filter(is_dense, tensors), key=_size):
            self._left -= _size(tensor)
            if self._left >= 0:
                yield local_part(tensor), local_part(tensor).clone()

    def rewind(self) -> None:
        """Restore the state before the first pass."""
        copies = [(local_part(w.tensor), w.copy) for w in self._watched if w.copy is not None]
        _put_back(self._buffers, [*self._always, *copies])

    @contextlib.contextmanager
    def left_as_found(self) -> Iterator[None]:
        """Restore the present state, that after the first pass, on leaving."""
        buffers = [(module, dict(module._buffers)) for module, _ in self._buffers]
        tensors = [tensor for tensor, _ in self._always] + [local_part(w.tensor) for w in self._watched]
        old = {id(buffer) for _, before in self._buffers for buffer in before.values()}
        replaced = (b for _, now in buffers for b in now.values() if b is not None and id(b) not in old)
        tensors += [buffer for buffer in replaced if is_dense(buffer)]
        values = [(tensor, tensor.clone()) for tensor in tensors] + self._still
        try:
            yield
        finally:
            _put_back(buffers, values)


@torch.no_grad()
def _put_back(buffers: list[tuple[nn.Module, dict[str, torch.Tensor | None]]], values: list[Pair]) -> None:
    for module, before in buffers:
        now = module._buffers
        if now.keys() != before.keys() or any(now[name] is not buffer for name, buffer in before.items()):
            now.clear()
            now.update(before)
    same = [(tensor, value) for tensor, value in values if tensor.shape == value.shape]
    penalty.copy_([tensor for tensor, _ in same], [value for _, value in same])
    for tensor, value in values:
        if tensor.shape != value.shape:  # resized in place, as observers for quantisation do
            tensor.data = value.clone()


def budget_of(trained: Iterable[torch.Tensor]) -> int:
    """Return how many bytes of tensors may be copied, and of attributes held, in a window."""
    return max(BUDGET, sum(map(_size, trained)))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _sample(local: torch.Tensor) -> torch.Tensor:
    """Return a copy of evenly spaced elements of a tensor."""
    flat = local.detach().flatten()  # a view if contiguous, as large tensors are
    size = min(max(1, len(flat) // 4096), SAMPLE)
    return flat[:: max(1, len(flat) // size)].clone(memory_format=torch.contiguous_format)


def _size(tensor: torch.Tensor) -> int:
    return local_part(tensor).numel() * tensor.element_size()
