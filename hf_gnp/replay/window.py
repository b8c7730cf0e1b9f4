"""The window of one optimizer step: its micro-batches, to be run again exactly as they ran the first time."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .randomness import RandomState


@dataclass
class MicroBatch:
    """One call of `training_step`: its arguments, and what stood around it."""

    inputs: Any
    num_items_in_batch: torch.Tensor | int | None
    accumulation_steps: int | None
    random_state: RandomState
    versions: list[int]
    loss: torch.Tensor | None = None


class Window:
    """
    The micro-batches since the last optimizer step.

    A micro-batch is held by reference; its containers are new, so keys that a first pass adds or pops do not show.
    Where `copy_inputs` is set its tensors are copied too, which a loss that changes its inputs in place needs;
    elsewhere such a change is noticed by the tensors' version counters, and refused.
    """

    def __init__(self, devices: list[torch.device], copy_inputs: bool = False):
        self.devices = devices
        self.copy_inputs = copy_inputs
        self.micro_batches: list[MicroBatch] = []

    def record(
        self, inputs: Any, num_items_in_batch: torch.Tensor | int | None, accumulation_steps: int | None
    ) -> MicroBatch:
        """Remember a micro-batch, before its first pass."""
        inputs = map_tensors(torch.clone if self.copy_inputs else lambda tensor: tensor, inputs)
        state = RandomState(self.devices)
        micro_batch = MicroBatch(inputs, num_items_in_batch, accumulation_steps, state, _versions(inputs))
        self.micro_batches.append(micro_batch)
        return micro_batch

    def loss(self) -> torch.Tensor:
        """The clean loss of the window: the sum over its micro-batches, as `Trainer` sums them."""
        return sum(micro_batch.loss for micro_batch in self.micro_batches)

    @contextlib.contextmanager
    def replay(self) -> Iterator[Iterator[tuple[MicroBatch, bool]]]:
        """
        The micro-batches again, each with whether it is the last, each under the random state that it had. On leaving,
        the generators stand where the first pass left them.
        """
        end = RandomState(self.devices)
        try:
            yield self._replayed()
        finally:
            end.restore()

    def _replayed(self) -> Iterator[tuple[MicroBatch, bool]]:
        for index, micro_batch in enumerate(self.micro_batches):
            if _versions(micro_batch.inputs) != micro_batch.versions:
                raise RuntimeError(
                    "The first pass changed its inputs in place, so the second pass of the gradient-norm penalty "
                    "would not see the same ones: clone them in the model or the data collator before changing them."
                )
            micro_batch.random_state.restore()
            yield micro_batch, index == len(self.micro_batches) - 1

    def clear(self) -> None:
        self.micro_batches.clear()


def map_tensors(function: Callable[[torch.Tensor], Any], data: Any) -> Any:
    """`data` in new containers, those that `Trainer._prepare_input` descends into, with `function` of its tensors."""
    if isinstance(data, Mapping):
        return type(data)({key: map_tensors(function, value) for key, value in data.items()})
    if isinstance(data, tuple | list):
        return type(data)(map_tensors(function, value) for value in data)
    return function(data) if isinstance(data, torch.Tensor) else data


def _versions(inputs: Any) -> list[int]:
    versions: list[int] = []
    map_tensors(lambda tensor: versions.append(_version(tensor)), inputs)
    return versions


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
