"""ZeRO stage 0: gradients are whole and in `param.grad`."""

from typing import Any

import torch
from accelerate import Accelerator

from hf_gnp import penalty
from hf_gnp.engines.native import NativeEngine
from hf_gnp.perturbation import Perturbation
from hf_gnp.tensors import gradient_of

from .base import DeepSpeedSteps


class Zero0Engine(DeepSpeedSteps, NativeEngine):
    """Stage 0: the gradients of `NativeEngine`, and DeepSpeed's own step."""

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation):
        self.ds_engine = accelerator.deepspeed_engine_wrapped.engine
        optimizer = self.ds_engine.optimizer
        self.has_master = not isinstance(optimizer, torch.optim.Optimizer)
        if self.has_master and perturbation.is_momentum:
            raise ValueError(
                f"gnp_direction=momentum under ZeRO stage 0 in 16 bit: DeepSpeed's {type(optimizer).__name__} keeps "
                "the moments in an order of its own. Use ZeRO stage 1, or fp32."
            )
        super().__init__(accelerator, perturbation, self.ds_engine.module, None if self.has_master else optimizer)

    def begin_window(self, perturbation: Perturbation, optimizer: Any = None) -> None:
        super().begin_window(perturbation)  # the optimizer is DeepSpeed's

    def sets_gradients_aside(self) -> bool:
        return False  # accelerate steps after a backward that is not `Trainer.training_step`'s

    @torch.no_grad()
    def finish(self) -> None:
        gradients = [gradient_of(parameter) for parameter in self.all_parameters if parameter.grad is not None]
        if not penalty.local_sq_norms(gradients).sum().isfinite():
            # In fp32, stage 0 does not skip such a step. Without a boundary DeepSpeed makes none.
            self.discard_gradient()
            self.ds_engine.set_gradient_accumulation_boundary(False)
        super().finish()
