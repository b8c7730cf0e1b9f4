"""What the trainer asks of an engine."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch


class Engine(ABC):
    """
    The shards of one rank, and the collectives between ranks, during one penalised step:

        with engine.first_pass(): ...           # each micro-batch: backward, and no optimizer step
        norm = engine.gradient_norm()
        with engine.perturbed(r, alpha):        # the weights are θ + r g₁/‖g₁‖
            with engine.micro_batch(is_last): ...
        engine.mix(alpha)                       # the gradient is (1-α) g₁ + α g₂
        engine.finish()
        engine.drop_nonfinite_gradient(grad_norm)
    """

    @property
    @abstractmethod
    def is_perturbed(self) -> bool:
        """Whether weights on this rank are not θ."""

    @abstractmethod
    def first_pass(self) -> AbstractContextManager:
        """Around `Trainer.training_step`: nothing steps in it, also where the engine's backward would."""

    @abstractmethod
    def gradient_norm(self) -> float:
        """
        ‖g₁‖ at the window's end: global, the same number on all ranks, without the loss scale. Each element of the
        gradient counts once, whether it is sharded or replicated. One scalar all-reduce at most.
        """

    @abstractmethod
    def micro_batch(self, is_last: bool) -> AbstractContextManager:
        """Around a replayed `Trainer.training_step`: gradients are reduced over ranks as in the first pass."""

    @contextlib.contextmanager
    def perturbed(self, r: float, alpha: float) -> Iterator[None]:
        """
        The weights moved to θ + r g₁/‖g₁‖ on all ranks, and the gradient ready for g₂. Afterwards, at the latest when
        `finish` steps, the weights are θ bit for bit. If the second pass raised, they are at once, and no gradient
        is left.
        """
        try:
            self.perturb(r, alpha)
            yield
        except BaseException:
            try:
                self.restore()
            finally:
                self.discard_gradient()
            raise
        self.end_perturbation()

    @abstractmethod
    def perturb(self, r: float, alpha: float) -> None:
        """Keep what `restore` and `mix` need, move the local shards, and make them visible to the next forward."""

    @abstractmethod
    def restore(self) -> None:
        """Put θ back. May be called when `perturb` failed half way, or twice."""

    def end_perturbation(self) -> None:
        """After a second pass that went well: put θ back, or leave it to `finish` where the step will anyway."""
        self.restore()

    @abstractmethod
    def mix(self, alpha: float) -> None:
        """Turn the accumulated gradient into (1-α) g₁ + α g₂."""

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
