"""
Stochastic rounding to 16 bit. The noise of an element depends on its place in the whole parameter only, so replicas
are rounded alike, shards independently, and a parameter in the same way however it is sharded.

The noise is that of a counter-based generator (SplitMix64: Steele, Lea and Flood, OOPSLA 2014): a number is computed
from its index alone, without a state that would have to be agreed on.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


_WORD = 2**64
_INCREMENT, _FIRST_FACTOR, _SECOND_FACTOR = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_NOISE_BITS = 24  # of a float32's significand


class Place(NamedTuple):
    """
    Where a local tensor lies in its whole parameter.

    `parameter` numbers the parameter, the same on all ranks. Element (i, j, …) of the tensor is element
    axes[0][i] + axes[1][j] + … of the whole parameter, counted in row-major order. An axis that is evenly spaced is a
    range; another is an int64 tensor with as many dimensions as the local one, of which one is not 1.
    """

    parameter: int
    axes: tuple[range | torch.Tensor, ...]

    @classmethod
    def whole(cls, parameter: int, shape: Sequence[int]) -> "Place":
        """The place of a parameter that is not sharded."""
        axes, stride = [], 1
        for size in reversed(shape):
            axes.append(range(0, size * stride, stride))
            stride *= max(size, 1)
        return cls(parameter, tuple(reversed(axes)))

    @classmethod
    def run(cls, parameter: int, start: int, size: int) -> "Place":
        """The place of a one-dimensional tensor: elements `start` to `start + size` of the flattened parameter."""
        return cls(parameter, (range(start, start + size),))

    def rows(self, start: int, end: int) -> "Place":
        """The place of rows `start` to `end` of the local tensor."""
        return self._replace(axes=(self.axes[0][start:end], *self.axes[1:]))

    def indices(self, device: torch.device) -> torch.Tensor:
        """The index in the whole parameter of each element of the local tensor, in int64."""
        total = torch.zeros((), dtype=torch.int64, device=device)
        for dim, axis in enumerate(self.axes):
            if isinstance(axis, range):
                shape = [-1 if other == dim else 1 for other in range(len(self.axes))]
                axis = torch.arange(axis.start, axis.stop, axis.step, device=device).view(shape)
            total = total + axis.to(device)
        return total


def uniform_noise(place: Place, seed: int, device: torch.device | str) -> torch.Tensor:
    """
    Numbers in [0, 1), uniform and independent, in float32 and of the shape of the local tensor at `place`.

    Args:
        seed: Of all parameters; equal on all ranks.
    """
    key = _mix((seed + _mix(place.parameter * _INCREMENT)) % _WORD)
    word = place.indices(torch.device(device))
    word.add_(1).mul_(_signed(_INCREMENT)).add_(_signed(key))
    for shift, factor in ((30, _FIRST_FACTOR), (27, _SECOND_FACTOR)):
        word.bitwise_xor_(_shift_right(word, shift)).mul_(_signed(factor))
    return _shift_right(word, 64 - _NOISE_BITS).to(torch.float32).mul_(2.0**-_NOISE_BITS)


def _mix(word: int) -> int:
    """SplitMix64's output function, on Python's integers."""
    word %= _WORD
    word = (word ^ (word >> 30)) * _FIRST_FACTOR % _WORD
    word = (word ^ (word >> 27)) * _SECOND_FACTOR % _WORD
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    """The same 64 bits as torch.int64 has them."""
    return word - _WORD if word >= _WORD // 2 else word


def _shift_right(word: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift: of a signed integer, torch's repeats the sign."""
    return (word >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def round_stochastically(tensor: torch.Tensor, dtype: torch.dtype, noise: torch.Tensor) -> torch.Tensor:
    """
    `tensor` in a 16-bit `dtype`, rounded up or down with the probability that makes it right on average.

    Args:
        tensor: float32, of any shape.
        noise: Uniform in [0, 1), of the same shape and on the same device.
    """
    info = torch.finfo(dtype)
    significant_bits = 1 - int(math.log2(info.eps))
    _, exponent = torch.frexp(tensor)
    spacing = torch.ldexp(torch.ones_like(tensor), exponent - significant_bits)
    spacing.clamp_(min=max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal))
    return (torch.floor(tensor / spacing + noise) * spacing).to(dtype)
