"""One process, DataParallel, DDP, FSDP2, tensor parallelism: gradients are in `param.grad`, whole or as DTensors."""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_gnp import penalty

from .base import Engine


class NativeEngine(Engine):
    """
    Engine over `param.grad`.

    The second pass accumulates into the scaled first gradient, so there is no second gradient buffer; what is held
    is one copy of the trainable weights that have a gradient (of this rank's shard under FSDP2).
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module):
        self.accelerator = accelerator
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._fsdp_modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self._scaled_norm = 0.0
        self._moved: list[torch.Tensor] = []
        self._backup: list[torch.Tensor] = []

    @property
    def is_perturbed(self) -> bool:
        return bool(self._moved)

    def first_pass(self):
        return contextlib.nullcontext()

    @torch.no_grad()
    def gradient_norm(self) -> float:
        with_gradient = self._with_gradient()
        if not with_gradient:
            raise RuntimeError(
                "No parameter has a gradient after backward, so there is nothing to penalise. An optimizer that steps "
                "inside backward (LOMO, layer-wise GaLore or APOLLO) cannot be used with the gradient-norm penalty."
            )
        sq_norm = _global_sq_norm([p.grad for p in with_gradient], self.accelerator.device)
        self._scaled_norm = math.sqrt(sq_norm)
        return self._scaled_norm / self._loss_scale()

    @contextlib.contextmanager
    def micro_batch(self, is_last: bool) -> Iterator[None]:
        set_sync_gradients(self.accelerator, is_last)
        try:
            with contextlib.nullcontext() if self._reduces(is_last) else self._no_sync():
                yield
        finally:
            set_sync_gradients(self.accelerator, True)

    @torch.no_grad()
    def perturb(self, r: float, alpha: float) -> None:
        with_gradient = self._with_gradient()
        weights = [_local(p) for p in with_gradient]
        gradients = [_local(p.grad) for p in with_gradient]
        self._backup = [weight.clone() for weight in weights]
        self._moved = weights
        penalty.add_scaled_(weights, gradients, r / self._scaled_norm)
        if alpha < 1:
            penalty.scale_(gradients, (1 - alpha) / alpha)
        else:
            self.discard_gradient()
        self._reshard()

    @torch.no_grad()
    def restore(self) -> None:
        penalty.copy_(self._moved, self._backup)
        self._moved, self._backup = [], []
        self._reshard()

    @torch.no_grad()
    def mix(self, alpha: float) -> None:
        if alpha < 1:
            penalty.scale_([_local(p.grad) for p in self._with_gradient()], alpha)

    def discard_gradient(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def finish(self) -> None:
        pass

    def drop_nonfinite_gradient(self, grad_norm: torch.Tensor | float | None) -> bool:
        if self.accelerator.scaler is not None or grad_norm is None or math.isfinite(grad_norm):
            return False
        self.discard_gradient()
        return True

    def _with_gradient(self) -> list[nn.Parameter]:
        with_gradient = [p for p in self.parameters if p.grad is not None]
        if any(p.grad.is_sparse for p in with_gradient):
            raise NotImplementedError(
                "The gradient-norm penalty needs dense gradients: build the embedding with sparse=False."
            )
        return with_gradient

    def _loss_scale(self) -> float:
        return 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()

    def _reduces(self, is_last: bool) -> bool:
        return is_last or self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)

    def _no_sync(self):
        if self._fsdp_modules and not self.accelerator.is_fsdp2:
            return _defer_reduction(self.model)
        return self.accelerator.no_sync(self.model)

    def _reshard(self) -> None:
        """Parameters that FSDP2 kept gathered (reshard_after_backward=False) would not notice a changed shard."""
        for module in self._fsdp_modules:
            module.reshard()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _global_sq_norm(gradients: list[torch.Tensor], device: torch.device) -> float:
    """
    ‖g‖² over all ranks, each element counted once.

    Plain tensors are the same on all ranks already and need no collective. With DTensors, an element that k ranks
    hold counts 1/k on each of them, so one sum over the world is right on any mix of meshes.
    """
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return penalty.local_sq_norm(gradients).item()
    by_copies = defaultdict(list)
    for gradient in gradients:
        by_copies[_copies(gradient)].append(_local(gradient))
    local = sum(penalty.local_sq_norm(group).to(device) / copies for copies, group in by_copies.items())
    dist.all_reduce(local)
    return local.item()


def _copies(tensor: torch.Tensor) -> int:
    """The number of ranks that hold each element."""
    copies = dist.get_world_size()
    if isinstance(tensor, DTensor):
        for placement, size in zip(tensor.placements, tensor.device_mesh.shape, strict=True):
            if placement.is_partial():
                raise NotImplementedError(f"The gradient-norm penalty needs reduced gradients, not {placement}.")
            if not placement.is_replicate():
                copies //= size
    return copies


@contextlib.contextmanager
def _defer_reduction(model: nn.Module) -> Iterator[None]:
    """`no_sync` for a model that transformers sharded at load time; HSDP defers only the sum over replicas."""
    replicated = model.config.distributed_config.dp_replicate_size > 1
    defer = model.set_requires_all_reduce if replicated else model.set_requires_gradient_sync
    defer(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def set_sync_gradients(accelerator: Accelerator, sync_gradients: bool) -> None:
    # Private, and what Trainer itself calls before each micro-batch: accelerate has no public setter.
    accelerator.gradient_state._set_sync_gradients(sync_gradients)
