"""What an engine is: the shards of one rank, the sums over ranks, and the penalised step in terms of both."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from hf_gnp.perturbation import Perturbation
from hf_gnp.tensors import modules_of, parameters_of

from .private import sync_gradients_set
from .shards import Shard


class Engine(ABC):
    """
    One penalised step, with `move = Move(engine)`:

        engine.begin_window(perturbation)
        with engine.first_pass(): ...               # each micro-batch: backward, and no optimizer step
        move.gradient_norm()                        # shards, sum_over_ranks, loss_scale
        with move.perturbed(penalty, noise_seed):   # keep_weights, keep_gradients, publish, end_perturbation
            with engine.replay(is_last): ...        # each micro-batch again
        engine.mix(alpha)                           # the gradient is (1-α) g₁ + α g₂
        engine.finish()
        engine.drop_nonfinite_gradient(grad_norm)

    Args:
        model: As `accelerator` has prepared it.
    """

    has_master = True  # whether 16-bit forward weights have an fp32 master
    accumulates = False  # whether g₂ is added to the g₁ that `keep_gradients` leaves
    gathers_weights = False  # whether a move makes ranks gather whole weights again
    outside: Sequence[nn.Parameter] = ()  # of the optimizer, and not of the model

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation, model: nn.Module):
        self.accelerator, self.model = accelerator, model
        self.begin_window(perturbation)

    def begin_window(self, perturbation: Perturbation, optimizer: Any = None) -> None:
        """
        Begin a window: parameters may have come, gone, or been unfrozen since the last one.

        Args:
            optimizer: The trainer's, which a callback may have made anew. DeepSpeed has its own.
        """
        self.perturbation = perturbation
        self.modules = modules_of(self.model)
        self.all_parameters = parameters_of(self.modules)
        self.numbers = {id(parameter): number for number, parameter in enumerate(self.all_parameters)}

    # The shards.

    @abstractmethod
    def shards(self) -> list[Shard]:
        """Return this rank's shards that have a gradient, after a pass has ended: those that the step will use."""

    @abstractmethod
    def trainable_shards(self) -> list[Shard]:
        """Return all trainable shards of this rank, without a look at gradients."""

    @abstractmethod
    def first_moment(self, shard: Shard) -> torch.Tensor | None:
        """Return the optimizer's first moment of a shard. None: before its first step."""

    @abstractmethod
    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of a small tensor over the ranks that hold distinct shards: one all-reduce at most."""

    @abstractmethod
    def loss_scale(self) -> torch.Tensor | float:
        """Return the factor that the gradients in `shards` carry. A scalar tensor where it is on the device."""

    def each_once(self, shards: Sequence[Shard], values: torch.Tensor) -> torch.Tensor:
        """Return one value a shard, divided by the number of ranks that hold the shard: sums over ranks are global."""
        if all(shard.copies == 1 for shard in shards):
            return values
        return values / torch.tensor([shard.copies for shard in shards], device=values.device)

    # The weights.

    @property
    @abstractmethod
    def is_perturbed(self) -> bool:
        """Whether weights on this rank are not θ."""

    @abstractmethod
    def keep_weights(self, shards: list[Shard]) -> list[Shard]:
        """Keep what `restore` needs before shards are moved. Returns them with θ as `master`, and no gradient."""

    @abstractmethod
    def publish(self) -> None:
        """Make the next forward on all ranks see the shards. A collective where weights are replicated."""

    @abstractmethod
    def restore(self) -> None:
        """Put θ back. May be called when a move failed half way, or twice."""

    def end_perturbation(self) -> None:
        """Put θ back after passes that went well, or leave it to `finish` where the step will anyway."""
        self.restore()

    # The passes.

    @abstractmethod
    def first_pass(self) -> AbstractContextManager[None]:
        """Surround `Trainer.training_step`: nothing steps in it, also where the engine's backward would."""

    @abstractmethod
    def replay(self, is_last: bool) -> AbstractContextManager[None]:
        """Surround a second `Trainer.training_step`: gradients are reduced over ranks as in the first pass."""

    def after_backward(self) -> None:
        """Called after each backward of the loss: its gradient outlives the next forward."""
        return None

    def sync_gradients_set(self, is_last: bool) -> AbstractContextManager[None]:
        """Set `accelerator.sync_gradients` to its value in the first pass, so that user code sees the same flag."""
        if self.perturbation.is_per_micro_batch:
            return contextlib.nullcontext()
        return sync_gradients_set(self.accelerator, is_last)

    def probed(self) -> AbstractContextManager[None]:
        """Surround a forward without backward."""
        return torch.no_grad()

    def computes_in_16_bit(self) -> bool:
        """Whether a forward does, whatever the weights' dtype."""
        return self.accelerator.mixed_precision != "no"

    # The gradients.

    @abstractmethod
    def keep_gradients(self, shards: list[Shard], alpha: float, scale: float) -> None:
        """Keep what `mix` needs of `scale * g₁`, and make room for g₂."""

    @abstractmethod
    def mix(self, alpha: float) -> None:
        """Turn the gradient into (1-α) g₁ + α g₂."""

    @abstractmethod
    def scale_gradient(self, scale: float) -> None:
        """Multiply the gradient of the step."""

    @abstractmethod
    def discard_gradient(self) -> None:
        """Drop the gradient of this step."""

    @abstractmethod
    def take_gradient(self) -> Any:
        """Set the gradient that is there aside, and return it for `add_gradient`. None or empty: there is none."""

    @abstractmethod
    def add_gradient(self, gradient: Any) -> None:
        """Add a gradient that `take_gradient` returned. A collective where each rank has its own."""

    @abstractmethod
    def hold_gradient(self) -> None:
        """Keep the gradient of a micro-batch with a direction of its own, until the step ends. The weights are θ."""

    def gradients_of(self, shards: Sequence[Shard]) -> list[torch.Tensor | None]:
        """Return the gradients of shards after a pass. None: the loss did not reach the parameter."""
        gradients = {id(shard.parameter): shard.gradient for shard in self.shards()}
        return [gradients.get(id(shard.parameter)) for shard in shards]

    def sets_gradients_aside(self) -> bool:
        """Whether `take_gradient` gives what a backward leaves now, in the middle of a window too."""
        return False

    def hides_gradient(self) -> bool:
        """Whether there is a gradient that `take_gradient` does not give."""
        return False

    def hidden_gradient(self) -> AbstractContextManager[None]:
        """Hide the gradients of parameters where `take_gradient` works. One that is made inside is dropped."""
        return contextlib.nullcontext()

    def gradient_marks(self) -> Any:
        """Return something that changes when anybody adds to the gradient. None: that cannot be seen."""
        return None

    # The end of the step.

    @abstractmethod
    def finish(self) -> None:
        """End `training_step`: an engine steps here whose backward would have stepped."""

    @abstractmethod
    def drop_nonfinite_gradient(self, grad_norm: torch.Tensor | float | None) -> torch.Tensor | bool:
        """
        Drop a gradient whose norm is not finite, between clipping and the optimizer step, so that no weight becomes
        NaN. Returns whether it was dropped, as a flag on the device where it is the optimizer that skips the step
        there. A loss scaler, where there is one, skips the step by itself.
        """

    def end_step(self) -> None:
        """Called after the optimizer's step: what `drop_nonfinite_gradient` has set is gone."""
        return None

    def abandon(self) -> None:
        """
        Put θ back and drop the gradient, after a failure anywhere in a step. Putting back is tried again if it was
        itself interrupted. The interruption is raised when the weights are clean.
        """
        interruption = None
        for _ in range(3):
            try:
                self.clean_up()
                break
            except BaseException as error:
                interruption = error
        if interruption is not None:
            raise interruption

    def clean_up(self) -> None:
        """Put θ back and drop the gradient, wherever a step has ended. May be called again."""
        self.restore()
        self.discard_gradient()
