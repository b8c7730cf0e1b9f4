"""A user's own calls of backward: gradients that are not of the window's loss, such as a regulariser's."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from .engines.engine import OTHER_BACKWARD, Engine
from .second_pass.probe import is_called_by_training_step, replaced


class OwnBackward:
    """
    Watch `accelerator.backward`. Set the gradient of a user's own call aside before the next backward of the window,
    and add it to the gradient of the step after the second pass. Engines without `sets_gradients_aside` refuse it.

    Where each micro-batch has its own direction, the mixed gradient of the step's earlier ones is set aside likewise.
    """

    def __init__(self, engine: Engine, trainer_name: str, after_backward: Callable[[torch.Tensor], None]):
        self._engine, self._accelerator, self._trainer_name = engine, engine.accelerator, trainer_name
        self._after_backward = after_backward  # called with the loss after each backward of the window's loss
        self.watching = contextlib.ExitStack()
        self.clear()

    def clear(self) -> None:
        self.watching.close()
        self._aside: list[Any] = []
        self._is_within = False  # whether a backward inside compute_loss made a gradient
        self._marks: Any = None  # the gradient's marks after the window's last backward

    def begin_window(self) -> None:
        """Start watching, and set aside the gradient that exists before the window."""
        self.watching.enter_context(replaced(self._accelerator, backward=self._backward))
        self._set_aside()

    def after_window(self) -> None:
        """Keep watching within a step, to refuse a backward whose gradient the next window cannot set aside."""
        if not self._accelerator.sync_gradients and not self._engine.sets_gradients_aside():
            self.watching.enter_context(replaced(self._accelerator, backward=self._backward))

    def _set_aside(self) -> bool:
        """Set the present gradient aside, and return whether there was one."""
        gradient = self._engine.take_gradient()
        if gradient:
            self._aside.append(gradient)
        return bool(gradient)

    def _backward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        engine, is_first = self._engine, self._marks is None
        if is_called_by_training_step():
            if is_first:
                self._is_within = self._set_aside()
            self.refuse_changes()
            original(*args, **kwargs)
            engine.after_backward()
            self._after_backward(*args)
        elif not engine.sets_gradients_aside():
            raise NotImplementedError(OTHER_BACKWARD)
        else:
            ours = None if is_first else engine.take_gradient()
            original(*args, **kwargs)
            if is_first:  # the window's first backward sets the gradient aside
                return
            self._aside.append(engine.take_gradient())
            engine.add_gradient(ours)
        self._marks = engine.gradient_marks()

    def refuse_changes(self) -> None:
        """Raise a RuntimeError if the gradient has changed since the window's last backward."""
        if self._marks is not None and self._marks != self._engine.gradient_marks():
            raise RuntimeError(
                "The gradient was changed between the micro-batches of a step, or before its second pass, by "
                "something other than the backward of the loss. It cannot be told from the gradient of the loss. To "
                "mask or scale gradients, use tensor hooks (parameter.register_hook) or the callback "
                "on_pre_optimizer_step. To add one, add the term to the loss or call backward through "
                "self.accelerator.backward. Or set gnp_alpha=0."
            )

    def sees_other_gradient(self, is_known_to_reach: bool) -> bool:
        """Return whether there is a gradient besides the window's own and those that were set aside."""
        marks = self._engine.gradient_marks()
        # DeepSpeed has no marks. There, none is assumed once a micro-batch has reached `Trainer.training_step`.
        return not is_known_to_reach if marks is None else marks != (self._marks or [])

    def refuse_lone(self) -> None:
        """Raise a NotImplementedError if only a backward inside compute_loss gave a gradient, and the loss none."""
        if self._is_within:
            raise NotImplementedError(
                f"The loss that {self._trainer_name}.compute_loss returned has no gradient: all gradients come from a "
                "backward inside compute_loss, as gradient caching does. The penalty cannot run that again. Return a "
                "loss with its graph, or set gnp_alpha=0."
            )

    def add(self) -> None:
        """Add the gradients that were set aside."""
        for gradient in self._aside:
            self._engine.add_gradient(gradient)
        self._aside = []
