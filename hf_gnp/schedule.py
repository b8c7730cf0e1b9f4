"""Whether the penalty is on at an optimizer step, and with which r and α."""

import math
import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Penalty:
    """
    The penalty of one optimizer step: the radius r > 0 and the share 0 < α ≤ 1 of the second gradient.

    One of the two is 0 at the start of a warm-up with `gnp_normalize_gradient`, where g₂ is g₁.
    """

    r: float
    alpha: float


@dataclass(frozen=True)
class Schedule:
    """
    The penalty at each optimizer step of a run, a pure function of the step: the same on all ranks, and resuming
    changes nothing.

    Args:
        total_steps: The optimizer steps of the whole run, of which `start` and `end` are fractions.
        warmup_steps: During it r or α rises from 0 as the learning rate does, or there is no penalty.
        is_normalized: Whether g₁ is normalised in the mix. Then the first step of a warm-up of r or α is no plain
            step: it is (1-α) g₁/‖g₁‖ + α g₁, as in the authors' code.
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
    def from_args(
        cls, args: Any, total_steps: int, training_args: Any = None, is_adaptive: bool = False
    ) -> "Schedule":
        """
        Args:
            args: Those of the penalty.
            training_args: They have the learning-rate warm-up and the seed; None if `args` has them too.
            is_adaptive: Whether the optimizer divides by an estimate of the gradient's size, for the "auto" warm-up.
        """
        training_args = args if training_args is None else training_args
        warmup = args.gnp_warmup_steps
        if warmup is None:
            warmup_steps = training_args.get_warmup_steps(total_steps)
        else:
            warmup_steps = int(warmup) if warmup >= 1 else math.ceil(warmup * total_steps)
        warmup_type = args.gnp_warmup_type
        if warmup_type == "auto":  # arXiv 2406.09723
            warmup_type = "zero" if is_adaptive and warmup_steps > 0 else "none"
        return cls(
            r=args.gnp_r,
            alpha=args.gnp_alpha,
            total_steps=total_steps,
            warmup_type=warmup_type,
            warmup_steps=warmup_steps,
            start=args.gnp_start,
            end=args.gnp_end,
            interval=args.gnp_interval,
            probability=args.gnp_probability,
            seed=training_args.seed,
            is_normalized=args.gnp_normalize_gradient,
        )

    def at(self, step: int) -> Penalty | None:
        """Return the penalty of optimizer step `step`, counted from 0 (`state.global_step`). None: a plain step."""
        if not self.start * self.total_steps <= step < self.end * self.total_steps:
            return None
        if self.probability < 1:
            is_chosen = random.Random(f"{self.seed}:{step}").random() < self.probability
        else:
            is_chosen = (step + 1) % self.interval == 0
        if not is_chosen:
            return None
        warmth = min(1.0, step / self.warmup_steps) if self.warmup_type != "none" and self.warmup_steps > 0 else 1.0
        if self.warmup_type == "zero" and warmth < 1:
            return None
        r = self.r * warmth if self.warmup_type == "r" else self.r
        alpha = self.alpha * warmth if self.warmup_type == "lambda" else self.alpha
        is_on = (r > 0 and alpha > 0) or (self.is_normalized and warmth < 1)
        return Penalty(r, alpha) if is_on else None

    def noise_seed(self, step: int) -> int:
        """Return the seed for the noise of a step, equal on all ranks."""
        return random.Random(f"noise:{self.seed}:{step}").getrandbits(62)
