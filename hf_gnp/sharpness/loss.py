"""The loss of a sample and its gradient over all ranks, at the weights θ and at weights moved from θ."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import set_seed

from hf_gnp import penalty
from hf_gnp.engines import Engine, make_engine
from hf_gnp.perturbation import Perturbation
from hf_gnp.second_pass.inputs import copied
from hf_gnp.second_pass.window import StateAtHand
from hf_gnp.signals import DeferredSignals

from .prepared import left_as_found, prepared_model, refuse_unsupported
from .sample import WeightedBatch
from .vectors import ShardVectors, precise


class SampleLoss:
    """
    Compute L(θ + v), the mean of the trainer's loss over `batches`, and ∇L(θ + v). Every rank calls each method.

    The gradient of each micro-batch is reduced as in training and added up in float32.

    Attributes:
        batches: This rank's micro-batches, to be set before the first pass.
        vectors: The algebra of vectors such as v and ∇L.
    """

    def __init__(self, trainer: Any, model: nn.Module, engine: Engine, state: StateAtHand, seed: int, progress: Any):
        self.trainer, self.model, self.progress = trainer, model, progress
        self._engine, self._state, self._seed = engine, state, seed
        self.vectors = ShardVectors(engine.keep_weights(engine.trainable_shards()), engine)
        self.batches: list[WeightedBatch] = []
        self._offset: torch.Tensor | None = None

    def set_origin(self, offset: torch.Tensor) -> None:
        """Measure around θ + offset instead of θ, such as around another checkpoint."""
        self._offset = offset
        self.move()

    def origin(self) -> torch.Tensor:
        """Return θ + offset as a vector."""
        theta = self.vectors.theta()
        return theta if self._offset is None else theta.add_(self._offset)

    @torch.no_grad()
    def move(self, vector: torch.Tensor | None = None, scale: float = 1.0) -> None:
        """
        Set the weights on all ranks to origin + scale v, rounded once to their dtype. Without a vector v is 0.

        The weights stay there until the next move. Under ZeRO-1 and 2 a move is a collective.
        """
        if self._offset is not None:
            vector, scale = self._offset if vector is None else torch.add(self._offset, vector, alpha=scale), 1.0
        weights = [shard.weight for shard in self.vectors.shards]
        thetas = [shard.master for shard in self.vectors.shards]
        if vector is None:
            penalty.copy_(weights, thetas)
        else:
            penalty.move_(weights, self.vectors.parts(vector), thetas, scale)
        self._engine.publish()

    def value(self) -> float:
        """Return the loss at the current weights."""
        with torch.no_grad():
            return self._mean([self.micro_batch_loss(batch) for batch in self.batches])

    def add_gradient_(self, vector: torch.Tensor, scale: float = 1.0) -> float:
        """Add `scale * ∇L` at the current weights to `vector`, and return the loss."""
        accelerator, engine, losses = self.trainer.accelerator, self._engine, []
        # Engines average gradients over ranks, and accelerate divides the loss by its accumulation steps.
        in_deepspeed = self.trainer.is_deepspeed_enabled
        factor = accelerator.num_processes * (1 if in_deepspeed else accelerator.gradient_accumulation_steps)
        kwargs = {"scale_wrt_gas": False} if in_deepspeed else {}
        for batch in self.batches:
            with engine.replay(is_last=True):
                loss = self.micro_batch_loss(batch)
                losses.append(loss.detach())
                accelerator.backward(loss * (batch.share * factor), **kwargs)
            gradients = engine.gradients_of(self.vectors.shards)
            self.vectors.add_(vector, gradients, scale / float(engine.loss_scale()))
            engine.discard_gradient()
        return self._mean(losses)

    def micro_batch_loss(self, batch: WeightedBatch) -> torch.Tensor:
        """Return the mean loss over the labels of a micro-batch, with the same random numbers in each pass."""
        trainer, items = self.trainer, None
        set_seed(self._seed + batch.number)
        if trainer.compute_loss_func is not None:  # it needs the number of items, which a model counts itself
            items = torch.tensor(batch.items, device=trainer.accelerator.device)
        inputs = trainer._prepare_inputs(copied(batch.inputs))
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(self.model, inputs, num_items_in_batch=items)
        # `compute_loss` multiplies the loss by the number of ranks, so that the mean over ranks gives the sum.
        is_scaled = items is not None and trainer.args.average_tokens_across_devices
        return loss / trainer.accelerator.num_processes if is_scaled else loss

    def end_pass(self) -> None:
        """Restore the state, so that each pass finds the same random generators, buffers and attributes."""
        self._state.put_back()
        self.progress.update()

    def _mean(self, losses: list[torch.Tensor]) -> float:
        self.end_pass()
        dtype = precise(losses[0].device)
        shares = [loss.to(dtype) * batch.share for loss, batch in zip(losses, self.batches, strict=True)]
        return self.trainer.accelerator.reduce(torch.stack(shares).sum(), reduction="sum").item()


@contextlib.contextmanager
def sample_loss(trainer: Any, seed: int, training: bool = False, name: str = "Sharpness") -> Iterator[SampleLoss]:
    """
    Yield a `SampleLoss` in evaluation or training mode.

    On leaving, also after an interruption, restore weights, gradients and all other state bit for bit.
    """
    refuse_unsupported(trainer)
    is_silent = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
    with prepared_model(trainer) as model:
        # Before the state is recorded: an engine makes the parameters the shards, also after an evaluation.
        engine = make_engine(trainer.accelerator, model, Perturbation(), trainer.optimizer)
        with (
            left_as_found(trainer, model, training) as state,
            tqdm(desc=name, unit=" passes", leave=False, disable=is_silent) as progress,
        ):
            gradient = engine.take_gradient()
            try:
                yield SampleLoss(trainer, model, engine, state, seed, progress)
            finally:
                with DeferredSignals():
                    try:
                        engine.abandon()
                    finally:
                        engine.add_gradient(gradient)
