"""`GNPTrainer`: transformers' `Trainer` with a penalised step."""

import functools
import inspect
import os
import re
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from .arguments import with_gnp_arguments
from .checkpoint import GNPStateCallback, add_to_model_card, load_renamed
from .direction import Perturbation
from .engines import Engine, make_engine, refuse_unsupported
from .metrics import StepMetrics
from .replay.buffers import RunningBuffers
from .replay.randomness import random_devices
from .replay.window import Window
from .schedule import Penalty, Schedule


logger = logging.get_logger(__name__)

# Of the perturbation, what should survive rounding.
FIDELITY_FLOOR = 0.9
# By class name: they divide by a running estimate of the gradient's size.
ADAPTIVE_OPTIMIZERS = "ada|lamb|rmsprop|prodigy|apollo|sophia"


class GNPMixin:
    r"""
    Penalises the gradient norm of the loss, in any subclass of [`~transformers.Trainer`]. It comes first:

    ```python
    class GNPSeq2SeqTrainer(GNPMixin, Seq2SeqTrainer): ...
    ```

    One optimizer step runs every micro-batch of its accumulation window twice, at \\(\theta\\) and at
    \\(\theta + r\, g_1/\lVert g_1\rVert\\), with the same dropout masks, and steps with
    \\((1-\alpha)\, g_1 + \alpha\, g_2\\). \\(g_1\\), its norm and the move are those of the whole global batch.

    `Trainer`'s logs gain `gnp_grad_norm` (\\(\lVert g_1\rVert\\)), `gnp_perturbed_loss`, and `gnp_sharpness`
    (perturbed minus clean loss): means over the penalised steps since the last log, and over ranks. `loss` is the
    clean loss of the first pass.

    Raises:
        ValueError: at construction, for an argument out of range or an optimizer that steps inside backward.
        NotImplementedError: at construction, for an engine on which the penalty would not be right.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.args = with_gnp_arguments(self.args)
        perturbation = Perturbation.from_args(self.args, self.model)
        if self.args.gnp_alpha > 0:
            optimizer_cls = self.optimizer_cls_and_kwargs[0] if self.optimizer_cls_and_kwargs else None
            refuse_unsupported(self.accelerator, self.args, self.optimizer or optimizer_cls, self.model, perturbation)
        self.add_callback(GNPStateCallback(**self.args.gnp_values()))
        self._gnp_run: _Run | None = None

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """
        The first pass of one micro-batch and, at the end of its accumulation window, the second pass of the window.

        Args and return value are those of [`~transformers.Trainer.training_step`]; the loss is the clean one.
        """
        run = self._gnp_current_run(model)
        run.begin_step(self.state.global_step)
        if run.penalty is None:
            return super().training_step(model, inputs, num_items_in_batch)

        engine, window = run.engine, run.window
        if not window.micro_batches:
            run.buffers.start()
        micro_batch = window.record(inputs, num_items_in_batch, self.current_gradient_accumulation_steps)
        with engine.first_pass():
            micro_batch.loss = loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.accelerator.sync_gradients:
            return loss

        norms = engine.gradient_norms()
        if engine.wants_second_pass():  # else the norm is 0 or not finite, and the step goes on as a plain one
            perturbed_loss = self._gnp_second_pass(model, run)
            run.metrics.add(norms.gradient, window.loss(), perturbed_loss)
        engine.finish()
        window.clear()
        return loss

    def _gnp_second_pass(self, model: nn.Module, run: "_Run") -> torch.Tensor:
        """Replay the window at the perturbed weights, mix the gradients, and return the perturbed loss."""
        engine, penalty = run.engine, run.penalty
        noise_seed = run.schedule.noise_seed(self.state.global_step)
        perturbed_loss = 0.0
        with (
            engine.perturbed(penalty.r, penalty.alpha, noise_seed, self._gnp_logs_this_step()) as fidelity,
            run.buffers.replay(),
            run.window.replay() as micro_batches,
        ):
            for micro_batch, is_last in micro_batches:
                self.current_gradient_accumulation_steps = micro_batch.accumulation_steps
                with engine.micro_batch(is_last):
                    perturbed_loss += super().training_step(model, micro_batch.inputs, micro_batch.num_items_in_batch)
                self.current_flos += float(self.floating_point_ops(micro_batch.inputs))
        engine.mix(penalty.alpha)
        if fidelity is not None:
            run.metrics.fidelity = fidelity.to(self.accelerator.device)
        return perturbed_loss

    def _gnp_logs_this_step(self) -> bool:
        """Whether `Trainer` will log when this step ends, as far as its arguments tell."""
        args, state = self.args, self.state
        if args.logging_strategy == IntervalStrategy.NO:
            return False
        if args.logging_first_step and state.global_step == 0:
            return True
        interval = state.logging_steps
        if args.logging_strategy == IntervalStrategy.EPOCH:
            interval = max(1, round(state.max_steps / state.num_train_epochs))
        return (state.global_step + 1) % interval == 0

    def _gnp_current_run(self, model: nn.Module) -> "_Run":
        """What belongs to this run of `train`: `Trainer` makes a new state, and may wrap the model anew, for each."""
        run = self._gnp_run
        if run is None or run.state is not self.state or run.model is not model:
            self._gnp_run = _Run(self, model)
        return self._gnp_run

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None):
        # Trainer calls this between clipping and the optimizer step, on every engine, and the norm is global.
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        run = self._gnp_run
        if run is not None and run.penalty is not None and run.engine.drop_nonfinite_gradient(grad_norm):
            logger.warning(f"Step {self.state.global_step}: the gradient is not finite; the weights stay as they are.")
        return grad_norm

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._gnp_run is not None:
            gnp_logs = self._gnp_run.metrics.drain(self.accelerator)
            logs.update(gnp_logs)
            if gnp_logs.get("gnp_fidelity", 1.0) < FIDELITY_FLOOR:
                self._gnp_run.warn_once(
                    f"Less than {FIDELITY_FLOOR:.0%} of the perturbation survives rounding to the weights' dtype "
                    "(gnp_fidelity): raise gnp_r, set gnp_stochastic_rounding, or use fp32 weights and bf16=True."
                )
        super().log(logs, *args, **kwargs)

    def save_model(self, *args, **kwargs) -> None:
        """Saves as [`~transformers.Trainer.save_model`] does, but never perturbed weights, as a signal handler may."""
        if self._gnp_run is not None and self._gnp_run.is_perturbed:
            raise RuntimeError("The weights are perturbed by an unfinished second pass: nothing was saved.")
        super().save_model(*args, **kwargs)

    def create_model_card(self, *args, **kwargs) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_model_card(os.path.join(self.args.output_dir, "README.md"), self.args.gnp_values())

    def _load_from_checkpoint(self, *args, **kwargs) -> None:
        # Passed on as it came: sentence-transformers' trainers take the folder alone.
        loader = super()._load_from_checkpoint
        if not self._gnp_loads_renamed(*inspect.signature(loader).bind(*args, **kwargs).args):
            loader(*args, **kwargs)

    def _load_best_model(self) -> None:
        if not self._gnp_loads_renamed(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _gnp_loads_renamed(self, folder: str, model: nn.Module | None = None) -> bool:
        """Load a checkpoint that stock `Trainer` would load only in part; False if there is nothing to do."""
        # DeepSpeed and FSDP keep checkpoints of their own, under the model's names.
        if _gnp_is_off(self) or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return False
        result = load_renamed(self.model if model is None else model, folder)
        if result is not None:
            self._issue_warnings_after_load(result)
        return result is not None


class GNPTrainer(GNPMixin, Trainer):
    __doc__ = (
        "[`~transformers.Trainer`] with a penalised gradient norm: replace the name, and nothing else.\n\n"
        "    Plain `TrainingArguments` get the `gnp_*` arguments at their defaults.\n\n"
        "    Example:\n\n"
        "    ```python\n"
        "    >>> from hf_gnp import GNPTrainer, GNPTrainingArguments\n\n"
        '    >>> args = GNPTrainingArguments(output_dir="out", gnp_r=0.05, gnp_alpha=0.8)\n'
        "    >>> GNPTrainer(model, args, train_dataset=train_dataset).train()\n"
        "    ```\n"
        f"{GNPMixin.__doc__}"
    )


class _Run:
    """What lives as long as one run of the training loop: it begins with a new state, and perhaps a new wrapping."""

    def __init__(self, trainer: GNPMixin, model: nn.Module):
        self.state, self.model, self.accelerator = trainer.state, model, trainer.accelerator
        # Anew: `model_init` has made another model since, and FSDP2 has replaced the parameters.
        self.perturbation = Perturbation.from_args(trainer.args, trainer.model)
        self.schedule = Schedule.from_args(trainer.args, trainer.state.max_steps)
        self.window = Window(random_devices(model, trainer.args.n_gpu), copy_inputs=_loss_is_user_code(trainer))
        self.buffers = RunningBuffers(model)
        self.metrics = StepMetrics()
        self.step: int | None = None
        self.penalty: Penalty | None = None
        self._warnings: set[str] = set()
        if _is_known_to_harm(trainer):
            self.warn_once(
                "An adaptive optimizer with a learning-rate warm-up and no warm-up of the penalty: there the penalty "
                "is known to harm (arXiv 2406.09723). Set gnp_warmup_type, to 'zero' for vision transformers."
            )

    def warn_once(self, message: str) -> None:
        if message not in self._warnings:
            self._warnings.add(message)
            logger.warning(message)

    def begin_step(self, step: int) -> None:
        """Called for each micro-batch of the step."""
        if step != self.step:
            self.step, self.penalty = step, self.schedule.at(step)
            if self.schedule.alpha > 0:
                self.metrics.begin(self.penalty)

    @functools.cached_property
    def engine(self) -> Engine:
        """Made for the first penalised step: plain training asks nothing of the engine."""
        return make_engine(self.accelerator, self.model, self.perturbation)

    @property
    def is_perturbed(self) -> bool:
        return "engine" in vars(self) and self.engine.is_perturbed


def _gnp_is_off(trainer: GNPMixin) -> bool:
    return trainer.args.gnp_alpha == 0


def _is_known_to_harm(trainer: GNPMixin) -> bool:
    args = trainer.args
    has_warmup = args.get_warmup_steps(trainer.state.max_steps) > 0
    if args.gnp_alpha == 0 or args.gnp_warmup_type != "none" or not has_warmup or trainer.optimizer is None:
        return False
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrappers
        optimizer = optimizer.optimizer
    return re.search(ADAPTIVE_OPTIMIZERS, type(optimizer).__name__, re.IGNORECASE) is not None


def _loss_is_user_code(trainer: Trainer) -> bool:
    """Whether inputs pass through a loss that is not transformers' own and may change them in place."""
    is_overridden = not type(trainer).compute_loss.__module__.startswith("transformers.")
    return is_overridden or trainer.compute_loss_func is not None
