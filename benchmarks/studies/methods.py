"""What is compared: the penalty's arguments, and what they cost."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Method:
    """
    One way to train.

    α = 0 is stock `Trainer` bit for bit (tests/step/test_identity.py), so plain training runs through the same code.

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


RAMP = {"gnp_warmup_type": "r", "gnp_warmup_steps": 0.5}


def penalised(cost: float = 2.0, micro_batch: int | None = None, **gnp: Any) -> Method:
    """SAM (α = 1) with the library's own warm-up, and r to be chosen."""
    scope = {"gnp_scope": "micro_batch"} if micro_batch else {}
    return Method({"gnp_alpha": 1.0, **scope, **gnp}, cost, micro_batch=micro_batch, is_tuned=True)


def default(metric: str, cost: float = 2.0, **gnp: Any) -> Method:
    """A candidate for the library's default: its α, in one of the metrics, with r to be chosen."""
    return penalised(cost, gnp_alpha=0.8, gnp_metric=metric, **gnp)


PLAIN, TWICE = "plain", "plain, twice the epochs"
BASELINES = (PLAIN, TWICE)
METHODS = {
    PLAIN: Method(),
    TWICE: Method(cost=2.0, epochs=2),
    "m = 32": penalised(),
    "m = 8": penalised(micro_batch=8),
    "m = 4": penalised(micro_batch=4),
    "m = 8, every 2nd step": penalised(1.5, micro_batch=8, gnp_interval=2),
    "momentum": penalised(1.0, gnp_direction="momentum"),
    "m = 32, every 2nd step": penalised(1.5, gnp_interval=2),
    # Of batches of 128.
    "m = 128": penalised(),
    "m = 32 of 128": penalised(micro_batch=32),
    "m = 8, α = 0.8": penalised(micro_batch=8, gnp_alpha=0.8),
    "m = 8, no warm-up": penalised(micro_batch=8, gnp_warmup_type="none"),
    # Candidates for the default. Late: the second half alone. Ramp: r rises over the first half.
    "l2": default("l2"),
    "layer": default("layer"),
    "l2, late": default("l2", 1.5, gnp_start=0.5),
    "layer, late": default("layer", 1.5, gnp_start=0.5),
    "l2, ramp": default("l2", **RAMP),
    "layer, ramp": default("layer", **RAMP),
    # At an r that is the same in all cases, as a default is.
    **{f"l2, r = {r}": default("l2").with_r(r) for r in (0.005, 0.05)},
    **{f"layer, r = {r}": default("layer").with_r(r) for r in (0.05, 0.1, 0.2)},
    "layer, r = 0.2, ramp": default("layer", **RAMP).with_r(0.2),
    "layer, r = 0.2, late": default("layer", 1.5, gnp_start=0.5).with_r(0.2),
}
