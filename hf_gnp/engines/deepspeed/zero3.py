"""ZeRO-3: weights, gradients and masters are sharded, and the forward gathers what it needs."""

import torch
import torch.distributed as dist
from accelerate import Accelerator

from hf_gnp.direction import Perturbation
from hf_gnp.engines.base import HeldShard, Shard, number_parameters
from hf_gnp.rounding import Place

from .base import ShardedEngine


class Zero3Engine(ShardedEngine):
    """
    ZeRO-3: the forward gathers `param.ds_tensor`, which lies in `fp16_partitioned_groups_flat` ("fp16" in name only).
    Where that is the master itself, which DeepSpeed 0.19.8 means to do in fp32 and does not, a sharded copy is kept.
    """

    def __init__(self, accelerator: Accelerator, perturbation: Perturbation):
        super().__init__(accelerator, perturbation)
        self._backup: list[torch.Tensor | None] = []

    @property
    def is_perturbed(self) -> bool:
        return bool(self._backup)

    def shards(self) -> list[Shard]:
        optimizer, shards, numbers = self.optimizer, [], number_parameters(self.engine.module)
        for i, group in enumerate(optimizer.fp16_groups):
            offset = 0
            for j, param in enumerate(group):
                size = param.partition_numel()
                start = size * dist.get_rank(param.ds_process_group)
                real = min(max(param.ds_numel - start, 0), size)
                if param.requires_grad and real > 0:
                    if optimizer.offload_optimizer:
                        gradient = optimizer.fp32_partitioned_groups_flat[i].grad.narrow(0, offset, real)
                    else:
                        gradient = optimizer.averaged_gradients[i][j].view(-1).narrow(0, 0, real)
                    weight = optimizer.fp16_partitioned_groups_flat[i].narrow(0, offset, real)
                    master = optimizer.fp32_partitioned_groups_flat[i].detach().narrow(0, offset, real)
                    place = Place.run(numbers[id(param)], start, real)
                    shards.append(Shard(param, weight, gradient, master, place))
                offset += size
        return shards

    def keep_weights(self, shards: list[Shard]) -> None:
        weights, masters = self.optimizer.fp16_partitioned_groups_flat, self.optimizer.fp32_partitioned_groups_flat
        self._backup = [
            weight.clone() if weight.data_ptr() == master.data_ptr() else None
            for weight, master in zip(weights, masters, strict=True)
        ]

    def hold_weights(self) -> list[HeldShard]:
        self.keep_weights([])
        optimizer, held, numbers = self.optimizer, [], number_parameters(self.engine.module)
        for i, group in enumerate(optimizer.fp16_groups):
            theta, offset = self._backup[i], 0
            if theta is None:
                theta = optimizer.fp32_partitioned_groups_flat[i].detach()
            for param in group:
                size = param.partition_numel()
                start = size * dist.get_rank(param.ds_process_group)
                real = min(max(param.ds_numel - start, 0), size)
                if param.requires_grad and real > 0:
                    weight = optimizer.fp16_partitioned_groups_flat[i].narrow(0, offset, real)
                    place = Place.run(numbers[id(param)], start, real)
                    held.append(HeldShard(param, weight, theta.narrow(0, offset, real), place))
                offset += size
        return held

    @torch.no_grad()
    def restore(self) -> None:
        for i, backup in enumerate(self._backup):
            source = self.optimizer.fp32_partitioned_groups_flat[i] if backup is None else backup
            self.optimizer.fp16_partitioned_groups_flat[i].copy_(source)
        self._backup = []
        self.publish()

    def publish(self) -> None:
        # Persistent parameters stay gathered, and would not notice a changed shard until they are released.
        self.optimizer.parameter_offload.partition_all_parameters()

    def reset_gradients(self) -> None:
        self.optimizer.zero_grad()  # also sets the micro-step counter back, else gradients would be added
        if self.optimizer.offload_optimizer:
            self.optimizer.reset_cpu_buffers()
