"""ZeRO-1 and 2: weights are whole on every rank, gradients and fp32 masters are sharded."""

import functools
import logging
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

from hf_gnp import penalty
from hf_gnp.engines.engine import attribute_set
from hf_gnp.engines.private import TESTED, require
from hf_gnp.perturbation import Perturbation

from .base import Fragment, ShardedEngine


logger = logging.getLogger(__name__)

# How long a rank whose second pass failed waits for the other ranks to fail too, before it raises the error.
FAILED_RANKS_TIMEOUT = timedelta(seconds=30)


@functools.lru_cache(maxsize=1)
def _group_of_failed_ranks(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return a second group of all ranks, in which failed ranks meet outside the order of training's collectives."""
    return dist.new_group(backend="gloo")


class _ReplicatedEngine(ShardedEngine):
    """
    ZeRO-1 and 2: each rank writes its partition of the forward weights, and all ranks gather the whole.

    The optimizer's step publishes new weights. θ is published after a skipped step, after a failure, and in
    `hold_gradient`.
    """

    restores_late = True

    # DeepSpeed's lists, with one entry for each parameter group.
    masters: list[Any]
    flat_weights: list[torch.Tensor]
    weight_partitions: list[list[torch.Tensor]]  # of all ranks

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation):
        super().__init__(accelerator, perturbation)
        self._ranks = [dist.get_rank(group) for group in self.optimizer.real_dp_process_group]
        self._failed_ranks = _group_of_failed_ranks(dist.group.WORLD)

    def partitions(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        weights = [parts[rank] for parts, rank in zip(self.weight_partitions, self._ranks, strict=True)]
        return [(weight, master.detach()) for weight, master in zip(weights, self.masters, strict=True)]

    def publish(self) -> None:
        all_gather_dp_groups(
            groups_flat=self.flat_weights,
            partitioned_param_groups=self.weight_partitions,
            dp_process_group=self.optimizer.real_dp_process_group,
            start_alignment_factor=self.optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=self.optimizer.allgather_bucket_size,
        )

    def hold_gradient(self) -> None:
        super().hold_gradient()
        self._publish_masters()

    def finish(self) -> None:
        has_step = self.ds_engine.is_gradient_accumulation_boundary()  # not if a subclass skipped the last micro-batch
        super().finish()
        if self.optimizer.overflow or not has_step:
            self._publish_masters()
        self.is_perturbed = False

    def _publish_masters(self) -> None:
        if self.is_perturbed:
            self.optimizer.update_lp_params()
        self.is_perturbed = False

    @torch.no_grad()
    def restore(self) -> None:
        """Put θ back after a failure: on this rank at once, and the other ranks' parts if all ranks failed."""
        if not self.is_perturbed:
            return
        self.restore_partitions()
        try:
            dist.monitored_barrier(self._failed_ranks, timeout=FAILED_RANKS_TIMEOUT)
            self.publish()
            self.is_perturbed = False
        except RuntimeError as error:
            logger.warning(
                "The second pass failed on this rank alone: its fp32 weights and its part of the forward weights are "
                f"clean, its copies of the other ranks' parts are not, so save_model will refuse. ({error})"
            )


class Zero12Engine(_ReplicatedEngine):
    """ZeRO-1 and 2, with or without optimizer offload."""

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation):
        super().__init__(accelerator, perturbation)
        optimizer = self.optimizer
        self.masters, self.flat_weights = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups_flat
        self.weight_partitions = optimizer.parallel_partitioned_bit16_groups
        self.offloads = optimizer.cpu_offload
        require("deepspeed", optimizer, "micro_step_id")

    def fragments(self) -> list[Fragment]:
        # `_hp_mapping` does not know the order of `round_robin_gradients`.
        optimizer, fragments = self.optimizer, []
        for group, rank in enumerate(self._ranks):
            offsets = optimizer.grad_partition_insertion_offset[group][rank]
            starts = optimizer.grad_start_offset[group][rank]
            for number, parameter in enumerate(optimizer.params_in_partition[group]):
                param_id = optimizer.get_param_id(parameter)
                offset, start = int(offsets[param_id]), int(starts[param_id])  # DeepSpeed 0.19.0 counts in floats
                size = min(parameter.numel() - start, int(optimizer.partition_size[group]) - offset)
                fragments.append(Fragment(parameter, group, number, offset, start, size))
        return fragments

    def fragment_gradients(self, fragments: list[Fragment]) -> list[torch.Tensor]:
        if self.offloads:
            if hasattr(self.optimizer, "_wait_for_offload_copies"):  # from DeepSpeed 0.19.8 on
                self.optimizer._wait_for_offload_copies()
            return [fragment.of(self.masters[fragment.group].grad) for fragment in fragments]
        # The list of a group also has its padding, which DeepSpeed marks everywhere but at the end.
        real = {
            group: [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
            for group, gradients in self.optimizer.averaged_gradients.items()
        }
        gradients = [real[fragment.group][fragment.number].view(-1) for fragment in fragments]
        if any(gradient.numel() != fragment.size for gradient, fragment in zip(gradients, fragments, strict=True)):
            raise RuntimeError(
                f"DeepSpeed {version('deepspeed')} has other gradients in its partitions than {TESTED['deepspeed']}, "
                "with which the gradient-norm penalty was tested: install that one, or train with gnp_alpha=0."
            )
        return gradients

    def reset_gradients(self) -> None:
        optimizer = self.optimizer
        optimizer.zero_grad()
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        for group in list(optimizer.averaged_gradients):
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
        if self.offloads:
            if hasattr(optimizer, "_offload_accumulated_param_ids"):
                optimizer._offload_accumulated_param_ids.clear()
            optimizer.reset_cpu_buffers()
            for master in self.masters:
                master.grad.zero_()

    def finish(self) -> None:
        # In bf16 DeepSpeed looks for NaN only on request, and would write them into the weights.
        optimizer = self.optimizer
        check = optimizer.check_grad_overflow or optimizer.dtype == torch.bfloat16
        with attribute_set(optimizer, "check_grad_overflow", check):
            super().finish()


class Bf16Zero1Engine(_ReplicatedEngine):
    """ZeRO-1 in bf16 with fp32 gradient accumulation: every rank has the whole gradient, into which g₂ is added."""

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation):
        super().__init__(accelerator, perturbation)
        optimizer = self.optimizer
        self.masters, self.flat_weights = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups_flat
        self.weight_partitions = optimizer.bf16_partitioned_groups

    def fragments(self) -> list[Fragment]:
        fragments = []
        for i, (group, rank) in enumerate(zip(self.optimizer.bf16_groups, self._ranks, strict=True)):
            partition_size = self.masters[i].numel()
            position = -rank * partition_size  # of the parameter, in the partition
            for j, parameter in enumerate(group):
                first, last = max(position, 0), min(position + parameter.numel(), partition_size)
                if first < last:
                    fragments.append(Fragment(parameter, i, j, first, first - position, last - first))
                position += parameter.numel()
        return fragments

    def fragment_gradients(self, fragments: list[Fragment]) -> list[torch.Tensor]:
        partitions = self.optimizer.fp32_groups_gradient_flat_partition
        return [fragment.of(partitions[fragment.group]) for fragment in fragments]

    def loss_scale(self) -> float:
        return 1.0

    def keep_gradients(self, alpha: float, scale: float) -> None:
        self.accumulates = alpha < 1
        if alpha < 1:
            penalty.scale_(self.gradients(), scale * (1 - alpha) / alpha)
        else:
            self.reset_gradients()

    @torch.no_grad()
    def mix(self, alpha: float) -> None:
        if alpha < 1:
            penalty.scale_(self.gradients(), alpha)

    def reset_gradients(self) -> None:
        self.optimizer.clear_hp_grads()

    def gradients(self) -> list[torch.Tensor]:
        return self.optimizer.fp32_groups_gradients_flat  # whole on every rank
