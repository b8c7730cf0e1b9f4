"""Vectors in the space of the trainable weights: each rank has the part that lies beside its shards."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from hf_gnp.engines import Engine, HeldShard
from hf_gnp.rounding import Place, uniform_noise


# So many numbers are drawn, or multiplied in double precision, at a time.
BLOCK = 2**20


class ShardVectors:
    """
    The algebra of local parts. A vector is a flat tensor of this rank with the elements of all held shards one after
    another, in float32 (float64 where a weight is); sums and multiples are ordinary tensor operations.

    Args:
        held: This rank's shards.
        engine: Sums over ranks: one all-reduce for each call that returns numbers.
    """

    def __init__(self, held: Sequence[HeldShard], engine: Engine):
        self.held, self._engine = held, engine
        ends = list(itertools.accumulate(shard.weight.numel() for shard in held))
        self.slices = [slice(end - shard.weight.numel(), end) for end, shard in zip(ends, held, strict=True)]
        self.size = ends[-1] if ends else 0
        dtypes = {shard.weight.dtype for shard in held}
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.device = held[0].weight.device if held else engine.accelerator.device

    def zeros(self) -> torch.Tensor:
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)

    def parts(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """The parts of a vector beside each shard: views in the shape of its weight."""
        return [vector[s].view(shard.weight.shape) for s, shard in zip(self.slices, self.held, strict=True)]

    def add_(self, vector: torch.Tensor, tensors: Sequence[torch.Tensor | None], scale: float = 1.0) -> None:
        """`vector += scale * tensors`, a tensor of any floating dtype for each shard; None counts as 0."""
        for part, tensor in zip(self.slices, tensors, strict=True):
            if tensor is not None:
                vector[part].add_(tensor.detach().reshape(-1).to(vector.device, vector.dtype), alpha=scale)

    def theta(self) -> torch.Tensor:
        """θ as a vector."""
        theta = self.zeros()
        self.add_(theta, [shard.theta for shard in self.held])
        return theta

    def dots(self, vectors: Sequence[torch.Tensor], other: torch.Tensor) -> np.ndarray:
        """⟨v, other⟩ over all ranks, for each vector v; summed in double precision."""
        dots = torch.stack([self._local_dot(vector, other) for vector in vectors])
        return self.sum_over_ranks(dots).cpu().double().numpy()

    def dot(self, vector: torch.Tensor, other: torch.Tensor) -> float:
        return float(self.dots([vector], other)[0])

    def norm(self, vector: torch.Tensor) -> float:
        return math.sqrt(self.dot(vector, vector))

    def sum_over_ranks(self, local: torch.Tensor) -> torch.Tensor:
        return self._engine.sum_over_ranks(local.to(self._engine.accelerator.device))

    def _local_dot(self, vector: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Summed over ranks it is the global one: an element that k ranks hold counts 1/k on each."""
        total = torch.zeros((), dtype=precise(vector.device), device=vector.device)
        runs = itertools.groupby(zip(self.slices, self.held, strict=True), key=lambda pair: pair[1].copies)
        for copies, run in runs:
            pairs = list(run)
            place = slice(pairs[0][0].start, pairs[-1][0].stop)
            for a, b in zip(vector[place].split(BLOCK), other[place].split(BLOCK), strict=True):
                total += torch.dot(a.to(total.dtype), b.to(total.dtype)) / copies
        return total

    def random(self, *key: int, signs: bool = False) -> torch.Tensor:
        """
        Standard normal numbers, or random signs: for an element of the whole model the same on every engine and
        number of ranks.

        Args:
            key: The seed, and which of its vectors.
        """
        vector = self.zeros()
        seeds = [int(seed) for seed in np.random.SeedSequence(key).generate_state(2, np.uint64)]
        for part, shard in zip(self.slices, self.held, strict=True):
            start = part.start
            for place in _in_blocks(shard):
                first, second = (uniform_noise(place, seed, vector.device).reshape(-1) for seed in seeds)
                numbers = torch.where(first < 0.5, -1.0, 1.0) if signs else _normal(first, second)
                vector[start : start + len(numbers)] = numbers
                start += len(numbers)
        return vector


def precise(device: torch.device) -> torch.dtype:
    """The dtype for sums on a device: double, where it has that."""
    return torch.float32 if device.type == "mps" else torch.float64


def _normal(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers out of uniform ones in [0, 1): Box and Muller 1958."""
    return (-2 * torch.log1p(-first)).sqrt_().mul_(torch.cos(2 * math.pi * second))


def _in_blocks(shard: HeldShard) -> Iterator[Place]:
    """The place of a shard, a few rows at a time: of each element, its index is made in 64 bits."""
    rows = len(shard.weight) if shard.weight.ndim else 1
    at_once = max(1, BLOCK * rows // max(shard.weight.numel(), 1))
    if at_once >= rows:
        yield shard.place
        return
    for start in range(0, rows, at_once):
        yield shard.place.rows(start, min(start + at_once, rows))
