"""
Tensors that a pass changes without a gradient.

Candidates are buffers, parameters that nothing trains (frozen, or not reached by the loss of the last window), and
large tensors in attributes, such as a queue. A momentum teacher has such parameters. Names and version counters do not
tell which change: `batch_norm` and `.data` write without a new version.

- In the first `LEARNING` penalised steps of a run, candidates are copied before the first pass and compared after it.
  The smallest come first, up to `BUDGET` or the size of the trainable weights (that of a teacher) if it is larger.
- From then on, copies are made of those that changed, and of small buffers.
- The others, such as quantised base weights, are watched. One that is replaced, gets a new version, or changes in a
  sample of its elements is copied from the next window on.
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from hf_gnp import penalty
from hf_gnp.tensors import local_part


SMALL = 2**14  # elements: buffers, and tensors in attributes, up to this size are copied in each window
BUDGET = 2**26  # bytes
LEARNING = 2  # penalised steps: a teacher that starts as a copy of the weights does not change in the first
SAMPLE = 256  # elements at most
TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)

Pair = tuple[torch.Tensor, torch.Tensor]  # a tensor, and a copy
Buffers = tuple[nn.Module, dict[str, torch.Tensor | None]]  # a module, and its buffers by name


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether the elements can be copied, compared as bytes and written in place, and ZeRO-3 leaves them."""
    local = local_part(tensor)
    if type(local) not in TENSORS or local.layout != torch.strided or local.device.type == "meta":
        return False
    if local.is_quantized or local.is_nested or local.is_inference() or hasattr(tensor, "ds_id"):
        return False
    # An expanded tensor has one element in several places.
    return all(stride > 0 or size == 1 for stride, size in zip(local.stride(), local.shape, strict=True))


def storage_address(tensor: torch.Tensor) -> int:
    """Return the address of a plain tensor's storage, which its views share."""
    return local_part(tensor).untyped_storage().data_ptr()


def storage_addresses(tensors: Iterable[torch.Tensor | None]) -> set[int]:
    """Return the addresses of the storages of plain tensors that have elements."""
    return {storage_address(tensor) for tensor in tensors if tensor is not None and is_plain(tensor)} - {0}


class _Candidate(NamedTuple):
    """Hold a tensor, and its elements before the window: all of them, or a sample."""

    tensor: torch.Tensor
    mark: tuple[int, int] | None  # of the tensor before the window. None if it is copied in each
    elements: torch.Tensor
    is_whole: bool

    def has_changed(self) -> torch.Tensor:
        local = local_part(self.tensor)
        return (_bytes(local if self.is_whole else _sample(local)) != _bytes(self.elements)).any()


