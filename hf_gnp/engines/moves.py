"""Where an engine moves its weights, and how far: the norms that this takes, and the moves."""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator

from hf_gnp import moments, penalty
from hf_gnp.direction import Perturbation

from .shards import GradientNorms, HeldShard, OptimizerState, Shard


AnyShard = TypeVar("AnyShard", Shard, HeldShard)


class Moves(ABC):
    """
    The moves of an engine, in terms of its shards and sums over ranks:

        e = r g₁/‖g₁‖                          g₁ of the step, or of a part of it
        e = r θ²g₁/‖θ ⊙ g₁‖                    gnp_adaptive
        e = r D⁻¹g₁/√(g₁ᵀD⁻¹g₁)                gnp_precondition
        e = -r m/‖m‖                           gnp_direction="momentum"
    """

    has_master = True  # whether 16-bit forward weights have an fp32 master

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation):
        self.accelerator = accelerator
        self.perturbation = perturbation
        self._norms = GradientNorms(0.0, 0.0)
        self._loss_scale = 1.0  # as `gradient_norms` read it

    # What each engine says of itself.

    @abstractmethod
    def shards(self) -> list[Shard]:
        """This rank's shards, after a pass has ended. Their gradients are those that the step will use."""

    @abstractmethod
    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a small tensor over the ranks that hold distinct shards: one all-reduce at most."""

    @abstractmethod
    def loss_scale(self) -> torch.Tensor | float:
        """The factor that the gradients in `shards` carry; a scalar where it is on the device."""

    @abstractmethod
    def optimizer_state(self, shard: Shard | HeldShard) -> OptimizerState | None:
        """What the optimizer keeps of this shard; None before its first step."""

    @abstractmethod
    def optimizer_name(self) -> str:
        """For messages."""

    @abstractmethod
    def keep_weights(self, shards: list[Shard]) -> None:
        """Keep what `restore` needs, before these shards are moved."""

    @abstractmethod
    def hold_weights(self, moved_only: bool = False) -> list[HeldShard]:
        """
        `keep_weights` of all trainable weights, to be moved any number of times until `restore`.

        Args:
            moved_only: Whether those suffice that the perturbation moves.
        """

    @abstractmethod
    def keep_gradients(self, shards: list[Shard], alpha: float, scale: float) -> None:
        """Keep what `mix` needs of scale * g₁, and make room for g₂."""

    @abstractmethod
    def publish(self) -> None:
        """Make the next forward on all ranks see the shards. A collective where weights are replicated."""

    # What follows from it.

    @torch.no_grad()
    def gradient_norms(self, flags: torch.Tensor | None = None) -> tuple[GradientNorms, list[bool]]:
        """
        The norms of g₁ at the window's end. Each element counts once, whether it is sharded or replicated.

        Args:
            flags: Of this rank alone, one-dimensional: they are read from the device with the norms, as each reading
                waits for all that the device has yet to compute.

        Returns:
            The norms, and the flags on the host.
        """
        shards = self.shards()
        sq_norms = [self._local_sq_norm(shards)]
        if not self.perturbation.is_plain:
            sq_norms.append(self._local_sq_norm_to_move(shards))
        sums, scale = self.sum_over_ranks(torch.stack(sq_norms)), self.loss_scale()
        also = [scale.view(1)] if isinstance(scale, torch.Tensor) else []
        if flags is not None:
            also.append(flags)
        read = iter(torch.cat([sums, *(tensor.to(sums.device, sums.dtype) for tensor in also)]).tolist())
        values = [math.sqrt(next(read)) for _ in sq_norms]
        self._loss_scale = next(read) if isinstance(scale, torch.Tensor) else scale
        self._norms = GradientNorms(values[0] / self._loss_scale, values[-1] / self._loss_scale)
        return self._norms, [bool(flag) for flag in read]

    def wants_second_pass(self) -> bool:
        """The same on all ranks: whether there is a direction to move along."""
        return self.has_direction

    @property
    def has_direction(self) -> bool:
        """Whether the last move, or the next, is one."""
        return self._has(self._norms.direction)

    @torch.no_grad()
    def perturb(
        self, r: float, alpha: float, noise_seed: int | None, measure: bool, first_scale: float = 1.0
    ) -> torch.Tensor | None:
        shards = self.shards()
        moved = self._to_move(shards) if self.has_direction else []
        self.keep_weights(moved)
        fidelity = penalty.move_(
            [shard.weight for shard in moved],
            [shard.gradient for shard in moved],
            [shard.master for shard in moved],
            scale=r / (self._norms.direction * self._loss_scale) if moved else 0.0,
            adaptive=self.perturbation.adaptive,
            noise_seed=noise_seed if self._rounds_stochastically() else None,
            places=[shard.place for shard in moved],
            measure=measure,
            second_moments=self._second_moments(moved) if self.perturbation.precondition else None,
        )
        if self.perturbation.normalize_gradient and self._has(self._norms.gradient):
            first_scale = 1 / self._norms.gradient
        self.keep_gradients(shards, alpha, first_scale)
        self.publish()
        return fidelity

    @torch.no_grad()
    def move_against_momentum(self, r: float, noise_seed: int | None, measure: bool) -> torch.Tensor | None:
        """The weights moved to θ - r m/‖m‖ with the optimizer's first moment m; not moved where it has none yet."""
        held = self.hold_weights(moved_only=True)
        found = [(shard, self._first_moment(shard)) for shard in self._to_move(held)]
        moved = [shard for shard, moment in found if moment is not None]
        momentum = [moment for _, moment in found if moment is not None]
        (sq_norm,) = self.dots(moved, [(momentum, momentum)])
        self._norms = GradientNorms(math.nan, math.sqrt(sq_norm))
        fidelity = None
        if self.has_direction:
            fidelity = penalty.move_(
                [shard.weight for shard in moved],
                momentum,
                [shard.theta for shard in moved],
                scale=-r / self._norms.direction,
                noise_seed=noise_seed if self._rounds_stochastically() else None,
                places=[shard.place for shard in moved],
                measure=measure,
            )
        self.publish()
        return fidelity

    def _first_moment(self, shard: HeldShard) -> torch.Tensor | None:
        state = self.optimizer_state(shard)
        if state is None:
            return None
        moment = moments.moment_of(state.values, moments.FIRST, state.shape)
        if moment is None:
            moments.refuse_optimizer("gnp_direction=momentum", self.optimizer_name())
        return state.part(moment)

    def _second_moments(self, shards: Sequence[Shard]) -> list[moments.SecondMoment]:
        """Those of the optimizer; zeros, which move nothing, where it has none yet."""
        found = []
        for shard in shards:
            state = self.optimizer_state(shard)
            if state is None:
                found.append(moments.SecondMoment(torch.zeros_like(shard.master), 1.0, 1.0))
                continue
            moment = moments.moment_of(state.values, moments.SECOND, state.shape)
            if moment is None or not moments.has_second(state.values, state.group):
                moments.refuse_optimizer("gnp_precondition", self.optimizer_name())
            found.append(moments.second_moment_of(state.part(moment), state.values, state.group))
        return found

    def dots(
        self, shards: Sequence[Shard | HeldShard], pairs: Sequence[tuple[Sequence[torch.Tensor], ...]]
    ) -> list[float]:
        """
        Global inner products of vectors that are sharded as `shards` are, each given as this rank's parts: one
        all-reduce at most. An element that k ranks hold counts once.
        """
        sums = [self._local_dot(shards, *pair) for pair in pairs]
        return self.sum_over_ranks(torch.stack(sums)).tolist()

    def _local_dot(
        self, shards: Sequence[Shard | HeldShard], one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        return self._each_once(shards, lambda held: penalty.local_dot(*_of(held, one, other)))

    @staticmethod
    def _has(norm: float) -> bool:
        return 0 < norm < math.inf

    def _to_move(self, shards: Sequence[AnyShard]) -> list[AnyShard]:
        return [shard for shard in shards if self.perturbation.moves(shard.parameter)]

    def _rounds_stochastically(self) -> bool:
        rounding = self.perturbation.stochastic_rounding
        return rounding is True or (rounding == "auto" and not self.has_master)

    def _local_sq_norm_to_move(self, shards: Sequence[Shard]) -> torch.Tensor:
        """In the metric of the move, a shard at a time: all products together would be a copy of the gradient."""
        moved = self._to_move(shards)
        if self.perturbation.adaptive:
            sq_norms = (penalty.local_sq_norm([s.master * s.gradient.to(s.master.device)]) for s in moved)
        elif self.perturbation.precondition:
            sq_norms = (m.sq_norm(s.gradient) for m, s in zip(self._second_moments(moved), moved, strict=True))
        else:
            return self._local_sq_norm(moved)
        scalars = [sq_norm.to(self.accelerator.device) for sq_norm in sq_norms]
        return self._each_once(moved, lambda held: torch.stack([scalars[i] for i in held]).sum())

    def _local_sq_norm(self, shards: Sequence[Shard]) -> torch.Tensor:
        gradients = [shard.gradient for shard in shards]
        return self._each_once(shards, lambda held: penalty.local_sq_norm(*_of(held, gradients)))

    def _each_once(
        self, shards: Sequence[Shard | HeldShard], local_sum: Callable[[list[int]], torch.Tensor]
    ) -> torch.Tensor:
        """
        A sum over elements, of which those that k ranks hold count 1/k on each: over ranks they add up to the global
        one.

        Args:
            local_sum: Of the shards with these indices, whose elements are on as many ranks.
        """
        by_copies = defaultdict(list)
        for i, shard in enumerate(shards):
            by_copies[shard.copies].append(i)
        total = torch.zeros((), device=self.accelerator.device)
        for copies, held in by_copies.items():
            total = total + local_sum(held).to(total.device) / copies
        return total


def _of(indices: list[int], *lists: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    return [[tensors[i] for i in indices] for tensors in lists]
