"""
What a penalty adds to its gradient, kept for the steps until the next one.

    v = g₂ - (⟨g₂, g₁⟩/‖g₁‖²) g₁          at a penalised step
    g ← g + α ‖g‖ v/‖v‖                   at the k-1 steps that follow

v changes more slowly than g₁ does. Of a penalised step's g = (1-α) g₁ + α g₂ the component orthogonal to g₁ is α v,
which has the same direction, so g₂ itself is not needed.

Reference: Liu, Mai, Chen, Hsieh and You, "Towards Efficient and Scalable Sharpness-Aware Minimization" (LookSAM), CVPR
2022, arXiv 2203.02714, Algorithm 1. Their α is ours.
"""

import math
import os

import torch

from . import penalty
from .engines import Engine, Shard


class OrthogonalComponent:
    """
    v, on this rank's shards of the gradient: one more of them is held.

    Args:
        engine: Whose shards, and whose sums over ranks.
    """

    def __init__(self, engine: Engine):
        """
        Raises:
            ValueError: for an engine whose optimizer steps with more than the shards.
        """
        if not engine.steps_with_shards:
            raise ValueError(
                "gnp_reuse under ZeRO-1 in bf16 with fp32 accumulation: DeepSpeed clips by the norm of the whole "
                "gradient that each rank holds, of which a rank would change its own part. Use ZeRO-2, or leave out "
                "gnp_reuse."
            )
        self._engine = engine
        self._kept: dict[int, torch.Tensor] = {}  # by the parameter's number; g₁ while the second pass runs
        self._norm = 0.0

    @property
    def is_there(self) -> bool:
        return 0 < self._norm < math.inf

    @torch.no_grad()
    def keep_first(self) -> None:
        """Before the second pass: g₁, in the place of the last v."""
        self._norm = 0.0
        shards = self._engine.shards()
        last, self._kept = self._kept, {}
        for shard in shards:
            old = last.pop(shard.place.parameter, None)
            if old is not None and old.shape == shard.gradient.shape and old.dtype == shard.gradient.dtype:
                self._kept[shard.place.parameter] = old.copy_(shard.gradient)
            else:
                self._kept[shard.place.parameter] = shard.gradient.clone()

    @torch.no_grad()
    def keep_orthogonal(self) -> None:
        """After the gradients were mixed: what of the gradient is orthogonal to g₁."""
        shards = [shard for shard in self._engine.shards() if shard.place.parameter in self._kept]
        gradients, first = [shard.gradient for shard in shards], self._of(shards)
        # Not what the loss reached at θ alone: an expert that was not chosen again.
        self._kept = {shard.place.parameter: kept for shard, kept in zip(shards, first, strict=True)}
        along, first_sq = self._engine.dots(shards, [(gradients, first), (first, first)])
        penalty.scale_(first, -along / first_sq if first_sq > 0 else 0.0)
        penalty.add_(first, gradients)
        (sq_norm,) = self._engine.dots(shards, [(first, first)])
        self._norm = math.sqrt(sq_norm)

    @torch.no_grad()
    def add(self, alpha: float) -> None:
        """At a step between: add v to the gradient, if there are a v and a gradient."""
        if not self.is_there:
            return
        every = self._engine.shards()
        gradients = [shard.gradient for shard in every]
        (sq_norm,) = self._engine.dots(every, [(gradients, gradients)])
        if not 0 < sq_norm < math.inf:
            return
        shards = [shard for shard in every if shard.place.parameter in self._kept]
        scale = alpha * math.sqrt(sq_norm) / self._norm
        torch._foreach_add_([shard.gradient for shard in shards], self._of(shards), alpha=scale)
        self._engine.gradients_changed()

    def _of(self, shards: list[Shard]) -> list[torch.Tensor]:
        for shard in shards:  # a checkpoint's are on the CPU
            number = shard.place.parameter
            self._kept[number] = self._kept[number].to(shard.gradient.device)
        return [self._kept[shard.place.parameter] for shard in shards]

    def save(self, folder: str, should_save: bool) -> None:
        """
        Beside the optimizer's state: a file for each rank, or one where all ranks hold the same.

        Args:
            should_save: Whether this rank writes what all hold: one of a cluster, or of each node.
        """
        layout, rank = self._engine.layout()
        os.makedirs(folder, exist_ok=True)
        if rank is not None or should_save:
            torch.save({"layout": layout, "norm": self._norm, "kept": self._kept}, _file(folder, rank))

    def load(self, folder: str) -> bool:
        """
        What `save` wrote for this rank; nothing for a run on another number of ranks or another engine.

        Returns:
            Whether all ranks have loaded.
        """
        layout, rank = self._engine.layout()
        file = _file(folder, rank)
        saved = torch.load(file, map_location="cpu", weights_only=True) if os.path.isfile(file) else None
        accelerator = self._engine.accelerator
        is_ours = torch.tensor([saved is not None and saved["layout"] == layout], device=accelerator.device)
        if not accelerator.gather(is_ours).all() or saved is None:
            return False
        self._kept, self._norm = saved["kept"], saved["norm"]
        return True


def _file(folder: str, rank: int | None) -> str:
    return os.path.join(folder, f"gnp_reuse{'' if rank is None else f'_{rank}'}.pt")
