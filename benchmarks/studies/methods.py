"""What is compared: the penalty's arguments, and what they cost."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Method:
    """
    One way to train.

    α = 0 is stock `Trainer` bit for bit (tests/test_identity.py), so plain training runs through the same code.

    Args:
        gnp: `GNPArguments`.
        cost: Of a run, in those of plain training: passes of one forward and one backward.
        epochs: Times those of plain training.
        micro_batch: The per-device batch, m with `gnp_scope="micro_batch"`; the step's batch is accumulated from it.
        is_tuned: Whether `gnp_r` is chosen on seeds that are not reported.
    """

    gnp: dict[str, Any] = field(default_factory=lambda: {"gnp_alpha": 0.0})
    cost: float = 1.0
    epochs: int = 1
    micro_batch: int | None = None
    is_tuned: bool = False

    def with_r(self, r: float) -> "Method":
        return replace(self, gnp=self.gnp | {"gnp_r": r}, is_tuned=False)


def penalised(cost: float = 2.0, micro_batch: int | None = None, **gnp: Any) -> Method:
    """SAM (α = 1) with the library's own warm-up, and r to be chosen."""
    scope = {"gnp_scope": "micro_batch"} if micro_batch else {}
    return Method({"gnp_alpha": 1.0, **scope, **gnp}, cost, micro_batch=micro_batch, is_tuned=True)


PLAIN, TWICE = "plain", "plain, twice the epochs"
BASELINES = (PLAIN, TWICE)
METHODS = {
    PLAIN: Method(),
    TWICE: Method(cost=2.0, epochs=2),
    "m = 32": penalised(),
    "m = 8": penalised(micro_batch=8),
    "m = 4": penalised(micro_batch=4),
    "m = 8, every 2nd step": penalised(1.5, micro_batch=8, gnp_interval=2),
    # Of 8 of a step's 32 examples.
    "direction from a quarter": penalised(1.25, micro_batch=8, gnp_scope="step", gnp_ascent_fraction=0.25),
    "every 2nd step, reused": penalised(1.5, gnp_interval=2, gnp_reuse=True, gnp_alpha=0.5),
    "momentum": penalised(1.0, gnp_direction="momentum"),
    "m = 32, every 2nd step": penalised(1.5, gnp_interval=2),
    # Of batches of 128.
    "m = 128": penalised(),
    "m = 32 of 128": penalised(micro_batch=32),
    "m = 8, α = 0.8": penalised(micro_batch=8, gnp_alpha=0.8),
    "m = 8, no warm-up": penalised(micro_batch=8, gnp_warmup_type="none"),
}
