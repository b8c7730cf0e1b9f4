"""Stochastic rounding is unbiased, and replicas share its noise."""

import math

import torch

from hf_gnp.rounding import noise_generator, round_stochastically


def generator(*key: int) -> torch.Generator:
    return noise_generator(torch.device("cpu"), *key)


def test_noise_depends_on_all_of_its_key():
    """The step, the parameter, and the coordinates of the shard. Replicas have the same key."""
    keys = [(0, 1, (0,)), (0, 1, (1,)), (0, 2, (0,)), (1, 1, (0,)), (0, 1, ())]
    noise = [torch.rand(1000, generator=generator(*key)) for key in keys]
    for i, one in enumerate(noise):
        assert torch.equal(one, torch.rand(1000, generator=generator(*keys[i])))
        for other in noise[:i]:
            # Correlations of n pairs of independent numbers are normal, of variance 1/n.
            assert abs(12 * ((one - 0.5) * (other - 0.5)).mean()) < 5 / math.sqrt(1000)


def test_rounding_is_unbiased():
    """
    The mean of n roundings of x differs from x by a normal error of at most spacing/(2√n): five of these are passed
    with a probability of 6e-7 for one of 8 x 2 numbers, 1e-5 for any.
    """
    n = 40_000
    values = torch.tensor([1.001, -1.001, 0.3333, 1e-3, -7e-6, 300.7, 1.0, 0.0])
    for dtype in (torch.bfloat16, torch.float16):
        rounded = round_stochastically(values.repeat(n, 1), dtype, generator(0)).double()
        info = torch.finfo(dtype)
        for value, column in zip(values.double(), rounded.T, strict=True):
            smallest = info.smallest_normal * info.eps
            spacing = max(2.0 ** (math.floor(math.log2(abs(value))) + math.log2(info.eps)) if value else 0, smallest)
            below = math.floor(value.item() / spacing) * spacing
            assert set(column.tolist()) <= {below, below + spacing}
            assert abs(column.mean() - value) < 5 * spacing / (2 * math.sqrt(n)), (dtype, value)


def test_representable_numbers_stay():
    values = torch.randn(1000).to(torch.bfloat16)
    assert torch.equal(round_stochastically(values.float(), torch.bfloat16, generator(0)), values)
