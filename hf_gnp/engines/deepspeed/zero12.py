"""ZeRO-1 and 2: weights are whole on every rank, gradients and fp32 masters are sharded."""

import functools
import logging
from abc import abstractmethod
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from hf_gnp import penalty
from hf_gnp.engines.shards import Shard, run_of
from hf_gnp.perturbation import Perturbation

from .base import ShardedEngine
from .private import (
    INITIAL_MICRO_STEP_ID,
    all_gather_dp_groups,
    check_fragments,
    forget_offloaded_gradients,
    fragment_of,
    wait_for_offload_copies,
)


logger = logging.getLogger(__name__)

# How long a rank whose second pass failed waits to see whether all ranks failed, before it gives the error on.
FAILED_RANKS_TIMEOUT = timedelta(seconds=30)


@functools.lru_cache(maxsize=1)
def _group_of_failed_ranks(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """All ranks again: only those that failed meet in it, outside the order of the collectives of training."""
    return dist.new_group(backend="gloo")


class _ReplicatedEngine(ShardedEngine):
    """
    ZeRO-1 and 2: each rank writes its partition of the forward weights, and all ranks gather the whole.

    After a step that was made the weights are new and published, so θ is put back only where none was.
    """

    names: ClassVar[dict[str, str]]  # DeepSpeed's attributes: lists with one entry for each parameter group

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation):
        super().__init__(accelerator, perturbation)
        self._is_perturbed = False
        self._failed_ranks = _group_of_failed_ranks(dist.group.WORLD)

    @property
    def is_perturbed(self) -> bool:
        return self._is_perturbed

    def _lists(self, name: str) -> list[Any]:
        return getattr(self.optimizer, self.names[name])

    def partitions(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each parameter group, this rank's flat partition of the weights, and its fp32 master."""
        ranks = [dist.get_rank(group) for group in self.optimizer.real_dp_process_group]
        weights = [parts[rank] for parts, rank in zip(self._lists("weight_partitions"), ranks, strict=True)]
        return [(w, m.detach()) for w, m in zip(weights, self._lists("masters"), strict=True)]

    def publish(self) -> None:
        all_gather_dp_groups(
            groups_flat=self._lists("flat_weights"),
            partitioned_param_groups=self._lists("weight_partitions"),
            dp_process_group=self.optimizer.real_dp_process_group,
            start_alignment_factor=self.optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=self.optimizer.allgather_bucket_size,
        )

    def keep_weights(self, shards: list[Shard]) -> list[Shard]:
        self._is_perturbed = True  # the masters keep them
        return [shard._replace(gradient=None) for shard in shards]

    def trainable_shards(self) -> list[Shard]:
        return [
            self._shard(parameter, start, weight.narrow(0, offset, size), master.narrow(0, offset, size))
            for group, (weight, master) in enumerate(self.partitions())
            for parameter, offset, start, size in self._fragments(group)
        ]

    def _shard(
        self,
        parameter: nn.Parameter,
        start: int,
        weight: torch.Tensor,
        master: torch.Tensor,
        gradient: torch.Tensor | None = None,
    ) -> Shard:
        """Return the shard that begins at element `start` of the parameter."""
        part = functools.partial(run_of, start=start, size=weight.numel())
        return Shard(parameter, self.numbers[id(parameter)], weight, master, gradient, (start,), part)

    @abstractmethod
    def _fragments(self, group: int) -> Iterator[tuple[nn.Parameter, int, int, int]]:
        """What lies in this rank's partition: of which parameter, where in the partition, where in it, how much."""

    def end_perturbation(self) -> None:
        pass  # `finish` publishes new weights, or `hold_gradient` those of the masters

    def hold_gradient(self) -> None:
        super().hold_gradient()
        if self._is_perturbed:
            self.optimizer.update_lp_params()
            self._is_perturbed = False

    def finish(self) -> None:
        super().finish()
        if self._is_perturbed and self.optimizer.overflow:
            self.optimizer.update_lp_params()
        self._is_perturbed = False

    @torch.no_grad()
    def restore(self) -> None:
        """After a failure: this rank's partition at once, the others' if their ranks failed as well."""
        if not self._is_perturbed:
            return
        for weight, master in self.partitions():
            weight.copy_(master)
        try:
            dist.monitored_barrier(self._failed_ranks, timeout=FAILED_RANKS_TIMEOUT)
            self.publish()
            self._is_perturbed = False
        except RuntimeError as error:
            logger.warning(
                "The second pass failed on this rank alone: its fp32 weights and its part of the forward weights are "
                f"clean, its copies of the other ranks' parts are not, so save_model will refuse. ({error})"
            )


class Zero12Engine(_ReplicatedEngine):
    """ZeRO-1 and 2, with or without optimizer offload."""

    names: ClassVar[dict[str, str]] = {
        "parameters": "bit16_groups",
        "flat_weights": "bit16_groups_flat",
        "weight_partitions": "parallel_partitioned_bit16_groups",
        "masters": "single_partition_of_fp32_groups",
    }

    def _fragments(self, group: int) -> Iterator[tuple[nn.Parameter, int, int, int]]:
        # Not by `_hp_mapping`, which does not know the order of `round_robin_gradients`.
        optimizer, rank = self.optimizer, dist.get_rank(self.optimizer.real_dp_process_group[group])
        offsets = optimizer.grad_partition_insertion_offset[group][rank]
        starts = optimizer.grad_start_offset[group][rank]
        for parameter in optimizer.params_in_partition[group]:
            number = optimizer.get_param_id(parameter)
            offset, start = int(offsets[number]), int(starts[number])  # DeepSpeed 0.19.0 counts in floats
            size = min(parameter.numel() - start, int(optimizer.partition_size[group]) - offset)
            yield parameter, offset, start, size

    def shards(self) -> list[Shard]:
        shards = []
        for i, (weight, master) in enumerate(self.partitions()):
            # The rank before has the beginning of the first parameter. DeepSpeed 0.19.0 counts in floats.
            skipped = int(self.optimizer.first_offset[i])
            for parameter, offset, gradient in self._gradients(i):
                local, theta = (flat.narrow(0, offset, gradient.numel()) for flat in (weight, master))
                shards.append(self._shard(parameter, skipped, local, theta, gradient.view(-1)))
                skipped = 0
        return shards

    def _gradients(self, group: int) -> Iterator[tuple[nn.Parameter, int, torch.Tensor]]:
        """The fragments of the averaged gradient in this rank's partition: parameter, offset, gradient."""
        optimizer, parameters = self.optimizer, self.optimizer.params_in_partition[group]
        if optimizer.cpu_offload:
            wait_for_offload_copies(optimizer)
            flat = optimizer.single_partition_of_fp32_groups[group].grad
            for parameter in parameters:
                _, _, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                yield parameter, offset, flat.narrow(0, offset, size)
        elif parameters:
            offset, fragments = 0, []
            for fragment in optimizer.averaged_gradients[group]:
                if not getattr(fragment, "_zero_padding", False):
                    fragments.append((offset, fragment))
                offset += fragment.numel()
            check_fragments([fragment for _, fragment in fragments], parameters)
            for parameter, (offset, fragment) in zip(parameters, fragments, strict=False):
                size = min(fragment.numel(), int(optimizer.partition_size[group]) - offset)
                is_whole = size == fragment.numel()
                yield parameter, offset, fragment if is_whole else fragment.view(-1).narrow(0, 0, size)

    def reset_gradients(self) -> None:
        optimizer = self.optimizer
        optimizer.zero_grad()
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        for group in list(optimizer.averaged_gradients):
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
        if optimizer.cpu_offload:
            forget_offloaded_gradients(optimizer)
            for master in optimizer.single_partition_of_fp32_groups:
                master.grad.zero_()

    def finish(self) -> None:
        # In bf16, DeepSpeed looks for NaN only on request, and would write them into the weights.
        check = self.optimizer.check_grad_overflow
        self.optimizer.check_grad_overflow = check or self.optimizer.dtype == torch.bfloat16
        try:
            super().finish()
        finally:
            self.optimizer.check_grad_overflow = check


class Bf16Zero1Engine(_ReplicatedEngine):
    """
    ZeRO-1 in bf16 with fp32 gradient accumulation: every rank holds the whole fp32 gradient, into which the second
    pass accumulates as in `NativeEngine`, so that no g₁ is kept aside.
    """

    names: ClassVar[dict[str, str]] = {
        "parameters": "bf16_groups",
        "flat_weights": "bf16_groups_flat",
        "weight_partitions": "bf16_partitioned_groups",
        "masters": "fp32_groups_flat_partition",
    }

    def _fragments(self, group: int) -> Iterator[tuple[nn.Parameter, int, int, int]]:
        for parameter in self._lists("parameters")[group]:
            if (mapping := fragment_of(parameter)) is not None:
                part, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield parameter, part.start, whole.start, part.numel

    def shards(self) -> list[Shard]:
        shards = []
        gradients = self.optimizer.fp32_groups_gradient_flat_partition
        for i, ((weight, master), gradient) in enumerate(zip(self.partitions(), gradients, strict=True)):
            start = -weight.numel() * dist.get_rank(self.optimizer.real_dp_process_group[i])
            for parameter in self.optimizer.bf16_groups[i]:
                first, last = max(start, 0), min(start + parameter.numel(), weight.numel())
                if first < last:
                    parts = (flat.narrow(0, first, last - first) for flat in (weight, master, gradient))
                    shards.append(self._shard(parameter, first - start, *parts))
                start += parameter.numel()
        return shards

    def loss_scale(self) -> float:
        return 1.0

    def keep_gradients(self, shards: list[Shard], alpha: float, scale: float) -> None:
        self.accumulates = alpha < 1
        if alpha < 1:
            penalty.scale_(self.optimizer.fp32_groups_gradients_flat, scale * (1 - alpha) / alpha)
        else:
            self.reset_gradients()

    @torch.no_grad()
    def mix(self, alpha: float) -> None:
        if alpha < 1:
            penalty.scale_(self.optimizer.fp32_groups_gradients_flat, alpha)

    def reset_gradients(self) -> None:
        self.optimizer.clear_hp_grads()

    def gradients(self) -> list[torch.Tensor]:
        return self.optimizer.fp32_groups_gradients_flat  # whole on every rank
