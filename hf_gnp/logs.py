"""The `gnp_*` metrics of the steps between two logs, and the hint of another r."""

import math

import torch
from accelerate import Accelerator
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from .arguments import GNPArguments
from .schedule import Penalty


class StepLogs:
    """Sums the metrics of steps on the device. Nothing is read back until they are logged."""

    FIDELITY_FLOOR = 0.9  # the least share of the perturbation that may survive rounding without a hint

    def __init__(self) -> None:
        self._is_rounding_told = False
        self.reset()

    def reset(self) -> None:
        self.steps = self.penalised_steps = self._cosines = 0
        self.penalty: Penalty | None = None
        self._is_counted = False  # whether this step is among the penalised ones
        self._sums: dict[str, torch.Tensor | float] = {}
        self._fidelity: torch.Tensor | None = None  # this rank's (⟨θ̃-θ, e⟩, ‖e‖²) of the last move
        self.dropped: torch.Tensor | int = 0  # steps with a gradient that is not finite, counted on the device

    def begin(self, penalty: Penalty | None) -> None:
        """Begin a step, with the penalty that the schedule has for it."""
        self.steps += 1
        self.penalty, self._is_counted = penalty, False

    def add(self, fidelity: torch.Tensor | None, **metrics: torch.Tensor | float | None) -> None:
        """Add the metrics of a penalised step, or a micro-batch's shares of them if it has a direction of its own."""
        for name, value in metrics.items():
            if value is not None:
                self._sums[name] = self._sums.get(name, 0.0) + value
        self._cosines += metrics.get("cosine") is not None
        self._fidelity = self._fidelity if fidelity is None else fidelity
        self.penalised_steps += not self._is_counted
        self._is_counted = True

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the last step's penalty, and means over penalised steps and over ranks. A collective."""
        if self.steps == 0:
            return {}
        last = self.penalty or Penalty(0.0, 0.0)
        logs = {"gnp_r": last.r, "gnp_alpha": last.alpha, "gnp_on": self.penalised_steps / self.steps}
        if self._sums:
            sums = [torch.as_tensor(value).float().to(accelerator.device) for value in self._sums.values()]
            counts = [self._cosines if name == "cosine" else self.penalised_steps for name in self._sums]
            means = torch.stack(sums) / torch.tensor(counts, device=accelerator.device)
            means = accelerator.reduce(means, reduction="mean").tolist()
            logs |= {f"gnp_{name}": mean for name, mean in zip(self._sums, means, strict=True)}
        if self._fidelity is not None:
            kept, moved = accelerator.reduce(self._fidelity.to(accelerator.device), reduction="sum").tolist()
            if moved > 0:
                logs["gnp_fidelity"] = kept / moved
        self.reset()
        return logs

    def fidelity_hint(self, logs: dict[str, float]) -> str | None:
        """Return, once, a hint if rounding loses much of the perturbation."""
        if self._is_rounding_told or logs.get("gnp_fidelity", 1.0) >= self.FIDELITY_FLOOR:
            return None
        self._is_rounding_told = True
        return (
            f"Less than {self.FIDELITY_FLOOR:.0%} of the perturbation survives rounding to the weights' dtype "
            "(gnp_fidelity): raise gnp_r, set gnp_stochastic_rounding, or use fp32 weights and bf16=True."
        )


class RadiusHint:
    """
    Says once a run that r is too large, or that the default r changes little, after `LOGS` such logs in a row.

    A large rise of the loss is no sign: with clean labels the loss goes to 0, and such a rise did no harm.
    """

    LOGS = 3
    TURNED, STRAIGHT = 0.3, 0.98  # the cosine is below, or above
    # Targets of the suggested r: the cosine is find_r's limit, and at this rise a short fine-tune was not slowed down.
    COSINE, RISE_SHARE = 0.8, 0.3

    def __init__(self, args: GNPArguments):
        self.metric, self.default_r = args.gnp_metric, args.gnp_r if args.is_default("gnp_r") else None
        self._kinds: list[str] | None = []  # what each log says of r. None after the hint

    def after(self, logs: dict[str, float]) -> str | None:
        """Return the hint after a log with the `gnp_*` metrics, or None."""
        names = ("gnp_r", "gnp_cosine", "gnp_sharpness", "loss")
        r, cosine, rise, loss = (logs.get(name, math.nan) for name in names)
        if self._kinds is None or math.isnan(cosine) or logs["gnp_on"] == 0:
            return None
        is_small = r == self.default_r and cosine > self.STRAIGHT
        kind = "large" if cosine < self.TURNED else "small" if is_small else ""
        self._kinds = [*self._kinds[1 - self.LOGS :], kind]
        if kind == "" or self._kinds != [kind] * self.LOGS:
            return None
        self._kinds = None
        if is_small:
            return (
                f"gnp_r={r:g}, the default, changes little: the cosine of both gradients (gnp_cosine) is "
                f"{cosine:.3f}. If some labels are wrong, a larger gnp_r with gnp_metric={self.metric} may help: see "
                "trainer.find_r(), and compare accuracies on clean validation data."
            )
        shares = [math.acos(self.COSINE) / math.acos(max(cosine, -1.0))]
        if rise > 0 and loss > 0:
            shares.append(self.RISE_SHARE * loss / rise)
        return (
            f"gnp_r={r:g} is too large for this model: the cosine of both gradients (gnp_cosine) is {cosine:.2f}, and "
            f"the move raises the loss of {loss:.3g} by {rise:.3g} (gnp_sharpness). Try gnp_r={r * min(shares):.1g} "
            f"with gnp_metric={self.metric}, or trainer.find_r()."
        )


def will_log(args: TrainingArguments, state: TrainerState) -> bool:
    """Return whether `Trainer` will log at the end of this step, as far as its arguments tell."""
    step, interval = state.global_step + 1, state.logging_steps
    if args.logging_strategy == IntervalStrategy.NO:
        return False
    if args.logging_strategy == IntervalStrategy.EPOCH:
        epochs = state.num_train_epochs if args.max_steps > 0 else args.num_train_epochs  # the first is rounded up
        interval = max(1, round(state.max_steps / epochs))
    return step % interval == 0 or (step == 1 and args.logging_first_step)
