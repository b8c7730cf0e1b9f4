"""What an engine is: shards of one rank, collectives between ranks, and the penalised step in terms of both."""

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from hf_gnp.direction import Perturbation

from .moves import Moves
from .private import sync_gradients_set
from .shards import HeldShard


class Engine(Moves):
    """
    One penalised step:

        engine.begin_window(perturbation)
        with engine.first_pass(): ...               # each micro-batch: backward, and no optimizer step
        norms, _ = engine.gradient_norms()
        with engine.perturbed(r, alpha):            # the weights are θ + r g₁/‖g₁‖
            with engine.micro_batch(is_last): ...
        engine.mix(alpha)                           # the gradient is (1-α) g₁ + α g₂
        engine.finish()
        engine.drop_nonfinite_gradient(grad_norm)
    """

    steps_with_shards = True  # whether the gradients in `shards` are all that the optimizer's step looks at

    def begin_window(self, perturbation: Perturbation) -> None:
        """A window begins: parameters may have been frozen or unfrozen since the last one."""
        self.perturbation = perturbation

    # What each engine does.

    @property
    @abstractmethod
    def is_perturbed(self) -> bool:
        """Whether weights on this rank are not θ."""

    @abstractmethod
    def first_pass(self, is_last: bool = False) -> AbstractContextManager[None]:
        """
        Around `Trainer.training_step`: nothing steps in it, also where the engine's backward would.

        Args:
            is_last: Whether g₁ is complete after it, although the window goes on: it is reduced over ranks now.
        """

    @abstractmethod
    def layout(self) -> tuple[str, int | None]:
        """How gradients are sharded, in words, and this rank's number; None where each rank has the whole gradient."""

    @abstractmethod
    def micro_batch(self, is_last: bool) -> AbstractContextManager[None]:
        """Around a replayed `Trainer.training_step`: gradients are reduced over ranks as in the first pass."""

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
    def drop_nonfinite_gradient(self, grad_norm: torch.Tensor | float | None) -> torch.Tensor | bool:
        """
        Between clipping and the optimizer step: drop a gradient whose norm is not finite, so that no weight becomes
        NaN. Returns whether it was dropped, as a flag on the device where it is the optimizer that skips the step
        there. A loss scaler, where there is one, skips the step by itself.
        """

    def end_step(self) -> None:
        """After the optimizer's step, or in place of one: what `drop_nonfinite_gradient` has set is gone."""
        return None

    # What follows from it.

    def sync_gradients_set(self, is_last: bool) -> AbstractContextManager[None]:
        """
        Inside, accelerate's flag stands as it did in the micro-batch's first pass, for whoever asks for it. Where each
        has a second pass of its own, that is as it stands now.
        """
        if self.perturbation.is_per_micro_batch:
            return contextlib.nullcontext()
        return sync_gradients_set(self.accelerator, is_last)

    @contextlib.contextmanager
    def perturbed(
        self,
        r: float,
        alpha: float,
        noise_seed: int | None = None,
        measure: bool = False,
        first_scale: float = 1.0,
    ) -> Iterator[torch.Tensor | None]:
        """
        The weights moved to θ + r g₁/‖g₁‖ on all ranks, and the gradient ready for g₂. Afterwards, at the latest when
        `finish` steps, the weights are θ bit for bit. Whoever catches what the second pass raises calls `abandon`.
        Against the momentum instead, which needs no g₁; where there is no direction, nothing moves.

        Args:
            noise_seed: For stochastic rounding; equal on all ranks.
            measure: Whether to yield this rank's (⟨θ̃-θ, e⟩, ‖e‖²), of the move e and what rounding left of it.
            first_scale: What g₁ is multiplied by in the mix, where it comes from a part of the step's examples.
        """
        if self.perturbation.is_momentum:
            yield self.move_against_momentum(r, noise_seed, measure)
        else:
            yield self.perturb(r, alpha, noise_seed, measure, first_scale)
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

    def sets_gradients_aside(self) -> bool:
        """Whether `take_gradient` gives what a backward leaves now, in the middle of a window too."""
        return False

    def hides_gradient(self) -> bool:
        """Whether there is a gradient that `take_gradient` does not give."""
        return False

    def is_unreduced(self) -> bool:
        """Whether what a backward leaves now is this rank's own, so that nothing reduces it once it is taken."""
        return False

    def reduced(self, gradient: Any) -> Any:
        """The mean over ranks of what `take_gradient` returned. A collective."""
        return gradient

    def hidden_gradient(self) -> AbstractContextManager[None]:
        """Inside, parameters have no gradient, where `take_gradient` works; one that is made there is dropped."""
        return contextlib.nullcontext()

    def gradients_changed(self) -> None:
        """The gradients of `shards` were changed in place."""
        return None

    def gradient_marks(self) -> Any:
        """Something that changes when anybody adds to the gradient; None where that cannot be seen."""
        return None

    def after_backward(self) -> None:
        """After each backward of the loss: its gradient outlives the next forward, and is reduced if the pass is."""
        return None

    def computes_in_16_bit(self) -> bool:
        """Whether a forward does, whatever the weights' dtype."""
        return self.accelerator.mixed_precision != "no"

    def probed(self) -> AbstractContextManager[None]:
        """Around a forward without backward."""
        return torch.no_grad()
