"""The engines: each has the shards of one kind of training, and its collectives. This file alone chooses one."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_gnp.perturbation import Perturbation

from .engine import Engine
from .fsdp import Fsdp2Engine
from .native import NativeEngine
from .shards import Shard, whole_shape
from .support import refuse_engine, refuse_unsupported


__all__ = ["Engine", "Shard", "make_engine", "refuse_engine", "refuse_unsupported", "whole_shape"]


def make_engine(
    accelerator: Accelerator, model: nn.Module, perturbation: Perturbation, optimizer: Any = None
) -> Engine:
    """Return the engine for a model, and perhaps an optimizer, that `accelerator` has prepared."""
    perturbation.check_rounding(model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from .deepspeed import make_deepspeed_engine

        return make_deepspeed_engine(accelerator, perturbation)
    is_fsdp2 = any(isinstance(module, FSDPModule) for module in model.modules())
    return (Fsdp2Engine if is_fsdp2 else NativeEngine)(accelerator, perturbation, model, optimizer)
