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
        kept = {shard.place.parameter: shard.gradient for shard in shards}
        self._kept = {number: self._kept.get(number) for number in kept}
        for number, gradient in kept.items():
            old = self._kept[number]
            is_fit = old is not None and old.shape == gradient.shape and old.dtype == gradient.dtype
            self._kept[number] = old.copy_(gradient) if is_fit else gradient.clone()

    @torch.no_grad()
    def keep_orthogonal(self) -> None:
        """After the gradients were mixed: what of the gradient is orthogonal to g₁."""
        shards = [shard for shard in self._engine.shards() if shard.place.parameter in self._kept]
        gradients, first = [shard.gradient for shard in shards], self._of(shards)
        along, first_sq = self._engine.dots(shards, [(gradients, first), (first, first)])
        penalty.scale_(first, -along / first_sq if first_sq > 0 else 0.0)
        penalty.add_(first, gradients)
        (sq_norm,) = self._engine.dots(shards, [(first, first)])
        self._norm = math.sqrt(sq_norm)

    @torch.no_grad()
    def add(self, alpha: float) -> bool:
        """At a step between: add v to the gradient. Returns whether there was something to add."""
        if not self.is_there:
            return False
        every = self._engine.shards()
        gradients = [shard.gradient for shard in every]
        (sq_norm,) = self._engine.dots(every, [(gradients, gradients)])
        if not 0 < sq_norm < math.inf:
            return False
        shards = [shard for shard in every if shard.place.parameter in self._kept]
        scale = alpha * math.sqrt(sq_norm) / self._norm
        torch._foreach_add_([shard.gradient for shard in shards], self._of(shards), alpha=scale)
        self._engine.gradients_changed()
        return True

    def _of(self, shards: list[Shard]) -> list[torch.Tensor]:
        for shard in shards:  # a checkpoint's are on the CPU
            number = shard.place.parameter
            self._kept[number] = self._kept[number].to(shard.gradient.device)
        return [self._kept[shard.place.parameter] for shard in shards]

    def save(self, folder: str) -> None:
        """Beside the optimizer's state: a file for each rank, or one where all ranks hold the same."""
        layout, rank = self._engine.layout()
        if rank is not None or self._engine.accelerator.is_main_process:
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
        if not accelerator.gather(is_ours).all():
            return False
        self._kept, self._norm = saved["kept"], saved["norm"]
        return True


def _file(folder: str, rank: int | None) -> str:
    return os.path.join(folder, f"gnp_reuse{'' if rank is None else f'_{rank}'}.pt")
