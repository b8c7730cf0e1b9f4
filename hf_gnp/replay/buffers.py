"""
The tensors that a forward moves without a gradient: buffers, and frozen parameters such as a momentum teacher's.

Neither names nor version counters tell which: `batch_norm` and `.data` write without a new version. So in the first
`LEARNING` penalised windows of a run they are copied before the first pass, the smallest first, as many as fit into
`BUDGET`, or into the size of the trainable weights (which a teacher has) if that is more, and compared after it. From
then on copies are made of those that were seen to move, and of the statistics of normalisation layers, which move when
their layer is set to training. The others, quantised base weights among them, are watched: one that is replaced, gets
a new version, or changes in a sample of its elements is copied from the next window on.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


BUDGET = 2**26  # bytes
LEARNING = 2  # penalised windows: a teacher that starts as a copy of the weights does not move in the first
SAMPLE = 256  # elements at most


class _Watched(NamedTuple):
    """
    A tensor and how it looked when the window began: `copy` of all of it, or else the `version` and the `storage` that
    it had and a `sample` of its elements. One that is not dense has neither and counts as not moved.
    """

    key: int
    tensor: torch.Tensor
    storage: int
    version: int
    copy: torch.Tensor | None
    sample: torch.Tensor | None

    def has_moved(self) -> torch.Tensor | bool:
        if self.copy is not None:
            return (_bytes(_local(self.tensor)) != _bytes(self.copy)).any()
        if (_storage(self.tensor), _version(self.tensor)) != (self.storage, self.version):
            return True
        return self.sample is not None and (_bytes(_sample(self.tensor)) != _bytes(self.sample)).any()


class RunningTensors:
    """The buffers and frozen parameters of some modules: put back for the second pass, and after it."""

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._moving: set[int] = set()  # ids of tensors that were seen to move
        self._compared = 0  # windows
        self._watched: list[_Watched] = []
        self._flags: list[torch.Tensor | bool] = []
        self._start: list[dict[str, torch.Tensor | None]] = []

    @torch.no_grad()
    def start(self, modules: Iterable[nn.Module]) -> None:
        """Before the first pass of a window."""
        self._modules = list(modules)
        self._start = [dict(module._buffers) for module in self._modules]
        found: dict[int, torch.Tensor] = {}
        trainable, statistics = 0, set()
        for module in self._modules:
            for tensor in (*module._buffers.values(), *module._parameters.values()):
                if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                    trainable += _size(tensor)
                elif tensor is not None and not hasattr(tensor, "ds_id"):
                    found[id(tensor)] = tensor
            if isinstance(module, _NormBase):
                statistics |= {id(buffer) for buffer in module._buffers.values()}
        left = max(BUDGET, trainable) if self._compared < LEARNING else -1
        self._watched = []
        for key, tensor in sorted(found.items(), key=lambda item: _size(item[1])):
            left -= _size(tensor)
            copy = sample = None
            if is_dense(tensor):
                if left >= 0 or key in self._moving or key in statistics:
                    copy = _local(tensor).clone()
                else:
                    sample = _sample(tensor)
            self._watched.append(_Watched(key, tensor, _storage(tensor), _version(tensor), copy, sample))

    def drop(self) -> None:
        """The window is over: keep what was learnt, and no tensor."""
        self._modules, self._watched, self._flags, self._start = [], [], [], []

    @torch.no_grad()
    def compare(self) -> torch.Tensor:
        """After the first pass: what it moved, where only the elements tell. `end` wants it, read from the device."""
        self._flags = [watched.has_moved() for watched in self._watched]
        tensors = [flag for flag in self._flags if isinstance(flag, torch.Tensor)]
        return torch.stack([flag.to(tensors[0].device) for flag in tensors]) if tensors else torch.zeros(0)

    def end(self, compared: Sequence[bool] | None = None) -> None:
        """
        After the first pass: see what it moved.

        Args:
            compared: What `compare` returned, on the host; None: it is read here.
        """
        if compared is None:
            compared = self.compare().tolist()
        read = iter(compared)
        moved = [next(read) if isinstance(flag, torch.Tensor) else flag for flag in self._flags]
        self._watched = [watched for watched, has_moved in zip(self._watched, moved, strict=True) if has_moved]
        self._moving |= {watched.key for watched in self._watched}
        self._compared += 1

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """On leaving, everything is as the first pass left it."""
        end = [dict(module._buffers) for module in self._modules]
        values = [(_local(w.tensor), _local(w.tensor).clone()) for w in self._watched if is_dense(w.tensor)]
        rebound = [
            (tensor, tensor.clone())
            for now, start in zip(end, self._start, strict=True)
            for name, tensor in now.items()
            if tensor is not None and start.get(name) is not tensor and is_dense(tensor)
        ]
        try:
            yield
        finally:
            self._put_back(end, [*values, *rebound])

    def rewind(self) -> None:
        """Everything is as the first pass found it."""
        self._put_back(self._start, [(_local(w.tensor), w.copy) for w in self._watched if w.copy is not None])

    @torch.no_grad()
    def _put_back(self, buffers: list[dict[str, Any]], values: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for module, names in zip(self._modules, buffers, strict=True):
            now = module._buffers
            if list(now) != list(names) or any(now[name] is not tensor for name, tensor in names.items()):
                now.clear()
                now.update(names)
        for tensor, value in values:
            tensor.copy_(value)


def is_dense(tensor: torch.Tensor) -> bool:
    """
    Whether its elements can be copied, compared as bytes and written to in place: not those of sparse, nested,
    quantised, lazy or expanded tensors.
    """
    local = _local(tensor)
    if type(local) not in (torch.Tensor, nn.Parameter, nn.Buffer) or local.layout != torch.strided:
        return False
    if local.is_quantized or local.is_nested or local.is_inference() or local.device.type == "meta":
        return False
    # An expanded tensor has one element in several places: nothing can be written to it in place.
    return all(stride > 0 or size == 1 for stride, size in zip(local.stride(), local.shape, strict=True))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Elements that lie evenly in it, copied."""
    flat = _local(tensor).detach().flatten()  # a view of what is contiguous, as large tensors are
    size = min(max(1, len(flat) // 4096), SAMPLE)
    return flat[:: max(1, len(flat) // size)].clone(memory_format=torch.contiguous_format)


def _size(tensor: torch.Tensor) -> int:
    return _local(tensor).numel() * tensor.element_size() if is_dense(tensor) else 0


def _storage(tensor: torch.Tensor) -> int:
    return _local(tensor).data_ptr() if is_dense(tensor) else 0


def _version(tensor: torch.Tensor) -> int:
    return tensor._version if is_dense(tensor) else 0
