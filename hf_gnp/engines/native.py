"""The engine of one process, DataParallel, DDP, FSDP2 and tensor parallelism, with gradients in `param.grad`."""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from hf_gnp import penalty
from hf_gnp.momentum import moment_of, refuse_optimizer, unwrapped
from hf_gnp.perturbation import Perturbation
from hf_gnp.tensors import gradient_of, gradients_hidden, local_part, modules_of, parameters_outside

from .engine import Engine
from .fsdp import ShardedModules
from .private import next_step_skipped, optimizer_that_skips
from .reducing import average_gradients, defer_reduction, has_communication_hook, reducing
from .shards import Shard, as_sharded, part_of, place_of


CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile


class TakenGradient(NamedTuple):
    """Hold a gradient that was set aside. `is_unreduced`: it is this rank's own, and no backward will reduce it."""

    pairs: list[tuple[nn.Parameter, torch.Tensor]]
    is_unreduced: bool


class NativeEngine(Engine):
    """
    Run a step with gradients in `param.grad`.

    Memory: one copy of the weights that move (of this rank's shard under FSDP2). The second pass adds g₂ to the scaled
    g₁, so there is no second gradient buffer. There is one for 16-bit gradients, where rounding would lose a small
    α g₂, and where a communication hook of DDP or a hook of a parameter changes gradients.

    Parameters of the optimizer outside of the model, such as those of a loss, get the mixed gradient but do not move.
    DDP and FSDP2 do not reduce their gradients, so ranks have no common direction for them.
    """

    has_master = False

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation, model: nn.Module, optimizer: Any = None):
        self._optimizer = optimizer
        self._fsdp = ShardedModules(modules_of(model))
        self._uses_cuda_graphs = accelerator.state.dynamo_plugin.mode in CUDA_GRAPHS
        self._moved: list[torch.Tensor] = []
        self._backup: list[torch.Tensor] = []
        self._first_gradients: TakenGradient | None = None
        self._skipping = contextlib.ExitStack()
        self._is_reducing = False  # whether gradients are reduced in this pass
        super().__init__(accelerator, perturbation, model)
        has_communication_hook(model)  # refuses PowerSGD

    def begin_window(self, perturbation: Perturbation, optimizer: Any = None) -> None:
        self.reshard()
        super().begin_window(perturbation)
        self._optimizer = optimizer or self._optimizer  # a callback may have replaced it
        self._outside = parameters_outside(self.all_parameters, self._optimizer)
        self.is_sharded = any(isinstance(p, DTensor) for p in self.all_parameters)

    # The shards.

    @torch.no_grad()
    def shards(self) -> list[Shard]:
        with_gradient = [p for p in self.all_parameters if p.grad is not None]
        # A loss may be constant, such as for a batch without pairs. An optimizer in hooks removes the gradients.
        if not with_gradient and any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self._trainable()):
            raise RuntimeError(
                "No parameter has a gradient after backward, so there is nothing to penalise. An optimizer that steps "
                "inside backward (LOMO, layer-wise GaLore or APOLLO) cannot be used with the gradient-norm penalty."
            )
        return list(map(self._shard, with_gradient, self._gradients(with_gradient)))

    @torch.no_grad()
    def trainable_shards(self) -> list[Shard]:
        return [self._shard(parameter) for parameter in self._trainable()]

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.all_parameters if p.requires_grad]

    def _shard(self, parameter: nn.Parameter, gradient: torch.Tensor | None = None) -> Shard:
        number = self.numbers[id(parameter)]
        if not self.is_sharded:
            return Shard(parameter, number, parameter, parameter, gradient)
        weight, part = local_part(parameter).detach(), functools.partial(part_of, parameter)
        coordinates, copies = place_of(parameter)
        return Shard(parameter, number, weight, weight, gradient, coordinates, part, copies)

    def _gradients(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """Return this rank's parts of gradients, sharded as the parameters."""
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        if any(gradient.is_sparse for gradient in gradients):
            raise NotImplementedError(
                "The gradient-norm penalty needs dense gradients: build the embedding with sparse=False."
            )
        if not self.is_sharded:
            return gradients
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if isinstance(gradient, DTensor):
                parameter.grad = as_sharded(gradient, parameter)
        return [local_part(gradient_of(parameter)) for parameter in parameters]

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
        return [shard.kept(backup) for shard, backup in zip(shards, self._backup, strict=True)]

    def reshard(self) -> None:
        self._fsdp.reshard()

    def publish(self) -> None:
        self.reshard()

    @torch.no_grad()
    def restore(self) -> None:
        if self._moved:
            penalty.copy_(self._moved, self._backup)
            self._moved, self._backup = [], []
        self.publish()

    def clean_up(self) -> None:
        self._fsdp.forget_forward()
        self._fsdp.drop_gradients()
        super().clean_up()

    # The passes.

    def first_pass(self) -> AbstractContextManager[None]:
        self._is_reducing = not self.perturbation.is_per_rank and self.perturbation.is_per_micro_batch
        if self.perturbation.is_per_rank:
            return self.accelerator.no_sync(self.model)
        return reducing(self.model, self._fsdp.modules) if self._is_reducing else contextlib.nullcontext()

    @contextlib.contextmanager
    def replay(self, is_last: bool) -> Iterator[None]:
        is_each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        self._is_reducing = not self.perturbation.is_per_rank and (is_last or is_each)
        reduced = reducing(self.model, self._fsdp.modules) if self._is_reducing else self._no_sync()
        with self.sync_gradients_set(is_last), reduced:
            yield

    def _no_sync(self) -> AbstractContextManager[None]:
        if self._fsdp and not self.accelerator.is_fsdp2:
            return defer_reduction(self.model)
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
            with self._no_sync():
                yield
        finally:
            penalty.copy_(weights, kept)
        self._fsdp.forget_forward()
        self.publish()

    # The gradients.

    def keep_gradients(self, shards: list[Shard], alpha: float, scale: float) -> None:
        self.accumulates = False
        if alpha == 1:
            self.discard_gradient()
        elif (
            any(shard.gradient.dtype.itemsize == 2 for shard in shards)
            # Such a hook changes all of `.grad`: tensor parallelism would sum g₁ over ranks a second time.
            or any(parameter._post_accumulate_grad_hooks for parameter in self._trainable())
            or has_communication_hook(self.model)
        ):
            self.scale_gradient(scale)
            self._first_gradients = self.take_gradient()
        else:
            self.accumulates = True
            outside = self._gradients([parameter for parameter in self._outside if parameter.grad is not None])
            penalty.scale_([*(shard.gradient for shard in shards), *outside], scale * (1 - alpha) / alpha)

    def scale_gradient(self, scale: float) -> None:
        penalty.scale_(self._gradients(self._with_any_gradient()), scale)

    @torch.no_grad()
    def mix(self, alpha: float) -> None:
        first, self._first_gradients = self._first_gradients, None
        if alpha == 1:
            return
        if first is None:
            self.scale_gradient(alpha)
            return
        by_parameter = {id(p): g for p, g in first.pairs}
        with_gradient = self._with_any_gradient()
        both = [p for p in with_gradient if id(p) in by_parameter]
        firsts = [local_part(by_parameter[id(p)]) for p in both]
        penalty.lerp_(self._gradients(both), firsts, 1 - alpha)
        penalty.scale_(self._gradients([p for p in with_gradient if id(p) not in by_parameter]), alpha)
        for parameter, gradient in first.pairs:
            if parameter.grad is None:
                parameter.grad = gradient.mul_(1 - alpha)

    def discard_gradient(self) -> None:
        self._first_gradients = None
        for parameter in (*self.all_parameters, *self._outside):
            parameter.grad = None

    def gradients_of(self, shards: Sequence[Shard]) -> list[torch.Tensor | None]:
        reached = [shard.parameter for shard in shards if shard.parameter.grad is not None]
        gradients = dict(zip(map(id, reached), self._gradients(reached), strict=True))
        return [gradients.get(id(shard.parameter)) for shard in shards]

    def take_gradient(self) -> TakenGradient | None:
        # The next backward overwrites a view into a bucket of DDP.
        is_view = getattr(self.model, "gradient_as_bucket_view", False)
        pairs = [(p, gradient_of(p).clone() if is_view else gradient_of(p)) for p in self._with_any_gradient()]
        for parameter, _ in pairs:
            parameter.grad = None
        return TakenGradient(pairs, self._is_unreduced()) if pairs else None

    @torch.no_grad()
    def add_gradient(self, gradient: TakenGradient | None) -> None:
        if gradient is None:
            return
        if gradient.is_unreduced:
            with self.hidden_gradient():
                for parameter, own in gradient.pairs:
                    parameter.grad = own
                average_gradients([p for p, _ in gradient.pairs if id(p) in self.numbers], some_unused=False)
        for parameter, other in gradient.pairs:
            parameter.grad = other if parameter.grad is None else parameter.grad.add_(other)

    def _is_unreduced(self) -> bool:
        """Return whether the present gradient is this rank's own, and no backward reduces it once it is taken."""
        if self.is_sharded or not dist.is_initialized() or dist.get_world_size() == 1:
            return False
        is_of_step = not (self.perturbation.is_per_rank or self.perturbation.is_per_micro_batch)
        return is_of_step and not self.accelerator.sync_gradients

    def sets_gradients_aside(self) -> bool:
        # Before the window's last backward FSDP2 does not set `.grad`.
        return not self._fsdp or (self.accelerator.sync_gradients and not self.hides_gradient())

    def hides_gradient(self) -> bool:
        return self._fsdp.has_gradient()

    def hidden_gradient(self) -> AbstractContextManager[None]:
        return gradients_hidden((*self.all_parameters, *self._outside))

    def gradient_marks(self) -> list[tuple[int, int]]:
        parameters = (*self.all_parameters, *self._outside)
        return [(id(gradient), gradient._version) for p in parameters if (gradient := p.grad) is not None]

    def _with_any_gradient(self) -> list[nn.Parameter]:
        return [p for p in (*self.all_parameters, *self._outside) if p.grad is not None]

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
