"""Stochastic rounding to 16 bit, with noise that replicas share."""

import math
import random
from collections.abc import Hashable

import torch


def noise_generator(device: torch.device, *key: Hashable) -> torch.Generator:
    """
    Return a generator on `device` that is seeded by `key`.

    Ranks that hold the same shard give the same key, so their noise is the same. The key has the step's seed, the
    number of the parameter and the coordinates of the shard.
    """
    return torch.Generator(device=device).manual_seed(random.Random(repr(key)).getrandbits(63))


def round_stochastically(tensor: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """
    Round `tensor` to a 16-bit `dtype`, up or down, with the probabilities that make it right on average.

    Args:
        tensor: float32, of any shape.
        generator: On the device of the tensor.
    """
    info = torch.finfo(dtype)
    significant_bits = 1 - int(math.log2(info.eps))
    _, exponent = torch.frexp(tensor)
    spacing = torch.ldexp(torch.ones_like(tensor), exponent - significant_bits)
    spacing.clamp_(min=max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal))
    noise = torch.rand(tensor.shape, generator=generator, device=tensor.device)
    return (torch.floor(tensor / spacing + noise) * spacing).to(dtype)
