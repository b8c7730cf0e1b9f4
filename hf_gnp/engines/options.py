"""DeepSpeed's options: those that the penalty is wrong with, and those that it was run with."""

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from transformers.utils import logging


logger = logging.get_logger(__name__)

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
