"""The penalty of each optimizer step of a run."""

import math
import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Penalty:
    """
    Hold the radius r and the share α of the second gradient for one optimizer step.

    r > 0 and 0 < α ≤ 1. Only in the first step of a warm-up with `gnp_normalize_gradient` one of them is 0.
    """

    r: float
    alpha: float


@dataclass(frozen=True)
class Schedule:
    """
    Decide the penalty of each optimizer step from its number alone: ranks agree, and resuming changes nothing.

    Args:
        total_steps: The number of optimizer steps of the whole run. `start` and `end` are fractions of it.
        warmup_steps: The number of steps in which r or α rises linearly from 0, or in which there is no penalty.
        is_normalized: Whether g₁ is normalised in the mix. If so, the first step of a warm-up is not a plain one. Its
            gradient is (1-α) g₁/‖g₁‖ + α g₁.
    """

    r: float
    alpha: float
    total_steps: int
    warmup_type: str = "none"
    warmup_steps: int = 0
    start: float = 0.0
    end: float = 1.0
    interval: int = 1
    probability: float = 1.0
    seed: int = 0
    is_normalized: bool = False

    @classmethod
    def from_args(cls, args: Any, total_steps: int, training_args: Any, is_adaptive: bool) -> "Schedule":
        """Return the schedule of a run. `training_args` gives the learning-rate warm-up and the seed."""
        warmup = args.gnp_warmup_steps
        if warmup is None:
            warmup_steps = training_args.get_warmup_steps(total_steps)
        else:
            warmup_steps = int(warmup) if warmup >= 1 else math.ceil(warmup * total_steps)
        warmup_type = args.gnp_warmup_type
        if warmup_type == "auto":  # arXiv 2406.09723
            warmup_type = "zero" if is_adaptive and warmup_steps > 0 else "none"
        names = ("r", "alpha", "start", "end", "interval", "probability")
        values = {name: getattr(args, f"gnp_{name}") for name in names}
        timing = {"total_steps": total_steps, "warmup_type": warmup_type, "warmup_steps": warmup_steps}
        return cls(**values, **timing, seed=training_args.seed, is_normalized=args.gnp_normalize_gradient)

    def at(self, step: int) -> Penalty | None:
        """Return the penalty of optimizer step `step`, counted from 0 (`state.global_step`). None: a plain step."""
        start, end = (round(share * self.total_steps, 6) for share in (self.start, self.end))  # 0.07 * 100 is above 7
        is_in_part = start <= step < end
        is_drawn = self.probability == 1 or random.Random(f"{self.seed}:{step}").random() < self.probability
        if not is_in_part or not is_drawn or (step + 1) % self.interval != 0:
            return None
        is_warm = self.warmup_type == "none" or step >= self.warmup_steps
        if is_warm:
            return Penalty(self.r, self.alpha)
        share = step / self.warmup_steps
        r = self.r * share if self.warmup_type == "r" else self.r
        alpha = self.alpha * share if self.warmup_type == "lambda" else self.alpha
        is_plain = self.warmup_type == "zero" or (r * alpha == 0 and not self.is_normalized)
        return None if is_plain else Penalty(r, alpha)
