"""The engines under the trainer: who owns the shards, and how ranks agree. The one place that chooses."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from hf_gnp.perturbation import Perturbation

from .engine import Engine
from .native import NativeEngine
from .private import check_private_names
from .shards import Shard
from .support import refuse_engine, refuse_unsupported


__all__ = ["Engine", "Shard", "make_engine", "refuse_engine", "refuse_unsupported"]


def make_engine(
    accelerator: Accelerator, model: nn.Module, perturbation: Perturbation, optimizer: Any = None
) -> Engine:
    """
    The engine for a model that `accelerator` has prepared.

    Args:
        optimizer: The prepared optimizer, whose parameters beyond the model's get a mixed gradient too.

    Raises:
        ValueError: for stochastic rounding of weights that are not 16-bit.
        RuntimeError: for a release of torch, accelerate or DeepSpeed that lacks a private name that is used.
        NotImplementedError: for a distributed type that the penalty is not known to be right on.
    """
    perturbation.check_rounding(model)
    check_private_names(accelerator)
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        from .deepspeed import make_deepspeed_engine

        return make_deepspeed_engine(accelerator, perturbation)
    if kind in (DistributedType.NO, DistributedType.FSDP) or kind.value.startswith("MULTI_"):
        return NativeEngine(accelerator, perturbation, model, optimizer)
    raise NotImplementedError(
        f"The gradient-norm penalty does not run under {kind}. "
        "Use one process, DDP, FSDP2 or DeepSpeed ZeRO, or set gnp_alpha=0 for plain training."
    )
