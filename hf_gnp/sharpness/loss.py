"""The loss of a sample and its gradient over all ranks, at the weights θ and at weights moved from θ."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, set_seed

from hf_gnp import penalty
from hf_gnp.engines import Engine, make_engine, refuse_engine
from hf_gnp.perturbation import Perturbation
from hf_gnp.second_pass.inputs import copied
from hf_gnp.second_pass.probe import no_log, replaced
from hf_gnp.second_pass.running_tensors import RunningTensors
from hf_gnp.second_pass.state import Found, Snapshot
from hf_gnp.signals import deferred_signals
from hf_gnp.tensors import gradients_hidden

from .sample import WeightedBatch
from .vectors import ShardVectors


class SampleLoss:
    """
    Compute the mean L of the trainer's loss over `batches`, and ∇L. Every rank calls each method.

    Attributes:
        batches: This rank's micro-batches, to be set before the first pass.
        vectors: The algebra of vectors such as ∇L.
        origin: θ, one tensor for each shard. It may be set to other weights, such as those of a checkpoint.
    """

    def __init__(self, trainer: Any, model: nn.Module, engine: Engine, state: Snapshot, seed: int, progress: Any):
        self.trainer, self.model, self.progress = trainer, model, progress
        self._engine, self._state, self._seed = engine, state, seed
        self.vectors = ShardVectors(engine.keep_weights(engine.trainable_shards()), engine)
        self.origin = [shard.master for shard in self.vectors.shards]
        self.batches: list[WeightedBatch] = []

    def theta(self) -> torch.Tensor:
        """Return θ as a vector."""
        return self.vectors.add_(self.vectors.zeros(), self.origin)

    @torch.no_grad()
    def move(self, vector: torch.Tensor, scale: float = 1.0) -> None:
        """Set the weights on all ranks to θ + scale v, rounded once to their dtype, until the next move."""
        weights = [shard.weight for shard in self.vectors.shards]
        penalty.move_(weights, self.vectors.parts(vector), self.origin, scale)
        self._engine.publish()  # a collective under ZeRO-1 and 2

    def value(self) -> float:
        """Return the loss at the current weights."""
        with torch.no_grad():
            return self._mean([self.micro_batch_loss(batch) for batch in self.batches])

    def add_gradient_(self, vector: torch.Tensor, scale: float = 1.0) -> float:
        """Add `scale * ∇L` at the current weights to `vector`, and return the loss."""
        accelerator, engine, losses = self.trainer.accelerator, self._engine, []
        for batch in self.batches:
            with engine.replay(is_last=True):
                loss = self.micro_batch_loss(batch)
                losses.append(loss.detach())
                loss = loss * (batch.share * accelerator.num_processes)  # engines average gradients over ranks
                if self.trainer.is_deepspeed_enabled:
                    accelerator.backward(loss, scale_wrt_gas=False)
                else:
                    loss.backward()
            gradients = {id(shard.parameter): shard.gradient for shard in engine.shards()}
            found = [gradients.get(id(shard.parameter)) for shard in self.vectors.shards]
            self.vectors.add_(vector, found, scale / float(engine.loss_scale()))
            engine.discard_gradient()
        return self._mean(losses)

    def micro_batch_loss(self, batch: WeightedBatch) -> torch.Tensor:
        """Return the mean loss over the labels of a micro-batch, with the same random numbers in each pass."""
        trainer, items = self.trainer, None
        set_seed(self._seed + batch.number)
        is_overridden = type(trainer).compute_loss is not Trainer.compute_loss
        is_users = trainer.compute_loss_func is not None or (is_overridden and trainer.model_accepts_loss_kwargs)
        if is_users and "labels" in batch.inputs:  # it may divide by the number of items, which a model counts itself
            # With `average_tokens_across_devices` it is that of all ranks, and `compute_loss` multiplies by the ranks.
            ranks = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
            items = torch.tensor(batch.items * ranks, device=trainer.accelerator.device)
        inputs = trainer._prepare_inputs(copied(batch.inputs))
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(self.model, inputs, num_items_in_batch=items)

    def end_pass(self) -> None:
        """Restore the state, so that each pass finds the same random generators, buffers and attributes."""
        self._state.put_back()
        self.progress.update()

    def _mean(self, losses: list[torch.Tensor]) -> float:
        self.end_pass()
        shares = torch.tensor([batch.share for batch in self.batches], dtype=self.vectors.sum_dtype)
        mean = torch.stack(losses).to(shares.dtype) @ shares.to(losses[0].device)
        return self.trainer.accelerator.reduce(mean, reduction="sum").item()


@contextlib.contextmanager
def sample_loss(trainer: Any, seed: int, training: bool = False, name: str = "Sharpness") -> Iterator[SampleLoss]:
    """Yield a `SampleLoss`. On leaving, also after an interruption, restore all state bit for bit."""
    _refuse_unsupported(trainer)
    with _prepared_model(trainer) as model:
        # Before the state is recorded: an engine makes the parameters the shards, also after an evaluation.
        engine = make_engine(trainer.accelerator, model, Perturbation())  # of all trainable weights
        found, modes = Found(trainer), [(module, module.training) for module in model.modules()]
        state = Snapshot(found, RunningTensors().start(found))
        inside = set(map(id, trainer.model.parameters()))
        others = [p for p in (*found.others, *found.trained) if id(p) not in inside]
        gradient = engine.take_gradient()
        is_silent = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
        progress = tqdm(desc=name, unit=" passes", leave=False, disable=is_silent)
        try:
            with progress, gradients_hidden(others), replaced(trainer, log=no_log):
                model.train(training)
                yield SampleLoss(trainer, model, engine, state, seed, progress)
        finally:
            with deferred_signals(), contextlib.ExitStack() as stack:  # from last to first, also after one that raises
                for module, is_training in modes:
                    stack.callback(setattr, module, "training", is_training)
                stack.callback(state.put_back)
                stack.callback(engine.add_gradient, gradient)
                stack.callback(engine.abandon)


def _refuse_unsupported(trainer: Any) -> None:
    """Raise an error where a gradient would not be that of the mean loss, or where weights cannot be moved."""
    accelerator, sentence = trainer.accelerator, "Sharpness cannot be measured with {}."
    dtypes = {parameter.dtype for parameter in trainer.model.parameters()}
    if accelerator.mixed_precision == "fp16" or torch.float16 in dtypes:  # DeepSpeed's `fp16` too
        raise ValueError(
            "Sharpness is not measured in fp16, which has too few digits and too little range for differences of "
            "gradients without a loss scale: load the model in fp32 or bf16."
        )
    if any(dtype.is_complex for dtype in dtypes):
        raise NotImplementedError(sentence.format("complex weights: train them as pairs of real ones"))
    refuse_engine(accelerator, trainer.model, sentence)
    if trainer.args.n_gpu > 1:
        raise NotImplementedError(sentence.format("DataParallel: start one process a GPU (torchrun)"))
    if trainer.get_tp_size() > 1:
        raise NotImplementedError(sentence.format("tensor parallelism: use FSDP2 or DeepSpeed ZeRO"))
    if trainer.is_in_train and not accelerator.sync_gradients:
        raise RuntimeError("Sharpness is measured between optimizer steps, not between the micro-batches of one.")


@contextlib.contextmanager
def _prepared_model(trainer: Any) -> Iterator[nn.Module]:
    """Yield the model as `train` prepared it. Before `train`, prepare it for this context."""
    accelerator, model, wrapped = trainer.accelerator, trainer.model, trainer.model_wrapped
    is_sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if is_sharded and not accelerator._optimizers:  # `evaluate` prepares the model alone
        raise RuntimeError(
            "DeepSpeed and FSDP shard a model together with its optimizer, which `train` makes: measure during or "
            "after training (SharpnessCallback does), or before it on one process."
        )
    is_of_model = wrapped is not model and accelerator.unwrap_model(wrapped, keep_torch_compile=False) is model
    if is_sharded or is_of_model:  # else the user has set another model since `train`
        yield wrapped
        return
    models, attributes = list(accelerator._models), dict(vars(model))
    is_placed = getattr(model, "is_distributed_loading_by_transformers", False)  # and sharded
    try:
        yield accelerator.prepare_model(model, device_placement=not is_placed, evaluation_mode=is_placed)
    finally:  # accelerate adds to its models, and to the attributes of this one
        accelerator._models[:] = models
        for name in vars(model).keys() - attributes.keys():
            del vars(model)[name]
        vars(model).update(attributes)
