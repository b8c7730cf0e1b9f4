"""What an engine is: shards of one rank, collectives between ranks, and the penalised step in terms of both."""

import contextlib
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from hf_gnp import penalty
from hf_gnp.direction import Perturbation
from hf_gnp.rounding import Place


class Shard(NamedTuple):
    """
    This rank's part of one parameter (padding, if any, has a zero gradient): tensors of one shape. They may lie on
    different devices (offload) and have different dtypes; `master` is `weight` where there is no master. `place` is
    where they lie in the whole parameter. `copies` ranks hold the same part.
    """

    parameter: nn.Parameter
    weight: torch.Tensor
    gradient: torch.Tensor
    master: torch.Tensor
    place: Place
    copies: int = 1


class HeldShard(NamedTuple):
    """
    This rank's part of one trainable parameter, with or without a gradient, while weights may be moved: `weight` is
    what the forward sees, and `theta`, of the same shape, is θ and stays put. `copies` ranks hold the same part.
    """

    parameter: nn.Parameter
    weight: torch.Tensor
    theta: torch.Tensor
    place: Place
    copies: int = 1


class GradientNorms(NamedTuple):
    """
    `gradient`: ‖g₁‖. `direction`: the norm by which the move is normalised: ‖g₁‖ again, or that of the gradient of the
    chosen parameters, or ‖θ ⊙ g₁‖. Global, the same on all ranks, and without the loss scale.
    """

    gradient: float
    direction: float


def number_parameters(model: nn.Module) -> dict[int, int]:
    """The place of each parameter in the model's order, by id: what ranks and engines agree on without a word."""
    return {id(parameter): number for number, parameter in enumerate(model.parameters())}


