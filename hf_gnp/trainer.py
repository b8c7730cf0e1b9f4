"""`GNPTrainer`: transformers' `Trainer` with a penalised step."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from .arguments import GNPArguments, update_arguments
from .engines import refuse_unsupported
from .momentum import check_optimizer_of, is_adaptive
from .perturbation import Perturbation
from .renamed_weights import load_renamed
from .run_card import add_to_model_card, remember_values
from .schedule import Schedule
from .sharpness import find_r, measure_sharpness
from .sharpness.callback import callbacks_know
from .step import PenalisedSteps, never_reached


logger = logging.get_logger(__name__)

NOT_FINITE = "the gradient is not finite; the weights stay as they are."

# For type checkers: the methods that the mixin calls are those of a subclass of Trainer.
_Base: Any = object
_documented_as: Callable[[Any], Callable[[Any], Any]] = functools.wraps


class GNPMixin(_Base):
    r"""
    Penalise the gradient norm of the loss in any subclass of [`~transformers.Trainer`]. The mixin comes first:

    ```python
    class GNPSeq2SeqTrainer(GNPMixin, Seq2SeqTrainer): ...
    ```

    An optimizer step runs every micro-batch of its window twice with the same dropout masks, at \\(\theta\\) and at
    \\(\theta + r\, g_1/\lVert g_1\rVert\\). It uses the gradient \\((1-\alpha)\, g_1 + \alpha\, g_2\\). \\(g_1\\)
    and \\(g_2\\) are the gradients of the global batch at these weights.

    `Trainer`'s logs gain `gnp_grad_norm` (\\(\lVert g_1\rVert\\)), `gnp_perturbed_loss`, `gnp_sharpness` (perturbed
    minus clean loss) and `gnp_cosine` (of \\(g_1\\) and \\(g_2\\), at logged steps only). Each is a mean over ranks
    and over the penalised steps since the last log. `gnp_r` and `gnp_alpha` are those of the last step. `gnp_on` is
    the share of penalised steps, and `gnp_fidelity` the part of the last move that survives rounding. `loss` is the
    clean loss.

    Attributes:
        in_second_pass: Whether the second pass runs now. Put code that must run once a step, such as logging in
            `compute_loss`, behind `if not self.in_second_pass`.

    Raises:
        ValueError: at construction, for an argument out of range or an optimizer that steps inside backward.
        NotImplementedError: at construction, for an engine on which the penalty would be wrong.
    """

    _gnp_run: PenalisedSteps | None = None
    _gnp_logs: dict[str, float] | None = None  # what `Trainer` logs next

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if Trainer in cls.__mro__ and cls.__mro__.index(Trainer) < cls.__mro__.index(GNPMixin):
            raise TypeError(
                f"{cls.__name__} would train without the penalty: GNPMixin comes before the trainer, as in "
                f"class {cls.__name__}(GNPMixin, {cls.__bases__[0].__name__})."
            )
        if GNPMixin in cls.__bases__ and "__init__" not in vars(cls):
            # Scripts inspect the signature of `__init__`: it gets that of the base.
            base: Any = next(base for base in cls.__mro__ if base is not GNPMixin and "__init__" in vars(base))

            @functools.wraps(base.__init__)
            def init(self: Any, *args: Any, **kwargs: Any) -> None:
                super(cls, self).__init__(*args, **kwargs)

            cls.__init__ = init  # type: ignore[method-assign]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gnp_own_args = GNPArguments()
        self._gnp_check()

    @property
    def gnp_args(self) -> GNPArguments:
        """Return the trainer's `args`, or the `gnp_*` arguments beside plain `TrainingArguments`."""
        return self.args if isinstance(self.args, GNPArguments) else self._gnp_own_args

    def _gnp_check(self) -> None:
        """Refuse gnp arguments out of range, and engines and optimizers that the penalty does not support."""
        update_arguments(self.gnp_args, self.args)
        perturbation = Perturbation.from_args(self.gnp_args, self.model)
        if self.gnp_args.gnp_alpha != 0:
            optimizer_cls = self.optimizer_cls_and_kwargs[0] if self.optimizer_cls_and_kwargs else None
            optimizer = self.optimizer or optimizer_cls
            refuse_unsupported(self.accelerator, self.args, optimizer, self.model, perturbation)
            if perturbation.is_momentum:
                check_optimizer_of(self)

    @property
    def in_second_pass(self) -> bool:
        return self._gnp_run is not None and self._gnp_run.window.in_second_pass

    @property
    def _gnp_perturbed_run(self) -> PenalisedSteps | None:
        """Return the present run, or one that failed, if its weights are perturbed."""
        return self._gnp_run if self._gnp_run is not None and self._gnp_run.engine.is_perturbed else None

    @_documented_as(Trainer.train)
    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self._gnp_run is not None:  # the last run ended at perturbed weights
            self._gnp_run.abandon()
            self._gnp_end_run()
            if self._gnp_run is not None:
                raise RuntimeError("Weights are still moved by a second pass that failed: load a checkpoint first.")
        try:
            with callbacks_know(self):
                result = super().train(*args, **kwargs)
            self._gnp_tell_dropped()
            if run := self._gnp_perturbed_run:  # after micro-batches without a step
                run.abandon()
            return result
        finally:
            self.is_in_train = False  # also after an exception, so that sharpness can be measured
            self._gnp_end_run()

    def _gnp_end_run(self) -> None:
        """Release the run and with it the model, unless its weights are perturbed."""
        if self._gnp_run is not None:
            self._gnp_run.close()
            self._gnp_run = self._gnp_perturbed_run

    @_documented_as(Trainer.hyperparameter_search)
    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        self._gnp_before_search = {n: v for n, v in vars(self.gnp_args).items() if n.startswith(("gnp_", "_gnp_"))}
        return super().hyperparameter_search(*args, **kwargs)

    def _hp_search_setup(self, trial: Any) -> None:
        # Trainer calls this at the beginning of each run. From here on its arguments are final.
        if trial is not None:  # transformers keeps the values of the last trial
            vars(self.gnp_args).update(getattr(self, "_gnp_before_search", {}))
        super()._hp_search_setup(trial)
        if trial is not None and self.gnp_args is not self.args:
            is_optuna = hasattr(trial, "params")
            update_arguments(self.gnp_args, self.hp_space(trial) if is_optuna else dict(trial))
        self._gnp_check()

    def _gnp_current_run(self, model: nn.Module) -> PenalisedSteps:
        """Return the steps of this call of `train`, made at its first step."""
        run = self._gnp_run
        if run is None or run.state is not self.state or run.model is not model:
            schedule = self._gnp_schedule()
            self._gnp_run = run = PenalisedSteps(self, model, schedule)
            warning = remember_values(self.state, self.gnp_args.gnp_values())
            if warning is not None:
                logger.warning(warning)
            if self.gnp_args.gnp_warmup_type == "auto":
                logger.info(f"gnp_warmup_type=auto: {schedule.warmup_type}, for {schedule.warmup_steps} steps.")
            elif schedule.warmup_type == "none" and schedule.warmup_steps > 0 and is_adaptive(self.optimizer):
                logger.warning(
                    "An adaptive optimizer with a learning-rate warm-up and no warm-up of the penalty: there the "
                    "penalty is known to harm (arXiv 2406.09723). Leave gnp_warmup_type at 'auto'."
                )
        elif run.step != self.state.global_step and run.values != self.gnp_args.gnp_values():
            run.schedule, run.values = self._gnp_schedule(), self.gnp_args.gnp_values()
        return run

    def _gnp_schedule(self) -> Schedule:
        self._gnp_check()  # a callback may have set arguments
        return Schedule.from_args(self.gnp_args, self.state.max_steps, self.args, is_adaptive(self.optimizer))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run the first pass of a micro-batch and, at the window's end, the second pass. Return the clean loss."""
        if self.gnp_args.gnp_alpha == 0 or not self.is_in_train:  # outside of `train` no optimizer step follows
            return super().training_step(model, inputs, num_items_in_batch)
        run = self._gnp_current_run(model)
        try:
            loss = run.first_pass(super().training_step, inputs, num_items_in_batch)
            if run.is_window_complete:
                run.end_window()
        except BaseException:
            run.abandon()
            raise
        return loss

    @_documented_as(Trainer.floating_point_ops)
    def floating_point_ops(self, inputs: dict[str, torch.Tensor | Any]) -> int:
        flops: int = super().floating_point_ops(inputs)
        if self._gnp_run is None or self.gnp_args.gnp_alpha == 0:
            return flops
        self._gnp_run.inputs = None  # the micro-batch has ended, and a loader may yield the same object again
        return flops * self._gnp_run.passes

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> Any:
        # Trainer calls this between clipping and the optimizer step on every engine, with the global norm.
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.gnp_args.gnp_alpha == 0:
            return grad_norm
        run = self._gnp_run
        if run is None or run.step != self.state.global_step:
            # A subclass may skip a whole step, which leaves no gradient. DeepSpeed has stepped already.
            if self.is_deepspeed_enabled or any(p.grad is not None for p in model.parameters()):
                raise NotImplementedError(never_reached(self))
            return grad_norm
        dropped = run.engine.drop_nonfinite_gradient(grad_norm)
        if isinstance(dropped, torch.Tensor):
            run.logs.dropped += dropped  # read from the device when Trainer logs
        elif dropped:
            logger.warning(f"Step {self.state.global_step}: {NOT_FINITE}")
        return grad_norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if run := self._gnp_perturbed_run:  # a callback has stopped within a window
            run.engine.restore()
        # Here, as it is a collective, and a subclass may call `log` on one rank, or after it has renamed its entries.
        if self.control.should_log and self._gnp_run is not None:
            self._gnp_tell_dropped()
            self._gnp_logs = self._gnp_run.logs.drain(self.accelerator)
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self._gnp_logs = None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._gnp_logs and (run := self._gnp_run) is not None:
            logs.update(self._gnp_logs)
            self._gnp_logs = None  # the evaluation logs next
            for hint in filter(None, (run.radius_hint.after(logs), run.logs.fidelity_hint(logs))):
                logger.warning(hint)
        super().log(logs, *args, **kwargs)

    def _gnp_tell_dropped(self) -> None:
        """Warn of the steps that the optimizer has skipped since the last log."""
        if self._gnp_run is not None and (dropped := int(self._gnp_run.logs.dropped)):
            logger.warning(f"{dropped} of the last steps, to step {self.state.global_step}: {NOT_FINITE}")

    measure_sharpness = measure_sharpness
    find_r = find_r

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save as [`~transformers.Trainer.save_model`] does, but refuse perturbed weights (of signal handlers)."""
        if self._gnp_perturbed_run:
            raise RuntimeError("The weights are perturbed by an unfinished second pass: nothing was saved.")
        super().save_model(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_model_card(os.path.join(self.args.output_dir, "README.md"), self.gnp_args.gnp_values())

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # sentence-transformers' trainers take the folder alone.
        loader = super()._load_from_checkpoint
        if not self._gnp_loads_renamed(*inspect.signature(loader).bind(*args, **kwargs).args):
            loader(*args, **kwargs)

    def _load_best_model(self) -> None:
        if not self._gnp_loads_renamed(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _gnp_loads_renamed(self, folder: str, model: nn.Module | None = None) -> bool:
        """Load a checkpoint that stock `Trainer` would load only in part. False: it is no such checkpoint."""
        # DeepSpeed and FSDP have their own checkpoints, under the model's names.
        if self.gnp_args.gnp_alpha == 0 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
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
        '    >>> args = GNPTrainingArguments(output_dir="out")\n'
        "    >>> GNPTrainer(model, args, train_dataset=train_dataset).train()\n"
        "    ```\n"
        f"{GNPMixin.__doc__}"
    )
