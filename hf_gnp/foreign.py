"""Gradients that are not of the window's loss: of a regulariser, or of an earlier call in the same step."""

from collections.abc import Callable
from typing import Any

from .engines import Engine


class ForeignGradient:
    """
    Set aside before the window's own backward, and added to the step's gradient when its second pass is over.

    Args:
        trainer_name: For what the errors say.
    """

    def __init__(self, engine: Engine, trainer_name: str):
        self.engine, self._trainer_name = engine, trainer_name
        self._aside: list[tuple[Any, bool]] = []  # with whether it is this rank's own
        self._marks: Any = None  # of the gradient after the window's last backward

    def set_aside(self) -> None:
        """What is there before the window's first backward is not the window's."""
        if self.engine.hides_gradient():
            raise NotImplementedError(self._refusal())
        if gradient := self.engine.take_gradient():
            self._aside.append((gradient, self.engine.is_unreduced()))

    def before_backward(self) -> None:
        if self._marks is None:
            self.set_aside()
        else:
            self.refuse()

    def after_backward(self) -> None:
        self._marks = self.engine.gradient_marks()

    def refuse(self) -> None:
        """
        Raises:
            RuntimeError: where somebody has added to the gradient since the window's last backward.
        """
        if self._marks is not None and self._marks != self.engine.gradient_marks():
            raise RuntimeError(
                "A gradient was added (or dropped) between the micro-batches of one step by something other than "
                "Trainer.training_step, and cannot be told from the gradient of the loss: call backward through "
                "self.accelerator.backward, add it to the loss, or set gnp_alpha=0."
            )

    def backward(self, call: Callable[[], None]) -> None:
        """A call of `accelerator.backward` by somebody else than `Trainer.training_step`."""
        if not self.engine.sets_gradients_aside():
            raise NotImplementedError(self._refusal())
        if self._marks is None:
            call()  # it is set aside before the first backward of the window
        else:
            ours = self.engine.take_gradient()
            call()
            self._aside.append((self.engine.take_gradient(), self.engine.is_unreduced()))
            self.engine.add_gradient(ours)
            self.after_backward()

    def add(self) -> None:
        """A collective, where ranks have each their own: all of them have called backward, as they have to in DDP."""
        for gradient, is_unreduced in self._aside:
            self.engine.add_gradient(self.engine.reduced(gradient) if is_unreduced else gradient)

    def _refusal(self) -> str:
        return (
            f"{self._trainer_name} calls backward outside of Trainer.training_step. Under DeepSpeed, and under FSDP2 "
            "with gradient_accumulation_steps > 1, its gradient cannot be told from that of the loss: add the term to "
            "the loss in compute_loss, use DDP, or set gnp_alpha=0."
        )

    def clear(self) -> None:
        self._aside, self._marks = [], None
