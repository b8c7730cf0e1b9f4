"""Vectors in the space of the trainable weights. Each rank has the part that belongs to its shards."""

import math
from collections.abc import Sequence

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
        dimension: The number of elements over all ranks.
    """

    def __init__(self, shards: Sequence[Shard], engine: Engine):
        self.shards, self._engine = shards, engine
        self.device = shards[0].weight.device if shards else engine.accelerator.device
        self.dtype = torch.float64 if any(s.weight.dtype == torch.float64 for s in shards) else torch.float32
        self.sum_dtype = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no double precision
        self._sizes = [shard.weight.numel() for shard in shards]
        size = sum(shard.weight.numel() / shard.copies for shard in shards)
        self.dimension = round(float(self._sum_over_ranks(torch.tensor(size, dtype=self.sum_dtype))))

    def zeros(self) -> torch.Tensor:
        return torch.zeros(sum(self._sizes), dtype=self.dtype, device=self.device)

    def parts(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """Return a view of each shard's part, in the shape of its weight."""
        parts = vector.split(self._sizes)
        return [part.view(shard.weight.shape) for part, shard in zip(parts, self.shards, strict=True)]

    def add_(self, vector: torch.Tensor, tensors: Sequence[torch.Tensor | None], scale: float = 1.0) -> torch.Tensor:
        """Add `scale * tensors` to `vector`. Each shard has one tensor, of any floating dtype. None counts as 0."""
        for part, tensor in zip(self.parts(vector), tensors, strict=True):
            if tensor is not None:
                part.add_(tensor.detach().to(part), alpha=scale)
        return vector

    def dots(self, vectors: Sequence[torch.Tensor], other: torch.Tensor) -> np.ndarray:
        """Return ⟨v, other⟩ over all ranks for each vector v, summed in double precision."""
        dots = torch.zeros(len(vectors), dtype=self.sum_dtype, device=self.device)
        parts = zip(*(vector.split(self._sizes) for vector in (*vectors, other)), strict=True)
        for shard, of_shard in zip(self.shards, parts, strict=True):
            for *blocks, block in zip(*(part.split(BLOCK) for part in of_shard), strict=True):
                # An element on k ranks counts 1/k on each.
                dots += torch.stack(blocks).to(dots) @ block.to(dots) / shard.copies
        return self._sum_over_ranks(dots)

    def dot(self, vector: torch.Tensor, other: torch.Tensor) -> float:
        return float(self.dots([vector], other)[0])

    def norm(self, vector: torch.Tensor) -> float:
        return math.sqrt(self.dot(vector, vector))

    def match_norms_(self, vector: torch.Tensor, model: torch.Tensor, by_rows: bool = False) -> None:
        """Scale each tensor of `vector`, or each of its rows, to the norm that it has in `model`. 0 stays 0."""
        counts = [math.prod(whole_shape(p)[:1]) if by_rows else 1 for p in self._engine.all_parameters]
        ends = np.cumsum([0, *counts]).tolist()

        def groups_of(shard: Shard) -> torch.Tensor:
            """Return the index of the shard's tensor, or the index of each element's row among all rows."""
            groups, shape = torch.arange(*ends[shard.number : shard.number + 2]), whole_shape(shard.parameter)
            if by_rows:
                groups = shard.part_of(groups.view(shape[:1] + (1,) * len(shape[1:])).expand(shape)).reshape(-1)
            return groups.to(self.device)

        sq_norms = torch.zeros(2, ends[-1], dtype=self.sum_dtype, device=self.device)
        for shard, *parts in zip(self.shards, model.split(self._sizes), vector.split(self._sizes), strict=True):
            groups = groups_of(shard)
            for of_group, part in zip(sq_norms, parts, strict=True):
                squares = part.to(of_group).square()
                squares = squares if by_rows else squares.sum(0, keepdim=True)
                of_group.index_add_(0, groups, squares, alpha=1 / shard.copies)
        wanted, given = np.sqrt(self._sum_over_ranks(sq_norms))
        scales = torch.from_numpy(np.divide(wanted, given, out=np.zeros(ends[-1]), where=given > 0)).to(vector)
        for shard, part in zip(self.shards, vector.split(self._sizes), strict=True):
            part *= scales[groups_of(shard)]

    def random(self, *key: int) -> torch.Tensor:
        """Draw standard normal numbers by the seed and numbers in `key`, equal on every engine and number of ranks."""
        vector = self.zeros()
        for part, shard in zip(self.parts(vector), self.shards, strict=True):
            seed = np.random.SeedSequence((*key, shard.number)).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(seed[0] >> 1))
            part.copy_(shard.part_of(torch.randn(whole_shape(shard.parameter), generator=generator)))
        return vector

    def _sum_over_ranks(self, local: torch.Tensor) -> np.ndarray:
        return self._engine.sum_over_ranks(local.to(self._engine.accelerator.device)).cpu().double().numpy()
