"""ZeRO-3: weights, gradients and masters are sharded, and the forward gathers what it needs."""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from deepspeed.accelerator import get_accelerator

from hf_gnp.perturbation import Perturbation

from .base import Fragment, ShardedEngine


class Zero3Engine(ShardedEngine):
    """ZeRO-3: the forward gathers `param.ds_tensor`, a part of `fp16_partitioned_groups_flat` of any dtype."""

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation):
        super().__init__(accelerator, perturbation)
        self.offloads = self.optimizer.offload_optimizer
        # Because of a bug, DeepSpeed 0.19 does not share fp32 weights with the masters. A release may mend it.
        if any(weight.data_ptr() == master.data_ptr() for weight, master in self.partitions() if weight.numel()):
            raise NotImplementedError(
                "The gradient-norm penalty does not run with ZeRO-3 where DeepSpeed shares fp32 weights with the "
                "optimizer, as then nothing keeps them while they are moved: use bf16=True, ZeRO-2 or FSDP2, or set "
                "gnp_alpha=0."
            )

    def partitions(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        weights, masters = self.optimizer.fp16_partitioned_groups_flat, self.optimizer.fp32_partitioned_groups_flat
        return [(weight, master.detach()) for weight, master in zip(weights, masters, strict=True)]

    def fragments(self) -> list[Fragment]:
        fragments = []
        for i, group in enumerate(self.optimizer.fp16_groups):
            offset = 0
            for j, parameter in enumerate(group):
                size = parameter.partition_numel()
                start = size * dist.get_rank(parameter.ds_process_group)
                real = min(parameter.ds_numel - start, size)  # the last ranks have padding
                if parameter.requires_grad and real > 0:
                    fragments.append(Fragment(parameter, i, j, offset, start, real))
                offset += size
        return fragments

    def fragment_gradients(self, fragments: list[Fragment]) -> list[torch.Tensor]:
        if self.offloads:
            masters = self.optimizer.fp32_partitioned_groups_flat
            return [fragment.of(masters[fragment.group].grad) for fragment in fragments]
        gradients = self.optimizer.averaged_gradients
        return [gradients[part.group][part.number].view(-1).narrow(0, 0, part.size) for part in fragments]

    @torch.no_grad()
    def restore(self) -> None:
        if self.is_perturbed:
            self.restore_partitions()
        self.is_perturbed = False
        self.publish()

    def publish(self) -> None:
        # Persistent parameters stay gathered, and would not notice a changed shard until they are released.
        self.optimizer.parameter_offload.partition_all_parameters()
        # With `overlap_comm` gathers run on a stream of their own, which waits only for DeepSpeed's own step.
        stream = self.optimizer.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
        if stream is not None:  # a CPU has none
            stream.wait_stream(get_accelerator().current_stream())

    def reset_gradients(self) -> None:
        self.optimizer.zero_grad()  # also sets the micro-step counter back, else gradients would be added
        if self.offloads:
            self.optimizer.reset_cpu_buffers()
