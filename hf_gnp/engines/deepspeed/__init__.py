"""Which engine knows the DeepSpeed optimizer at hand."""

from typing import Any

import torch
from accelerate import Accelerator

from hf_gnp.engines.engine import Engine
from hf_gnp.perturbation import Perturbation

from .private import (
    BF16_Optimizer,
    DeepSpeedZeroOptimizer,
    DeepSpeedZeroOptimizer_Stage3,
    FP16_Optimizer,
    FP16_UnfusedOptimizer,
    check_engine,
)
from .zero0 import Zero0Engine
from .zero3 import Zero3Engine
from .zero12 import Bf16Zero1Engine, Zero12Engine


def make_deepspeed_engine(accelerator: Accelerator, perturbation: Perturbation) -> Engine:
    """
    The engine for the DeepSpeed optimizer that `accelerator` has prepared.

    Raises:
        NotImplementedError: for an optimizer wrapper that is not known here, or parameters that it has and the model
            has not.
    """
    check_engine(accelerator)
    _refuse_parameters_outside(accelerator.deepspeed_engine_wrapped.engine)
    optimizer = accelerator.deepspeed_engine_wrapped.engine.optimizer
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
    # Before DeepSpeed puts its flat partitions in their place.
    names = [name for name in ("bit16_groups", "fp16_groups", "bf16_groups") if hasattr(optimizer, name)]
    groups = getattr(optimizer, names[0]) if names else [group["params"] for group in optimizer.param_groups]
    if any(id(parameter) not in in_model for group in groups for parameter in group):
        raise NotImplementedError(
            "Under DeepSpeed, the gradient-norm penalty does not run with parameters that the optimizer has and the "
            "model has not (a loss's own): make them part of the model, use DDP or FSDP2, or set gnp_alpha=0."
        )
