"""Whether the penalty is on at an optimizer step, and with which r and α."""

from dataclasses import dataclass

from .arguments import GNPArguments


@dataclass(frozen=True)
class Penalty:
    """The penalty of one optimizer step: the radius r > 0 and the share 0 < α ≤ 1 of the second gradient."""

    r: float
    alpha: float


@dataclass(frozen=True)
class Schedule:
    """The penalty at each optimizer step of a run, a pure function of the step: resuming changes nothing."""

    r: float
    alpha: float

    @classmethod
    def from_args(cls, args: GNPArguments) -> "Schedule":
        return cls(r=args.gnp_r, alpha=args.gnp_alpha)

    def at(self, step: int) -> Penalty | None:
        """The penalty of optimizer step `step` (`state.global_step` while it runs); None for a plain step."""
        if self.alpha == 0:
            return None
        return Penalty(self.r, self.alpha)
