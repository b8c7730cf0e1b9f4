"""A user's own calls of backward: gradients that are not of the window's loss, such as a regulariser's."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from .engines import Engine
from .second_pass import is_called_by_training_step, replaced


class OwnBackward:
    """
    Watches `accelerator.backward`. What a user's own call leaves is set aside before the window's next backward, and
    added to the step's gradient when its second pass is over. One process and DDP. Elsewhere it is refused.

    Attributes:
        losses: How many backward passes of `Trainer.training_step` have ended in this window.
    """

    def __init__(self, engine: Engine, accelerator: Any, trainer_name: str):
        self._engine, self._accelerator, self._trainer_name = engine, accelerator, trainer_name
        self._watching = contextlib.ExitStack()
        self.clear()

    def clear(self) -> None:
        """Forget all that belongs to a window."""
        self._watching.close()
        self._aside: list[Any] = []
        self._is_within = False  # whether a gradient came within compute_loss
        self._marks: Any = None  # of the gradient after the window's last backward
        self.losses = 0

    def begin_window(self) -> None:
        """Set aside what is there before the window's first backward, and watch from now on."""
        self._watching.close()
        self._watching.enter_context(replaced(self._accelerator, backward=self._backward))
        self._set_aside()

    def end_window(self) -> None:
        """Watch no more: the second pass begins."""
        self._watching.close()

    def after_window(self) -> None:
        """Watch on in the middle of a step, where the next window would not see what comes between."""
        if not self._accelerator.sync_gradients and not self._engine.sets_gradients_aside():
            self._watching.enter_context(replaced(self._accelerator, backward=self._backward))

    def _set_aside(self) -> bool:
        """Set aside what is there, and return whether there is anything."""
        if self._engine.hides_gradient():
            raise NotImplementedError(self._refusal())
        gradient = self._engine.take_gradient()
        if gradient:
            self._aside.append(gradient)
        return bool(gradient)

    def _backward(self, original: Callable[..., Any], loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        call = functools.partial(original, loss, *args, **kwargs)
        if not is_called_by_training_step():
            self._of_user(call)
            return
        if self._marks is None:
            self._is_within = self._set_aside()
        else:
            self.refuse_changes()
        call()
        self._engine.after_backward()
        self._marks = self._engine.gradient_marks()
        self.losses += 1

    def _of_user(self, call: Callable[[], None]) -> None:
        if not self._engine.sets_gradients_aside():
            raise NotImplementedError(self._refusal())
        if self._marks is None:
            call()  # it is set aside before the first backward of the window
            return
        ours = self._engine.take_gradient()
        call()
        self._aside.append(self._engine.take_gradient())
        self._engine.add_gradient(ours)
        self._marks = self._engine.gradient_marks()

    def refuse_changes(self) -> None:
        """
        Raises:
            RuntimeError: where somebody has changed the gradient since the window's last backward.
        """
        if self._marks is not None and self._marks != self._engine.gradient_marks():
            raise RuntimeError(
                "The gradient was changed between the micro-batches of a step, or before its second pass, by "
                "something other than the backward of the loss. It cannot be told from the gradient of the loss. To "
                "mask or scale gradients, use tensor hooks (parameter.register_hook) or the callback "
                "on_pre_optimizer_step. To add one, add the term to the loss or call backward through "
                "self.accelerator.backward. Or set gnp_alpha=0."
            )

    def sees_other_gradient(self, is_known_to_reach: bool) -> bool:
        """
        Whether there is a gradient that is neither set aside nor the window's own.

        Args:
            is_known_to_reach: What is assumed where it cannot be seen, as under DeepSpeed: that there is none.
        """
        marks = self._engine.gradient_marks()
        if marks is None:
            return not is_known_to_reach
        return marks != (self._marks or [])

    def refuse_lone(self) -> None:
        """
        Raises:
            NotImplementedError: where the loss gave no gradient, and all there is comes from the user's backward.
        """
        if self._is_within:
            raise NotImplementedError(
                f"The loss that {self._trainer_name}.compute_loss returned has no gradient: all gradients come from a "
                "backward inside compute_loss, as gradient caching does. The penalty cannot run that again. Return a "
                "loss with its graph, or set gnp_alpha=0."
            )

    def add(self) -> None:
        """Add what was set aside. A collective where ranks have each their own: all of them have called backward."""
        for gradient in self._aside:
            self._engine.add_gradient(gradient)
        self._aside = []

    def _refusal(self) -> str:
        return (
            f"{self._trainer_name} calls backward outside of Trainer.training_step. Under DeepSpeed, and under FSDP2 "
            "with gradient_accumulation_steps > 1, its gradient cannot be told from that of the loss: add the term to "
            "the loss in compute_loss, use DDP, or set gnp_alpha=0."
        )
