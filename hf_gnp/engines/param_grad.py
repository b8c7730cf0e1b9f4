"""Gradients in `param.grad`: set aside, mixed, hidden and dropped."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from hf_gnp import penalty
from hf_gnp.perturbation import Perturbation
from hf_gnp.tensors import gradient_of, gradients_hidden, local_part, split_by_optimizer

from .engine import Engine
from .reducing import average_gradients, ddp_of, has_communication_hook
from .shards import Shard, as_sharded


class TakenGradient(NamedTuple):
    """Hold a gradient that was set aside. `is_unreduced`: it is this rank's own, and no backward will reduce it."""

    pairs: list[tuple[nn.Parameter, torch.Tensor]]
    is_unreduced: bool


class ParamGradEngine(Engine):
    """
    Mix gradients in `param.grad`, of the model's parameters and of the optimizer's others.

    The second pass adds g₂ to the scaled g₁, so there is no second gradient buffer. There is one for 16-bit gradients,
    where rounding would lose a small α g₂, and where a communication hook of DDP or a hook of a parameter changes
    gradients.
    """

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation, model: nn.Module, optimizer: Any = None):
        self._optimizer = optimizer
        self.ddp = ddp_of(model)
        self._first_gradients: TakenGradient | None = None
        super().__init__(accelerator, perturbation, model)
        if self.ddp is not None:
            has_communication_hook(self.ddp)  # refuses PowerSGD

    def begin_window(self, perturbation: Perturbation, optimizer: Any = None) -> None:
        self.reshard()
        super().begin_window(perturbation)
        self._optimizer = optimizer or self._optimizer  # a callback may have replaced it
        # The gradients of those that do not move are mixed too, as clipping counts them.
        self._moving, self._outside = split_by_optimizer(self.all_parameters, self._optimizer)
        if perturbation.targets is not None and not any(id(p) in perturbation.targets for p in self._moving):
            raise ValueError("gnp_target_modules matches no parameter that the optimizer has: name others.")
        self.is_sharded = any(isinstance(p, DTensor) for p in self.all_parameters)

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.all_parameters if p.requires_grad]

    def _with_any_gradient(self) -> list[nn.Parameter]:
        return [p for p in (*self.all_parameters, *self._outside) if p.grad is not None]

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

    def keep_gradients(self, shards: list[Shard], alpha: float, scale: float) -> None:
        self.accumulates = False
        if alpha == 1:
            self.discard_gradient()
        elif (
            any(shard.gradient.dtype.itemsize == 2 for shard in shards)
            # Such a hook changes all of `.grad`: tensor parallelism would sum g₁ over ranks a second time.
            or any(parameter._post_accumulate_grad_hooks for parameter in self._trainable())
            or (self.ddp is not None and has_communication_hook(self.ddp))
        ):
            self.scale_gradient(scale)
            self._first_gradients = self.take_gradient()
        else:
            self.accumulates = True
            self.scale_gradient(scale * (1 - alpha) / alpha)

    def scale_gradient(self, scale: float) -> None:
        penalty.scale_(self._local_gradients(self._with_any_gradient()), scale)

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
        penalty.lerp_(self._local_gradients(both), firsts, 1 - alpha)
        penalty.scale_(self._local_gradients([p for p in with_gradient if id(p) not in by_parameter]), alpha)
        for parameter, gradient in first.pairs:
            if parameter.grad is None:
                parameter.grad = gradient.mul_(1 - alpha)

    def discard_gradient(self) -> None:
        self._first_gradients = None
        for parameter in (*self.all_parameters, *self._outside):
            parameter.grad = None

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
        return True

    def hidden_gradient(self) -> AbstractContextManager[None]:
        return gradients_hidden((*self.all_parameters, *self._outside))

    def gradient_marks(self) -> list[tuple[int, int]]:
        parameters = (*self.all_parameters, *self._outside)
        return [(id(gradient), gradient._version) for p in parameters if (gradient := p.grad) is not None]
