"""
Tensors that a pass changes without a gradient.

Candidates are buffers, parameters that nothing trains (frozen, or not reached by the loss of the last window), and
large tensors in attributes. In the first `LEARNING` penalised steps of a run, those within a budget are copied before
the first pass and compared after it. From then on, those that changed and small buffers are copied. The others, such
as quantised base weights, are watched. If one is replaced, gets a new version, or changes in a sample of its elements,
the window has no second pass, and from the next window on the tensor is copied. Versions alone do not tell:
`batch_norm` and `.data` write without one.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_gnp import penalty
from hf_gnp.tensors import local_part


SMALL = 2**14  # elements: buffers, and arrays and tensors in attributes, up to this size are copied in each window
BUDGET = 2**26  # bytes, in addition to the size of the trainable weights, which is that of a teacher
LEARNING = 2  # penalised steps: a teacher that starts as a copy of the weights does not change in the first
SAMPLE = 256  # elements at most

Pair = tuple[torch.Tensor, torch.Tensor]  # a tensor, and a copy of its local part
Restorer = Callable[[], Any]


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether the elements can be copied, compared as bytes and written in place, and ZeRO-3 leaves them."""
    local = local_part(tensor)
    if type(local) not in (torch.Tensor, nn.Parameter) or local.layout != torch.strided or local.device.type == "meta":
        return False
    if local.is_quantized or local.is_nested or local.is_inference() or hasattr(tensor, "ds_id"):
        return False
    # An expanded tensor has one element in several places.
    return all(stride > 0 or size == 1 for stride, size in zip(local.stride(), local.shape, strict=True))


def storage_address(tensor: torch.Tensor) -> int:
    """Return the address of a plain tensor's storage, which its views share."""
    return local_part(tensor).untyped_storage().data_ptr()


def storages_of(parameters: Iterable[nn.Parameter]) -> set[int]:
    """Return the addresses of the storages of parameters and of their gradients, if these have elements."""
    tensors = [tensor for parameter in parameters for tensor in (parameter, parameter.grad)]
    return {storage_address(tensor) for tensor in tensors if tensor is not None and is_plain(tensor)} - {0}


class _Candidate(NamedTuple):
    """Hold a tensor, and its elements before the window: all of them, or a sample."""

    tensor: torch.Tensor
    mark: tuple[int, int] | None  # of the tensor before the window. None if it is copied in each
    elements: torch.Tensor
    is_whole: bool

    def has_changed(self) -> torch.Tensor:
        if self.mark != _mark(self.tensor):  # even if no element changes, as in a teacher that equals the weights
            return torch.ones((), dtype=torch.bool, device=self.elements.device)
        return (
            _bytes(local_part(self.tensor) if self.is_whole else _sample(self.tensor)) != _bytes(self.elements)
        ).any()


