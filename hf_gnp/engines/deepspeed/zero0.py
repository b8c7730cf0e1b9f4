"""ZeRO stage 0: gradients are whole and in `param.grad`."""

import math

import torch
from accelerate import Accelerator

from hf_gnp import penalty
from hf_gnp.direction import Perturbation
from hf_gnp.engines.dtensors import gradient_of
from hf_gnp.engines.native import NativeEngine

from .base import DeepSpeedSteps


class Zero0Engine(DeepSpeedSteps, NativeEngine):
    """Stage 0: gradients are whole and in `param.grad`."""

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation):
        self.engine = accelerator.deepspeed_engine_wrapped.engine
        optimizer = self.engine.optimizer
        self.has_master = not isinstance(optimizer, torch.optim.Optimizer)
        if self.has_master and (perturbation.is_momentum or perturbation.precondition):
            argument = "gnp_direction=momentum" if perturbation.is_momentum else "gnp_precondition"
            raise ValueError(
                f"{argument} under ZeRO stage 0 in 16 bit: DeepSpeed's {type(optimizer).__name__} keeps the moments "
                "in an order of its own. Use ZeRO stage 1, or fp32."
            )
        super().__init__(accelerator, perturbation, self.engine.module, None if self.has_master else optimizer)

    @torch.no_grad()
    def finish(self) -> None:
        gradients = [gradient_of(p) for p in self._with_gradient()]
        if not math.isfinite(penalty.local_sq_norm(gradients).item()):
            # In fp32, nothing in stage 0 would keep it from the weights: without a boundary there is no step.
            self.discard_gradient()
            self.engine.set_gradient_accumulation_boundary(False)
        super().finish()
