"""One process, DataParallel, DDP, FSDP2, tensor parallelism: gradients are in `param.grad`, whole or as DTensors."""

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
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_gnp import moments, penalty
from hf_gnp.direction import Perturbation
from hf_gnp.rounding import Place

from .averaging import average_gradients
from .base import Engine
from .dtensors import (
    as_sharded,
    count_copies,
    gradient_of,
    gradients_hidden,
    local_axes,
    local_gradient,
    local_part,
    shard_gradient_as_weight,
)
from .private import (
    drop_unreduced_gradients,
    has_unreduced_gradient,
    next_step_skipped,
    optimizer_that_skips,
)
from .shards import HeldShard, OptimizerState, Shard, number_parameters, parameters_beside
from .wrappers import defer_reduction, has_communication_hook, reducing


CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile


class NativeEngine(Engine):
    """
    Engine over `param.grad`.

    The second pass accumulates into the scaled first gradient, so there is no second gradient buffer; what is held
    is one copy of the weights that are moved (of this rank's shard under FSDP2). Gradients of 16 bit, in which a small
    α g₂ would drown, those that a communication hook of DDP compresses and those that a hook changes after each
    backward are kept aside instead.

    Parameters that the optimizer has and the model has not, those of a loss, get the mixed gradient and are not moved:
    DDP and FSDP2 do not reduce their gradients, so there is no one direction to move them along.
    """

    has_master = False

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation, model: nn.Module, optimizer: Any = None):
        super().__init__(accelerator, perturbation)
        self.model, self._optimizer = model, optimizer
        self._fsdp_modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
        within = {id(child) for module in self._fsdp_modules for child in module.modules() if child is not module}
        self._fsdp_roots = [module for module in self._fsdp_modules if id(module) not in within]
        has_unreduced_gradient(self._fsdp_modules)  # refuses a release of torch whose names are others
        has_communication_hook(model)  # refuses one
        self._uses_cuda_graphs = accelerator.state.dynamo_plugin.mode in CUDA_GRAPHS
        self.begin_window(perturbation)
        self._moved: list[torch.Tensor] = []
        self._backup: list[torch.Tensor] = []
        self._first_gradients: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._axes: dict[Any, tuple[torch.Tensor, ...]] = {}
        self._skipping = contextlib.ExitStack()
        self._is_reducing = False  # whether gradients are reduced in this pass

    def begin_window(self, perturbation: Perturbation) -> None:
        super().begin_window(perturbation)
        self.publish()  # after an evaluation FSDP2's root stays gathered, and has other parameters
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        self._group_of = {id(p): group for group in groups for p in group["params"]}
        self._beside = parameters_beside(self.model, self._optimizer)
        self._read_parameters()

    def _read_parameters(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.is_sharded = any(isinstance(p, DTensor) for p in self.parameters)
        self._outside = [p for p in self._beside if p.requires_grad]

    @torch.no_grad()
    def shards(self) -> list[Shard]:
        self._read_parameters()  # a loss may have unfrozen some
        shards, numbers = [], number_parameters(self.model)
        for parameter in self._with_gradient():
            weight = local_part(parameter)
            copies = count_copies(parameter) if self.is_sharded else 1
            place = self._place(numbers[id(parameter)], parameter)
            shards.append(Shard(parameter, weight, local_gradient(parameter), weight, place, copies))
        return shards

    def _place(self, number: int, parameter: nn.Parameter) -> Place:
        if not isinstance(parameter, DTensor):
            return Place.whole(number, parameter.shape)
        layout = (parameter.shape, parameter.device_mesh, parameter.placements)
        if layout not in self._axes:
            self._axes[layout] = local_axes(parameter)
        return Place(number, self._axes[layout])

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        # Whole gradients are the same on all ranks already, or meant to differ (without `sync`).
        if self.is_sharded:
            dist.all_reduce(value)
        return value

    def loss_scale(self) -> torch.Tensor | float:
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.accelerator.device))

    @property
    def is_perturbed(self) -> bool:
        return bool(self._moved)

    def first_pass(self, is_last: bool = False) -> AbstractContextManager[None]:
        self._is_reducing = not self.perturbation.is_per_rank and (is_last or self.perturbation.is_per_micro_batch)
        if self.perturbation.is_per_rank:
            return self.accelerator.no_sync(self.model)
        return reducing(self.model, self._fsdp_modules) if self._is_reducing else contextlib.nullcontext()

    def optimizer_state(self, shard: Shard | HeldShard) -> OptimizerState | None:
        parameter = shard.parameter
        values = self._optimizer.state.get(parameter)
        if not values:
            return None
        group = self._group_of[id(parameter)]
        values = moments.with_step_of_group(values, group, self._optimizer.state)
        return OptimizerState(values, group, parameter.shape, functools.partial(as_sharded, parameter))

    def optimizer_name(self) -> str:
        return type(moments.unwrapped(self._optimizer)).__name__

    def layout(self) -> tuple[str, int | None]:
        if not self.is_sharded:
            return "whole", None
        meshes = sorted({f"{p.device_mesh.shape}" for p in self.parameters if isinstance(p, DTensor)})
        return f"DTensors on {' and '.join(meshes)}", dist.get_rank()

    def wants_second_pass(self) -> bool:
        # The norms of ranks differ if each has its own, and a model may synchronise in its forward.
        return self.perturbation.is_per_rank or super().wants_second_pass()

    @contextlib.contextmanager
    def micro_batch(self, is_last: bool) -> Iterator[None]:
        self._is_reducing = self._reduces(is_last)
        reduced = reducing(self.model, self._fsdp_modules) if self._is_reducing else self._no_sync()
        with self.sync_gradients_set(is_last), reduced:
            yield

    def keep_weights(self, shards: list[Shard]) -> None:
        self._backup = [shard.weight.clone() for shard in shards]
        self._moved = [shard.weight for shard in shards]  # only now: `restore` needs both

    @torch.no_grad()
    def hold_weights(self, moved_only: bool = False) -> list[HeldShard]:
        parameters = [p for p in self.parameters if not moved_only or self.perturbation.moves(p)]
        weights, numbers, held = [local_part(p) for p in parameters], number_parameters(self.model), []
        self._backup = [weight.clone() for weight in weights]
        self._moved = weights  # only now: `restore` needs both
        for parameter, weight, theta in zip(parameters, weights, self._backup, strict=True):
            place = self._place(numbers[id(parameter)], parameter)
            copies = count_copies(parameter) if self.is_sharded else 1
            held.append(HeldShard(parameter, weight, theta, place, copies))
        return held

    def gradients_of(self, held: Sequence[HeldShard]) -> list[torch.Tensor | None]:
        self._with_any_gradient()
        return [None if shard.parameter.grad is None else local_part(shard.parameter.grad) for shard in held]

    def keep_gradients(self, shards: list[Shard], alpha: float, scale: float) -> None:
        if alpha == 1:
            self.discard_gradient()
        elif self._keeps_aside(shards):
            if scale != 1:
                penalty.scale_([local_gradient(p) for p in self._with_any_gradient()], scale)
            self._first_gradients = self.take_gradient()
        else:
            penalty.scale_([local_gradient(p) for p in self._with_any_gradient()], scale * (1 - alpha) / alpha)

    def _keeps_aside(self, shards: list[Shard]) -> bool:
        is_low = any(shard.gradient.dtype.itemsize == 2 for shard in shards)
        # Such a hook sees all that is in `.grad`: tensor parallelism sums it over ranks, which g₁ already is.
        has_hook = any(parameter._post_accumulate_grad_hooks for parameter in self.parameters)
        return is_low or has_hook or has_communication_hook(self.model)

    def publish(self) -> None:
        # Parameters that FSDP2 kept gathered (reshard_after_backward=False) would not notice a changed shard.
        for module in self._fsdp_modules:
            module.reshard()

    @torch.no_grad()
    def restore(self) -> None:
        if self._moved:
            penalty.copy_(self._moved, self._backup)
            self._moved, self._backup = [], []
        self.publish()

    def abandon(self) -> None:
        # A layer whose forward failed counts as running, and `reshard` leaves one as it is that is not resharded after
        # its forward: gathered, and moved.
        self._forget_forward()
        drop_unreduced_gradients(self._fsdp_modules)
        super().abandon()

    def _forget_forward(self) -> None:
        """FSDP2 waits for no backward of the last one."""
        for module in self._fsdp_roots:
            if hasattr(module, "reset_iter_state"):  # older releases of torch have none
                module.reset_iter_state()

    @torch.no_grad()
    def mix(self, alpha: float) -> None:
        if alpha == 1:
            return
        if not self._first_gradients:
            penalty.scale_([local_gradient(p) for p in self._with_any_gradient()], alpha)
            return
        first = {id(p): g for p, g in self._first_gradients}
        both = [p for p in self._with_any_gradient() if id(p) in first]
        second_only = [p for p in self._with_any_gradient() if id(p) not in first]
        penalty.lerp_([local_gradient(p) for p in both], [local_part(first[id(p)]) for p in both], 1 - alpha)
        penalty.scale_([local_gradient(p) for p in second_only], alpha)
        for parameter, gradient in self._first_gradients:
            if parameter.grad is None:
                parameter.grad = gradient.mul_(1 - alpha)
        self._first_gradients = []

    def discard_gradient(self) -> None:
        self._first_gradients = []
        for parameter in (*self.parameters, *self._outside):
            parameter.grad = None

    def take_gradient(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        # A view into a bucket of DDP is written over by the next backward.
        is_view = getattr(self.model, "gradient_as_bucket_view", False)
        taken = [(p, gradient_of(p).clone() if is_view else gradient_of(p)) for p in self._with_any_gradient()]
        for parameter, _ in taken:
            parameter.grad = None
        return taken

    @torch.no_grad()
    def add_gradient(self, gradient: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
        for parameter, other in gradient:
            parameter.grad = other if parameter.grad is None else parameter.grad.add_(other)

    def sets_gradients_aside(self) -> bool:
        # Until the window's last backward FSDP2 keeps gradients to itself.
        return not self._fsdp_modules or (self.accelerator.sync_gradients and not self.hides_gradient())

    def hides_gradient(self) -> bool:
        return has_unreduced_gradient(self._fsdp_modules)

    def is_unreduced(self) -> bool:
        if self.is_sharded or not dist.is_initialized() or dist.get_world_size() == 1:
            return False
        is_of_step = not (self.perturbation.is_per_rank or self.perturbation.is_per_micro_batch)
        return is_of_step and not self.accelerator.sync_gradients

    @torch.no_grad()
    def reduced(self, gradient: list[tuple[nn.Parameter, torch.Tensor]]) -> list[tuple[nn.Parameter, torch.Tensor]]:
        inside = {id(parameter) for parameter in self.parameters}
        with self.hidden_gradient():
            for parameter, own in gradient:
                parameter.grad = own
            average_gradients([parameter for parameter, _ in gradient if id(parameter) in inside], some_unused=False)
        return gradient

    def hidden_gradient(self) -> AbstractContextManager[None]:
        return gradients_hidden((*self.parameters, *self._outside))

    def gradient_marks(self) -> list[tuple[int, int]]:
        gradients = [p.grad for p in (*self.parameters, *self._outside)]
        return [(0, 0) if g is None else (id(g), g._version) for g in gradients]

    def after_backward(self) -> None:
        if self._is_reducing and not self.accelerator.sync_gradients and (adapters := self._unsharded()):
            average_gradients(adapters, some_unused=True)
        # A parameter's first gradient is the very tensor that backward made, here one of a CUDA graph's.
        if self._uses_cuda_graphs:
            for parameter in self._with_any_gradient():
                parameter.grad = gradient_of(parameter).clone()

    def _unsharded(self) -> list[nn.Parameter]:
        """
        Of a model that transformers sharded at load time what came later, an adapter: a hook of `Trainer`'s takes the
        mean over ranks of its gradients in the last backward of a step, and in no other.
        """
        is_sharded_at_load = getattr(self.model, "is_distributed_loading_by_transformers", False)
        return [p for p in self.parameters if not isinstance(p, DTensor)] if is_sharded_at_load else []

    @contextlib.contextmanager
    def probed(self) -> Iterator[None]:
        # With a graph: the same kernels run as in the first pass, and a loss may differentiate. It may also move
        # weights, which its trainer puts back after the backward.
        weights = [local_part(parameter).detach() for parameter in self.parameters]
        kept = [weight.clone() for weight in weights]
        try:
            with self._no_sync():
                yield
        finally:
            penalty.copy_(weights, kept)
        self._forget_forward()
        self.publish()

    def hold_gradient(self) -> None:
        pass  # in `param.grad`

    @torch.no_grad()
    def finish(self) -> None:
        """Where each rank moves along its own gradient no pass reduces: the mean over ranks is taken here, once."""
        if not (self.perturbation.is_per_rank and dist.is_initialized() and dist.get_world_size() > 1):
            return
        average_gradients(self.parameters, getattr(self.model, "find_unused_parameters", False))

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

    def _with_gradient(self) -> list[nn.Parameter]:
        with_gradient = [p for p in self.parameters if p.grad is not None]
        if any(gradient_of(p).is_sparse for p in with_gradient):
            raise NotImplementedError(
                "The gradient-norm penalty needs dense gradients: build the embedding with sparse=False."
            )
        # A loss may be a constant, of a batch without pairs; but an optimizer that steps in hooks takes the gradients.
        if not with_gradient and any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self.parameters):
            raise RuntimeError(
                "No parameter has a gradient after backward, so there is nothing to penalise. An optimizer that steps "
                "inside backward (LOMO, layer-wise GaLore or APOLLO) cannot be used with the gradient-norm penalty."
            )
        for parameter in with_gradient:
            shard_gradient_as_weight(parameter)
        return with_gradient

    def _with_any_gradient(self) -> list[nn.Parameter]:
        parameters = [p for p in (*self.parameters, *self._outside) if p.grad is not None]
        for parameter in parameters:
            shard_gradient_as_weight(parameter)
        return parameters

    def _reduces(self, is_last: bool) -> bool:
        if self.perturbation.is_per_rank:
            return False
        return is_last or self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)

    def _no_sync(self) -> AbstractContextManager[None]:
        if self._fsdp_modules and not self.accelerator.is_fsdp2:
            return defer_reduction(self.model)
        return self.accelerator.no_sync(self.model)
