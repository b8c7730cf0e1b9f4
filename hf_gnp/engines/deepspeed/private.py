"""
Every private name of DeepSpeed that hf_gnp uses. They are looked up and checked when an engine is made: an assignment
to a name that a release has dropped would be silent, and the gradient of the second pass wrong.
"""

import functools
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from deepspeed.accelerator import get_accelerator
from packaging.version import Version

from hf_gnp.engines.private import look_up, missing, require


_STAGE12 = "deepspeed.runtime.zero.stage_1_and_2"

BF16_Optimizer = look_up("deepspeed", "deepspeed.runtime.bf16_optimizer", "BF16_Optimizer")
FP16_Optimizer = look_up("deepspeed", "deepspeed.runtime.fp16.fused_optimizer", "FP16_Optimizer")
FP16_UnfusedOptimizer = look_up("deepspeed", "deepspeed.runtime.fp16.unfused_optimizer", "FP16_UnfusedOptimizer")
DeepSpeedZeroOptimizer = look_up("deepspeed", _STAGE12, "DeepSpeedZeroOptimizer")
DeepSpeedZeroOptimizer_Stage3 = look_up("deepspeed", "deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3")
INITIAL_MICRO_STEP_ID = look_up("deepspeed", _STAGE12, "INITIAL_MICRO_STEP_ID")
all_gather_dp_groups = look_up("deepspeed", "deepspeed.runtime.utils", "all_gather_dp_groups")

ENGINE_NAMES = ("backward", "module", "optimizer", "set_gradient_accumulation_boundary", "step")
_SHARDED_NAMES = ("dp_process_group", "loss_scale", "optimizer", "zero_grad")
_REPLICATED_NAMES = (
    *_SHARDED_NAMES,
    "allgather_bucket_size",
    "nccl_start_alignment_factor",
    "overflow",
    "real_dp_process_group",
    "update_lp_params",
)
# By the class of the optimizer: what it always has, and what it has with optimizer offload.
OPTIMIZER_NAMES = {
    "DeepSpeedZeroOptimizer": (
        *_REPLICATED_NAMES,
        "all_grad_tensors",
        "averaged_gradients",
        "bit16_groups",
        "bit16_groups_flat",
        "check_grad_overflow",
        "cpu_offload",
        "dtype",
        "first_offset",
        "get_param_id",
        "grad_partition_insertion_offset",
        "grad_start_offset",
        "micro_step_id",
        "parallel_partitioned_bit16_groups",
        "params_in_partition",
        "partition_size",
        "single_partition_of_fp32_groups",
    ),
    "BF16_Optimizer": (
        *(name for name in _REPLICATED_NAMES if name not in ("loss_scale", "overflow")),
        "bf16_groups",
        "bf16_groups_flat",
        "bf16_partitioned_groups",
        "clear_hp_grads",
        "fp32_groups_flat_partition",
        "fp32_groups_gradient_flat_partition",
        "fp32_groups_gradients_flat",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        *_SHARDED_NAMES,
        "averaged_gradients",
        "fp16_groups",
        "fp16_partitioned_groups_flat",
        "fp32_partitioned_groups_flat",
        "micro_step_id",  # which `zero_grad` sets back
        "offload_optimizer",
        "parameter_offload",
    ),
}
OFFLOAD_NAMES = {
    "DeepSpeedZeroOptimizer": (
        "grad_position",
        "local_overflow",
        "norm_for_param_grads",
        "reset_cpu_buffers",
    ),
    "BF16_Optimizer": (),
    "DeepSpeedZeroOptimizer_Stage3": ("get_param_id", "norm_for_param_grads", "reset_cpu_buffers"),
}
# Since gradients are copied to the CPU while backward goes on. Before, each copy was waited for, and added by itself.
ASYNCHRONOUS_COPIES = Version("0.19.8")
ASYNCHRONOUS_COPIES_NAMES = ("_offload_accumulated_param_ids", "_wait_for_offload_copies")
PARAMETER_OFFLOAD_NAMES = ("partition_all_parameters", "_DeepSpeedZeRoOffload__allgather_stream")
# Of a parameter that ZeRO-3 has sharded.
PARAMETER_NAMES = ("ds_numel", "ds_process_group", "partition_numel")


