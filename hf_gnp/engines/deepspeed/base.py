"""
The parts that DeepSpeed's stages share. This rank's gradients and fp32 masters are inside DeepSpeed's optimizers.

The attributes that hold them are private to DeepSpeed. Each engine supports the optimizer classes that `__init__.py`
lists. If DeepSpeed changes them, the equivalence tests fail.
"""

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, NamedTuple

import deepspeed.comm as ds_comm
import torch
from accelerate import Accelerator
from torch import nn

from hf_gnp import penalty
from hf_gnp.engines.engine import Engine, attribute_set
from hf_gnp.engines.shards import Shard
from hf_gnp.momentum import moment_of, refuse_optimizer
from hf_gnp.perturbation import Perturbation


class DeepSpeedSteps(Engine):
    """All stages: backward and step are two calls. DeepSpeed reduces at the boundary that `first_pass` sets."""

    ds_engine: Any

    def first_pass(self) -> AbstractContextManager[None]:
        """Replace accelerate's DeepSpeedEngineWrapper, whose `backward` would also step."""

        def backward(loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
            is_boundary = sync_gradients or self.perturbation.is_per_micro_batch
            self.ds_engine.set_gradient_accumulation_boundary(is_boundary)
            self.ds_engine.backward(loss, **kwargs)

        wrapper = SimpleNamespace(engine=self.ds_engine, backward=backward)
        return attribute_set(self.accelerator, "deepspeed_engine_wrapped", wrapper)

    @contextlib.contextmanager
    def replay(self, is_last: bool) -> Iterator[None]:
        with self.sync_gradients_set(is_last), self.first_pass():
            yield

    def computes_in_16_bit(self) -> bool:
        is_autocast = self.accelerator.deepspeed_plugin.hf_ds_config.get_value("torch_autocast.enabled")
        return bool(is_autocast) or super().computes_in_16_bit()

    def finish(self) -> None:
        self.ds_engine.step()

    def drop_nonfinite_gradient(self, grad_norm: torch.Tensor | float | None) -> bool:
        return False  # DeepSpeed has made the step, or skipped it


class Fragment(NamedTuple):
    """The elements of one parameter in this rank's partition of its parameter group, without padding."""

    parameter: nn.Parameter
    group: int  # the place of the parameter group
    number: int  # the place of the fragment among the gradients of its group
    offset: int  # the place of the first element in the partition
    start: int  # the place of the first element in the flattened parameter
    size: int

    def of(self, partition: torch.Tensor) -> torch.Tensor:
        return partition.narrow(0, self.offset, self.size)

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.reshape(-1).narrow(0, self.start, self.size)


class ShardedEngine(DeepSpeedSteps):
    """
    ZeRO-1, 2 and 3: θ is restored from the fp32 masters. If α < 1, this rank's shard of g₁ is copied before g₂, except
    in `Bf16Zero1Engine`.
    """

    keeps_momentum_move = True
    offloads = False  # whether gradients and masters are on the CPU

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation):
        self.ds_engine = accelerator.deepspeed_engine_wrapped.engine
        self.optimizer = self.ds_engine.optimizer
        super().__init__(accelerator, perturbation, self.ds_engine.module)
        self._first_gradients: list[torch.Tensor] = []
        self._holds = False  # whether there is a gradient of earlier micro-batches of the step

    # The shards.

    @abstractmethod
    def partitions(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return this rank's flat partition of the forward weights, and its fp32 master, for each parameter group."""

    @abstractmethod
    def fragments(self) -> list[Fragment]:
        """Return the fragments of all trainable parameters on this rank."""

    @abstractmethod
    def fragment_gradients(self, fragments: list[Fragment]) -> list[torch.Tensor]:
        """Return the flat gradient of each fragment, after a pass that reduced it."""

    @abstractmethod
    def reset_gradients(self) -> None:
        """Get ready for a pass whose gradients replace those of the pass before."""

    def trainable_shards(self) -> list[Shard]:
        return self._shards_of(self.fragments())

    def shards(self) -> list[Shard]:
        fragments = self.fragments()
        pairs = zip(self._shards_of(fragments), self.fragment_gradients(fragments), strict=True)
        return [shard._replace(gradient=gradient) for shard, gradient in pairs]

    def _shards_of(self, fragments: list[Fragment]) -> list[Shard]:
        partitions, shards = self.partitions(), []
        for part in fragments:
            weight, master = (part.of(partition) for partition in partitions[part.group])
            number = self.numbers[id(part.parameter)]
            shards.append(Shard(part.parameter, number, weight, master, None, (part.start,), part.part_of))
        return shards

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        ds_comm.all_reduce(value, group=self.optimizer.dp_process_group)
        return value

    def loss_scale(self) -> float:
        return self.optimizer.loss_scale

    def first_moment(self, shard: Shard) -> torch.Tensor | None:
        # Found by its place in memory: the base optimizer steps on the flat partitions that masters are views of.
        base = self.optimizer.optimizer
        for flat, values in base.state.items():
            start = (shard.master.data_ptr() - flat.data_ptr()) // flat.element_size()
            if values and 0 <= start < flat.numel():
                moment = moment_of(values, flat.shape)
                if moment is None:
                    refuse_optimizer(type(base).__name__)
                return moment.view(-1).narrow(0, start, shard.master.numel()).view(shard.master.shape)
        return None

    # The weights.

    def keep_weights(self, shards: list[Shard]) -> list[Shard]:
        self.is_perturbed = True
        return [shard._replace(gradient=None) for shard in shards]

    def restore_partitions(self) -> None:
        """Put θ back into this rank's partitions."""
        for weight, master in self.partitions():
            weight.copy_(master)

    # The gradients.

    def gradients(self) -> list[torch.Tensor]:
        """Return the gradients that the optimizer steps with on this rank, after a pass that reduced them."""
        return self.fragment_gradients(self.fragments())

    def keep_gradients(self, alpha: float, scale: float) -> None:
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
        """Correct the norms that DeepSpeed clips by: with offload it measured them as the gradients arrived."""
        if not self.offloads:
            return
        norms, fragments = self.optimizer.norm_for_param_grads, self.fragments()
        for fragment, gradient in zip(fragments, self.fragment_gradients(fragments), strict=True):
            if (param_id := self.optimizer.get_param_id(fragment.parameter)) in norms:
                norms[param_id] = gradient.norm()

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
        torch._foreach_add_(self.gradients(), gradient)
        self._update_offloaded_norms()
        if hasattr(self.optimizer, "local_overflow") and not penalty.local_sq_norms(gradient).sum().isfinite():
            self.optimizer.local_overflow = True  # DeepSpeed looks for overflow as gradients arrive