class Engine(ABC):
    """
    One penalised step:

        engine.begin_window(perturbation)
        with engine.first_pass(): ...               # each micro-batch: backward, and no optimizer step
        norms = engine.gradient_norms()
        with engine.perturbed(r, alpha):            # the weights are θ + r g₁/‖g₁‖
            with engine.micro_batch(is_last): ...
        engine.mix(alpha)                           # the gradient is (1-α) g₁ + α g₂
        engine.finish()
        engine.drop_nonfinite_gradient(grad_norm)
    """

    has_master = True  # whether 16-bit forward weights have an fp32 master
    sets_gradients_aside = False  # whether `take_gradient` works in the middle of a window

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation):
        self.accelerator = accelerator
        self.perturbation = perturbation
        self._norms = GradientNorms(0.0, 0.0)

    def begin_window(self, perturbation: Perturbation) -> None:
        """A window begins: parameters may have been frozen or unfrozen since the last one."""
        self.perturbation = perturbation

    # What each engine says of itself.

    @abstractmethod
    def shards(self) -> list[Shard]:
        """This rank's shards, after a pass has ended. Their gradients are those that the step will use."""

    @abstractmethod
    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a small tensor over the ranks that hold distinct shards: one all-reduce at most."""

    @abstractmethod
    def loss_scale(self) -> float:
        """The factor that the gradients in `shards` carry."""

    @property
    @abstractmethod
    def is_perturbed(self) -> bool:
        """Whether weights on this rank are not θ."""

    @abstractmethod
    def first_pass(self) -> AbstractContextManager:
        """Around `Trainer.training_step`: nothing steps in it, also where the engine's backward would."""

    @abstractmethod
    def micro_batch(self, is_last: bool) -> AbstractContextManager:
        """Around a replayed `Trainer.training_step`: gradients are reduced over ranks as in the first pass."""

    @abstractmethod
    def keep_weights(self, shards: list[Shard]) -> None:
        """Keep what `restore` needs, before these shards are moved."""

    @abstractmethod
    def hold_weights(self) -> list[HeldShard]:
        """`keep_weights` of all trainable weights, to be moved any number of times until `restore`."""

    @abstractmethod
    def keep_gradients(self, shards: list[Shard], alpha: float, scale: float) -> None:
        """Keep what `mix` needs of scale * g₁, and make room for g₂."""

    @abstractmethod
    def publish(self) -> None:
        """Make the next forward on all ranks see the shards. A collective where weights are replicated."""

    @abstractmethod
    def restore(self) -> None:
        """Put θ back. May be called when `perturb` failed half way, or twice."""

    def end_perturbation(self) -> None:
        """After a second pass that went well: put θ back, or leave it to `finish` where the step will anyway."""
        self.restore()

    @abstractmethod
    def mix(self, alpha: float) -> None:
        """Turn the gradient into (1-α) g₁ + α g₂."""

    @abstractmethod
    def discard_gradient(self) -> None:
        """Drop the gradient of this step."""

    @abstractmethod
    def finish(self) -> None:
        """The end of `training_step`, where an engine steps whose backward would have stepped."""

    @abstractmethod
    def drop_nonfinite_gradient(self, grad_norm: torch.Tensor | float | None) -> bool:
        """
        Between clipping and the optimizer step: drop a gradient whose norm is not finite, so that no weight becomes
        NaN. Returns whether it was dropped. A loss scaler, where there is one, skips the step by itself.
        """

    # What follows from it.

    @torch.no_grad()
    def gradient_norms(self) -> GradientNorms:
        """The norms of g₁ at the window's end. Each element counts once, whether it is sharded or replicated."""
        shards = self.shards()
        sq_norms = [self._local_sq_norm(shards)]
        if not self.perturbation.is_plain:
            sq_norms.append(self._local_sq_norm(self._to_move(shards), self.perturbation.adaptive))
        sq_norms = self.sum_over_ranks(torch.stack(sq_norms)).tolist()
        scale = self.loss_scale()
        self._norms = GradientNorms(math.sqrt(sq_norms[0]) / scale, math.sqrt(sq_norms[-1]) / scale)
        return self._norms

    def wants_second_pass(self) -> bool:
        """The same on all ranks: whether there is a direction to move along."""
        return 0 < self._norms.direction < math.inf

    @contextlib.contextmanager
    def perturbed(
        self, r: float, alpha: float, noise_seed: int | None = None, measure: bool = False
    ) -> Iterator[torch.Tensor | None]:
        """
        The weights moved to θ + r g₁/‖g₁‖ on all ranks, and the gradient ready for g₂. Afterwards, at the latest when
        `finish` steps, the weights are θ bit for bit. Whoever catches what the second pass raises calls `abandon`.

        Args:
            noise_seed: For stochastic rounding; equal on all ranks.
            measure: Whether to yield this rank's (⟨θ̃-θ, e⟩, ‖e‖²), of the move e and what rounding left of it.
        """
        yield self.perturb(r, alpha, noise_seed, measure)
        self.end_perturbation()

    def abandon(self) -> None:
        """
        After a failure anywhere in a step: θ is put back and the gradient is dropped. Putting back is tried again if
        it was itself interrupted; the interruption is raised when the weights are clean.
        """
        interruption = None
        for _ in range(3):
            try:
                self.restore()
                self.discard_gradient()
                break
            except BaseException as error:
                interruption = error
        if interruption is not None:
            raise interruption

    def gradients_of(self, held: Sequence[HeldShard]) -> list[torch.Tensor | None]:
        """The gradients of held shards after a pass; None where the loss did not reach the parameter."""
        gradients = {id(shard.parameter): shard.gradient for shard in self.shards()}
        return [gradients.get(id(shard.parameter)) for shard in held]

    @abstractmethod
    def take_gradient(self) -> Any:
        """Set the gradient that is there aside, and return it for `add_gradient`; None or empty if there is none."""

    @abstractmethod
    def add_gradient(self, gradient: Any) -> None:
        """Add a gradient that `take_gradient` returned."""

    @abstractmethod
    def hold_gradient(self) -> None:
        """A micro-batch with a direction of its own has ended: its gradient stays, and the weights are θ."""

    def gradient_marks(self) -> Any:
        """Something that changes when anybody adds to the gradient; None where that cannot be seen."""
        return None

    def computes_in_16_bit(self) -> bool:
        """Whether a forward does, whatever the weights' dtype."""
        return self.accelerator.mixed_precision != "no"

    def probed(self) -> AbstractContextManager:
        """Around a forward without backward."""
        return torch.no_grad()

    @torch.no_grad()
    def perturb(self, r: float, alpha: float, noise_seed: int | None, measure: bool) -> torch.Tensor | None:
        shards = self.shards()
        moved = self._to_move(shards) if self._has(self._norms.direction) else []
        self.keep_weights(moved)
        fidelity = penalty.move_(
            [shard.weight for shard in moved],
            [shard.gradient for shard in moved],
            [shard.master for shard in moved],
            scale=r / (self._norms.direction * self.loss_scale()) if moved else 0.0,
            adaptive=self.perturbation.adaptive,
            noise_seed=noise_seed if self._rounds_stochastically() else None,
            places=[shard.place for shard in moved],
            measure=measure,
        )
        is_normalized = self.perturbation.normalize_gradient and self._has(self._norms.gradient)
        self.keep_gradients(shards, alpha, 1 / self._norms.gradient if is_normalized else 1.0)
        self.publish()
        return fidelity

    @staticmethod
    def _has(norm: float) -> bool:
        return 0 < norm < math.inf

    def _to_move(self, shards: Sequence[Shard]) -> list[Shard]:
        return [shard for shard in shards if self.perturbation.moves(shard.parameter)]

    def _rounds_stochastically(self) -> bool:
        rounding = self.perturbation.stochastic_rounding
        return rounding is True or (rounding == "auto" and not self.has_master)

    def _local_sq_norm(self, shards: Sequence[Shard], adaptive: bool = False) -> torch.Tensor:
        """Summed over ranks it is the global one: an element that k ranks hold counts 1/k on each."""
        by_copies = defaultdict(list)
        for shard in shards:
            by_copies[shard.copies].append(shard)
        total = torch.zeros((), device=self.accelerator.device)
        for copies, group in by_copies.items():
            if adaptive:  # one product at a time: a list of them would be another copy of the gradient
                parts = [penalty.local_sq_norm([s.master * s.gradient.to(s.master.device)]) for s in group]
                sq_norm = sum(part.to(total.device) for part in parts)
            else:
                sq_norm = penalty.local_sq_norm([shard.gradient for shard in group]).to(total.device)
            total = total + sq_norm / copies
        return total
