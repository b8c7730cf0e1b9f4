"""One penalised step: first pass, norm, perturbation, second pass, mix."""

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from .engines import make_engine
from .logs import RadiusHint, StepLogs, will_log
from .move import Move
from .own_backward import OwnBackward
from .perturbation import Perturbation
from .schedule import Penalty, Schedule
from .second_pass.probe import (
    is_called_by_training_step,
    is_same_pass,
    no_log,
    probe_same_forward,
    refuse_same_pass,
    replaced,
)
from .second_pass.window import MicroBatch, Window
from .signals import deferred_signals


logger = logging.get_logger(__name__)

UNCOPIED = (
    "Step {} was not penalised: a large buffer, frozen weight or tensor in an attribute changed in a pass, and there "
    "was no copy of it. From the next step on it is copied."
)


class PenalisedSteps:
    """Run the steps of one call of `train`, which makes a new trainer state and may wrap the model anew."""

    def __init__(self, trainer: Any, model: nn.Module, schedule: Schedule):
        self.trainer, self.model, self.state, self.schedule = trainer, model, trainer.state, schedule
        self.values = trainer.gnp_args.gnp_values()  # those of the schedule
        self.logs, self.radius_hint = StepLogs(), RadiusHint(trainer.gnp_args)
        self.window = Window(trainer)
        # Each window finds its targets: after an evaluation FSDP2's root has other parameter objects.
        perturbation = replace(Perturbation.from_args(trainer.gnp_args, trainer.model), targets=None)
        self.engine = make_engine(trainer.accelerator, model, perturbation, trainer.optimizer)
        self.move = Move(self.engine)
        self._momentum_move = contextlib.ExitStack()  # from compute_loss to the end of its backward
        self.own_backward = OwnBackward(self.engine, type(trainer).__name__, self._after_backward)
        self.step: int | None = None
        self.penalty: Penalty | None = None
        self._is_open = False  # whether a window has begun
        self._is_probed = False
        self._has_reached = False  # whether this micro-batch has reached `Trainer.training_step`
        self._has_ever_reached = False
        self.inputs: Any = None  # the micro-batch, until `Trainer.floating_point_ops`, which follows training_step
        self.passes = 1  # over each micro-batch of this window

    # The first pass.

    def first_pass(self, training_step: Callable[..., Any], inputs: Any, num_items_in_batch: Any) -> Any:
        """Run one micro-batch through the subclass's `training_step`, and record what the second pass needs."""
        self._begin_micro_batch(inputs)
        self._has_reached = False
        recorded = replaced(self.trainer, compute_loss=self._compute_loss)
        with self.engine.first_pass(), self._momentum_move, recorded:  # the move may have had no backward to end it
            loss = training_step(self.model, inputs, num_items_in_batch)
        self._has_ever_reached |= self._has_reached
        if not self._has_reached and self.own_backward.sees_other_gradient(self._has_ever_reached):
            raise NotImplementedError(never_reached(self.trainer))  # without a gradient the subclass skipped the batch
        if isinstance(loss, torch.Tensor):
            loss = loss.clone()  # CUDA graphs (torch_compile_mode="reduce-overhead") overwrite it in the next pass
        if self.window.micro_batches and self.window.micro_batches[-1].loss is None:
            del self.window.micro_batches[-1]  # a subclass caught an exception of this forward or backward
        return loss

    def _after_backward(self, loss: torch.Tensor) -> None:
        self._momentum_move.close()
        if self.window.micro_batches:  # of `Trainer.training_step`, whose loss a subclass may scale
            self.window.micro_batches[-1].loss = loss.detach().clone()
            if not self.is_window_complete:
                self.window.tensors.note()

    def _begin_micro_batch(self, inputs: Any) -> None:
        step = self.trainer.state.global_step
        if step != self.step:
            penalty = self.schedule.at(step)
            # A subclass skipped the last micro-batch of the step before. FSDP2 and DeepSpeed still have its gradient.
            if self._is_open and (self.penalty != penalty or self.own_backward.sees_other_gradient(True)):
                if self.window.micro_batches:
                    logger.warning(skipped_last(self.trainer, self.step))
                self.close()
            self.step, self.penalty = step, penalty
            self.noise_key = "noise", self.schedule.seed, step  # seeds stochastic rounding alike on all ranks
            self.logs.begin(penalty)
        if self._is_open and inputs is self.inputs:
            raise NotImplementedError(called_twice(self.trainer))
        if not self._is_open:
            self.engine.reshard()  # `gnp_target_modules` is a set of parameter objects
            perturbation = Perturbation()  # a plain step communicates as in plain training
            if self.penalty is not None:
                perturbation = Perturbation.from_args(self.trainer.gnp_args, self.trainer.model)
            self.engine.begin_window(perturbation, self.trainer.optimizer)
            self.close()
            if self.engine.is_perturbed:  # along the momentum, after micro-batches without a step
                self.engine.restore()
            is_twice = self.penalty and self.penalty.r * self.penalty.alpha > 0 and not perturbation.is_momentum
            self._is_open, self.passes = True, 2 if is_twice else 1
            self.own_backward.begin_window()
            if self.penalty is not None and perturbation.is_momentum:
                self.move.momentum_norm()  # the momentum does not change within a window
        self.inputs = inputs

    def _compute_loss(
        self, original: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not is_called_by_training_step():
            return original(model, inputs, *args, **kwargs)
        if self._has_reached:
            raise NotImplementedError(called_twice(self.trainer))
        self._has_reached = True
        if self.penalty is not None and self.engine.perturbation.is_momentum:
            self._momentum_move.enter_context(self._moved_along_momentum(self.penalty))
        if self.penalty is None or self.engine.perturbation.is_momentum:
            return original(model, inputs, *args, **kwargs)
        self.engine.reshard()  # after a forward without backward, such as one that generates
        micro_batch = self.window.record(inputs, kwargs.get("num_items_in_batch"))
        loss = original(model, inputs, *args, **kwargs)
        micro_batch.forward_loss = loss.detach().clone()
        return loss

    @contextlib.contextmanager
    def _moved_along_momentum(self, penalty: Penalty) -> Iterator[None]:
        """Perturb the weights for the only pass of a micro-batch, with `gnp_direction="momentum"`."""
        with deferred_signals():
            measure = will_log(self.trainer.args, self.state)
            with self.move.perturbed(penalty, self.noise_key, measure):
                yield
        if self.move.has_direction:
            self.logs.add(self.move.fidelity)

    # The second pass.

    @property
    def is_window_complete(self) -> bool:
        """Return whether a second pass follows now: after the last micro-batch of a step, or after each."""
        return self.trainer.accelerator.sync_gradients or self.engine.perturbation.is_per_micro_batch

    def end_window(self) -> None:
        """Make the second pass, if this step has a penalty. DeepSpeed steps here."""
        engine, is_end_of_step = self.engine, self.trainer.accelerator.sync_gradients
        with deferred_signals():
            self.own_backward.watching.close()
            if self.penalty is not None and self.window.micro_batches:  # momentum records no micro-batch
                self._second_pass(self.penalty)
            self.own_backward.add()
            if is_end_of_step:
                engine.finish()
            else:
                engine.hold_gradient()
        self.close()
        self.own_backward.after_window()

    def _second_pass(self, penalty: Penalty) -> None:
        """Run the window's micro-batches again at perturbed weights, and mix the gradients."""
        window, engine, move = self.window, self.engine, self.move
        self.own_backward.refuse_changes()
        window.refuse_tensors_on_parameters()
        # One read for both: each read waits for the device.
        norm, moved = move.gradient_norm(window.tensors.compare())
        if window.tensors.end(moved):
            logger.warning(UNCOPIED.format(self.step))
            return
        if norm == 0:
            self.own_backward.refuse_lone()
        windows = self.trainer.current_gradient_accumulation_steps if engine.perturbation.is_per_micro_batch else 1
        share = 1 / (windows or 1)  # of this window in the step
        if penalty.r * penalty.alpha == 0:  # a warm-up with gnp_normalize_gradient: g₂ is g₁
            if 0 < norm < math.inf:
                engine.scale_gradient((1 - penalty.alpha) * share / norm + penalty.alpha)
            return
        if not (move.has_direction or engine.perturbation.is_per_rank):  # another rank may have a direction
            return
        is_first, self._is_probed = not self._is_probed, True
        engine.reshard()  # the state after the first pass has the shards, not what a rank has gathered
        with window.left_as_found():
            if is_first:
                self._probe()
            measure = will_log(self.trainer.args, self.state)
            with move.perturbed(penalty, self.noise_key, measure, share):
                is_visible = is_first and move.moved_weights()
                losses = self._run_all_again()
        engine.mix(penalty.alpha)
        if is_visible and is_same_pass(window.micro_batches, losses):
            refuse_same_pass(*move.local_norms_after_mix(penalty.alpha))
        # Summed as `Trainer` sums them, in order and dtype.
        firsts = [micro_batch.loss for micro_batch in window.micro_batches]
        perturbed_loss, loss = (functools.reduce(operator.add, each) for each in (losses, firsts))
        metrics = {"grad_norm": norm, "perturbed_loss": perturbed_loss, "sharpness": perturbed_loss - loss}
        self.logs.add(move.fidelity, **metrics, cosine=move.cosine)

    def _run_all_again(self) -> list[torch.Tensor]:
        """Run the micro-batches again as prepared, without logs, and without a subclass's `training_step`."""
        trainer = self.trainer
        losses: list[torch.Tensor] = []
        for micro_batch in self.window.replayed():
            is_last = len(losses) + 1 == len(self.window.micro_batches)
            compute_loss = functools.partial(self._compute_loss_again, micro_batch)
            again = replaced(trainer, compute_loss=compute_loss, log=no_log, _prepare_inputs=lambda _, inputs: inputs)
            offload = getattr(trainer, "maybe_activation_offload_context", contextlib.nullcontext())  # TRL's
            with self.engine.replay(is_last), again, offload:
                items = micro_batch.num_items_in_batch
                loss = Trainer.training_step(trainer, self.model, micro_batch.inputs, items)
                losses.append(loss.clone())  # CUDA graphs overwrite it in the next pass
                self.engine.after_backward()
        return losses

    def _compute_loss_again(
        self, micro_batch: MicroBatch, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        # A backward inside compute_loss (adversarial inputs, a regulariser) counted in the first pass. A `zero_grad`
        # there would delete g₁.
        with self.engine.hidden_gradient(), micro_batch.autocast():
            return original(*args, **kwargs)

    def _probe(self) -> None:
        """Check that the window's first micro-batch gives the same loss again at θ."""
        engine, micro_batch = self.engine, next(self.window.replayed())
        with engine.sync_gradients_set(len(self.window.micro_batches) == 1), engine.hidden_gradient():
            probe_same_forward(self.trainer, self.model, micro_batch, engine.probed(), engine.computes_in_16_bit())

    # The end.

    def abandon(self) -> None:
        """Restore θ, drop the gradient and empty the window, after any exception."""
        with deferred_signals():
            self.close()
            self.engine.abandon()

    def close(self) -> None:
        """Forget everything of this window except its gradient."""
        self.engine.end_step()
        self.move.forget()
        self.window.clear()
        self.own_backward.clear()
        self._is_open, self.inputs = False, None


def never_reached(trainer: Any) -> str:
    overrides = (cls for cls in type(trainer).__mro__ if "training_step" in vars(cls))
    name = next(cls.__name__ for cls in overrides if not cls.__module__.startswith("hf_gnp."))
    return (
        f"{name}.training_step never reaches Trainer.training_step, whose loss the gradient-norm penalty runs again, "
        "so the penalty cannot be applied: call super().training_step(...) in it, or set gnp_alpha=0."
    )


def skipped_last(trainer: Any, step: int | None) -> str:
    return (
        f"Step {step} was not penalised: {type(trainer).__name__}.training_step skipped its last micro-batch, after "
        "which the second pass runs."
    )


def called_twice(trainer: Any) -> str:
    return (
        f"{type(trainer).__name__} calls training_step twice for one micro-batch, within an accumulation window: what "
        "changed between the calls (weights that an adversarial attack moved) would be gone in the second pass. Do so "
        "in a subclass of GNPTrainer, with gradient_accumulation_steps=1, or set gnp_alpha=0."
    )
