"""The perturbation of local tensors, in parts of a bounded size."""

import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_gnp import penalty
from hf_gnp.rounding import noise_generator


def generators(seed: int | None, tensors: list[torch.Tensor]) -> list[torch.Generator] | None:
    return None if seed is None else [noise_generator(tensors[0].device, seed, i) for i in range(len(tensors))]


class PeakBytes(TorchDispatchMode):
    """The most that the results of operations held at once, of the storages that came into being meanwhile."""

    def __init__(self, older: list[torch.Tensor]):
        super().__init__()
        self.live: dict[int, weakref.ref] = {}
        self.older = {tensor.untyped_storage().data_ptr() for tensor in older}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.older:
                self.live[id(tensor)] = weakref.ref(tensor)
        tensors = [tensor for ref in self.live.values() if (tensor := ref()) is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.peak = max(self.peak, sum(storages.values()))
        return result


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("noise_seed", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perturbing_in_parts(monkeypatch, dtype, noise_seed, elementwise, measure):
    torch.manual_seed(0)
    shapes = 4 * [(30, 10), (100,), (7, 9), (200,), (64, 4), (1,), (90, 3)]
    masters = [torch.randn(shape) for shape in shapes]
    gradients = [torch.randn(shape) for shape in shapes]
    weights, sums, peaks = {}, {}, {}
    for part in (300, 2**22):
        monkeypatch.setattr(penalty, "PART", part)
        weights[part] = [master.to(dtype, copy=True) for master in masters]
        settings = {"elementwise": elementwise, "generators": generators(noise_seed, masters), "measure": measure}
        with PeakBytes([*weights[part], *gradients, *masters]) as peak:
            sums[part] = penalty.move_(weights[part], gradients, masters, 0.05, **settings)
        peaks[part] = peak.peak
    assert all(map(torch.equal, *weights.values()))
    if measure:
        assert torch.allclose(*sums.values())  # summed in another order
    assert peaks[300] < peaks[2**22] / 2  # the largest part is 300 of 4760 elements


def test_large_tensor_is_perturbed_by_rows(monkeypatch):
    """Also of one tensor, however large, only a bounded part is copied at a time."""
    torch.manual_seed(0)
    start, gradient = torch.randn(40, 7).bfloat16(), torch.randn(40, 7)
    moved = {}
    for part in (10, 100, 2**22):
        monkeypatch.setattr(penalty, "PART", part)
        moved[part] = start.clone()
        penalty.move_([moved[part]], [gradient], [moved[part]], 0.05, generators=generators(3, [start]))
    assert torch.equal(moved[10], moved[2**22])
    assert torch.equal(moved[100], moved[2**22])


@pytest.mark.parametrize("scale", [0.25, 1 / 3, 1e-30, 1e30])
@pytest.mark.parametrize(
    "dtypes", [[torch.float32], [torch.float64], [torch.bfloat16], [torch.float32, torch.float64]]
)
def test_scale_is_that_of_a_number(dtypes, scale):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(5, generator=generator).to(dtype) for dtype in dtypes for _ in range(3)]
    expected = [tensor.clone() for tensor in tensors]
    torch._foreach_mul_(expected, scale)
    penalty.scale_(tensors, scale)
    assert all(map(torch.equal, tensors, expected))


def test_sq_norms_of_several_dtypes():
    assert penalty.local_sq_norms([]).tolist() == []
    tensors = [torch.full((3,), 2.0, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16)]
    assert penalty.local_sq_norms(tensors).dtype == torch.float32
    wide = penalty.local_sq_norms([*tensors, torch.full((2,), 1e200, dtype=torch.float64), torch.zeros(0)])
    assert wide.dtype == torch.float64
    assert wide.tolist() == pytest.approx([12.0, 12.0, 12.0, math.inf, 0.0])
