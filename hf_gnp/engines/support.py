"""Refuses, when the trainer is built, what the penalty cannot run with. Errors say what to use instead."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils.import_utils import is_sagemaker_mp_enabled

from hf_gnp import penalty
from hf_gnp.perturbation import Perturbation

from .options import refused_options, warn_of_unchecked_options


POWER_SGD = "PowerSGD, which carries an error from one gradient to the next: use the fp16 or bf16 hook, or none"
_CLASSES_INSIDE_BACKWARD = {"Lomo", "AdaLomo", "LayerWiseDummyOptimizer"}


def refuse_unsupported(
    accelerator: Accelerator, args: TrainingArguments, optimizer: Any, model: nn.Module, perturbation: Perturbation
) -> None:
    """
    Raise where the penalised step would be wrong: for an optimizer, a gnp argument, an engine or a parallelism.

    Args:
        optimizer: The optimizer, or the optimizer class, that the user passed. None: `args.optim` decides.
    """
    _refuse_optimizer(args, optimizer)
    refuse_engine(accelerator, model, "The gradient-norm penalty does not run with {}, or set gnp_alpha=0.")
    warn_of_unchecked_options(accelerator)
    _refuse_perturbation(accelerator, perturbation, model)


def refuse_engine(accelerator: Accelerator, model: nn.Module, sentence: str) -> None:
    """Raise NotImplementedError where weights cannot be moved: `sentence`, with the reason for its `{}`."""
    reasons = (_unsupported_engine(accelerator), _unsupported_model(model), _unsupported_tensors(model))
    for reason in (*reasons, *refused_options(accelerator)):
        if reason is not None:
            raise NotImplementedError(sentence.format(reason))


def _refuse_optimizer(args: TrainingArguments, optimizer: Any) -> None:
    if optimizer is None:
        name = OptimizerNames(args.optim).value
        is_inside = name.endswith(("lomo", "layerwise"))
    else:
        name = (optimizer if isinstance(optimizer, type) else type(optimizer)).__name__
        is_inside = name in _CLASSES_INSIDE_BACKWARD
    if is_inside:
        raise ValueError(
            f"optim={name} updates the weights inside backward, so there is no gradient to mix with that of the "
            "second pass. Use an optimizer that steps after backward (for GaLore and APOLLO the ones without "
            "'layerwise'), or set gnp_alpha=0."
        )


def _unsupported_engine(accelerator: Accelerator) -> str | None:
    kind, parallelism = accelerator.distributed_type, accelerator.parallelism_config
    if is_sagemaker_mp_enabled():
        return "SageMaker model parallelism: use FSDP2 or DeepSpeed ZeRO"
    if kind == DistributedType.XLA:
        return "XLA: use a CUDA or CPU device"
    if kind == DistributedType.MEGATRON_LM:
        return "Megatron-LM: use FSDP2 or DeepSpeed ZeRO"
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        return "FSDP version 1: set fsdp_version to 2"
    hook = getattr(getattr(accelerator, "ddp_handler", None), "comm_hook", DDPCommunicationHookType.NO)
    if "power_sgd" in DDPCommunicationHookType(hook).value:
        return POWER_SGD
    if parallelism is None:
        return None
    if parallelism.cp_enabled:
        return "context parallelism, which shards the inputs in place: use Ulysses (sp_size) under ZeRO-3"
    plugin = accelerator.state.deepspeed_plugin
    if parallelism.sp_enabled and (plugin is None or plugin.hf_ds_config.get_value("zero_optimization.stage") != 3):
        return (
            "sequence parallelism but under ZeRO-3: in stages 1 and 2 DeepSpeed 0.19.8 averages over data parallel "
            "ranks alone, and the gradient is sp_size times too large. Set stage 3"
        )
    return None


def _refuse_perturbation(accelerator: Accelerator, perturbation: Perturbation, model: nn.Module) -> None:
    is_deepspeed = accelerator.state.deepspeed_plugin is not None
    is_sharded = accelerator.is_fsdp2 or getattr(model, "is_distributed_loading_by_transformers", False)
    if perturbation.is_per_rank and (is_deepspeed or is_sharded):
        raise ValueError(
            f"gnp_scope={perturbation.scope} moves each rank along its own gradient, of which a sharded engine "
            f"({'DeepSpeed' if is_deepspeed else 'FSDP2'}) has only a part: use DDP or one process, or "
            "gnp_scope=micro_batch."
        )
    if perturbation.is_per_rank and getattr(accelerator.ddp_handler, "static_graph", False):
        raise ValueError(
            f"gnp_scope={perturbation.scope} with ddp_static_graph=True: DDP learns its static graph in the first "
            "backward, which has no reduction where each rank moves along its own gradient. Leave out "
            "ddp_static_graph, or use gnp_scope=step or micro_batch."
        )
    if not is_deepspeed:  # DeepSpeed has not cast the weights yet
        perturbation.check_rounding(model)


def _unsupported_model(model: Any) -> str | None:
    # The attribute is of a model of transformers, or of a wrapper that hands attributes on.
    if not getattr(model, "is_distributed_loading_by_transformers", False):
        return None
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = None not in (inputs, outputs) and inputs.weight is outputs.weight
    if is_tied and model.config.distributed_config.dp_size > 1:
        return (
            "tied embeddings in a model that transformers shards over FSDP at load time: transformers 5.23 shards "
            "them twice and trains one of the two. Load with tie_word_embeddings=False, or use FSDP2 through "
            "accelerate, ZeRO-3, or tensor parallelism alone, where they are right"
        )
    return None


def _unsupported_tensors(model: nn.Module) -> str | None:
    """Look for trainable weights of a tensor subclass that cannot be moved and restored in place."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not _can_be_moved(parameter):
            return (
                f"trainable weights of type {type(parameter.data).__name__} ({name}), which torch._foreach_add_ and "
                "torch._foreach_copy_ do not change in place (torchao's int8 training is one): train plain weights, "
                "or an adapter on frozen ones"
            )
    return None


@torch.no_grad()
def _can_be_moved(parameter: nn.Parameter) -> bool:
    if isinstance(parameter, DTensor) or type(parameter.data) in (torch.Tensor, nn.Parameter):
        return True
    try:
        copy = penalty.clones([parameter.detach()])[0]
        torch._foreach_add_([copy], [torch.zeros(copy.shape, dtype=copy.dtype, device=copy.device)])
        torch._foreach_copy_([copy], [parameter.detach()])
    except Exception:  # a subclass may raise anything for an operation that it lacks
        return False
    return True