class RunningTensors:
    """Restore buffers, frozen parameters and large attributes before the second pass and after it."""

    def __init__(self) -> None:
        self._moving: set[int] = set()  # ids of tensors that have changed
        self._unreached: set[int] = set()  # ids of parameters that had no gradient in the last window
        self._steps: set[int] = set()  # the first penalised ones
        self.is_learning = True
        self.forget()

    def forget(self) -> None:
        """Release all tensors, but remember which change."""
        self._trained: Sequence[nn.Parameter] = ()  # the engine restores these
        self._candidates: list[_Candidate] = []
        self._buffers: list[dict[str, Any]] = []  # of each module, by name
        self._noted: tuple[list[Any], list[dict[str, Any]]] = [], []  # marks of the candidates, and buffers

    @torch.no_grad()
    def start(self, found: Any, step: int = 0) -> Restorer:
        """Copy or watch candidates before the first pass of a window. Return what restores them before the second."""
        self.forget()
        if self.is_learning:
            self._steps.add(step)
            self.is_learning = len(self._steps) <= LEARNING
        for tensor, fits in self._candidates_of(found):
            is_small_buffer = tensor.numel() <= SMALL and not isinstance(tensor, nn.Parameter)
            mark = None if is_small_buffer or id(tensor) in self._moving else _mark(tensor)
            is_whole = fits or mark is None
            elements = local_part(tensor).clone() if is_whole else _sample(tensor)
            self._candidates.append(_Candidate(tensor, mark, elements, is_whole))
        self._trained, self._buffers = found.trained, found.buffers
        # Not the present list: `end` removes what did not change.
        return lambda: put_back([(each.tensor, each.elements) for each in self._candidates if each.is_whole])

    def _candidates_of(self, found: Any) -> Iterator[tuple[torch.Tensor, bool]]:
        """Yield the candidates, parameters last and small ones first, and whether a copy fits into the budget."""
        reached = [parameter for parameter in found.trained if id(parameter) not in self._unreached]
        restored = set(map(id, reached))
        tensors = {id(tensor): tensor for tensor in found.tensors}
        for module in found.modules:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and id(tensor) not in restored:
                    tensors[id(tensor)] = tensor
        may_share = any(tensor.dtype.is_floating_point or tensor.dtype.is_complex for tensor in tensors.values())
        weights = storages_of(reached) if may_share else set()
        plain = [tensor for tensor in tensors.values() if is_plain(tensor) and storage_address(tensor) not in weights]
        left = BUDGET + sum(local_part(parameter).nbytes for parameter in found.trained) if self.is_learning else -1
        # Most parameters here are frozen weights, which do not change.
        for tensor in sorted(plain, key=lambda tensor: (isinstance(tensor, nn.Parameter), local_part(tensor).nbytes)):
            fits = local_part(tensor).nbytes <= left
            left -= fits * local_part(tensor).nbytes
            yield tensor, fits

    def note(self) -> None:
        """Note the tensors and their versions after a micro-batch, for `written`."""
        self._noted = [_mark(each.tensor) for each in self._candidates], [dict(buffers) for buffers in self._buffers]

    @torch.no_grad()
    def written(self) -> Iterator[Restorer]:
        """Yield what restores the tensors that code outside of `compute_loss` has written or replaced since `note`."""
        marks, noted = self._noted
        pairs = zip(self._candidates, marks, strict=False)  # no marks if nothing was noted
        written = [candidate.tensor for candidate, mark in pairs if mark != _mark(candidate.tensor)]
        for buffers, before in zip(self._buffers, noted, strict=False):
            new = {name: buffer for name, buffer in buffers.items() if buffer is not before.get(name)}
            if new:
                yield functools.partial(buffers.update, new)
            written += [buffer for buffer in new.values() if buffer is not None and is_plain(buffer)]
        yield functools.partial(put_back, [(tensor, local_part(tensor).clone()) for tensor in written])

    @torch.no_grad()
    def compare(self) -> torch.Tensor:
        """Return flags on the device that tell which tensors the first pass changed. `end` takes them on the host."""
        flags = [candidate.has_changed() for candidate in self._candidates if candidate.mark is not None]
        return torch.stack([flag.to(flags[0].device) for flag in flags]) if flags else torch.zeros(0)

    def end(self, compared: Sequence[bool]) -> bool:
        """
        Learn from the flags of `compare`, read from the device. Release the copies of what did not change.

        Return whether a tensor without a copy changed, so that the state before the first pass is lost.
        """
        flags, reached = iter(compared), {id(p) for p in self._trained if p.grad is not None}
        changed = [candidate for candidate in self._candidates if candidate.mark is None or next(flags)]
        self._candidates = [each for each in changed if id(each.tensor) not in reached]  # the engine restores these
        self._moving |= {id(candidate.tensor) for candidate in self._candidates if candidate.mark is not None}
        # ZeRO keeps no `grad`.
        self._unreached = {id(p) for p in self._trained} - reached if reached else set()
        return not all(candidate.is_whole for candidate in self._candidates)

    @torch.no_grad()
    def after(self, found: Any) -> Restorer:
        """Return what restores the tensors after the second pass. The first pass may have made some of `found`."""
        tensors = {id(candidate.tensor): candidate.tensor for candidate in self._candidates}
        if self.is_learning:  # if a teacher still equals the weights, only the second pass, at θ + e, changes it
            for tensor, fits in self._candidates_of(found):
                if fits and (tensor.is_floating_point() or tensor.numel() <= SMALL):
                    tensors[id(tensor)] = tensor
        return functools.partial(put_back, [(tensor, local_part(tensor).clone()) for tensor in tensors.values()])


@torch.no_grad()
def put_back(copies: list[Pair]) -> None:
    """Set tensors to their copies."""
    pairs = [(local_part(tensor), copy) for tensor, copy in copies]
    for local, copy in pairs:
        if local.shape != copy.shape:  # resized in place, as observers for quantisation do
            local.data = torch.empty_like(copy)
    penalty.copy_([local for local, _ in pairs], [copy for _, copy in pairs])


def _mark(tensor: torch.Tensor) -> tuple[int, int]:
    return local_part(tensor).data_ptr(), tensor._version


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of evenly spaced elements of a tensor."""
    flat = local_part(tensor).detach().flatten()  # a view if contiguous, as large tensors are
    return flat[:: max(4096, len(flat) // SAMPLE)].clone(memory_format=torch.contiguous_format)
