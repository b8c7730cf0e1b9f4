"""The engine of one process, DataParallel, DDP and tensor parallelism, with gradients in `param.grad`."""

import contextlib
import functools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from hf_gnp import penalty
from hf_gnp.momentum import moment_of, refuse_optimizer, unwrapped
from hf_gnp.perturbation import Perturbation
from hf_gnp.tensors import gradient_of, local_part

from .engine import Engine
from .param_grad import ParamGradEngine
from .private import next_step_skipped, optimizer_that_skips
from .reducing import average_gradients
from .shards import Shard, as_sharded, part_of, place_of


CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile


class NativeEngine(ParamGradEngine):
    """
    Run a step with gradients in `param.grad`.

    Memory: one copy of the weights that move (of this rank's shard under FSDP2), and seldom one of the gradients
    (`ParamGradEngine`).

    The parameters of the model that the optimizer has move. Others of the model, and those of the optimizer outside
    of the model, such as those of a loss, get the mixed gradient but do not move.
    DDP and FSDP2 do not reduce their gradients, so ranks have no common direction for them.
    """

    has_master = False

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation, model: nn.Module, optimizer: Any = None):
        self._uses_cuda_graphs = accelerator.state.dynamo_plugin.mode in CUDA_GRAPHS
        self._moved: list[torch.Tensor] = []
        self._backup: list[torch.Tensor] = []
        self._skipping = contextlib.ExitStack()
        self._is_reducing = False  # whether gradients are reduced in this pass
        super().__init__(accelerator, perturbation, model, optimizer)

    # The shards.

    @torch.no_grad()
    def shards(self) -> list[Shard]:
        with_gradient = [p for p in self._moving if p.grad is not None]
        # A loss may be constant, such as for a batch without pairs. An optimizer in hooks removes the gradients.
        if not with_gradient and any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self._trainable()):
            raise RuntimeError(
                "No parameter has a gradient after backward, so there is nothing to penalise. An optimizer that steps "
                "inside backward (LOMO, layer-wise GaLore or APOLLO) cannot be used with the gradient-norm penalty."
            )
        return list(map(self._shard, with_gradient, self._local_gradients(with_gradient)))

    @torch.no_grad()
    def trainable_shards(self) -> list[Shard]:
        return [self._shard(parameter) for parameter in self._moving if parameter.requires_grad]

    def _shard(self, parameter: nn.Parameter, gradient: torch.Tensor | None = None) -> Shard:
        number = self.numbers[id(parameter)]
        if parameter.is_complex() and not self.is_sharded:  # a real and an imaginary number for each element
            view = torch.view_as_real(parameter)
            gradient = None if gradient is None else torch.view_as_real(gradient.resolve_conj())
            return Shard(parameter, number, view, view, gradient)
        if not self.is_sharded:
            return Shard(parameter, number, parameter, parameter, gradient)
        weight, part = local_part(parameter).detach(), functools.partial(part_of, parameter)
        coordinates, copies = place_of(parameter)
        return Shard(parameter, number, weight, weight, gradient, coordinates, part, copies)

    def first_moment(self, shard: Shard) -> torch.Tensor | None:
        values = self._optimizer.state.get(shard.parameter)
        if not values:
            return None
        moment = moment_of(values, shard.parameter.shape)
        if moment is None:
            refuse_optimizer(type(unwrapped(self._optimizer)).__name__)
        return local_part(as_sharded(moment, shard.parameter))

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        # Whole gradients are equal on all ranks, or differ on purpose (gnp_scope="rank").
        if self.is_sharded:
            dist.all_reduce(value)
        return value

    def loss_scale(self) -> torch.Tensor | float:
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.accelerator.device))

    # The weights.

    @property
    def is_perturbed(self) -> bool:
        return bool(self._moved)

    @torch.no_grad()
    def keep_weights(self, shards: list[Shard]) -> list[Shard]:
        self._backup = penalty.clones([shard.weight for shard in shards])
        self._moved = [shard.weight for shard in shards]  # last: `restore` needs both
        pairs = zip(shards, self._backup, strict=True)
        return [shard._replace(master=backup, gradient=None) for shard, backup in pairs]

    publish = Engine.reshard  # does nothing, as no rank gathers weights

    @torch.no_grad()
    def restore(self) -> None:
        if self._moved:
            penalty.copy_(self._moved, self._backup)
            self._moved, self._backup = [], []
        self.publish()

    # The passes.

    def first_pass(self) -> AbstractContextManager[None]:
        self._is_reducing = not self.perturbation.is_per_rank and self.perturbation.is_per_micro_batch
        if self.perturbation.is_per_rank:
            return self.no_sync()
        return self.reducing() if self._is_reducing else contextlib.nullcontext()

    @contextlib.contextmanager
    def replay(self, is_last: bool) -> Iterator[None]:
        is_each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        self._is_reducing = not self.perturbation.is_per_rank and (is_last or is_each)
        with self.sync_gradients_set(is_last), self.reducing() if self._is_reducing else self.no_sync():
            yield

    @contextlib.contextmanager
    def reducing(self) -> Iterator[None]:
        """Reduce gradients, even within `no_sync`, which `Trainer` enters for all but the last micro-batch."""
        if self.ddp is None:
            yield
            return
        before = self.ddp.require_backward_grad_sync
        self.ddp.require_backward_grad_sync = True
        try:
            yield
        finally:
            self.ddp.require_backward_grad_sync = before

    def no_sync(self) -> AbstractContextManager[None]:
        """Reduce no gradients."""
        return self.accelerator.no_sync(self.model)

    def after_backward(self) -> None:
        if self._is_reducing and not self.accelerator.sync_gradients and (adapters := self._unsharded()):
            average_gradients(adapters, some_unused=True)
        # A parameter's first gradient is the tensor that backward made. A CUDA graph would overwrite it.
        if self._uses_cuda_graphs:
            for parameter in self._with_any_gradient():
                parameter.grad = gradient_of(parameter).clone()

    def _unsharded(self) -> list[nn.Parameter]:
        """
        Return the adapters in a model that transformers sharded at load time.

        A hook of `Trainer` averages their gradients over ranks, but only in the last backward of a step.
        """
        is_sharded_at_load = getattr(self.model, "is_distributed_loading_by_transformers", False)
        return [p for p in self._trainable() if not isinstance(p, DTensor)] if is_sharded_at_load else []

    @contextlib.contextmanager
    def probed(self) -> Iterator[None]:
        # With a graph: the kernels are those of the first pass, and a loss may differentiate. A loss may also change
        # weights that its trainer restores after the backward.
        weights = [local_part(parameter).detach() for parameter in self._trainable()]
        kept = [weight.clone() for weight in weights]
        try:
            with self.no_sync():
                yield
        finally:
            penalty.copy_(weights, kept)

    # The end of the step.

    @torch.no_grad()
    def finish(self) -> None:
        """Average the gradient over ranks if each rank moves along its own, as then no pass reduces it."""
        if not (self.perturbation.is_per_rank and dist.is_initialized() and dist.get_world_size() > 1):
            return
        parameters = [p for p in self.all_parameters if p.requires_grad or p.grad is not None]
        average_gradients(parameters, getattr(self.model, "find_unused_parameters", False))

    def drop_nonfinite_gradient(self, grad_norm: torch.Tensor | float | None) -> torch.Tensor | bool:
        if self.accelerator.scaler is not None or grad_norm is None:
            return False
        norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        if isinstance(norm, torch.Tensor) and (optimizer := optimizer_that_skips(self._optimizer, norm.device)):
            flag = norm.detach().isfinite().logical_not()
            self._skipping.enter_context(next_step_skipped(optimizer, flag))
            return flag
        if math.isfinite(norm):
            return False
        self.discard_gradient()
        return True

    def end_step(self) -> None:
        self._skipping.close()
