"""The window of one perturbation: its micro-batches, and the state that they run in."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hf_gnp.tensors import gradients_hidden

from .inputs import copied
from .running_tensors import RunningTensors
from .state import Found, Snapshot, tensors_on_parameters


@dataclass
class MicroBatch:
    """Hold one call of `compute_loss` by `Trainer.training_step`: copies of its arguments, and the state before it."""

    inputs: Any
    num_items_in_batch: torch.Tensor | int | None
    snapshot: Snapshot
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]  # as a user's `training_step` may have set it
    forward_loss: torch.Tensor | None = None  # what compute_loss returned
    loss: Any = None  # what `Trainer.training_step` called backward with


class Window:
    """Record and replay the micro-batches of a window, and restore the state that their passes change."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self.tensors = RunningTensors()
        self.in_second_pass = False
        self.clear()

    def clear(self) -> None:
        """Forget everything except which tensors change."""
        self.micro_batches: list[MicroBatch] = []
        self._found: Found | None = None
        self._on_parameters: set[tuple[int, str, int, int]] = set()
        self.tensors.forget()

    def record(self, inputs: Any, num_items_in_batch: torch.Tensor | int | None) -> MicroBatch:
        """Record a micro-batch before its first pass."""
        trainer, running = self._trainer, None
        if self._found is None or self.tensors.is_learning:  # in its first passes a loss may create objects
            self._found = Found(trainer)
        if not self.micro_batches:  # also after one that failed
            self._on_parameters = tensors_on_parameters(self._found.trained)
            running = self.tensors.start(self._found, trainer.state.global_step)
        snapshot, device = Snapshot(self._found, running), trainer.accelerator.device.type
        if running is None:
            snapshot.restorers += self.tensors.written()
        dtype, is_enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        autocast = functools.partial(torch.autocast, device, dtype, is_enabled)
        micro_batch = MicroBatch(copied(inputs), copied(num_items_in_batch), snapshot, autocast)
        self.micro_batches.append(micro_batch)
        return micro_batch

    def refuse_tensors_on_parameters(self) -> None:
        """Raise a NotImplementedError if the first pass wrote into tensors that are attributes of parameters."""
        if self._found is None or self._trainer.is_deepspeed_enabled:  # DeepSpeed keeps its own there
            return
        changed = tensors_on_parameters(self._found.trained) - self._on_parameters
        for parameter_id, attribute, *_ in changed:
            names = {id(parameter): name for name, parameter in self._trainer.model.named_parameters()}
            raise NotImplementedError(
                f"The backward pass writes into {names.get(parameter_id, 'a parameter')}.{attribute}, as hooks do "
                "that keep main_grad or per-sample gradients. The penalty changes .grad only. Use .grad. Keep what "
                "no optimizer uses in a dictionary of your own, `if not trainer.in_second_pass`. Or set gnp_alpha=0."
            )

    @contextlib.contextmanager
    def left_as_found(self) -> Iterator[None]:
        """Restore the state after the first pass on leaving. Call `tensors.end` before it."""
        if self._found is None or self.tensors.is_learning:  # the first passes may have created objects
            self._found = Found(self._trainer)
        after = Snapshot(self._found, self.tensors.after(self._found))
        try:
            with gradients_hidden(self._found.others):
                self.in_second_pass = True
                yield
        finally:
            self.in_second_pass = False
            after.put_back()

    def replayed(self) -> Iterator[MicroBatch]:
        """Yield the micro-batches again, each in the state of its first pass."""
        for micro_batch in tuple(self.micro_batches):
            micro_batch.snapshot.put_back()
            yield micro_batch
