"""ZeRO-3: weights, gradients and masters are sharded, and the forward gathers what it needs."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from hf_gnp.engines.shards import Shard, run_of
from hf_gnp.perturbation import Perturbation

from .base import ShardedEngine
from .private import order_before_gathers


class _Part(NamedTuple):
    """This rank's part of a parameter: `size` elements from `offset` on of its group's flat tensors."""

    parameter: nn.Parameter
    group: int
    number: int  # in the group
    offset: int
    start: int  # in the parameter
    size: int

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
            shards.append(self._shard(part, master.detach(), gradient))
        return shards

    def trainable_shards(self) -> list[Shard]:
        masters = self.optimizer.fp32_partitioned_groups_flat
        return [self._shard(part, part.of(masters).detach()) for part in self._parts()]

    def _shard(self, part: _Part, master: torch.Tensor, gradient: torch.Tensor | None = None) -> Shard:
        weight = part.of(self.optimizer.fp16_partitioned_groups_flat)
        part_of = functools.partial(run_of, start=part.start, size=part.size)
        number = self.numbers[id(part.parameter)]
        return Shard(part.parameter, number, weight, master, gradient, (part.start,), part_of)

    def _parts(self) -> Iterator[_Part]:
        """This rank's parts, without the padding that only the last ranks have."""
        for i, group in enumerate(self.optimizer.fp16_groups):
            offset = 0
            for j, parameter in enumerate(group):
                size = parameter.partition_numel()
                start = size * dist.get_rank(parameter.ds_process_group)
                real = min(max(parameter.ds_numel - start, 0), size)
                if parameter.requires_grad and real > 0:
                    yield _Part(parameter, i, j, offset, start, real)
                offset += size

    def _theta(self) -> list[torch.Tensor]:
        """θ of each parameter group while weights are held, flat."""
        masters = self.optimizer.fp32_partitioned_groups_flat
        pairs = zip(masters, self._backup, strict=True)
        return [master.detach() if backup is None else backup for master, backup in pairs]

    def keep_weights(self, shards: list[Shard]) -> list[Shard]:
        weights, masters = self.optimizer.fp16_partitioned_groups_flat, self.optimizer.fp32_partitioned_groups_flat
        self._backup = [
            weight.clone() if weight.data_ptr() == master.data_ptr() else None
            for weight, master in zip(weights, masters, strict=True)
        ]
        theta, by_parameter = self._theta(), {id(part.parameter): part for part in self._parts()}
        return [shard._replace(gradient=None, master=by_parameter[id(shard.parameter)].of(theta)) for shard in shards]

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
