"""
The tensors that a forward moves without a gradient: buffers, parameters that nothing trains, such as a momentum
teacher's (frozen ones, and those that the last window's loss did not reach), and large tensors in attributes, such as
a bank of past features.

Neither names nor version counters tell which: `batch_norm` and `.data` write without a new version. So in the first
`LEARNING` penalised steps of a run they are copied before the first pass, the smallest first, as many as fit into
`BUDGET`, or into the size of the trainable weights (which a teacher has) if that is more, and compared after it. Those
that stood still are put back as well: a teacher that is still a copy of the weights moves in the second pass alone.
From then on copies are made of those that were seen to move, of small buffers, and of the statistics of normalisation
layers, which move when their layer is set to training. The others, quantised base weights among them, are watched: one
that is replaced, gets a new version, or changes in a sample of its elements is copied from the next window on.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

from hf_gnp.engines.dtensors import local_part


BUDGET = 2**26  # bytes
SMALL_BUFFER = 2**16  # bytes: such a one is copied in each window
LEARNING = 2  # penalised steps: a teacher that starts as a copy of the weights does not move in the first
SAMPLE = 256  # elements at most
TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)
# What a forward may register in a module, and note in an attribute that it has.
REGISTERED = ("_buffers", *(name for name in vars(nn.Module()) if "_hooks" in name and "state_dict" not in name))


class _Watched(NamedTuple):
    """
    A tensor and how it looked when the window began: its `shape`, the `version` and the `storage` that it had, and a
    `copy` of all of it or a `sample` of its elements. One that is not dense has none and counts as not moved.
    """

    key: int
    tensor: torch.Tensor
    shape: torch.Size | None
    storage: int
    version: int
    copy: torch.Tensor | None
    sample: torch.Tensor | None

    def has_moved(self) -> torch.Tensor | bool:
        if self.shape is not None and self.shape != local_part(self.tensor).shape:  # observers of quantisation resize
            return True
        if (_storage(self.tensor), _version(self.tensor)) != (self.storage, self.version):
            return True  # also to what it was: a teacher that follows weights which have not moved yet
        if self.copy is not None:
            return (_bytes(local_part(self.tensor)) != _bytes(self.copy)).any()
        return self.sample is not None and (_bytes(_sample(self.tensor)) != _bytes(self.sample)).any()


class _Registered:
    """What is registered in a module, as it stands when this is made."""

    def __init__(self, module: nn.Module):
        self._module = module
        # The hooks of a lazy module make another module of it, once.
        self._kinds = REGISTERED[:1] if isinstance(module, LazyModuleMixin) else REGISTERED
        self._found = {kind: dict(found) for kind in self._kinds if (found := getattr(module, kind))}

    @property
    def buffers(self) -> dict[str, torch.Tensor | None]:
        return self._found.get("_buffers", {})

    def put_back(self) -> None:
        for kind in self._kinds:
            now, kept = getattr(self._module, kind), self._found.get(kind, {})
            if (now or kept) and (list(now) != list(kept) or any(now[name] is not kept[name] for name in kept)):
                now.clear()
                now.update(kept)


class RunningTensors:
    """Buffers, frozen parameters and large attributes: put back for the second pass, and after it."""

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._trained: Sequence[nn.Parameter] = ()
        self._moving: set[int] = set()  # ids of tensors that were seen to move
        self._unreached: set[int] = set()  # ids of parameters that had no gradient in the last window
        self._step: int | None = None
        self._steps = 0  # with a window
        self._left = 0
        self._watched: list[_Watched] = []
        self._flags: list[torch.Tensor | bool] = []
        self._still: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._start: list[_Registered] = []

    @torch.no_grad()
    def start(
        self,
        modules: Iterable[nn.Module],
        trained: Sequence[nn.Parameter] = (),
        others: Iterable[torch.Tensor] = (),
        step: int = 0,
    ) -> None:
        """
        Before the first pass of a window.

        Args:
            trained: The trainable parameters of the model and of the optimizer: the engine's to move and put back, and
                so is what shares their memory.
            others: Tensors beside buffers and parameters that a forward may write into.
            step: The number of the step that the window belongs to.
        """
        self._steps += step != self._step
        self._step = step
        self._modules, self._trained = list(modules), trained
        self._start = [_Registered(module) for module in self._modules]
        found: dict[int, torch.Tensor] = {}
        reached = {id(parameter) for parameter in trained} - self._unreached
        weights = addresses(parameter for parameter in trained if id(parameter) in reached)
        always: set[int] = set()
        for module in self._modules:
            for tensor in (*module._buffers.values(), *module._parameters.values()):
                if tensor is None or id(tensor) in reached or hasattr(tensor, "ds_id"):
                    continue
                if storage_address(tensor) not in weights:
                    found[id(tensor)] = tensor
            buffers = [buffer for buffer in module._buffers.values() if buffer is not None]
            is_norm = isinstance(module, _NormBase)
            always |= {id(buffer) for buffer in buffers if is_norm or _size(buffer) <= SMALL_BUFFER}
        found.update((id(tensor), tensor) for tensor in others if storage_address(tensor) not in weights)
        self._left = budget_of(trained) if self._steps <= LEARNING else -1
        self._watched = []
        for key, tensor in sorted(found.items(), key=lambda item: _size(item[1])):
            self._left -= _size(tensor)
            copy = sample = shape = None
            if is_dense(tensor):
                shape = local_part(tensor).shape
                if self._left >= 0 or key in self._moving or key in always:
                    copy = local_part(tensor).clone()
                else:
                    sample = _sample(tensor)
            self._watched.append(_Watched(key, tensor, shape, _storage(tensor), _version(tensor), copy, sample))

    def drop(self) -> None:
        """The window is over: keep what was learnt, and no tensor."""
        self._modules, self._trained, self._watched, self._flags = [], (), [], []
        self._still, self._start = [], []

    @torch.no_grad()
    def compare(self) -> torch.Tensor:
        """After the first pass: what it moved, where only the elements tell. `end` wants it, read from the device."""
        self._flags = [watched.has_moved() for watched in self._watched]
        tensors = [flag for flag in self._flags if isinstance(flag, torch.Tensor)]
        return torch.stack([flag.to(tensors[0].device) for flag in tensors]) if tensors else torch.zeros(0)

    @torch.no_grad()
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
        reached = {id(parameter) for parameter in self._trained if parameter.grad is not None}
        mine = [pair for pair in zip(self._watched, moved, strict=True) if pair[0].key not in reached]
        self._watched = [watched for watched, has_moved in mine if has_moved]
        self._moving |= {watched.key for watched in self._watched}
        unreached = [p for p in self._trained if id(p) not in reached] if reached else []  # ZeRO keeps no `grad`
        if self._steps <= LEARNING:
            still = [(w.tensor, w.copy) for w, has_moved in mine if w.copy is not None and not has_moved]
            self._still = [(local_part(tensor), copy) for tensor, copy in still if copy.is_floating_point()]
            self._still += self._copies_of([p for p in unreached if id(p) not in self._unreached])
        self._unreached = {id(parameter) for parameter in unreached}

    def _copies_of(self, tensors: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The smallest first, as many as fit into what is left of the budget."""
        for tensor in sorted(filter(is_dense, tensors), key=_size):
            self._left -= _size(tensor)
            if self._left >= 0:
                yield local_part(tensor), local_part(tensor).clone()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """On leaving, everything is as the first pass left it."""
        end = [_Registered(module) for module in self._modules]
        values = [(local_part(w.tensor), local_part(w.tensor).clone()) for w in self._watched if is_dense(w.tensor)]
        values += self._still
        rebound = [
            (tensor, tensor.clone())
            for now, start in zip(end, self._start, strict=True)
            for name, tensor in now.buffers.items()
            if tensor is not None and start.buffers.get(name) is not tensor and is_dense(tensor)
        ]
        try:
            yield
        finally:
            self._put_back(end, [*values, *rebound])

    def rewind(self) -> None:
        """Everything is as the first pass found it."""
        self._put_back(self._start, [(local_part(w.tensor), w.copy) for w in self._watched if w.copy is not None])

    @torch.no_grad()
    def _put_back(self, registered: list[_Registered], values: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for of_module in registered:
            of_module.put_back()
        for tensor, value in values:
            if tensor.shape == value.shape:
                tensor.copy_(value)
            else:
                tensor.data = value.clone()


def budget_of(trained: Iterable[torch.Tensor]) -> int:
    """How many bytes may be held of what a forward moves."""
    return max(BUDGET, sum(_size(parameter) for parameter in trained))


def is_dense(tensor: torch.Tensor) -> bool:
    """
    Whether its elements can be copied, compared as bytes and written to in place: not those of sparse, nested,
    quantised, lazy or expanded tensors.
    """
    local = local_part(tensor)
    if type(local) not in TENSORS or local.layout != torch.strided:
        return False
    if local.is_quantized or local.is_nested or local.is_inference() or local.device.type == "meta":
        return False
    # An expanded tensor has one element in several places: nothing can be written to it in place.
    return all(stride > 0 or size == 1 for stride, size in zip(local.stride(), local.shape, strict=True))


def storage_address(tensor: torch.Tensor) -> int:
    """Where the memory begins that a tensor shares with its views; 0 for one that is not dense."""
    return local_part(tensor).untyped_storage().data_ptr() if is_dense(tensor) else 0


def addresses(tensors: Iterable[torch.Tensor | None]) -> set[int]:
    """The storage addresses of those that are dense."""
    return {storage_address(tensor) for tensor in tensors if tensor is not None} - {0}


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Elements that lie evenly in it, copied."""
    flat = local_part(tensor).detach().flatten()  # a view of what is contiguous, as large tensors are
    size = min(max(1, len(flat) // 4096), SAMPLE)
    return flat[:: max(1, len(flat) // size)].clone(memory_format=torch.contiguous_format)


def _size(tensor: torch.Tensor) -> int:
    return local_part(tensor).numel() * tensor.element_size() if is_dense(tensor) else 0


def _storage(tensor: torch.Tensor) -> int:
    return local_part(tensor).data_ptr() if is_dense(tensor) else 0


def _version(tensor: torch.Tensor) -> int:
    return tensor._version if is_dense(tensor) else 0