def offloads(optimizer: Any) -> bool:
    """Whether gradients and fp32 masters lie on the CPU."""
    return bool(getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False))


@functools.cache  # asked in each micro-batch, and slow to read
def copies_are_asynchronous() -> bool:
    """Whether ZeRO-1 and 2 copy gradients to the CPU while backward goes on."""
    return Version(version("deepspeed")) >= ASYNCHRONOUS_COPIES


def wait_for_offload_copies(optimizer: Any) -> None:
    """Under ZeRO-1 and 2: until the gradients that backward sends to the CPU are there."""
    if copies_are_asynchronous():
        optimizer._wait_for_offload_copies()


def forget_offloaded_gradients(optimizer: Any) -> None:
    """Under ZeRO-1 and 2: the next gradients on the CPU replace those that are there."""
    if copies_are_asynchronous():
        optimizer._offload_accumulated_param_ids = set()
    optimizer.reset_cpu_buffers()


def check_engine(accelerator: Accelerator) -> None:
    """Raise a RuntimeError where accelerate's or DeepSpeed's engine lacks a name that all stages use."""
    require("accelerate", accelerator, ["deepspeed_engine_wrapped"], "Accelerator")
    if accelerator.deepspeed_engine_wrapped is None:
        raise RuntimeError(
            "accelerate forgets the DeepSpeed engine when a training run ends, so under DeepSpeed a trainer trains "
            "once, without the gradient-norm penalty too: make a new trainer for the next run."
        )
    require("accelerate", accelerator.deepspeed_engine_wrapped, ["engine", "backward"], "DeepSpeedEngineWrapper")
    require("deepspeed", accelerator.deepspeed_engine_wrapped.engine, ENGINE_NAMES, "DeepSpeedEngine")


def check_optimizer(optimizer: Any) -> None:
    """Raise a RuntimeError where one of DeepSpeed's sharded optimizers lacks a name that its engine uses."""
    kind = type(optimizer).__name__
    require("deepspeed", optimizer, OPTIMIZER_NAMES[kind], kind)
    if offloads(optimizer):
        require("deepspeed", optimizer, OFFLOAD_NAMES[kind], kind)
        if kind == "DeepSpeedZeroOptimizer" and copies_are_asynchronous():
            require("deepspeed", optimizer, ASYNCHRONOUS_COPIES_NAMES, kind)
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        require("deepspeed", optimizer.parameter_offload, PARAMETER_OFFLOAD_NAMES, "DeepSpeedZeRoOffload")
        for parameter in [parameter for group in optimizer.fp16_groups for parameter in group][:1]:
            require("deepspeed", parameter, PARAMETER_NAMES, "a parameter's")


def order_before_gathers(optimizer: Any) -> None:
    """
    Let ZeRO-3's next gathers wait for what was written into shards: with `overlap_comm` they run on a stream of their
    own, which DeepSpeed makes wait for its own step only by synchronising there.
    """
    stream = optimizer.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
    if stream is not None:  # none on a CPU
        stream.wait_stream(get_accelerator().current_stream())


def fragment_of(parameter: Any) -> Any | None:
    """Which part of a parameter lies where in this rank's partition under ZeRO-1 and 2; None where no part does."""
    require("deepspeed", parameter, ["_hp_mapping"], "a parameter's")
    return parameter._hp_mapping


def check_fragments(fragments: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]) -> None:
    """
    Raise where the gradient's fragments are not those of the parameters, of which the first and the last may be cut:
    DeepSpeed marks padding among them with `_zero_padding`, and unmarked padding would be taken for a gradient. At the
    end of a partition it is not always marked, and does no harm.
    """
    is_short = len(fragments) < len(parameters)
    pairs = zip(fragments[1:], parameters[1:-1], strict=False)
    if is_short or any(fragment.numel() != parameter.numel() for fragment, parameter in pairs):
        raise RuntimeError(missing("deepspeed", "averaged_gradients' _zero_padding"))
