"""What the penalty cannot run with, refused when the trainer is built, by name and with what to use instead."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils.import_utils import is_sagemaker_mp_enabled

from hf_gnp.perturbation import Perturbation

from .options import refused_options, warn_of_unchecked_options


POWER_SGD = "PowerSGD, which carries an error from one gradient to the next: use the fp16 or bf16 hook, or none"
_STEPS_INSIDE_BACKWARD = {
    OptimizerNames.LOMO,
    OptimizerNames.ADALOMO,
    OptimizerNames.GALORE_ADAMW_LAYERWISE,
    OptimizerNames.GALORE_ADAMW_8BIT_LAYERWISE,
    OptimizerNames.GALORE_ADAFACTOR_LAYERWISE,
    OptimizerNames.APOLLO_ADAMW_LAYERWISE,
}
_STEPS_INSIDE_BACKWARD_CLASSES = {"Lomo", "AdaLomo", "LayerWiseDummyOptimizer"}


def refuse_unsupported(
    accelerator: Accelerator,
    args: TrainingArguments,
    optimizer: Any,
    model: nn.Module,
    perturbation: Perturbation = Perturbation(),  # noqa: B008, which is frozen
) -> None:
    """
    Raise for an optimizer, a parallelism or an engine on which the penalised step would be wrong.

    Args:
        optimizer: The optimizer, or the optimizer class, that the user passed. None: `args.optim` decides.

    Raises:
        ValueError: for an optimizer that steps inside backward, or a gnp argument that the engine cannot follow.
        NotImplementedError: for an engine or a parallelism.
    """
    _refuse_optimizer(args, optimizer)
    sentence = "The gradient-norm penalty does not run with {}, or set gnp_alpha=0."
    refuse_engine(accelerator, model, sentence)
    warn_of_unchecked_options(accelerator)
    _refuse_perturbation(accelerator, perturbation, model)


def refuse_engine(accelerator: Accelerator, model: nn.Module, sentence: str) -> None:
    """Raise NotImplementedError where weights cannot be moved: `sentence` with the reason, and what to use instead."""
    reasons = (_unsupported_engine(accelerator), _unsupported_model(model), _unsupported_tensors(model))
    for reason in (*reasons, *refused_options(accelerator)):
        if reason is not None:
            raise NotImplementedError(sentence.format(reason))


def _refuse_optimizer(args: TrainingArguments, optimizer: Any) -> None:
    cls = optimizer if isinstance(optimizer, type) else type(optimizer)
    name = cls.__name__ if optimizer is not None else OptimizerNames(args.optim).value
    if cls.__name__ in _STEPS_INSIDE_BACKWARD_CLASSES or (optimizer is None and args.optim in _STEPS_INSIDE_BACKWARD):
        raise ValueError(
            f"optim={name} updates the weights inside backward, so there is no gradient to mix with that of the "
            "second pass. Use an optimizer that steps after backward (for GaLore and APOLLO the ones without "
            "'layerwise'), or set gnp_alpha=0."
        )


def _unsupported_engine(accelerator: Accelerator) -> str | None:
    kind = accelerator.distributed_type
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
    return _unsupported_sequence(accelerator)


def _unsupported_sequence(accelerator: Accelerator) -> str | None:
    parallelism, plugin = accelerator.parallelism_config, getattr(accelerator.state, "deepspeed_plugin", None)
    if parallelism is None:
        return None
    if parallelism.cp_enabled:
        return "context parallelism, which shards the inputs in place: use Ulysses (sp_size) under ZeRO-3"
    if parallelism.sp_enabled and (plugin is None or plugin.hf_ds_config.get_value("zero_optimization.stage") != 3):
        return (
            "sequence parallelism but under ZeRO-3: in stages 1 and 2 DeepSpeed 0.19.8 averages over data parallel "
            "ranks alone, and the gradient is sp_size times too large. Set stage 3"
        )
    return None


def _refuse_perturbation(accelerator: Accelerator, perturbation: Perturbation, model: nn.Module) -> None:
    is_deepspeed = getattr(accelerator.state, "deepspeed_plugin", None) is not None
    is_sharded = accelerator.is_fsdp2 or getattr(model, "is_distributed_loading_by_transformers", False)
    if perturbation.is_per_rank and (is_deepspeed or is_sharded):
        raise ValueError(
            f"gnp_scope={perturbation.scope} moves each rank along its own gradient, of which a sharded engine "
            f"({'DeepSpeed' if is_deepspeed else 'FSDP2'}) has only a part: use DDP or one process, or "
            "gnp_scope=micro_batch."
        )
    if perturbation.is_per_rank and getattr(getattr(accelerator, "ddp_handler", None), "static_graph", False):
        raise ValueError(
            f"gnp_scope={perturbation.scope} with ddp_static_graph=True: DDP learns its static graph in the first "
            "backward, which has no reduction where each rank moves along its own gradient. Leave out "
            "ddp_static_graph, or use gnp_scope=step or micro_batch."
        )
    if not is_deepspeed:  # which has yet to cast the weights
        perturbation.check_rounding(model)


def _unsupported_model(model: Any) -> str | None:  # transformers' own, or in a wrapper that hands its attributes on
    if not getattr(model, "is_distributed_loading_by_transformers", False):
        return None
    embeddings = [get() for get in (model.get_input_embeddings, model.get_output_embeddings)]
    is_tied = None not in embeddings and embeddings[0].weight is embeddings[1].weight
    if is_tied and model.config.distributed_config.dp_size > 1:
        return (
            "tied embeddings in a model that transformers shards over FSDP at load time: transformers 5.23 shards "
            "them twice and trains one of the two. Load with tie_word_embeddings=False, or use FSDP2 through "
            "accelerate, ZeRO-3, or tensor parallelism alone, where they are right"
        )
    return None


def _unsupported_tensors(model: nn.Module) -> str | None:
    """Trainable weights of a tensor subclass that lacks the operations by which weights are moved and put back."""
    for name, parameter in model.named_parameters():
        is_plain = isinstance(parameter, DTensor) or type(parameter.data) in (torch.Tensor, nn.Parameter)
        if parameter.requires_grad and not is_plain and not _can_be_moved(parameter):
            return (
                f"trainable weights of type {type(parameter.data).__name__} ({name}), which torch._foreach_add_ and "
                "torch._foreach_copy_ do not change in place (torchao's int8 training is one): train plain weights, "
                "or an adapter on frozen ones"
            )
    return None


@torch.no_grad()
def _can_be_moved(parameter: nn.Parameter) -> bool:
    try:
        copy = parameter.detach().clone()
        torch._foreach_add_([copy], [torch.zeros(copy.shape, dtype=copy.dtype, device=copy.device)])
        torch._foreach_copy_([copy], [parameter.detach()])
    except Exception:  # whatever a subclass raises for an operation that it has not
        return False
    return True
