"""The move of the weights to θ + e, and its measures: cosine and fidelity."""

import contextlib
import math
from collections.abc import Hashable, Iterator

import torch

from . import penalty
from .engines import Engine, Shard
from .engines.private import forget_casts
from .rounding import noise_generator
from .schedule import Penalty


# A forward may round away a move that is smaller than this share of ‖θ‖.
VISIBLE = 1e-6


class Move:
    """
    Move an engine's weights to θ + e, in the metric of its `Perturbation`.

        move.gradient_norm(flags)       # or move.momentum_norm()
        with move.perturbed(penalty, noise_key):
            ...

    Norms are global and carry the loss scale, except where a docstring says otherwise.

    Attributes:
        fidelity: This rank's (⟨θ̃-θ, e⟩, ‖e‖²) of the last move, where θ̃ is θ + e after rounding. None if not measured.
        cosine: The global cosine of g₁ and g₂ over the tensors that moved last, a scalar on the device. None if not
            measured, and before `perturbed` ends.
        first_scale: The factor of g₁ in the mix.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._to_move: list[Shard] = []
        self._directions: list[torch.Tensor] = []
        self._direction_norm = 0.0  # the denominator of e, or ‖θ‖ over the tensors that move with "layer"
        self.sq_norm = 0.0  # ‖d‖² over the tensors that move, or ‖θ ⊙ d‖² with "element"
        self._local_sq_norm = torch.zeros(())  # ‖g₁‖² on this rank
        self._factors: dict[int, float] = {}  # "layer": e_l/(r d_l) by the number of the tensor
        self.first_norm = 0.0
        self._moved: list[tuple[Shard, float]] = []  # the perturbed shards, with θ as master, and e/d of each
        self.fidelity: torch.Tensor | None = None
        self.cosine: torch.Tensor | None = None
        self.first_scale = 1.0

    @property
    def has_direction(self) -> bool:
        """Return whether the direction is finite and not 0."""
        return 0 < self._direction_norm < math.inf

    @torch.no_grad()
    def gradient_norm(self, flags: torch.Tensor) -> tuple[float, list[bool]]:
        """
        Return ‖g₁‖ without the loss scale, and `flags` on the host. One all-reduce, and one read from the device.

        Args:
            flags: A vector of this rank's flags. It is read together with the norm, as each read waits for the device.
        """
        engine, targets = self.engine, self.engine.perturbation.targets
        shards = engine.shards()
        self._to_move = [shard for shard in shards if targets is None or id(shard.parameter) in targets]
        self._directions = [shard.gradient for shard in self._to_move]
        sq_norms = penalty.local_sq_norms([shard.gradient for shard in shards])
        self._local_sq_norm = sq_norms.sum()
        squares = self._each_once(shards, sq_norms)
        moving = self._each_once(self._to_move, penalty.local_sq_norms(self._directions)) if targets else squares
        sums = engine.sum_over_ranks(torch.cat([squares.sum().view(1), *self._sums_of_metric(moving)]))
        scale = engine.loss_scale()
        scales = [scale.view(1)] if isinstance(scale, torch.Tensor) else []  # a number would be copied to the device
        read = torch.cat([sums, *(tensor.to(sums.device, sums.dtype) for tensor in (*scales, flags))]).tolist()
        values, rest = read[: len(sums)], read[len(sums) :]
        loss_scale = rest.pop(0) if isinstance(scale, torch.Tensor) else scale
        self._normalise(*values)
        self.first_norm = math.sqrt(values[0]) / loss_scale
        return self.first_norm, [bool(flag) for flag in rest]

    @torch.no_grad()
    def momentum_norm(self) -> None:
        """Set the optimizer's first moment as the direction. Before its first step there is none."""
        engine, targets = self.engine, self.engine.perturbation.targets
        shards = [s for s in engine.trainable_shards() if targets is None or id(s.parameter) in targets]
        pairs = [(shard, moment) for shard in shards if (moment := engine.first_moment(shard)) is not None]
        self._to_move, self._directions = [shard for shard, _ in pairs], [moment for _, moment in pairs]
        squares = self._each_once(self._to_move, penalty.local_sq_norms(self._directions))
        sums = engine.sum_over_ranks(torch.cat([squares.sum().view(1), *self._sums_of_metric(squares)]))
        self._normalise(*sums.tolist())

    def _each_once(self, shards: list[Shard], values: torch.Tensor) -> torch.Tensor:
        """Divide the value of each shard by the number of ranks that hold it, so that sums over ranks are global."""
        if any(shard.copies > 1 for shard in shards):
            values = values / torch.tensor([shard.copies for shard in shards], device=values.device)
        return values.to(self.engine.accelerator.device)

    def _sums_of_metric(self, squares: torch.Tensor) -> list[torch.Tensor]:
        """Return the local sums that the metric needs besides ‖g₁‖². `squares` are those of the directions."""
        perturbation, device = self.engine.perturbation, self.engine.accelerator.device
        if perturbation.metric == "layer":
            weights = self._each_once(self._to_move, penalty.local_sq_norms([s.master for s in self._to_move]))
            numbers = torch.tensor([shard.number for shard in self._to_move], dtype=torch.long)
            numbers = numbers.to(device, non_blocking=True)
            count = len(self.engine.numbers)
            return [sums.new_zeros(count).index_add_(0, numbers, sums) for sums in (weights, squares)]
        if perturbation.metric == "element":
            # One shard at a time: all products together would take the memory of a gradient.
            pairs = zip(self._to_move, self._directions, strict=True)
            each = [penalty.local_sq_norms([s.master * d.to(s.master.device)]).to(device) for s, d in pairs]
            values = torch.cat(each) if each else torch.zeros(0, device=device)
            return [self._each_once(self._to_move, values).sum().view(1)]
        return [] if perturbation.targets is None else [squares.sum().view(1)]

    def _normalise(self, total: float, *values: float) -> None:
        """Set the norm of the direction from the global ‖g₁‖² and the global sums of `_sums_of_metric`."""
        if self.engine.perturbation.metric == "layer":
            weights, directions = values[: len(values) // 2], values[len(values) // 2 :]
            moving = [i for i, (w, d) in enumerate(zip(weights, directions, strict=True)) if w > 0 and d > 0]
            self._direction_norm = theta = math.sqrt(sum(weights[i] for i in moving))
            self._factors = {i: math.sqrt(weights[i] / directions[i]) / theta for i in moving}
            self.sq_norm = sum(directions[i] for i in moving)
        else:
            self.sq_norm = values[0] if values else total
            self._direction_norm = math.sqrt(self.sq_norm)
        if not math.isfinite(total):
            self._direction_norm = math.inf

    @contextlib.contextmanager
    def perturbed(
        self, penalty_: Penalty, noise_key: tuple[Hashable, ...], measure: bool = False, share: float = 1.0
    ) -> Iterator[None]:
        """
        Move the weights to θ + e on all ranks, and prepare the gradient for g₂. On leaving, restore θ bit for bit.

        An engine may restore θ later: when the last micro-batch ends, or in `finish`. After an exception inside, the
        caller must call `abandon`. Without a direction nothing moves. Perturbed weights do not move again.

        Args:
            noise_key: The seed of this step's stochastic rounding, equal on all ranks.
            measure: Whether to measure `fidelity` and `cosine` for the logs.
            share: This window's share of the step's micro-batches. It scales a normalised g₁.
        """
        engine, self.fidelity, self.cosine, self.first_scale = self.engine, None, None, 1.0
        if not engine.is_perturbed:
            with torch.no_grad():
                self._move_weights(penalty_.r, noise_key, measure)
                if not engine.perturbation.is_momentum:
                    norm = self.first_norm
                    if engine.perturbation.normalize_gradient and 0 < norm < math.inf:
                        self.first_scale = share / norm
                    engine.keep_gradients(penalty_.alpha, self.first_scale)
                    self.forget()  # the engine keeps what it needs of g₁
                engine.publish()
            forget_casts()
        try:
            yield
            if measure and not engine.perturbation.is_momentum:
                # One rank may have no direction (gnp_scope="rank"). It logs 0, as all ranks must log the same names.
                self.cosine = self._measure_cosine(penalty_.alpha) if self.has_direction else torch.zeros(())
        finally:
            self._moved = []
        # The momentum perturbs all micro-batches of a step alike.
        is_needed_again = engine.perturbation.is_momentum and not engine.accelerator.sync_gradients
        if not (engine.restores_late or (engine.keeps_momentum_move and is_needed_again)):
            engine.restore()
        forget_casts()

    def forget(self) -> None:
        """Release g₁ and the directions."""
        self._to_move, self._directions = [], []

    def local_norms_after_mix(self, alpha: float) -> tuple[float, float]:
        """Return two local norms: of the mixed gradient if g₂ were g₁, and of the present one. Waits for a device."""
        now = penalty.local_sq_norms([shard.gradient for shard in self.engine.shards()]).sum()
        return ((1 - alpha) * self.first_scale + alpha) * math.sqrt(self._local_sq_norm), math.sqrt(now)

    def _move_weights(self, r: float, noise_key: tuple[Hashable, ...], measure: bool) -> None:
        engine = self.engine
        if not self.has_direction:
            engine.keep_weights([])
            self.fidelity = torch.zeros(2) if measure else None  # all ranks log the same names
            return
        masters = [shard.master for shard in self._to_move]
        moved = engine.keep_weights(self._to_move)
        # e/d, one number or one a shard. With "element" the factor θ² is not in it.
        r = -r if engine.perturbation.is_momentum else r
        scales: float | list[float] = r / self._direction_norm
        if engine.perturbation.metric == "layer":
            scales = [r * self._factors.get(shard.number, 0.0) for shard in self._to_move]
        each = [scales] * len(moved) if isinstance(scales, float) else scales
        self._moved = list(zip(moved, each, strict=True))
        generators, rounding = None, engine.perturbation.stochastic_rounding
        is_low = any(shard.weight.dtype.itemsize == 2 for shard in moved)
        if is_low and (rounding is True or (rounding == "auto" and not engine.has_master)):
            generators = [noise_generator(s.weight.device, *noise_key, s.number, s.coordinates) for s in moved]
        self.fidelity = penalty.move_(
            [shard.weight for shard in moved],
            self._directions,
            masters,
            scales,
            elementwise=engine.perturbation.metric == "element",
            generators=generators,
            measure=measure,
        )

    @torch.no_grad()
    def moved_weights(self) -> bool:
        """Return whether ‖θ̃-θ‖ on this rank is larger than `VISIBLE` ‖θ‖. Read from the device."""
        theta = [shard.master for shard, _ in self._moved]
        moves = [shard.weight.to(shard.master) - shard.master for shard, _ in self._moved]
        sq_norms = torch.stack([penalty.local_sq_norms(moves).sum(), penalty.local_sq_norms(theta).sum()])
        moved, length = sq_norms.sqrt().tolist()
        return moved > VISIBLE * length

    @torch.no_grad()
    def _measure_cosine(self, alpha: float) -> torch.Tensor:
        """
        Return the cosine of g₁ and g₂ over the tensors that move, a scalar on the device. Needs perturbed weights.

        With "element" it is the cosine of θ ⊙ g₁ and θ ⊙ g₂. g₁ is computed from θ̃-θ, so no copy of g₁ is needed.
        One all-reduce of four numbers where gradients are sharded.
        """
        engine, share = self.engine, 0.0
        if engine.accumulates and alpha < 1:  # the gradient is share · g₁ + g₂
            share = self.first_scale * (1 - alpha) / alpha
        # In 16 bit θ̃-θ is mostly rounding noise in each element. There (ZeRO-1 in bf16) share · g₁ is subtracted from
        # the sums.
        is_low = any(shard.weight.dtype.itemsize == 2 for shard, _ in self._moved)
        device = engine.accelerator.device
        sums = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        gradients = {id(shard.parameter): shard.gradient for shard in engine.shards()}
        for shard, scale in self._moved:
            gradient = gradients.get(id(shard.parameter))
            if gradient is not None and scale != 0:
                for first, second in _both_gradients(shard, scale, gradient, engine.perturbation.metric):
                    second = second if is_low or share == 0 else second.sub(first, alpha=share)
                    pair = (first * second).sum(dtype=sums.dtype), second.square().sum(dtype=sums.dtype)
                    sums += torch.stack(pair).to(device) / shard.copies
        assert self.fidelity is not None
        dot, sq_norm, kept, moved = engine.sum_over_ranks(torch.cat([sums, self.fidelity.to(sums)]))
        dot = dot * moved / kept  # rounding left kept/moved of the move
        if is_low and share != 0:
            dot = dot - share * self.sq_norm
            sq_norm = sq_norm - 2 * share * dot - share * share * self.sq_norm
        length = math.sqrt(self.sq_norm) * sq_norm.clamp(min=0).sqrt()
        cosine = torch.where(length > 0, dot / length, 0.0).clamp(-1, 1)
        return torch.where(kept != 0, cosine, 1.0).float()  # 0: all was rounded away, g₂ = g₁


def _both_gradients(
    shard: Shard, scale: float, gradient: torch.Tensor, metric: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield parts of g₁ = (θ̃-θ)/scale and of `gradient`, in float32 or float64. With "element" both times θ."""
    tensors = [tensor.reshape(-1) for tensor in (shard.weight, shard.master, gradient)]
    dtype = torch.promote_types(shard.master.dtype, torch.float32)
    for start in range(0, gradient.numel(), penalty.PART):
        parts = (tensor[start : start + penalty.PART].to(gradient.device, dtype) for tensor in tensors)
        weight, theta, second = parts
        first = (weight - theta) / scale
        if metric == "element":
            first, second = torch.where(theta == 0, 0.0, first / theta), theta * second
        yield first, second
