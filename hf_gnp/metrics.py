"""The `gnp_*` metrics of the optimizer steps between two logs, and when there is one."""

import torch
from accelerate import Accelerator
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from .schedule import Penalty


class StepMetrics:
    """Sums over steps, kept on the device: nothing is read back until they are logged."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.steps, self.penalised_steps = 0, 0
        self.penalty: Penalty | None = None
        self._is_counted = False
        self._sums: dict[str, torch.Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self.fidelity: torch.Tensor | None = None
        self.dropped: torch.Tensor | int = 0  # steps whose gradient was not finite, counted on the device

    def begin(self, penalty: Penalty | None) -> None:
        """A step begins, with the penalty that the schedule has for it."""
        self.steps += 1
        self.penalty = penalty
        self._is_counted = False

    def add(
        self,
        grad_norm: float | None = None,
        perturbed_loss: torch.Tensor | None = None,
        sharpness: torch.Tensor | None = None,
    ) -> None:
        """
        A step was penalised, or one of its micro-batches that have a direction each: those of a step are summed. The
        loss of a micro-batch is its share of the step's, so the sums are means over micro-batches.

        Args:
            grad_norm: ‖g₁‖.
            perturbed_loss, sharpness: Detached scalars of this rank, summed over the micro-batches as `Trainer` sums
                the loss that it logs. None: the step has no such thing.
        """
        values = {"gnp_grad_norm": grad_norm, "gnp_perturbed_loss": perturbed_loss, "gnp_sharpness": sharpness}
        for name, value in values.items():
            if value is not None:
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + (not self._is_counted)
        self.penalised_steps += not self._is_counted
        self._is_counted = True

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """What to log: the penalty of the last step, and means over penalised steps and over ranks. A collective."""
        if self.steps == 0:
            return {}
        logs = {
            "gnp_r": self.penalty.r if self.penalty else 0.0,
            "gnp_alpha": self.penalty.alpha if self.penalty else 0.0,
            "gnp_on": self.penalised_steps / self.steps,
        }
        if self._sums:
            sums = [torch.as_tensor(value).float().to(accelerator.device) for value in self._sums.values()]
            counts = torch.tensor([self._counts[name] for name in self._sums], device=accelerator.device)
            means = accelerator.reduce(torch.stack(sums) / counts, reduction="mean").tolist()
            logs |= dict(zip(self._sums, means, strict=True))
        if self.fidelity is not None:
            kept, moved = accelerator.reduce(self.fidelity, reduction="sum").tolist()
            if moved > 0:
                logs["gnp_fidelity"] = kept / moved
        self.reset()
        return logs


def logs_after(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether `Trainer` will log when the step that now runs has ended, as far as its arguments tell."""
    if args.logging_strategy == IntervalStrategy.NO:
        return False
    if args.logging_first_step and state.global_step == 0:
        return True
    interval = state.logging_steps
    if args.logging_strategy == IntervalStrategy.EPOCH:
        interval = max(1, round(state.max_steps / state.num_train_epochs))
    return (state.global_step + 1) % interval == 0
