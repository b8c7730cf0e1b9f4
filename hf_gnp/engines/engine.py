"""The interface of engines: a rank's shards, sums over ranks, perturbed weights and mixed gradients."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from hf_gnp.perturbation import Perturbation
from hf_gnp.tensors import modules_of, parameters_of

from .shards import Shard


@contextlib.contextmanager
def attribute_set(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute, and set it back on leaving."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


OTHER_BACKWARD = (
    "There is a backward outside of Trainer.training_step. Under DeepSpeed, and under FSDP2 with "
    "gradient_accumulation_steps > 1, its gradient cannot be told from that of the loss: add the term to the loss in "
    "compute_loss, use DDP, or set gnp_alpha=0."
)


class Engine(ABC):
    """
    Run a penalised step on one kind of sharding. With `move = Move(engine)` a step is:

        engine.begin_window(perturbation)
        with engine.first_pass(): ...               # each micro-batch: backward without optimizer step
        move.gradient_norm(flags)                   # shards, sum_over_ranks, loss_scale
        with move.perturbed(penalty, noise_key):    # keep_weights, keep_gradients, publish, restore
            with engine.replay(is_last): ...        # each micro-batch again
        engine.mix(alpha)                           # the gradient is (1-α) g₁ + α g₂
        engine.finish()
        engine.drop_nonfinite_gradient(grad_norm)

    Args:
        model: The model that `accelerator` has prepared. The constructor calls `begin_window`, so a subclass sets its
            attributes before it calls this one.
    """

    is_perturbed = False  # whether weights on this rank may not be θ
    restores_late = False  # whether `finish` and `hold_gradient` restore θ, as the step gathers new weights anyway
    has_master = True  # whether 16-bit forward weights have an fp32 master
    accumulates = False  # whether g₂ is added to the g₁ that `keep_gradients` leaves
    keeps_momentum_move = False  # whether a move along the momentum stays until the step ends, as restoring gathers

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation, model: nn.Module):
        self.accelerator, self.model = accelerator, model
        self.begin_window(perturbation)

    def begin_window(self, perturbation: Perturbation, optimizer: Any = None) -> None:
        """Begin a window. A callback may have replaced parameters or `optimizer`. DeepSpeed has its own optimizer."""
        self.perturbation = perturbation
        self.all_parameters = parameters_of(modules_of(self.model))
        self.numbers = {id(parameter): number for number, parameter in enumerate(self.all_parameters)}

    def reshard(self) -> None:
        """Make the model's parameters the shards. After an evaluation FSDP2's root has other parameter objects."""
        return None

    # The shards.

    @abstractmethod
    def shards(self) -> list[Shard]:
        """Return this rank's shards that have a gradient, after a pass."""

    @abstractmethod
    def trainable_shards(self) -> list[Shard]:
        """Return all trainable shards of this rank, with or without gradient."""

    @abstractmethod
    def first_moment(self, shard: Shard) -> torch.Tensor | None:
        """Return the optimizer's first moment of a shard. None before its first step."""

    @abstractmethod
    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        """Sum a small tensor in place over ranks that hold distinct shards, and return it. One all-reduce at most."""

    @abstractmethod
    def loss_scale(self) -> torch.Tensor | float:
        """Return the factor of the gradients in `shards`, a scalar tensor where it is on the device."""

    # The weights.

    @abstractmethod
    def keep_weights(self, shards: list[Shard]) -> list[Shard]:
        """Save what `restore` needs before shards move. Return the shards with θ as `master`, without gradients."""

    def publish(self) -> None:
        """Make changed shards visible to the next forward on all ranks. A collective under ZeRO-1 and 2."""
        return None

    @abstractmethod
    def restore(self) -> None:
        """Restore θ. Works after a partial move, and twice."""

    # The passes.

    @abstractmethod
    def first_pass(self) -> AbstractContextManager[None]:
        """Surround `Trainer.training_step`, so that no backward steps."""

    @abstractmethod
    def replay(self, is_last: bool) -> AbstractContextManager[None]:
        """Surround a second `Trainer.training_step`, so that ranks reduce gradients as in the first pass."""

    def after_backward(self) -> None:
        """Make the gradient of a backward of the loss survive the next forward. Called after each backward."""
        return None

    def sync_gradients_set(self, is_last: bool) -> AbstractContextManager[None]:
        """Set `accelerator.sync_gradients` to its value in the first pass, so that user code sees the same flag."""
        if self.perturbation.is_per_micro_batch:  # the flag is that of the present micro-batch
            return contextlib.nullcontext()
        return attribute_set(self.accelerator, "sync_gradients", is_last)

    def probed(self) -> AbstractContextManager[None]:
        """Surround a forward without backward."""
        return torch.no_grad()

    def computes_in_16_bit(self) -> bool:
        """Return whether a forward computes in 16 bit, whatever the weights' dtype."""
        return self.accelerator.mixed_precision != "no"

    # The gradients.

    @abstractmethod
    def keep_gradients(self, alpha: float, scale: float) -> None:
        """Save what `mix` needs of `scale * g₁`, and prepare the gradient for g₂."""

    @abstractmethod
    def mix(self, alpha: float) -> None:
        """Set the gradient to (1-α) g₁ + α g₂, with the scaled g₁ of `keep_gradients`."""

    @abstractmethod
    def scale_gradient(self, scale: float) -> None:
        """Multiply the gradient of the step by `scale`."""

    @abstractmethod
    def discard_gradient(self) -> None:
        """Drop the gradient of this step."""

    @abstractmethod
    def take_gradient(self) -> Any:
        """
        Remove the present gradient and return it. A collective where no backward will reduce it.

        Raise a NotImplementedError if there is one that cannot be taken.
        """

    @abstractmethod
    def add_gradient(self, gradient: Any) -> None:
        """Add a gradient of `take_gradient`."""

    def hold_gradient(self) -> None:
        """Keep the gradient of a micro-batch with its own direction, for the next window to set aside."""
        return None

    def sets_gradients_aside(self) -> bool:
        """Return whether `take_gradient` can return the gradient of a backward now, also within a window."""
        return False

    def hidden_gradient(self) -> AbstractContextManager[None]:
        """Hide the gradients of parameters where the engine can. Gradients that are made inside are dropped."""
        return contextlib.nullcontext()

    def gradient_marks(self) -> Any:
        """Return a value that changes when the gradient changes. None if the engine cannot tell."""
        return None

    # The end of the step.

    @abstractmethod
    def finish(self) -> None:
        """End `training_step`. An engine whose backward would step makes its step here."""

    @abstractmethod
    def drop_nonfinite_gradient(self, grad_norm: torch.Tensor | float | None) -> torch.Tensor | bool:
        """
        Drop a gradient whose norm is not finite, between clipping and the optimizer step. A scaler does so itself.

        Return whether the step is dropped. This is a flag on the device if the optimizer skips the step itself.
        """

    def end_step(self) -> None:
        """Undo what `drop_nonfinite_gradient` has set, if anything. Called when a window closes."""
        return None

    def abandon(self) -> None:
        """Restore θ and drop the gradient after a failure, at any place in a step. May be called again."""
        self.restore()
        self.discard_gradient()
