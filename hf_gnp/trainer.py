"""`GNPTrainer`: transformers' `Trainer` with a penalised step."""

import functools
import logging
import math
import os
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .arguments import with_gnp_arguments
from .checkpoint import GNPStateCallback, add_to_model_card, has_renamed_keys, load_renamed
from .engines import Engine, make_engine, refuse_unsupported
from .metrics import StepMetrics
from .replay import RunningStatistics, Window, random_devices
from .schedule import Penalty, Schedule


logger = logging.getLogger(__name__)


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
        if self.args.gnp_alpha > 0:
            optimizer_cls = self.optimizer_cls_and_kwargs[0] if self.optimizer_cls_and_kwargs else None
            refuse_unsupported(self.accelerator, self.args, self.optimizer or optimizer_cls, self.model)
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
        run.penalty = run.schedule.at(self.state.global_step)
        if run.penalty is None:
            return super().training_step(model, inputs, num_items_in_batch)

        engine, window = run.engine, run.window
        if not window.micro_batches:
            run.statistics.start()
        micro_batch = window.record(inputs, num_items_in_batch, self.current_gradient_accumulation_steps)
        with engine.first_pass():
            micro_batch.loss = loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.accelerator.sync_gradients:
            return loss

        grad_norm = engine.gradient_norm()
        if 0 < grad_norm < math.inf:  # else the step goes on as it would have without a penalty
            perturbed_loss = self._gnp_second_pass(model, run)
            run.metrics.add(grad_norm, window.loss(), perturbed_loss)
        engine.finish()
        window.clear()
        return loss

    def _gnp_second_pass(self, model: nn.Module, run: "_Run") -> torch.Tensor:
        """Replay the window at the perturbed weights, mix the gradients, and return the perturbed loss."""
        engine, penalty = run.engine, run.penalty
        perturbed_loss = 0.0
        with (
            engine.perturbed(penalty.r, penalty.alpha),
            run.statistics.frozen(),
            run.window.replay() as micro_batches,
        ):
            for micro_batch, is_last in micro_batches:
                self.current_gradient_accumulation_steps = micro_batch.accumulation_steps
                with engine.micro_batch(is_last):
                    perturbed_loss += super().training_step(model, micro_batch.inputs, micro_batch.num_items_in_batch)
                self.current_flos += float(self.floating_point_ops(micro_batch.inputs))
        engine.mix(penalty.alpha)
        return perturbed_loss

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
            logs.update(self._gnp_run.metrics.drain(self.accelerator))
        super().log(logs, *args, **kwargs)

    def save_model(self, *args, **kwargs) -> None:
        """Saves as [`~transformers.Trainer.save_model`] does, and never perturbed weights, as a signal handler might."""
        if self._gnp_run is not None and self._gnp_run.is_perturbed:
            raise RuntimeError("The weights are perturbed by an unfinished second pass: nothing was saved.")
        super().save_model(*args, **kwargs)

    def create_model_card(self, *args, **kwargs) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_model_card(os.path.join(self.args.output_dir, "README.md"), self.args.gnp_values())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        if self._gnp_loads_renamed(target, resume_from_checkpoint):
            self._issue_warnings_after_load(load_renamed(target, resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._gnp_loads_renamed(self.model, self.state.best_model_checkpoint):
            self._issue_warnings_after_load(load_renamed(self.model, self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _gnp_loads_renamed(self, model: nn.Module, folder: str) -> bool:
        # DeepSpeed and FSDP keep checkpoints of their own, under the model's names.
        return not self.is_deepspeed_enabled and not self.is_fsdp_enabled and has_renamed_keys(model, folder)


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
    """The parts of the penalised step that live as long as one run of the training loop."""

    def __init__(self, trainer: GNPMixin, model: nn.Module):
        self.state, self.model, self.accelerator = trainer.state, model, trainer.accelerator
        self.schedule = Schedule.from_args(trainer.args)
        self.window = Window(random_devices(model, trainer.args.n_gpu), copy_inputs=_loss_is_user_code(trainer))
        self.statistics = RunningStatistics(model)
        self.metrics = StepMetrics()
        self.penalty: Penalty | None = None

    @functools.cached_property
    def engine(self) -> Engine:
        """Made for the first penalised step: plain training asks nothing of the engine."""
        return make_engine(self.accelerator, self.model)

    @property
    def is_perturbed(self) -> bool:
        return "engine" in vars(self) and self.engine.is_perturbed


def _loss_is_user_code(trainer: Trainer) -> bool:
    """Whether inputs pass through a loss that is not transformers' own and may change them in place."""
    is_overridden = not type(trainer).compute_loss.__module__.startswith("transformers.")
    return is_overridden or trainer.compute_loss_func is not None
