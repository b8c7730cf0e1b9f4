"""Sharpness as a curve of the run."""

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback, TrainerState

from .sample import find_dataset


class SharpnessCallback(TrainerCallback):
    """
    Measure the sharpness during training, and log it as any metric: `sharpness_top_eigenvalue_1`, and so on.

    Args:
        every: The number of optimizer steps between measurements. A run that does not stop early ends with one too.
        options: Arguments of `measure_sharpness`.

    Example:

    ```python
    >>> GNPTrainer(model, args, train_dataset=train, eval_dataset=test, callbacks=[SharpnessCallback(every=100)])
    ```
    """

    def __init__(self, every: int = 100, **options: Any):
        if every < 1:
            raise ValueError(f"every is a number of steps, at least 1, but it is {every!r}.")
        self.every, self.options = every, options
        self._trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        find_dataset(self._known_trainer(), self.options.get("dataset"))  # raises an error where there is none

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._known_trainer().measure_sharpness(**self.options)

    def _known_trainer(self) -> Any:
        if self._trainer is None:
            raise RuntimeError(
                "SharpnessCallback needs a trainer with GNPMixin: use GNPTrainer (gnp_alpha=0 too), and add the "
                "callback before train."
            )
        return self._trainer


@contextlib.contextmanager
def callbacks_know(trainer: Any) -> Iterator[None]:
    """Give the trainer to the callbacks of this kind. transformers gives them the model alone."""
    known = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, SharpnessCallback)]
    try:
        for callback in known:
            callback._trainer = trainer
        yield
    finally:
        for callback in known:
            callback._trainer = None
