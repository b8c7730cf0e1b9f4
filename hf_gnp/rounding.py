"""Stochastic rounding to 16 bit, with noise that replicas share."""

import math
import random
from collections.abc import Hashable

import torch


def noise_generator(device: torch.device, *key: Hashable) -> torch.Generator:
    """Return a generator seeded by `key`: the step's seed, the parameter's number and the shard's coordinates."""
    return torch.Generator(device=device).manual_seed(random.Random(repr(key)).getrandbits(63))


def round_stochastically(tensor: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Round each element of a float32 tensor to a 16-bit `dtype`, up or down at random, so that its mean stays."""
    info = torch.finfo(dtype)
    significant_bits = 1 - int(math.log2(info.eps))
    _, exponent = torch.frexp(tensor)
    spacing = torch.ldexp(torch.ones_like(tensor), exponent - significant_bits)
    spacing.clamp_(min=max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal))
    noise = torch.rand(tensor.shape, generator=generator, device=tensor.device)
    return (torch.floor(tensor / spacing + noise) * spacing).to(dtype)
