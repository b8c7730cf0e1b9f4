"""The noise of stochastic rounding: uniform, independent, and a function of an element's place alone."""

import math

import pytest
import torch

from hf_gnp import penalty
from hf_gnp.rounding import Place, uniform_noise


N = 2**16
# Of a standard normal number: passed with a probability of 6e-7.
SIGMAS = 5


def noise(place: Place, seed: int = 0) -> torch.Tensor:
    return uniform_noise(place, seed, "cpu")


def splitmix64(state: int, numbers: int) -> list[int]:
    """The first numbers of the stream that starts at `state`, as its authors' C code computes them."""
    words = []
    for _ in range(numbers):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        word = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        words.append(word ^ (word >> 31))
    return words


def test_it_is_splitmix64():
    # What that code prints for this state.
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    seed, parameter = 7, 3
    (key_of_parameter,) = splitmix64((parameter - 1) * 0x9E3779B97F4A7C15, 1)
    (key,) = splitmix64(seed + key_of_parameter - 0x9E3779B97F4A7C15, 1)
    expected = [(word >> 40) / 2**24 for word in splitmix64(key, 1000)]
    assert noise(Place.run(parameter, 0, 1000), seed).tolist() == expected


@pytest.mark.parametrize("start", [0, 10**12])
def test_it_is_uniform(start):
    """Mean and variance, and the largest distance of the distribution from the uniform one (Kolmogorov-Smirnov)."""
    u = noise(Place.run(0, start, N)).double()
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 1 / 2) < SIGMAS * math.sqrt(1 / 12 / N)
    assert abs(u.square().mean() - 1 / 3) < SIGMAS * math.sqrt(4 / 45 / N)  # the variance of u² is 1/5 - 1/9
    distance = (u.sort().values - torch.arange(N) / N).abs().max()
    assert distance < 2.72 / math.sqrt(N)  # passed with a probability of 2 exp(-2 · 2.72²) = 7e-7


def test_neighbours_parameters_and_seeds_are_independent():
    """Correlations of n pairs of independent numbers are normal, of variance 1/n."""
    base = noise(Place.run(0, 0, N)).double() - 0.5
    others = {
        "the next element": noise(Place.run(0, 1, N)),
        "the next row": noise(Place.run(0, 768, N)),
        "the next parameter": noise(Place.run(1, 0, N)),
        "the next step": noise(Place.run(0, 0, N), seed=1),
        "parameter and step": noise(Place.run(1, 0, N), seed=1),
    }
    for name, other in others.items():
        correlation = 12 * (base * (other.double() - 0.5)).mean()
        assert abs(correlation) < SIGMAS / math.sqrt(N), name


def test_a_part_has_the_noise_of_its_place_in_the_whole():
    whole = noise(Place.whole(2, (6, 5, 4)))
    assert torch.equal(noise(Place.run(2, 7, 60)), whole.flatten()[7:67])
    assert torch.equal(noise(Place.whole(2, (6, 5, 4)).rows(2, 5)), whole[2:5])
    rows, columns, last = Place.whole(2, (6, 5, 4)).axes
    odd = torch.tensor([0, 1, 4]).view(1, 3, 1) * columns.step
    assert torch.equal(noise(Place(2, (rows[1:3], odd, last))), whole[1:3, [0, 1, 4]])
    assert noise(Place.whole(2, ())).shape == ()
    assert noise(Place.whole(2, (2, 0))).shape == (2, 0)


def test_large_tensors_move_by_rows(monkeypatch):
    """Also of one tensor, however large, only a bounded part is copied at a time."""
    torch.manual_seed(0)
    start, gradient = torch.randn(40, 7).bfloat16(), torch.randn(40, 7)
    moved = {}
    for part in (10, 100, 2**22):
        monkeypatch.setattr(penalty, "PART", part)
        moved[part] = start.clone()
        penalty.move_([moved[part]], [gradient], [moved[part]], 0.05, noise_seed=3)
    assert torch.equal(moved[10], moved[2**22])
    assert torch.equal(moved[100], moved[2**22])
