"""The loss of a sample and its gradient, at θ and at weights moved from θ, over all ranks."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import set_seed

from hf_gnp import penalty
from hf_gnp.direction import Perturbation
from hf_gnp.engines import Engine, make_engine
from hf_gnp.interrupts import DeferredSignals
from hf_gnp.replay.window import copied

from .prepared import UntouchedState, kept_generators, prepared_model, refuse_unsupported
from .sample import WeightedBatch, draw_sample
from .vectors import ShardVectors, precise


class SampleLoss:
    """
    L(θ + v): the mean of the trainer's loss over a sample, and ∇L(θ + v). Every rank calls each method.

    A gradient is one forward and backward of each micro-batch. It is reduced as in training and added up in float32,
    so that nothing but one micro-batch's gradient is in the dtype of 16-bit weights.
    """

    def __init__(
        self, trainer: Any, model: nn.Module, engine: Engine, batches: list[WeightedBatch], samples: int, seed: int
    ):
        self.trainer, self.model, self.batches, self.samples, self._seed = trainer, model, batches, samples, seed
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.progress = tqdm(desc="Sharpness", unit=" passes", leave=False, disable=not _shows_progress(trainer))
        self._engine, self._state = engine, UntouchedState(trainer, model)
        self._origin: torch.Tensor | None = None

    def begin(self) -> None:
        """Weights may be moved until `end`."""
        self._state.begin()
        self.vectors = ShardVectors(self._engine.hold_weights(), self._engine)

    def set_origin(self, origin: torch.Tensor | None) -> None:
        """Measure around θ + origin instead of θ: around another checkpoint."""
        self._origin = origin
        self.move()

    def origin(self) -> torch.Tensor:
        """The weights that are measured around, as a vector."""
        origin = self.vectors.theta()
        return origin if self._origin is None else origin.add_(self._origin)

    @torch.no_grad()
    def move(self, vector: torch.Tensor | None = None, scale: float = 1.0) -> None:
        """
        The weights become θ + scale v, rounded once to their dtype, on all ranks; θ without a vector. They stay there
        until the next move: making them seen is a collective under ZeRO-1 and 2.
        """
        if self._origin is not None:
            vector, scale = self._origin if vector is None else torch.add(self._origin, vector, alpha=scale), 1.0
        weights, thetas = ([getattr(shard, name) for shard in self.vectors.held] for name in ("weight", "theta"))
        if vector is None:
            penalty.copy_(weights, thetas)
        else:
            penalty.move_(weights, self.vectors.parts(vector), thetas, scale)
        self._engine.publish()

    def value(self) -> float:
        """The loss at the weights as they are."""
        with torch.no_grad():
            losses = [self._counted(self.micro_batch_loss(batch), batch) for batch in self.batches]
        return self._sum(losses)

    def add_gradient_(self, vector: torch.Tensor, scale: float = 1.0) -> float:
        """`vector += scale * ∇L` at the weights as they are. Returns the loss."""
        accelerator, engine = self.trainer.accelerator, self._engine
        kwargs = {"scale_wrt_gas": False} if self.trainer.is_deepspeed_enabled else {}
        losses = []
        for batch in self.batches:
            with engine.micro_batch(is_last=True):
                loss = self.micro_batch_loss(batch)
                losses.append(self._counted(loss, batch))
                # Engines average over ranks, and accelerate over its own accumulation steps.
                steps = 1 if kwargs else accelerator.gradient_accumulation_steps
                accelerator.backward(loss * (batch.share * accelerator.num_processes * steps), **kwargs)
            self.vectors.add_(vector, engine.gradients_of(self.vectors.held), scale / float(engine.loss_scale()))
            engine.discard_gradient()
        return self._sum(losses)

    def micro_batch_loss(self, batch: WeightedBatch) -> torch.Tensor:
        """The mean loss of a micro-batch over its own labels, with random numbers that are the same in each pass."""
        trainer = self.trainer
        set_seed(self._seed + batch.number)
        # A loss function that divides by the number of items gets that of the micro-batch; a model does by itself.
        has_function = trainer.compute_loss_func is not None
        items = torch.tensor(batch.items, device=trainer.accelerator.device) if has_function else None
        inputs = trainer._prepare_inputs(copied(batch.inputs))
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(self.model, inputs, num_items_in_batch=items)
        # What `compute_loss` multiplies it by, so that averaging over ranks gives the sum.
        is_scaled = has_function and trainer.args.average_tokens_across_devices
        return loss / trainer.accelerator.num_processes if is_scaled else loss

    @staticmethod
    def _counted(loss: torch.Tensor, batch: WeightedBatch) -> torch.Tensor:
        return loss.detach().to(precise(loss.device)) * batch.share

    def end_pass(self) -> None:
        self._state.put_back()
        self.progress.update()

    def _sum(self, losses: list[torch.Tensor]) -> float:
        self.end_pass()
        return self.trainer.accelerator.reduce(torch.stack(losses).sum(), reduction="sum").item()

    def end(self) -> None:
        """The weights are θ bit for bit, and all else is as it was, also when it was interrupted half way."""
        with DeferredSignals():
            try:
                self._engine.abandon()
            finally:
                self._state.end()
                self.progress.close()


@contextlib.contextmanager
def sample_loss(trainer: Any, dataset: Any, samples: int, seed: int) -> Iterator[SampleLoss]:
    """The loss of a sample, for the time in which weights may be moved."""
    refuse_unsupported(trainer)
    with prepared_model(trainer) as model, kept_generators(trainer, model):
        batches, size = draw_sample(trainer, dataset, samples, seed)
        engine = make_engine(trainer.accelerator, model, Perturbation(), trainer.optimizer)
        loss, gradient = SampleLoss(trainer, model, engine, batches, size, seed), engine.take_gradient()
        try:
            loss.begin()
            yield loss
        finally:
            loss.end()
            engine.add_gradient(gradient)


def _shows_progress(trainer: Any) -> bool:
    return trainer.is_local_process_zero() and not trainer.args.disable_tqdm
