"""Vectors in the space of the trainable weights. Each rank has the part that belongs to its shards."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from hf_gnp.engines import Engine, Shard, whole_shape


# The number of elements that are converted to double precision at a time.
BLOCK = 2**20


class ShardVectors:
    """
    Compute with vectors of which each rank has a part.

    The part is a flat tensor: the elements of this rank's shards one after another, in float32, or in float64 if a
    weight is. Sums and multiples are ordinary tensor operations. A method that returns numbers does one all-reduce.

    Attributes:
        placed_shards: This rank's trainable shards, each with its slice of a vector.
        blocks: Slices of at most `BLOCK` elements, each with the number of ranks that hold these elements.
        dimension: The number of elements over all ranks.
    """

    def __init__(self, shards: Sequence[Shard], engine: Engine):
        self.shards, self._engine = shards, engine
        ends = [0, *itertools.accumulate(shard.weight.numel() for shard in shards)]
        self.placed_shards = [(slice(*ends[i : i + 2]), shard) for i, shard in enumerate(shards)]
        self.blocks = [
            (slice(start, min(start + BLOCK, place.stop)), shard.copies)
            for place, shard in self.placed_shards
            for start in range(place.start, place.stop, BLOCK)
        ]
        self._size, self.device = ends[-1], shards[0].weight.device if shards else engine.accelerator.device
        self.dtype = torch.float64 if any(s.weight.dtype == torch.float64 for s in shards) else torch.float32
        self.sum_dtype = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no double precision
        sizes = [shard.weight.numel() / shard.copies for shard in shards]
        self.dimension = round(float(self._sum_over_ranks(torch.tensor(sum(sizes), dtype=self.sum_dtype))))

    def zeros(self) -> torch.Tensor:
        return torch.zeros(self._size, dtype=self.dtype, device=self.device)

    def parts(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """Return a view of each shard's slice, in the shape of its weight."""
        return [vector[place].view(shard.weight.shape) for place, shard in self.placed_shards]

    def add_(self, vector: torch.Tensor, tensors: Sequence[torch.Tensor | None], scale: float = 1.0) -> torch.Tensor:
        """Add `scale * tensors` to `vector`. Each shard has one tensor, of any floating dtype. None counts as 0."""
        for (place, _), tensor in zip(self.placed_shards, tensors, strict=True):
            if tensor is not None:
                vector[place].add_(tensor.detach().reshape(-1).to(vector), alpha=scale)
        return vector

    def dots(self, vectors: Sequence[torch.Tensor], other: torch.Tensor) -> np.ndarray:
        """Return ⟨v, other⟩ over all ranks for each vector v, summed in double precision."""
        dots = torch.zeros(len(vectors), dtype=self.sum_dtype, device=self.device)
        for place, copies in self.blocks:  # an element on k ranks counts 1/k on each
            part = torch.stack([vector[place] for vector in vectors]).to(dots)
            dots += part @ other[place].to(dots) / copies
        return self._sum_over_ranks(dots)

    def dot(self, vector: torch.Tensor, other: torch.Tensor) -> float:
        return float(self.dots([vector], other)[0])

    def norm(self, vector: torch.Tensor) -> float:
        return math.sqrt(self.dot(vector, vector))

    def match_norms_(
        self, vector: torch.Tensor, model: torch.Tensor, groups_of: Callable[[Shard], torch.Tensor], count: int
    ) -> torch.Tensor:
        """
        Scale each group of elements of `vector` to the norm of the same group of `model`. A group of norm 0 stays.

        `groups_of` returns the group, from 0 to `count` - 1, of each element of a shard, or of all its elements.
        """
        sq_norms = torch.zeros(2, count, dtype=self.sum_dtype, device=self.device)
        for place, shard in self.placed_shards:
            groups = groups_of(shard).to(self.device)
            for row, part in zip(sq_norms, (model[place], vector[place]), strict=True):
                squares = part.to(row).square()
                squares = squares if groups.ndim else squares.sum().view(1)
                row.index_add_(0, groups.view(-1), squares, alpha=1 / shard.copies)
        wanted, given = np.sqrt(self._sum_over_ranks(sq_norms))
        scales = torch.from_numpy(np.divide(wanted, given, out=np.zeros(count), where=given > 0)).to(vector)
        for place, shard in self.placed_shards:
            vector[place] *= scales[groups_of(shard).to(self.device)]
        return vector

    def random(self, *key: int) -> torch.Tensor:
        """Draw standard normal numbers by the seed and numbers in `key`, equal on every engine and number of ranks."""
        vector = self.zeros()
        for place, shard in self.placed_shards:
            seed = np.random.SeedSequence((*key, shard.number)).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(seed[0] >> 1))
            vector[place] = shard.part_of(torch.randn(whole_shape(shard.parameter), generator=generator)).reshape(-1)
        return vector

    def _sum_over_ranks(self, local: torch.Tensor) -> np.ndarray:
        return self._engine.sum_over_ranks(local.to(self._engine.accelerator.device)).cpu().double().numpy()
