"""How far each tensor moves, the move itself, and what it did to the gradient."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from . import penalty
from .engines import Engine, Shard
from .engines.private import forget_casts
from .perturbation import Perturbation
from .rounding import noise_generator
from .schedule import Penalty


# A move by less than this share of ‖θ‖ may be rounded away in a forward.
VISIBLE = 1e-6


class Move:
    """
    The move of an engine's weights to θ + e, in the metric of its `Perturbation`.

        move.gradient_norm()            # or move.momentum_norm()
        with move.perturbed(penalty, noise_seed):
            ...

    Norms are global, the same on all ranks, and carry the loss scale unless it says otherwise.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._shards: list[Shard] = []  # all that have a gradient
        self._to_move: list[Shard] = []
        self._directions: list[torch.Tensor] = []
        self._loss_scale = 1.0
        self._direction_norm = 0.0  # which e is normalised by
        self.sq_norm = 0.0  # ‖d‖² of those that move, or ‖θ ⊙ d‖²
        self._local_sq_norm = torch.zeros(())  # ‖g₁‖² on this rank
        self._factors: dict[int, float] = {}  # "layer": what d_l is multiplied by to be e_l/r, by the tensor's number
        self.gradient_norm_ = 0.0

    @property
    def has_direction(self) -> bool:
        """Whether there is one to move along."""
        return 0 < self._direction_norm < math.inf

    @torch.no_grad()
    def gradient_norm(self, flags: torch.Tensor | None = None) -> tuple[float, list[bool]]:
        """
        Return ‖g₁‖ without the loss scale, at the window's end. One all-reduce, and one read from the device.

        Args:
            flags: Of this rank alone, one-dimensional: they are read from the device with the norm, as each reading
                waits for all that the device has yet to compute.

        Returns:
            The norm, and the flags on the host.
        """
        engine = self.engine
        self._shards = engine.shards()
        self._to_move = self._targets_of(self._shards)
        self._directions = [shard.gradient for shard in self._to_move]
        total, self._local_sq_norm = self._sum_of_squares(self._shards, [shard.gradient for shard in self._shards])
        sums = engine.sum_over_ranks(torch.cat([total, *self._sums_of_metric()]))
        scale = engine.loss_scale()
        also = [scale.view(1)] if isinstance(scale, torch.Tensor) else []
        if flags is not None:
            also.append(flags)
        read = torch.cat([sums, *(tensor.to(sums.device, sums.dtype) for tensor in also)]).tolist()
        values, rest = read[: len(sums)], read[len(sums) :]
        self._loss_scale = rest.pop(0) if isinstance(scale, torch.Tensor) else scale
        self._normalise(values[0], values[1:])
        self.gradient_norm_ = math.sqrt(values[0]) / self._loss_scale
        return self.gradient_norm_, [bool(flag) for flag in rest]

    @torch.no_grad()
    def momentum_norm(self) -> None:
        """Take minus the optimizer's first moment as the direction. There is none before its first step."""
        engine = self.engine
        shards = self._targets_of(engine.trainable_shards())
        found = [(shard, engine.first_moment(shard)) for shard in shards]
        self._to_move = [shard for shard, moment in found if moment is not None]
        self._directions = [moment for _, moment in found if moment is not None]
        total, _ = self._sum_of_squares(self._to_move, self._directions)
        sums = engine.sum_over_ranks(torch.cat([total, *self._sums_of_metric()])).tolist()
        self._normalise(sums[0], sums[1:])

    def _targets_of(self, shards: list[Shard]) -> list[Shard]:
        targets = self.engine.perturbation.targets
        return shards if targets is None else [shard for shard in shards if id(shard.parameter) in targets]

    def _sum_of_squares(
        self, shards: Sequence[Shard], tensors: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's share of the global sum, on the accelerator, and the sum on this rank."""
        sq_norms = penalty.local_sq_norms(tensors)
        once = self.engine.each_once(shards, sq_norms)
        return once.sum().view(1).to(self.engine.accelerator.device), sq_norms.sum()

    def _sums_of_metric(self) -> list[torch.Tensor]:
        """Return what the metric needs summed over ranks, besides the sum of squares of all gradients."""
        perturbation, device = self.engine.perturbation, self.engine.accelerator.device
        if perturbation.metric == "layer":
            numbers = torch.tensor([shard.number for shard in self._to_move], dtype=torch.long, device=device)
            vectors = []
            for of_shards in ([shard.master for shard in self._to_move], self._directions):
                sq_norms = self.engine.each_once(self._to_move, penalty.local_sq_norms(of_shards)).to(device)
                vectors.append(sq_norms.new_zeros(len(self.engine.numbers)).index_add_(0, numbers, sq_norms))
            return vectors
        if perturbation.metric == "element":
            # A shard at a time: all products together would be a copy of the gradient.
            pairs = zip(self._to_move, self._directions, strict=True)
            each = [penalty.local_sq_norms([s.master * d.to(s.master.device)]).to(device) for s, d in pairs]
            values = torch.cat(each) if each else torch.zeros(0, device=device)
            return [self.engine.each_once(self._to_move, values).sum().view(1)]
        return [] if perturbation.targets is None else [self._sum_of_squares(self._to_move, self._directions)[0]]

    def _normalise(self, total: float, values: list[float]) -> None:
        """Decide how long the direction is: from the sum of all squares, and from what `_sums_of_metric` returned."""
        metric = self.engine.perturbation.metric
        if metric == "layer":
            weights, directions = values[: len(values) // 2], values[len(values) // 2 :]
            moving = [i for i, (w, d) in enumerate(zip(weights, directions, strict=True)) if w > 0 and d > 0]
            theta = math.sqrt(sum(weights[i] for i in moving))
            self._factors = {i: math.sqrt(weights[i] / directions[i]) / theta for i in moving}
            self.sq_norm = sum(directions[i] for i in moving)
            self._direction_norm = theta if math.isfinite(total) else math.inf
            return
        self.sq_norm = values[0] if values else total
        self._direction_norm = math.sqrt(self.sq_norm) if math.isfinite(total) else math.inf

    def _scales(self, r: float) -> float | list[float]:
        """Return what the directions are multiplied by, besides θ² with "element"."""
        r = -r if self.engine.perturbation.is_momentum else r
        if self.engine.perturbation.metric == "layer":
            return [r * self._factors.get(shard.number, 0.0) for shard in self._to_move]
        return r / self._direction_norm

    @contextlib.contextmanager
    def perturbed(
        self, penalty_: Penalty, noise_seed: Callable[[], int], measure: bool = False, share: float = 1.0
    ) -> Iterator["PerturbedPass"]:
        """
        Move the weights to θ + e on all ranks, and make the gradient ready for g₂. Afterwards, at the latest when the
        engine's `finish` steps, the weights are θ bit for bit. Whoever catches what is raised inside calls `abandon`.
        Where there is no direction, nothing moves. Weights that an engine left moved are not moved again.

        Args:
            noise_seed: Returns the seed for stochastic rounding, equal on all ranks.
            measure: Whether to measure what the move did, for the logs.
            share: The share of the step's micro-batches that this direction is for, with which a normalised g₁ counts.
        """
        engine = self.engine
        passes = PerturbedPass(self, penalty_)
        if not engine.is_perturbed:
            with torch.no_grad():
                self._move_weights(passes, penalty_.r, noise_seed, measure)
                if not engine.perturbation.is_momentum:
                    norm = self.gradient_norm_
                    if engine.perturbation.normalize_gradient and 0 < norm < math.inf:
                        passes.first_scale = share / norm
                    engine.keep_gradients(self._shards, penalty_.alpha, passes.first_scale)
                    self.forget()  # g₁ is not held, but as the engine does
                engine.publish()
            forget_casts()
        yield passes
        if measure and not engine.perturbation.is_momentum:
            # 0 on a rank without a direction, with gnp_scope="rank": all ranks log the same names.
            passes.cosine = passes.measure_cosine() if self.has_direction else torch.zeros(())
        passes.shards = []
        # Along the momentum all micro-batches of a step are moved alike, and gathering twice is enough.
        is_needed_again = engine.perturbation.is_momentum and not engine.accelerator.sync_gradients
        if not (engine.gathers_weights and is_needed_again):
            engine.end_perturbation()
            forget_casts()

    def forget(self) -> None:
        """Hold no tensor."""
        self._shards, self._to_move, self._directions = [], [], []

    def local_norms_after_mix(self, alpha: float, first_scale: float) -> tuple[float, float]:
        """Return this rank's norm of the mixed gradient as it would be with g₂ = g₁, and as it is. Reads both."""
        now = penalty.local_sq_norms([shard.gradient for shard in self.engine.shards()]).sum()
        return ((1 - alpha) * first_scale + alpha) * math.sqrt(self._local_sq_norm), math.sqrt(now)

    def _move_weights(self, passes: "PerturbedPass", r: float, noise_seed: Callable[[], int], measure: bool) -> None:
        engine = self.engine
        if not self.has_direction:
            engine.keep_weights([])
            passes.fidelity = torch.zeros(2) if measure else None  # all ranks log the same
            return
        masters = [shard.master for shard in self._to_move]  # the weights themselves, where there are no others
        moved = engine.keep_weights(self._to_move)
        scales = self._scales(r)
        passes.shards = moved
        passes.scales = [scales] * len(moved) if isinstance(scales, float) else scales
        generators, is_low = None, any(shard.weight.dtype.itemsize == 2 for shard in moved)
        if is_low and _rounds_stochastically(engine.perturbation, engine.has_master):
            seed = noise_seed()
            generators = [noise_generator(s.weight.device, seed, s.number, s.coordinates) for s in moved]
        passes.fidelity = penalty.move_(
            [shard.weight for shard in moved],
            self._directions,
            masters,
            scales,
            elementwise=engine.perturbation.metric == "element",
            generators=generators,
            measure=measure,
        )


class PerturbedPass:
    """
    What `Move.perturbed` hands out.

    Attributes:
        fidelity: This rank's (⟨θ̃-θ, e⟩, ‖e‖²) of the move e and what rounding left of it, if measured.
        cosine: Of g₁ and g₂ over the tensors that move, a scalar on the device, if measured. None before the end.
    """

    def __init__(self, move: Move, penalty_: Penalty):
        self._move, self._penalty = move, penalty_
        self.shards: list[Shard] = []  # those that were moved, with θ as their master
        self.scales: list[float] = []
        self.first_scale = 1.0
        self.fidelity: torch.Tensor | None = None
        self.cosine: torch.Tensor | None = None

    @torch.no_grad()
    def moved_weights(self) -> bool:
        """Whether the weights on this rank differ from θ, by more than a forward rounds. Reads from the device."""
        theta = [shard.master for shard in self.shards]
        moves = [shard.weight.to(shard.master) - shard.master for shard in self.shards]
        sq_norms = torch.stack([penalty.local_sq_norms(moves).sum(), penalty.local_sq_norms(theta).sum()])
        moved, length = sq_norms.sqrt().tolist()
        return moved > VISIBLE * length

    @torch.no_grad()
    def measure_cosine(self) -> torch.Tensor:
        """
        Return the cosine of g₁ and g₂ over the tensors that move, before the weights are put back, as a scalar on the
        device. With "element" it is that of θ ⊙ g₁ and θ ⊙ g₂.

        g₁ is read from the move, which is along it, so nothing is held for it. One all-reduce of four numbers where
        gradients are sharded.
        """
        move, engine = self._move, self._move.engine
        share = 0.0
        if engine.accumulates and self._penalty.alpha < 1:  # the gradient is c g₁ + g₂
            share = self.first_scale * (1 - self._penalty.alpha) / self._penalty.alpha
        # c g₁ is subtracted from each element, but where that of the move is mostly the noise of rounding.
        is_low = any(shard.weight.dtype.itemsize == 2 for shard in self.shards)
        device = engine.accelerator.device
        sums = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        gradients = engine.gradients_of(self.shards)
        for shard, scale, gradient in zip(self.shards, self.scales, gradients, strict=True):
            if gradient is not None and scale != 0:
                for first, second in _both_gradients(shard, scale, gradient, engine.perturbation.metric):
                    second = second if is_low or share == 0 else second.sub(first, alpha=share)
                    pair = (first * second).sum(dtype=sums.dtype), second.square().sum(dtype=sums.dtype)
                    sums += torch.stack(pair).to(device) / shard.copies
        assert self.fidelity is not None  # as it is measured with the cosine
        dot, sq_norm, kept, moved = engine.sum_over_ranks(torch.cat([sums, self.fidelity.to(sums)]))
        dot = dot * moved / kept  # rounding left this part of the move
        if is_low and share != 0:
            dot = dot - share * move.sq_norm
            sq_norm = sq_norm - 2 * share * dot - share * share * move.sq_norm
        length = math.sqrt(move.sq_norm) * sq_norm.clamp(min=0).sqrt()
        cosine = torch.where(length > 0, dot / length, 0.0).clamp(-1, 1)
        return torch.where(kept != 0, cosine, 1.0).float()  # all was rounded away: g₂ is g₁


def _both_gradients(
    shard: Shard, scale: float, gradient: torch.Tensor, metric: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield g₁, read from the move, and `gradient`, in float32 or more, some elements at a time, or θ times both."""
    tensors = [tensor.reshape(-1) for tensor in (shard.weight, shard.master, gradient)]
    dtype = torch.promote_types(shard.master.dtype, torch.float32)
    for start in range(0, gradient.numel(), penalty.PART):
        parts = (tensor[start : start + penalty.PART].to(gradient.device, dtype) for tensor in tensors)
        weight, theta, second = parts
        first = (weight - theta) / scale
        if metric == "element":
            first, second = torch.where(theta == 0, 0.0, first / theta), theta * second
        yield first, second


def _rounds_stochastically(perturbation: Perturbation, has_master: bool) -> bool:
    rounding = perturbation.stochastic_rounding
    return rounding is True or (rounding == "auto" and not has_master)
