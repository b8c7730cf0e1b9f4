"""
What DeepSpeed's stages share. Gradients and fp32 masters are this rank's partitions, inside DeepSpeed's optimizers.

Which attributes hold them is private to DeepSpeed. One class here knows one optimizer class there, and its equivalence
tests fail when the insides change.
"""

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import deepspeed.comm as ds_comm
import torch
from accelerate import Accelerator

from hf_gnp import penalty
from hf_gnp.engines.engine import Engine
from hf_gnp.engines.shards import Shard
from hf_gnp.momentum import moment_of, refuse_optimizer
from hf_gnp.perturbation import Perturbation

from . import private


class _BackwardOnly:
    """Stands where accelerate keeps its DeepSpeedEngineWrapper, whose `backward` would also step."""

    def __init__(self, engine: Any, always_reduces: bool):
        self.engine, self.always_reduces = engine, always_reduces

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        self.engine.set_gradient_accumulation_boundary(sync_gradients or self.always_reduces)
        self.engine.backward(loss, **kwargs)


@contextlib.contextmanager
def _backward_only(accelerator: Accelerator, always_reduces: bool) -> Iterator[None]:
    wrapped = accelerator.deepspeed_engine_wrapped
    accelerator.deepspeed_engine_wrapped = _BackwardOnly(wrapped.engine, always_reduces)
    try:
        yield
    finally:
        accelerator.deepspeed_engine_wrapped = wrapped


class DeepSpeedSteps(Engine):
    """What all stages share: backward and step are two calls, and DeepSpeed itself knows when to reduce."""

    engine: Any  # DeepSpeed's

    def first_pass(self) -> AbstractContextManager[None]:
        return _backward_only(self.accelerator, self.perturbation.is_per_micro_batch)

    @contextlib.contextmanager
    def replay(self, is_last: bool) -> Iterator[None]:
        with self.sync_gradients_set(is_last), _backward_only(self.accelerator, is_last):
            yield

    def computes_in_16_bit(self) -> bool:
        is_autocast = self.accelerator.deepspeed_plugin.hf_ds_config.get_value("torch_autocast.enabled")
        return bool(is_autocast) or super().computes_in_16_bit()

    def sets_gradients_aside(self) -> bool:
        return False  # and accelerate steps after a backward that is not `Trainer.training_step`'s

    def finish(self) -> None:
        self.engine.step()

    def drop_nonfinite_gradient(self, grad_norm: torch.Tensor | float | None) -> bool:
        return False  # the step has been made, or skipped


class ShardedEngine(DeepSpeedSteps):
    """What ZeRO-1, 2 and 3 share: g₁ is kept aside as a shard, and g₂ replaces it."""

    gathers_weights = True

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation):
        self.engine = accelerator.deepspeed_engine_wrapped.engine
        self.optimizer = self.engine.optimizer
        super().__init__(accelerator, perturbation, self.engine.module)
        private.check_optimizer(self.optimizer)
        self._first_gradients: list[torch.Tensor] = []
        self._holds = False  # the gradient of earlier micro-batches of the step

    @abstractmethod
    def reset_gradients(self) -> None:
        """Get ready for a pass whose gradients replace those of the pass before."""

    def gradients(self) -> list[torch.Tensor]:
        """Return what the optimizer steps with on this rank, after a pass that reduced it."""
        return [shard.gradient for shard in self.shards() if shard.gradient is not None]

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        ds_comm.all_reduce(value, group=self.optimizer.dp_process_group)
        return value

    def loss_scale(self) -> float:
        return self.optimizer.loss_scale

    def first_moment(self, shard: Shard) -> torch.Tensor | None:
        # By its place in memory: the base optimizer steps on the flat partitions of which masters are views.
        base = self.optimizer.optimizer
        for flat, values in base.state.items():
            start = (shard.master.data_ptr() - flat.data_ptr()) // flat.element_size()
            if values and 0 <= start < flat.numel():
                moment = moment_of(values, flat.shape)
                if moment is None:
                    refuse_optimizer(type(base).__name__)
                return moment.view(-1).narrow(0, start, shard.master.numel()).view(shard.master.shape)
        return None

    def keep_gradients(self, shards: list[Shard], alpha: float, scale: float) -> None:
        self._first_gradients = [gradient.clone() for gradient in self.gradients()] if alpha < 1 else []
        penalty.scale_(self._first_gradients, scale)
        self.reset_gradients()

    @torch.no_grad()
    def mix(self, alpha: float) -> None:
        if alpha < 1:
            penalty.lerp_(self.gradients(), self._first_gradients, 1 - alpha)
        self._first_gradients = []
        self._update_offloaded_norms()

    @torch.no_grad()
    def scale_gradient(self, scale: float) -> None:
        penalty.scale_(self.gradients(), scale)
        self._update_offloaded_norms()

    def _update_offloaded_norms(self) -> None:
        """Correct the norms that DeepSpeed clips by, with offload: it took them as the gradients arrived."""
        if not private.offloads(self.optimizer):
            return
        norms = self.optimizer.norm_for_param_grads
        for shard in self.shards():
            if shard.gradient is not None and (param_id := self.optimizer.get_param_id(shard.parameter)) in norms:
                norms[param_id] = shard.gradient.norm()

    def discard_gradient(self) -> None:
        self._first_gradients, self._holds = [], False
        self.reset_gradients()

    def hold_gradient(self) -> None:
        self._holds = True

    def take_gradient(self) -> list[torch.Tensor]:
        if not self._holds:
            return []
        self._holds = False
        taken = [gradient.clone() for gradient in self.gradients()]
        self.reset_gradients()
        return taken

    @torch.no_grad()
    def add_gradient(self, gradient: list[torch.Tensor]) -> None:
        if not gradient:
            return
        penalty.add_(self.gradients(), gradient)
        self._update_offloaded_norms()
        if hasattr(self.optimizer, "local_overflow") and not penalty.local_sq_norms(gradient).sum().isfinite():
            self.optimizer.local_overflow = True  # which DeepSpeed notes as gradients arrive
