"""Refuses, when the trainer is built, what the penalty cannot run with. Errors say what to use instead."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils import logging
from transformers.utils.import_utils import is_sagemaker_mp_enabled

from hf_gnp import penalty
from hf_gnp.perturbation import Perturbation


logger = logging.get_logger(__name__)

POWER_SGD = "PowerSGD, which carries an error from one gradient to the next: use the fp16 or bf16 hook, or none"
ZERO = "zero_optimization."
QUANTISED = "ZeRO++ quantisation ({}), which rounds a small move away: set it to false"
# Counts that switch an option on above these. Other options are on if they are true, or a section.
OFF = {f"{ZERO}zero_hpz_partition_size": 1, "tensor_parallel.autotp_size": 1, f"{ZERO}mics_shard_size": 0}
# By key, the refusal of an option that is on.
REFUSED_IF_ON = {
    f"{ZERO}offload_optimizer.super_offload": "SuperOffload ({}): use offload to the CPU without it",
    f"{ZERO}zero_hpz_partition_size": "hpZ ({}), whose secondary shards would stay: set it to 1",
    f"{ZERO}mics_shard_size": "MiCS ({}): use ZeRO-3, or FSDP2 with replicas (HSDP)",
    f"{ZERO}zero_quantized_weights": QUANTISED,
    f"{ZERO}zero_quantized_gradients": QUANTISED,
    f"{ZERO}zero_quantized_nontrainable_weights": QUANTISED,
    f"{ZERO}zenflow": "ZenFlow ({}): use ZeRO-2 with offload to the CPU",
    "pipeline": "pipeline parallelism ({}): use ZeRO-3",
    "compile.deepcompile": "DeepCompile ({}): use torch_compile",
    "sparse_gradients": "sparse gradients ({}): set it to false",
    "amp.enabled": "Apex AMP ({}): use the bf16 section",
    "tensor_parallel.autotp_size": "AutoTP ({}): use ZeRO-3",
}
# Keys, and sections with all that is in them. The tests run with most of them. The second paragraph only prints,
# writes, times, or belongs to a part of DeepSpeed that is not used.
KEYS = """
train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping
zero_allow_untested_optimizer zero_force_ds_cpu_optimizer optimizer.type optimizer.params scheduler
torch_autocast bf16.enabled bf16.check_grad_overflow data_types.grad_accum_dtype
fp16.enabled fp16.auto_cast fp16.loss_scale fp16.initial_scale_power fp16.min_loss_scale fp16.loss_scale_window
fp16.hysteresis fp16.consecutive_hysteresis managed_gradient_accumulation
communication_data_type prescale_gradients gradient_predivide_factor

