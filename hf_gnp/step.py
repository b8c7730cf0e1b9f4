"""One penalised step, out of engine, window, schedule and mix. It knows of the trainer what a window records."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .direction import Perturbation
from .engines import Engine, make_engine
from .interrupts import DeferredSignals
from .metrics import StepMetrics
from .replay.first_pass import is_called_by_training_step, replaced
from .replay.window import MicroBatch, Window, copied
from .schedule import Penalty, Schedule


# Of a loss, what may differ when the same forward runs again on an accelerator, whose kernels add in any order.
PROBE_TOLERANCE = 1e-3
PROBE_TOLERANCE_LOW = 5e-2  # in 16 bit

RunPass = Callable[[MicroBatch], torch.Tensor]


class PenalisedSteps:
    """
    The steps of one run of the training loop, which begins with a new state and perhaps a new wrapping of the model.

    Args:
        trainer: Of it, the accelerator, the state and what `Window` records are used.
        schedule: The penalty of each step.
    """

    def __init__(self, trainer: Any, model: nn.Module, schedule: Schedule):
        self.trainer, self.model, self.state = trainer, model, trainer.state
        self.schedule = schedule
        self.metrics = StepMetrics()
        self.window = Window(trainer, model)
        self.engine: Engine = make_engine(
            trainer.accelerator, model, Perturbation.from_args(trainer.gnp_args, trainer.model), trainer.optimizer
        )
        self.step: int | None = None
        self.penalty: Penalty | None = None
        self._is_probed = False
        self._hooks = contextlib.ExitStack()
        self._foreign: list[Any] = []
        self._marks: Any = None
        self._inputs: Any = None

    @property
    def is_perturbed(self) -> bool:
        return self.engine.is_perturbed

    def begin_micro_batch(self, step: int, inputs: Any) -> None:
        """Before the first pass of each micro-batch of the step, whose `inputs` are as the data loader gave them."""
        if step != self.step:
            if self.step is not None and self.window.micro_batches and self.penalty != self.schedule.at(step):
                self.close()
            self.step, self.penalty = step, self.schedule.at(step)
            self.metrics.begin(self.penalty)
        if not self.window.micro_batches:
            perturbation = Perturbation.from_args(self.trainer.gnp_args, self.trainer.model)
            # A step without penalty communicates as a plain one.
            self.engine.begin_window(perturbation if self.penalty else replace(perturbation, scope="step"))
            self.close()
            self._hooks.enter_context(replaced(self.trainer.accelerator, backward=self._backward))
            self._set_foreign_gradient_aside()
        elif inputs is self._inputs:
            raise NotImplementedError(
                f"{type(self.trainer).__name__} calls training_step twice for one micro-batch, in the middle of an "
                "accumulation window: what changed between the calls (weights that an adversarial attack moved) would "
                "be gone in the second pass. Set gradient_accumulation_steps=1, or gnp_alpha=0."
            )
        self._inputs = inputs

    # The first pass.

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        """Around a subclass's `training_step`: what `Trainer.training_step` computes in it is recorded."""
        recorded = len(self.window.micro_batches)
        with self.engine.first_pass(), replaced(self.trainer, compute_loss=self._compute_loss):
            yield
        if len(self.window.micro_batches) == recorded:
            raise NotImplementedError(never_reached(self.trainer))
        self._refuse_foreign_gradient()

    def _compute_loss(self, original: Callable, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_called_by_training_step():
            return original(model, inputs, *args, **kwargs)
        steps = self.trainer.current_gradient_accumulation_steps
        micro_batch = self.window.record(inputs, kwargs.get("num_items_in_batch"), steps)
        loss = original(model, inputs, *args, **kwargs)
        micro_batch.forward_loss = loss.detach().clone()
        return loss

    def _backward(self, original: Callable, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if is_called_by_training_step():
            if self._marks is None:
                self._set_foreign_gradient_aside()
            else:
                self._refuse_foreign_gradient()
            original(loss, *args, **kwargs)
            self._marks = self.engine.gradient_marks()
        elif not self.engine.sets_gradients_aside:
            raise NotImplementedError(
                f"{type(self.trainer).__name__} calls accelerator.backward outside of Trainer.training_step. Under "
                "ZeRO-1 to 3 its gradient cannot be told from that of the loss: add the term to the loss in "
                "compute_loss, use DDP or FSDP2, or set gnp_alpha=0."
            )
        elif self._marks is None:
            original(loss, *args, **kwargs)  # it is set aside before the first backward of the window
        else:
            ours = self.engine.take_gradient()
            original(loss, *args, **kwargs)
            self._foreign.append(self.engine.take_gradient())
            self.engine.add_gradient(ours)
            self._marks = self.engine.gradient_marks()

    def _set_foreign_gradient_aside(self) -> None:
        # Not of this window's loss: of an earlier micro-batch with a direction of its own, of an earlier call for this
        # step, or of a regulariser with a backward of its own.
        gradient = self.engine.take_gradient()
        if gradient:
            self._foreign.append(gradient)

    def _refuse_foreign_gradient(self) -> None:
        if self._marks is not None and self._marks != self.engine.gradient_marks():
            raise RuntimeError(
                "A gradient was added between the micro-batches of one step by something other than "
                "Trainer.training_step, and cannot be told from the gradient of the loss: call backward through "
                "self.accelerator.backward, add it to the loss, or set gnp_alpha=0."
            )

    # The end of the window.

    @property
    def is_end_of_window(self) -> bool:
        """Whether a second pass follows now: on the last micro-batch of a step, or on each."""
        return self.trainer.accelerator.sync_gradients or self.engine.perturbation.is_per_micro_batch

    def end_window(self, run_pass: RunPass, noise_seed: int, measure: bool) -> None:
        """
        The second pass, if there is a penalty and a direction. If the step ends too, that of engines that step in
        backward; else the gradient is held for the rest of the step.
        """
        engine, penalty = self.engine, self.penalty
        self._hooks.close()
        with DeferredSignals():
            if penalty is not None:
                norms = engine.gradient_norms()
                if engine.wants_second_pass():  # else the norm is 0 or not finite: the step goes on as a plain one
                    with self.window.kept():
                        self._probe()
                        perturbed_loss = self._second_pass(run_pass, penalty, noise_seed, measure)
                    engine.mix(penalty.alpha)
                    self.metrics.add(norms.gradient, self.window.loss(), perturbed_loss)
            for gradient in self._foreign:
                engine.add_gradient(gradient)
            if self.trainer.accelerator.sync_gradients:
                engine.finish()
            else:
                engine.hold_gradient()
        self.close()

    def _second_pass(self, run_pass: RunPass, penalty: Penalty, noise_seed: int, measure: bool) -> torch.Tensor:
        perturbed_loss = 0.0
        with self.engine.perturbed(penalty.r, penalty.alpha, noise_seed, measure) as fidelity:
            for micro_batch, is_last in self.window.replayed():
                with self.engine.micro_batch(is_last):
                    perturbed_loss += run_pass(micro_batch)
        if fidelity is not None:
            self.metrics.fidelity = fidelity.to(self.trainer.accelerator.device)
        return perturbed_loss

    def _probe(self) -> None:
        """Once a run: the window's first micro-batch again at θ must give the loss that it gave."""
        if self._is_probed:
            return
        self._is_probed = True
        trainer = self.trainer
        micro_batch, _ = next(self.window.replayed())
        inputs = copied(micro_batch.inputs)
        with self.engine.probed(), replaced(trainer, log=_not_logged), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(self.model, inputs, num_items_in_batch=micro_batch.num_items_in_batch)
        loss, expected = loss.detach().double(), micro_batch.forward_loss.double()
        if not _is_same(loss, expected, micro_batch.forward_loss.device.type, self._tolerance()):
            raise RuntimeError(
                f"The loss of a micro-batch was {expected.mean().item()} and is {loss.mean().item()} when it is run "
                "again at the same weights, with the same inputs, random numbers, buffers and Python state: something "
                "else moves between two forwards, and the second pass of the gradient-norm penalty would see another "
                f"loss than the first. Look in {type(trainer).__name__}.compute_loss and in the model's forward for "
                "state outside their attributes (globals, class attributes, files, a generator of another library), "
                "keep it in an attribute of the model or of the trainer, or set gnp_alpha=0."
            )

    def _tolerance(self) -> float:
        dtypes = {p.dtype for p in self.engine_parameters()}
        is_low = any(dtype.itemsize <= 2 for dtype in dtypes) or self.engine.computes_in_16_bit()
        return PROBE_TOLERANCE_LOW if is_low else PROBE_TOLERANCE

    def engine_parameters(self) -> Iterator[nn.Parameter]:
        return (p for p in self.model.parameters() if p.requires_grad)

    def abandon(self) -> None:
        """After any exception in a step: clean weights, no gradient, an empty window."""
        with DeferredSignals():
            self.close()
            self.engine.abandon()

    def close(self) -> None:
        """Forget all that belongs to one window, but the gradient."""
        self._hooks.close()
        self.window.clear()
        self._foreign, self._marks, self._inputs = [], None, None


def _is_same(loss: torch.Tensor, expected: torch.Tensor, device_type: str, tolerance: float) -> bool:
    if device_type == "cpu":
        return torch.equal(loss, expected) or (loss.isnan() & expected.isnan()).all().item()
    return torch.allclose(loss, expected, rtol=tolerance, atol=tolerance * 1e-3, equal_nan=True)


def _not_logged(original: Callable, *args: Any, **kwargs: Any) -> None:
    """In place of `log` where only the gradient of a pass is to stay."""


def replayed_step(trainer: Any) -> contextlib.AbstractContextManager:
    """Around `Trainer.training_step` in a second pass: inputs are prepared already, and nothing is logged twice."""
    return replaced(trainer, _prepare_inputs=lambda original, inputs: inputs, log=_not_logged)


def never_reached(trainer: Any) -> str:
    name = next(cls.__name__ for cls in type(trainer).__mro__ if _overrides_step(cls))
    return (
        f"{name}.training_step never reaches Trainer.training_step, whose loss the gradient-norm penalty runs again, "
        "so the penalty cannot be applied: call super().training_step(...) in it, or set gnp_alpha=0."
    )


def _overrides_step(cls: type) -> bool:
    return "training_step" in vars(cls) and not cls.__module__.startswith("hf_gnp.")
