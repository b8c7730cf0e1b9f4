"""Chooses the engine for the optimizer that DeepSpeed has made."""

from typing import Any

import torch
from accelerate import Accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from hf_gnp.engines.engine import Engine
from hf_gnp.perturbation import Perturbation

from .zero0 import Zero0Engine
from .zero3 import Zero3Engine
from .zero12 import Bf16Zero1Engine, Zero12Engine


def make_deepspeed_engine(accelerator: Accelerator, perturbation: Perturbation) -> Engine:
    """Return the engine for the DeepSpeed optimizer that `accelerator` has prepared."""
    if accelerator.deepspeed_engine_wrapped is None:
        raise RuntimeError(
            "accelerate forgets the DeepSpeed engine when a training run ends, so under DeepSpeed a trainer trains "
            "once, without the gradient-norm penalty too: make a new trainer for the next run."
        )
    engine = accelerator.deepspeed_engine_wrapped.engine
    _refuse_parameters_outside(engine)
    optimizer = engine.optimizer
    if type(optimizer) is DeepSpeedZeroOptimizer:
        return Zero12Engine(accelerator, perturbation)
    if type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
        return Zero3Engine(accelerator, perturbation)
    if type(optimizer) is BF16_Optimizer:
        return Bf16Zero1Engine(accelerator, perturbation)
    if isinstance(optimizer, torch.optim.Optimizer | FP16_Optimizer | FP16_UnfusedOptimizer):
        return Zero0Engine(accelerator, perturbation)
    raise NotImplementedError(
        f"The gradient-norm penalty does not know DeepSpeed's {type(optimizer).__name__}: "
        "use ZeRO stage 1, 2 or 3, or set gnp_alpha=0 for plain training."
    )


def _refuse_parameters_outside(engine: Any) -> None:
    optimizer, in_model = engine.optimizer, {id(parameter) for parameter in engine.module.parameters()}
    # These lists have the parameters themselves. In `param_groups` DeepSpeed puts its flat partitions in their place.
    names = [name for name in ("bit16_groups", "fp16_groups", "bf16_groups") if hasattr(optimizer, name)]
    groups = getattr(optimizer, names[0]) if names else [group["params"] for group in optimizer.param_groups]
    if any(id(parameter) not in in_model for group in groups for parameter in group):
        raise NotImplementedError(
            "Under DeepSpeed, the gradient-norm penalty does not run with parameters that the optimizer has and the "
            "model has not (a loss's own): make them part of the model, use DDP or FSDP2, or set gnp_alpha=0."
        )