steps_per_print wall_clock_breakdown memory_breakdown dump_state disable_python_gc tensorboard wandb csv_monitor
comet comms_logger checkpoint activation_checkpointing aio dataloader_drop_last
"""
ZERO_KEYS = """
stage overlap_comm contiguous_gradients round_robin_gradients reduce_scatter reduce_bucket_size
allgather_partitions allgather_bucket_size allgather_sequential use_multi_rank_bucket_allreduce sub_group_size
stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold
stage3_max_live_parameters stage3_max_reuse_distance stage3_use_all_reduce_for_fetch_params
stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
leaf_module ignore_unused_parameters log_trace_cache_warnings
offload_optimizer.device offload_optimizer.pin_memory offload_optimizer.buffer_count offload_optimizer.nvme_path
offload_param.device offload_param.pin_memory offload_param.buffer_count offload_param.buffer_size
offload_param.nvme_path offload_param.max_in_cpu
"""
CHECKED = {*KEYS.split(), *(f"{ZERO}{key}" for key in ZERO_KEYS.split()), *REFUSED_IF_ON}


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
    for reason in (*_unsupported_engine(accelerator), *_unsupported_model(model), *refused_options(accelerator)):
        raise NotImplementedError(sentence.format(reason))


def _refuse_optimizer(args: TrainingArguments, optimizer: Any) -> None:
    if optimizer is None:
        name = OptimizerNames(args.optim).value
        is_inside = name.endswith(("lomo", "layerwise"))
    else:
        name = (optimizer if isinstance(optimizer, type) else type(optimizer)).__name__
        is_inside = name in ("Lomo", "AdaLomo", "LayerWiseDummyOptimizer")
    if is_inside:
        raise ValueError(
            f"optim={name} updates the weights inside backward, so there is no gradient to mix with that of the "
            "second pass. Use an optimizer that steps after backward (for GaLore and APOLLO the ones without "
            "'layerwise'), or set gnp_alpha=0."
        )


def _unsupported_engine(accelerator: Accelerator) -> Iterator[str]:
    kind, parallelism = accelerator.distributed_type, accelerator.parallelism_config
    if is_sagemaker_mp_enabled():
        yield "SageMaker model parallelism: use FSDP2 or DeepSpeed ZeRO"
    known = (DistributedType.NO, DistributedType.FSDP, DistributedType.DEEPSPEED)
    if kind not in known and not kind.value.startswith("MULTI_"):
        yield f"{kind.value}: use DDP, FSDP2 or DeepSpeed ZeRO"
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        yield "FSDP version 1: set fsdp_version to 2"
    hook = getattr(getattr(accelerator, "ddp_handler", None), "comm_hook", DDPCommunicationHookType.NO)
    if "power_sgd" in DDPCommunicationHookType(hook).value:
        yield POWER_SGD
    if parallelism is not None and parallelism.cp_enabled:
        yield "context parallelism, which shards the inputs in place: use Ulysses (sp_size) under ZeRO-3"
    plugin = accelerator.state.deepspeed_plugin
    is_zero3 = plugin is not None and plugin.hf_ds_config.get_value("zero_optimization.stage") == 3
    if parallelism is not None and parallelism.sp_enabled and not is_zero3:
        yield (
            "sequence parallelism but under ZeRO-3: in stages 1 and 2 DeepSpeed 0.19.8 averages over data parallel "
            "ranks alone, and the gradient is sp_size times too large. Set stage 3"
        )


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


def _unsupported_model(model: Any) -> Iterator[str]:
    # The attribute is of a model of transformers, or of a wrapper that hands attributes on.
    if getattr(model, "is_distributed_loading_by_transformers", False):
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        is_tied = None not in (inputs, outputs) and inputs.weight is outputs.weight
        if is_tied and model.config.distributed_config.dp_size > 1:
            yield (
                "tied embeddings in a model that transformers shards over FSDP at load time: transformers 5.23 shards "
                "them twice and trains one of the two. Load with tie_word_embeddings=False, or use FSDP2 through "
                "accelerate, ZeRO-3, or tensor parallelism alone, where they are right"
            )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not _can_be_moved(parameter):
            yield (
                f"trainable weights of type {type(parameter.data).__name__} ({name}), which torch._foreach_add_ and "
                "torch._foreach_copy_ do not change in place (torchao's int8 training is one): train plain weights, "
                "or an adapter on frozen ones"
            )


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


def refused_options(accelerator: Accelerator) -> Iterator[str]:
    """Yield each option of a DeepSpeed configuration that the penalty is wrong with, and what to use instead."""
    if accelerator.state.deepspeed_plugin is None:
        return
    config = accelerator.state.deepspeed_plugin.hf_ds_config
    for key, refusal in REFUSED_IF_ON.items():
        value = config.get_value(key)
        is_on = (value or 0) > OFF[key] if key in OFF else bool(value)
        if is_on:
            yield refusal.format(key)
    for key in ("offload_optimizer", "offload_param"):
        if config.get_value(f"{ZERO}{key}.device") == "nvme":
            yield f"NVMe offload ({ZERO}{key}): offload to the CPU"
    if config.get_value(f"{ZERO}stage", 0) == 0 and config.get_value("fp16.enabled") is True:
        yield "fp16 in ZeRO stage 0, where DeepSpeed 0.19.8 does not scale the loss: use stage 1 to 3, or bf16"
    if config.get_value("managed_gradient_accumulation") is False:
        yield "managed_gradient_accumulation=false: leave it out"
    optimizer = str(config.get_value("optimizer.type") or "").lower()
    if optimizer.startswith(("onebit", "zeroone", "muon")):
        yield f"the {optimizer} optimizer, which changes gradients as it communicates them: use AdamW"


def warn_of_unchecked_options(accelerator: Accelerator) -> None:
    """Warn once of the options of a DeepSpeed configuration that nobody has run the penalty with."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and (keys := list(unchecked_options(plugin.hf_ds_config.config))):
        logger.warning_once(
            f"The gradient-norm penalty was not checked with these DeepSpeed options: {', '.join(keys)}. Leave them "
            "out, or compare a run of a small model with one on a single process."
        )


def unchecked_options(config: dict[str, Any], section: str = "") -> Iterator[str]:
    """Yield the options that are set and not in `CHECKED`. A section may be checked as a whole, or be switched off."""
    for name, value in config.items():
        key = f"{section}{name}"
        if value is None or key in CHECKED:
            continue
        if not isinstance(value, dict):
            yield key
        elif value.get("enabled") is not False:
            yield from unchecked_options(value, f"{key}.")
