"""The engine of one process, DataParallel, DDP and tensor parallelism, with gradients in `param.grad`."""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
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
from hf_gnp.tensors import gradient_of, gradients_hidden, local_part, split_by_optimizer

from .engine import Engine, attribute_set
from .private import next_step_skipped, optimizer_that_skips
from .reducing import average_gradients, ddp_of, has_communication_hook
from .shards import Shard, as_sharded, part_of, place_of


CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile

Gradients = list[tuple[nn.Parameter, torch.Tensor]]


class NativeEngine(Engine):
    """
    Run a step with gradients in `param.grad`.

    The model's parameters that the optimizer has move. Other parameters of the model or the optimizer, such as those
    of a loss, get the mixed gradient. DDP and FSDP2 do not reduce theirs, so ranks have no common direction for them.

    Memory: one copy of the weights that move. The second pass adds g₂ to the scaled g₁. Only 16-bit gradients, where
    rounding would lose a small α g₂, and hooks that change gradients need a copy of g₁.
    """

    has_master = False

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation, model: nn.Module, optimizer: Any = None):
        self._optimizer = optimizer
        self.ddp = ddp_of(model)
        self._uses_cuda_graphs = accelerator.state.dynamo_plugin.mode in CUDA_GRAPHS
        self._moved: list[torch.Tensor] = []
        self._backup: list[torch.Tensor] = []
        self._first_gradients: Gradients = []
        self._skipping = contextlib.ExitStack()
        self._is_reducing = False  # whether this engine, not `Trainer`, makes the present micro-batch reduce
        super().__init__(accelerator, perturbation, model)
        if self.ddp is not None:
            has_communication_hook(self.ddp)  # refuses PowerSGD

    def begin_window(self, perturbation: Perturbation, optimizer: Any = None) -> None:
        self.reshard()
        super().begin_window(perturbation)
        self._optimizer = optimizer or self._optimizer  # a callback may have replaced it
        self._moving, outside = split_by_optimizer(self.all_parameters, self._optimizer)
        self._mixed = [*self.all_parameters, *outside]  # clipping counts them all
        if perturbation.targets is not None and not any(id(p) in perturbation.targets for p in self._moving):
            raise ValueError("gnp_target_modules matches no parameter that the optimizer has: name others.")
        self.is_sharded = any(isinstance(p, DTensor) for p in self.all_parameters)

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.all_parameters if p.requires_grad]

    def _with_gradient(self) -> list[nn.Parameter]:
        return [p for p in self._mixed if p.grad is not None]

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

    def _local_gradients(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
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

    @torch.no_grad()
    def keep_weights(self, shards: list[Shard]) -> list[Shard]:
        self._backup = penalty.clones([shard.weight for shard in shards])
        self._moved = [shard.weight for shard in shards]
        self.is_perturbed = bool(shards)  # last: `restore` needs both lists
        pairs = zip(shards, self._backup, strict=True)
        return [shard._replace(master=backup, gradient=None) for shard, backup in pairs]

    @torch.no_grad()
    def restore(self) -> None:
        if self.is_perturbed:
            penalty.copy_(self._moved, self._backup)
            self._moved, self._backup, self.is_perturbed = [], [], False
        self.publish()

    # The passes.

    def first_pass(self) -> AbstractContextManager[None]:
        self._is_reducing = self.perturbation.scope == "micro_batch"
        if self._is_reducing:
            return self.reducing()
        return self.no_sync() if self.perturbation.is_per_rank else contextlib.nullcontext()

    @contextlib.contextmanager
    def replay(self, is_last: bool) -> Iterator[None]:
        is_each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        self._is_reducing = not self.perturbation.is_per_rank and (is_last or is_each)
        with self.sync_gradients_set(is_last), self.reducing() if self._is_reducing else self.no_sync():
            yield

    def reducing(self) -> AbstractContextManager[None]:
        """Reduce gradients, even within `no_sync`, which `Trainer` enters for all but the last micro-batch."""
        if self.ddp is None:
            return contextlib.nullcontext()
        return attribute_set(self.ddp, "require_backward_grad_sync", True)

    def no_sync(self) -> AbstractContextManager[None]:
        """Reduce no gradients."""
        return self.accelerator.no_sync(self.model)

    def after_backward(self) -> None:
        # A hook of `Trainer` averages the gradients of adapters in a model that transformers sharded at load time,
        # but only in the last backward of a step.
        is_loaded = getattr(self.model, "is_distributed_loading_by_transformers", False)
        if is_loaded and self._is_reducing and not self.accelerator.sync_gradients:
            average_gradients([p for p in self._trainable() if not isinstance(p, DTensor)], some_unused=True)
        # A parameter's first gradient is the tensor that backward made. A CUDA graph would overwrite it.
        if self._uses_cuda_graphs:
            for parameter in self._with_gradient():
                parameter.grad = gradient_of(parameter).clone()

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

    # The gradients.

    def keep_gradients(self, alpha: float, scale: float) -> None:
        self.accumulates = False
        if alpha == 1:
            self.discard_gradient()
        elif (
            any(gradient_of(parameter).dtype.itemsize == 2 for parameter in self._with_gradient())
            # Such a hook changes all of `.grad`: tensor parallelism would sum g₁ over ranks a second time.
            or any(parameter._post_accumulate_grad_hooks for parameter in self.all_parameters)
            or (self.ddp is not None and has_communication_hook(self.ddp))
        ):
            self.scale_gradient(scale)
            self._first_gradients = self.take_gradient()
        else:
            self.accumulates = True
            self.scale_gradient(scale * (1 - alpha) / alpha)

    @torch.no_grad()
    def mix(self, alpha: float) -> None:
        first, self._first_gradients = self._first_gradients, []
        if alpha == 1:
            return
        for parameter, gradient in first:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(gradient)
        kept = {id(parameter) for parameter, _ in first}
        penalty.scale_(self._local_gradients([p for p in self._with_gradient() if id(p) not in kept]), alpha)
        penalty.lerp_(self._local_gradients([p for p, _ in first]), [local_part(g) for _, g in first], 1 - alpha)

    @torch.no_grad()
    def scale_gradient(self, scale: float) -> None:
        penalty.scale_(self._local_gradients(self._with_gradient()), scale)

    def discard_gradient(self) -> None:
        self._first_gradients = []
        for parameter in self._mixed:
            parameter.grad = None

    def take_gradient(self) -> Gradients:
        parameters = self._with_gradient()
        if parameters and self._is_unreduced():
            average_gradients([p for p in parameters if id(p) in self.numbers], some_unused=False)
        # The next backward overwrites a view into a bucket of DDP.
        is_view = getattr(self.model, "gradient_as_bucket_view", False)
        taken = [(p, gradient_of(p).clone() if is_view else gradient_of(p)) for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        return taken

    def _is_unreduced(self) -> bool:
        """Return whether the present gradient is this rank's own, and no backward reduces it once it is taken."""
        if self.is_sharded or not dist.is_initialized() or dist.get_world_size() == 1:
            return False
        return self.perturbation.scope == "step" and not self.accelerator.sync_gradients

    @torch.no_grad()
    def add_gradient(self, gradient: Gradients) -> None:
        for parameter, other in gradient:
            parameter.grad = other if parameter.grad is None else parameter.grad.add_(other)

    def sets_gradients_aside(self) -> bool:
        return True

    def hidden_gradient(self) -> AbstractContextManager[None]:
        return gradients_hidden(self._mixed)

    def gradient_marks(self) -> list[tuple[int, int]]:
        return [(id(gradient), gradient._version) for p in self._mixed if (gradient := p.grad) is not None]

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
