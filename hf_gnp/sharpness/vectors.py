"""Vectors in the space of the trainable weights. Each rank has the part that belongs to its shards."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch

from hf_gnp.engines import Engine, Shard


# The number of elements that are converted to double precision at a time.
BLOCK = 2**20


class ShardVectors:
    """
    Compute with vectors of which each rank has a part.

    The part is a flat tensor: the elements of this rank's shards one after another, in float32, or in float64 if a
    weight is. Sums and multiples are ordinary tensor operations. A method that returns numbers does one all-reduce.

    Args:
        shards: This rank's trainable shards.
        engine: The engine that sums over ranks.
    """

    def __init__(self, shards: Sequence[Shard], engine: Engine):
        self.shards, self._engine = shards, engine
        ends = [0, *itertools.accumulate(shard.weight.numel() for shard in shards)]
        self._slices = [slice(start, end) for start, end in itertools.pairwise(ends)]
        self.size = ends[-1]
        self.dtype = torch.float64 if any(s.weight.dtype == torch.float64 for s in shards) else torch.float32
        self.device = shards[0].weight.device if shards else engine.accelerator.device

    @property
    def placed_shards(self) -> list[tuple[slice, Shard]]:
        """Return each shard with its slice of a vector."""
        return list(zip(self._slices, self.shards, strict=True))

    def zeros(self) -> torch.Tensor:
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)

    def parts(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """Return a view of each shard's slice, in the shape of its weight."""
        return [vector[place].view(shard.weight.shape) for place, shard in self.placed_shards]

    def add_(self, vector: torch.Tensor, tensors: Sequence[torch.Tensor | None], scale: float = 1.0) -> None:
        """Add `scale * tensors` to `vector`. Each shard has one tensor, of any floating dtype. None counts as 0."""
        for place, tensor in zip(self._slices, tensors, strict=True):
            if tensor is not None:
                vector[place].add_(tensor.detach().reshape(-1).to(vector.device, vector.dtype), alpha=scale)

    def theta(self) -> torch.Tensor:
        """Return θ as a vector."""
        theta = self.zeros()
        self.add_(theta, [shard.master for shard in self.shards])
        return theta

    def dots(self, vectors: Sequence[torch.Tensor], other: torch.Tensor) -> np.ndarray:
        """Return ⟨v, other⟩ over all ranks for each vector v, summed in double precision."""
        dots = torch.stack([self._local_dot(vector, other) for vector in vectors])
        return self.sum_over_ranks(dots).cpu().double().numpy()

    def dot(self, vector: torch.Tensor, other: torch.Tensor) -> float:
        return float(self.dots([vector], other)[0])

    def norm(self, vector: torch.Tensor) -> float:
        return math.sqrt(self.dot(vector, vector))

    def norms_by_tensor(self, vectors: Sequence[torch.Tensor]) -> np.ndarray:
        """Return the global norm of each vector's part in each parameter: one row a vector, with one all-reduce."""
        sq_norms = torch.zeros(len(vectors), len(self._engine.numbers), dtype=precise(self.device), device=self.device)
        for place, shard in self.placed_shards:
            for row, vector in enumerate(vectors):
                sq_norms[row, shard.number] += _dot(vector[place], vector[place]) / shard.copies
        return self.sum_over_ranks(sq_norms).sqrt().cpu().double().numpy()

    def sum_over_ranks(self, local: torch.Tensor) -> torch.Tensor:
        return self._engine.sum_over_ranks(local.to(self._engine.accelerator.device))

    def _local_dot(self, vector: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Return this rank's summand of the global dot product. An element on k ranks counts 1/k on each."""
        total = torch.zeros((), dtype=precise(vector.device), device=vector.device)
        # Adjacent slices share one product: a model has hundreds of tensors, and each product costs a few kernels.
        for copies, run in itertools.groupby(self.placed_shards, lambda pair: pair[1].copies):
            places = [place for place, _ in run]
            whole = slice(places[0].start, places[-1].stop)
            total += _dot(vector[whole], other[whole]) / copies
        return total

    def random(self, *key: int, signs: bool = False) -> torch.Tensor:
        """
        Draw standard normal numbers or random signs. They do not depend on the engine or the number of ranks.

        Args:
            key: The seed and the numbers of the vector.
        """
        vector = self.zeros()
        for place, shard in self.placed_shards:
            seed = np.random.SeedSequence((*key, shard.number)).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(seed[0] >> 1))
            vector[place] = shard.part_of(torch.randn(shard.whole_shape, generator=generator)).reshape(-1)
        return torch.where(vector < 0, -1.0, 1.0).to(self.dtype) if signs else vector


def precise(device: torch.device) -> torch.dtype:
    """Return the dtype for sums on a device. MPS has no double precision."""
    return torch.float32 if device.type == "mps" else torch.float64


def _dot(vector: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the dot product of local tensors in double precision. Convert one block at a time."""
    total = torch.zeros((), dtype=precise(vector.device), device=vector.device)
    for a, b in zip(vector.split(BLOCK), other.split(BLOCK), strict=True):
        total += torch.dot(a.to(total.dtype), b.to(total.dtype))
    return total
