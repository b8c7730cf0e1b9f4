"""
The private names of DeepSpeed that hf_gnp uses. Those that are assigned are checked when an engine is made: an
assignment to a name that a release has dropped would be silent, and the gradient of the second pass wrong.
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

# By the class of the optimizer. `zero_grad` of ZeRO-3 sets micro_step_id back.
ASSIGNED = {
    "DeepSpeedZeroOptimizer": ("all_grad_tensors", "averaged_gradients", "check_grad_overflow", "micro_step_id"),
    "BF16_Optimizer": (),
    "DeepSpeedZeroOptimizer_Stage3": ("averaged_gradients", "micro_step_id"),
}
ASSIGNED_WITH_OFFLOAD = {
    "DeepSpeedZeroOptimizer": ("local_overflow", "norm_for_param_grads"),
    "BF16_Optimizer": (),
    "DeepSpeedZeroOptimizer_Stage3": ("norm_for_param_grads",),
}
# Since this release gradients are copied to the CPU while backward goes on. Before, each copy was waited for.
ASYNCHRONOUS_COPIES = Version("0.19.8")


def offloads(optimizer: Any) -> bool:
    """Whether gradients and fp32 masters lie on the CPU."""
    return bool(getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False))


@functools.cache  # asked in each micro-batch, and slow to read
def copies_are_asynchronous() -> bool:
    """Whether ZeRO-1 and 2 copy gradients to the CPU while backward goes on."""
    return Version(version("deepspeed")) >= ASYNCHRONOUS_COPIES


def wait_for_offload_copies(optimizer: Any) -> None:
    """Wait, under ZeRO-1 and 2, until the gradients that backward sends to the CPU are there."""
    if copies_are_asynchronous():
        optimizer._wait_for_offload_copies()


def forget_offloaded_gradients(optimizer: Any) -> None:
    """Let the next gradients on the CPU replace those that are there, under ZeRO-1 and 2."""
    if copies_are_asynchronous():
        optimizer._offload_accumulated_param_ids = set()
    optimizer.reset_cpu_buffers()


def check_engine(accelerator: Accelerator) -> None:
    """Raise a RuntimeError where accelerate has no DeepSpeed engine, or not where hf_gnp replaces it."""
    require("accelerate", accelerator, ["deepspeed_engine_wrapped"], "Accelerator")
    if accelerator.deepspeed_engine_wrapped is None:
        raise RuntimeError(
            "accelerate forgets the DeepSpeed engine when a training run ends, so under DeepSpeed a trainer trains "
            "once, without the gradient-norm penalty too: make a new trainer for the next run."
        )


def check_optimizer(optimizer: Any) -> None:
    """Raise a RuntimeError where one of DeepSpeed's sharded optimizers lacks a name that its engine assigns."""
    kind = type(optimizer).__name__
    require("deepspeed", optimizer, ASSIGNED[kind], kind)
    if offloads(optimizer):
        require("deepspeed", optimizer, ASSIGNED_WITH_OFFLOAD[kind], kind)
        if kind == "DeepSpeedZeroOptimizer" and copies_are_asynchronous():
            require("deepspeed", optimizer, ["_offload_accumulated_param_ids"], kind)


def order_before_gathers(optimizer: Any) -> None:
    """
    Let ZeRO-3's next gathers wait for what was written into shards: with `overlap_comm` they run on a stream of their
    own, which DeepSpeed makes wait for its own step only by synchronising there.
    """
    stream = optimizer.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
    if stream is not None:  # none on a CPU
        stream.wait_stream(get_accelerator().current_stream())


def fragment_of(parameter: Any) -> Any | None:
    """Return which part of a parameter lies where in this rank's partition under bf16 ZeRO-1. None: no part does."""
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