class RunningTensors:
    """Restore buffers, frozen parameters and large attributes before the second pass and after it."""

    def __init__(self) -> None:
        self._moving: set[int] = set()  # ids of tensors that have changed
        self._unreached: set[int] = set()  # ids of parameters that had no gradient in the last window
        self._steps: set[int] = set()  # the first penalised ones
        self.forget()

    @property
    def is_learning(self) -> bool:
        return len(self._steps) <= LEARNING

    def forget(self) -> None:
        """Release all tensors, but remember which change."""
        self._trained: Sequence[nn.Parameter] = ()
        self._modules: set[nn.Module] = set()
        self._buffers: list[Buffers] = []
        self._candidates: list[_Candidate] = []
        self._unsure: list[_Candidate] = []
        self._may_change_later: list[Pair] = []

    @torch.no_grad()
    def start(
        self,
        modules: Collection[nn.Module],
        trained: Sequence[nn.Parameter] = (),
        others: Iterable[torch.Tensor] = (),
        step: int = 0,
    ) -> None:
        """Copy or watch all candidates before the first pass of a window. The engine restores the `trained` ones."""
        self.forget()
        self._trained = trained
        if self.is_learning:
            self._steps.add(step)
        reached = {id(parameter): parameter for parameter in trained if id(parameter) not in self._unreached}
        found = {id(tensor): tensor for tensor in others}
        copied = set(self._moving)
        self._modules = set(modules)
        for module in modules:
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) not in reached:
                    found[id(parameter)] = parameter
            for buffer in module._buffers.values():
                if buffer is not None:
                    found[id(buffer)] = buffer
                    if buffer.numel() <= SMALL:
                        copied.add(id(buffer))
            if module._buffers and isinstance(module._buffers, dict):  # TorchScript's cannot be replaced
                self._buffers.append((module, dict(module._buffers)))
        may_share = any(tensor.dtype.is_floating_point or tensor.dtype.is_complex for tensor in found.values())
        weights = storage_addresses(reached.values()) if may_share else set()
        plain = [tensor for tensor in found.values() if is_plain(tensor) and storage_address(tensor) not in weights]
        self._left = max(BUDGET, sum(map(_size, trained))) if self.is_learning else -1  # bytes left of the budget
        for tensor in sorted(plain, key=_size):
            local, mark = local_part(tensor), None if id(tensor) in copied else _mark(tensor)
            self._left -= _size(tensor)
            is_whole = self._left >= 0 or mark is None
            self._candidates.append(_Candidate(tensor, mark, local.clone() if is_whole else _sample(local), is_whole))

    @torch.no_grad()
    def compare(self) -> torch.Tensor:
        """Return flags on the device that tell which tensors the first pass changed. `end` takes them on the host."""
        # A write counts even if no element changes, as in a teacher that still equals the weights.
        self._unsure = [candidate for candidate in self._candidates if candidate.mark == _mark(candidate.tensor)]
        flags = [candidate.has_changed() for candidate in self._unsure]
        return torch.stack([flag.to(flags[0].device) for flag in flags]) if flags else torch.zeros(0)

    @torch.no_grad()
    def end(self, compared: Sequence[bool]) -> None:
        """Learn from the flags of `compare`, read from the device, which tensors the first pass changed."""
        pairs = zip(self._unsure, compared, strict=True)
        unchanged = {id(candidate.tensor): candidate for candidate, has_changed in pairs if not has_changed}
        reached = {id(p) for p in self._trained if p.grad is not None}  # the engine restores these
        known = unchanged.keys() | reached
        self._candidates = [candidate for candidate in self._candidates if id(candidate.tensor) not in known]
        self._moving |= {id(candidate.tensor) for candidate in self._candidates if candidate.mark is not None}
        # ZeRO keeps no `grad`.
        unreached = {id(p): p for p in self._trained if id(p) not in reached} if reached else {}
        # If a teacher still equals the weights, only the second pass, at θ + e, changes it.
        whole = [c for c in unchanged.values() if c.is_whole and c.elements.is_floating_point()]
        new = [p for number, p in unreached.items() if number not in self._unreached and is_plain(p)]
        self._may_change_later = [(local_part(c.tensor), c.elements) for c in whole]
        for parameter in sorted(new, key=_size):
            self._left -= _size(parameter)
            if self._left >= 0:
                self._may_change_later.append((local_part(parameter), local_part(parameter).clone()))
        self._unreached, self._unsure = set(unreached), []

    def rewind(self) -> None:
        """Restore the state before the first pass."""
        put_back([(local_part(c.tensor), c.elements) for c in self._candidates if c.is_whole], self._buffers)

    @contextlib.contextmanager
    def left_as_found(self, modules: Iterable[nn.Module] = ()) -> Iterator[None]:
        """Restore the present state, that after the first pass, on leaving. `modules` may have new ones."""
        buffers = [(module, dict(module._buffers)) for module, _ in self._buffers]
        tensors = [local_part(candidate.tensor) for candidate in self._candidates]
        new = [module for module in modules if module not in self._modules]
        trained = set(map(id, self._trained)) if new else set()
        made = [tensor for module in new for tensor in (*module._parameters.values(), *module._buffers.values())]
        tensors += [local_part(t) for t in made if t is not None and id(t) not in trained and is_plain(t)]
        values = [(tensor, tensor.detach().clone()) for tensor in tensors] + self._may_change_later
        try:
            yield
        finally:
            put_back(values, buffers)


@torch.no_grad()
def put_back(values: list[Pair], buffers: Iterable[Buffers] = ()) -> None:
    """Set tensors to their copies, and the buffers of modules to the same tensors as before."""
    for module, before in buffers:
        now = module._buffers
        if now.keys() != before.keys() or any(now[name] is not buffer for name, buffer in before.items()):
            now.clear()
            now.update(before)
    for tensor, value in values:
        if tensor.shape != value.shape:  # resized in place, as observers for quantisation do
            tensor.data = torch.empty_like(value)
    penalty.copy_([tensor for tensor, _ in values], [value for _, value in values])


def _mark(tensor: torch.Tensor) -> tuple[int, int]:
    return local_part(tensor).data_ptr(), tensor._version


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _sample(local: torch.Tensor) -> torch.Tensor:
    """Return a copy of evenly spaced elements of a tensor."""
    flat = local.detach().flatten()  # a view if contiguous, as large tensors are
    size = min(max(1, len(flat) // 4096), SAMPLE)
    return flat[:: max(1, len(flat) // size)].clone(memory_format=torch.contiguous_format)


def _size(tensor: torch.Tensor) -> int:
    return local_part(tensor).numel() * tensor.element_size()
