"""ZeRO-3: weights, gradients and masters are sharded, and the forward gathers what it needs."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from hf_gnp.direction import Perturbation
from hf_gnp.engines.shards import HeldShard, Shard, number_parameters
from hf_gnp.rounding import Place

from .base import ShardedEngine
from .private import order_before_gathers


class _Part(NamedTuple):
    """What this rank has of a parameter: `size` elements from `offset` on of its group's flat tensors."""

    parameter: nn.Parameter
    group: int
    number: int  # in the group
    offset: int
    size: int
    place: Place

    def of(self, flat: Sequence[torch.Tensor]) -> torch.Tensor:
        """The part in one of DeepSpeed's lists of flat tensors, of which each group has one."""
        return flat[self.group].narrow(0, self.offset, self.size)


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
        optimizer, shards = self.optimizer, []
        offloaded = [flat.grad for flat in optimizer.fp32_partitioned_groups_flat]
        for part in self._parts():
            master = part.of(optimizer.fp32_partitioned_groups_flat)
            if optimizer.offload_optimizer:
                gradient = part.of(offloaded)
            else:
                gradient = optimizer.averaged_gradients[part.group][part.number].view(-1).narrow(0, 0, part.size)
            weight = part.of(optimizer.fp16_partitioned_groups_flat)
            shards.append(Shard(part.parameter, weight, gradient, master.detach(), part.place))
        return shards

    def _parts(self) -> Iterator[_Part]:
        """This rank's parts, without the padding that only the last ranks have."""
        numbers = number_parameters(self.engine.module)
        for i, group in enumerate(self.optimizer.fp16_groups):
            offset = 0
            for j, parameter in enumerate(group):
                size = parameter.partition_numel()
                start = size * dist.get_rank(parameter.ds_process_group)
                real = min(max(parameter.ds_numel - start, 0), size)
                if parameter.requires_grad and real > 0:
                    place = Place.run(numbers[id(parameter)], start, real)
                    yield _Part(parameter, i, j, offset, real, place)
                offset += size

    def _theta(self) -> list[torch.Tensor]:
        """θ of each parameter group while weights are held, flat."""
        masters = self.optimizer.fp32_partitioned_groups_flat
        pairs = zip(masters, self._backup, strict=True)
        return [master.detach() if backup is None else backup for master, backup in pairs]

    def keep_weights(self, shards: list[Shard]) -> None:
        weights, masters = self.optimizer.fp16_partitioned_groups_flat, self.optimizer.fp32_partitioned_groups_flat
        self._backup = [
            weight.clone() if weight.data_ptr() == master.data_ptr() else None
            for weight, master in zip(weights, masters, strict=True)
        ]

    def hold_weights(self, moved_only: bool = False) -> list[HeldShard]:
        self.keep_weights([])
        weights, theta = self.optimizer.fp16_partitioned_groups_flat, self._theta()
        return [HeldShard(part.parameter, part.of(weights), part.of(theta), part.place) for part in self._parts()]

    @torch.no_grad()
    def restore(self) -> None:
        if self._backup:
            for weight, theta in zip(self.optimizer.fp16_partitioned_groups_flat, self._theta(), strict=True):
                weight.copy_(theta)
        self._backup = []
        self.publish()

    def publish(self) -> None:
        # Persistent parameters stay gathered, and would not notice a changed shard until they are released.
        self.optimizer.parameter_offload.partition_all_parameters()
        order_before_gathers(self.optimizer)

    def reset_gradients(self) -> None:
        self.optimizer.zero_grad()  # also sets the micro-step counter back, else gradients would be added
        if self.optimizer.offload_optimizer:
            self.optimizer.reset_cpu_buffers()
