"""DeepSpeed's options: those that the penalty is wrong with, and those that it was run with."""

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from transformers.utils import logging


logger = logging.get_logger(__name__)

ZERO = "zero_optimization."
# Keys, and sections with all that is in them. With most of them the tests run; the rest print, write or time
# something, or belong to a part of DeepSpeed that is not used.
CHECKED = frozenset(
    {
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "optimizer.type", "optimizer.params"),
        *("scheduler", "torch_autocast", "bf16.enabled", "bf16.check_grad_overflow", "data_types.grad_accum_dtype"),
        *(f"fp16.{key}" for key in ("enabled", "auto_cast", "loss_scale", "initial_scale_power", "min_loss_scale")),
        *(f"fp16.{key}" for key in ("loss_scale_window", "hysteresis", "consecutive_hysteresis")),
        *("communication_data_type", "prescale_gradients", "gradient_predivide_factor"),
        # Printed, written, timed.
        *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_python_gc"),
        *("tensorboard", "wandb", "csv_monitor", "comet", "comms_logger", "checkpoint", "activation_checkpointing"),
        *("aio", "dataloader_drop_last"),
        # ZeRO.
        *(f"{ZERO}{key}" for key in ("stage", "overlap_comm", "contiguous_gradients", "round_robin_gradients")),
        *(f"{ZERO}{key}" for key in ("reduce_scatter", "reduce_bucket_size", "allgather_partitions")),
        *(f"{ZERO}{key}" for key in ("allgather_bucket_size", "use_multi_rank_bucket_allreduce", "sub_group_size")),
        *(f"{ZERO}{key}" for key in ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")),
        *(f"{ZERO}{key}" for key in ("stage3_model_persistence_threshold", "stage3_max_live_parameters")),
        *(f"{ZERO}{key}" for key in ("stage3_max_reuse_distance", "stage3_use_all_reduce_for_fetch_params")),
        *(f"{ZERO}{key}" for key in ("stage3_gather_16bit_weights_on_model_save", "allgather_sequential")),
        f"{ZERO}stage3_gather_fp16_weights_on_model_save",
        *(f"{ZERO}{key}" for key in ("leaf_module", "ignore_unused_parameters", "log_trace_cache_warnings")),
        *(f"{ZERO}offload_optimizer.{key}" for key in ("device", "pin_memory", "buffer_count", "nvme_path")),
        *(f"{ZERO}offload_param.{key}" for key in ("device", "pin_memory", "buffer_count", "buffer_size")),
        *(f"{ZERO}offload_param.{key}" for key in ("nvme_path", "max_in_cpu")),
        # Refused by name where they are on.
        *(f"{ZERO}{key}" for key in ("zero_hpz_partition_size", "mics_shard_size", "zero_quantized_weights")),
        *(f"{ZERO}{key}" for key in ("zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zenflow")),
        *(f"{ZERO}offload_optimizer.super_offload", "pipeline", "compile.deepcompile", "sparse_gradients", "amp"),
        *("tensor_parallel.autotp_size", "managed_gradient_accumulation"),
    }
)


def refused_options(accelerator: Accelerator) -> Iterator[str]:
    """Yield what a DeepSpeed configuration asks for that is known to be wrong, each with what to use instead."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        yield from _wrong(plugin.hf_ds_config)


def warn_of_unchecked_options(accelerator: Accelerator) -> None:
    """Name the options of a DeepSpeed configuration that nobody has run the penalty with, in one warning."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and (keys := list(unchecked_options(plugin.hf_ds_config.config))):
        logger.warning_once(
            f"The gradient-norm penalty was not checked with these DeepSpeed options: {', '.join(keys)}. Leave them "
            "out, or compare a run of a small model with one on a single process."
        )


def unchecked_options(config: dict[str, Any], section: str = "") -> Iterator[str]:
    """Yield the options that are set and not in `CHECKED`. A section may be in it, or be switched off."""
    for name, value in config.items():
        key = f"{section}{name}"
        if value is None or key in CHECKED:
            continue
        if not isinstance(value, dict):
            yield key
        elif value.get("enabled") is not False:
            yield from unchecked_options(value, f"{key}.")


def _wrong(config: Any) -> Iterator[str]:
    for key in ("offload_optimizer", "offload_param"):
        if config.get_value(f"{ZERO}{key}.device") == "nvme":
            yield f"NVMe offload ({ZERO}{key}): offload to the CPU"
    if config.get_value(f"{ZERO}offload_optimizer.super_offload"):
        yield f"SuperOffload ({ZERO}offload_optimizer.super_offload): use offload to the CPU without it"
    if (config.get_value(f"{ZERO}zero_hpz_partition_size") or 1) > 1:
        yield f"hpZ ({ZERO}zero_hpz_partition_size), whose secondary shards would stay: set it to 1"
    if (config.get_value(f"{ZERO}mics_shard_size") or 0) > 0:
        yield f"MiCS ({ZERO}mics_shard_size): use ZeRO-3, or FSDP2 with replicas (HSDP)"
    for key in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"):
        if config.get_value(f"{ZERO}{key}"):
            yield f"ZeRO++ quantisation ({ZERO}{key}), which rounds a small move away: set it to false"
    for key, name, instead in (
        (f"{ZERO}zenflow", "ZenFlow", "use ZeRO-2 with offload to the CPU"),
        ("pipeline", "pipeline parallelism", "use ZeRO-3"),
        ("compile.deepcompile", "DeepCompile", "use torch_compile"),
        ("sparse_gradients", "sparse gradients", "set it to false"),
        ("amp.enabled", "Apex AMP", "use the bf16 section"),
    ):
        if config.get_value(key):
            yield f"{name} ({key}): {instead}"
    if config.get_value(f"{ZERO}stage", 0) == 0 and config.get_value("fp16.enabled") is True:
        yield "fp16 in ZeRO stage 0, where DeepSpeed 0.19.8 does not scale the loss: use stage 1 to 3, or bf16"
    if (config.get_value("tensor_parallel.autotp_size") or 1) > 1:
        yield "AutoTP (tensor_parallel.autotp_size): use ZeRO-3"
    if config.get_value("managed_gradient_accumulation") is False:
        yield "managed_gradient_accumulation=false: leave it out"
    optimizer = str(config.get_value("optimizer.type") or "").lower()
    if optimizer.startswith(("onebit", "zeroone", "muon")):
        yield f"the {optimizer} optimizer, which changes gradients as it communicates them: use AdamW"
