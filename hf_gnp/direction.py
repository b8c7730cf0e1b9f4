"""How weights are moved for the second pass: what stays the same at every step of a run."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@dataclass(frozen=True)
class Perturbation:
    """
    Args:
        targets: The ids of the parameters that are moved; None for all.
        adaptive: Move by r θ²g₁/‖θ ⊙ g₁‖ (ASAM).
        normalize_gradient: Mix (1-α) g₁/‖g₁‖ + α g₂.
        scope: The examples that share one direction, of `SCOPES`.
        ascent_fraction: The share of a step's micro-batches whose gradient gives the direction.
        is_momentum: Move against the optimizer's first moment: -r m/‖m‖.
        precondition: Move by r D⁻¹g₁/√(g₁ᵀD⁻¹g₁), with D = √v̂ + ε of the optimizer's second moment.
        stochastic_rounding: Whether a move of 16-bit weights is rounded stochastically; "auto": where they have no
            fp32 master.
    """

    targets: frozenset[int] | None = None
    adaptive: bool = False
    normalize_gradient: bool = False
    scope: str = "step"
    ascent_fraction: float = 1.0
    is_momentum: bool = False
    precondition: bool = False
    stochastic_rounding: bool | str = "auto"

    @classmethod
    def from_args(cls, args: Any, model: nn.Module) -> "Perturbation":
        return cls(
            targets=find_targets(model, args.gnp_target_modules),
            adaptive=args.gnp_adaptive,
            normalize_gradient=args.gnp_normalize_gradient,
            scope=args.gnp_scope,
            ascent_fraction=args.gnp_ascent_fraction,
            is_momentum=args.gnp_direction == "momentum",
            precondition=args.gnp_precondition,
            stochastic_rounding=args.gnp_stochastic_rounding,
        )

    @property
    def is_per_rank(self) -> bool:
        """Whether each rank moves along its own gradient."""
        return self.scope in ("rank", "rank_micro_batch")

    @property
    def is_per_micro_batch(self) -> bool:
        """Whether each micro-batch has a direction, and a second pass, of its own."""
        return self.scope in ("micro_batch", "rank_micro_batch")

    @property
    def is_plain(self) -> bool:
        """Whether all weights move along g₁ itself."""
        return self.targets is None and not self.adaptive and not self.precondition

    def of_plain_step(self) -> "Perturbation":
        """For a step without penalty, which communicates as a plain one."""
        return replace(self, scope="step", ascent_fraction=1.0, is_momentum=False)

    def first_passes(self, micro_batches: int) -> float:
        """How many of a window's micro-batches run at θ before the weights move: as many as come, if g₁ is whole."""
        if self.is_momentum:
            return 0
        return self._share_of(micro_batches) if self.ascent_fraction < 1 else math.inf

    def first_rows(self, rows: int) -> int:
        """How many rows of a window's only micro-batch run at θ."""
        return self._share_of(rows)

    def _share_of(self, count: int) -> int:
        return max(1, math.ceil(self.ascent_fraction * count - 1e-9))  # 0.7 * 10 is 7.000000000000001

    def moves(self, parameter: nn.Parameter) -> bool:
        return self.targets is None or id(parameter) in self.targets

    def check_rounding(self, model: nn.Module) -> None:
        """Raise a ValueError where stochastic rounding is asked for, and no weight is rounded."""
        trainable = (parameter for parameter in model.parameters() if parameter.requires_grad)
        if self.stochastic_rounding is True and all(parameter.dtype.itemsize > 2 for parameter in trainable):
            raise ValueError("gnp_stochastic_rounding=True is for 16-bit weights, and these are not: use 'auto'.")


def find_targets(model: nn.Module, spec: str | Sequence[str] | None) -> frozenset[int] | None:
    """
    The ids of the trainable parameters that `gnp_target_modules` names; None for all.

    Args:
        spec: "norm" for those of normalisation layers; else a regular expression that matches a whole name, or name
            endings, as PEFT has it. Names are those of modules or of parameters.

    Raises:
        ValueError: if nothing is matched, or the expression is malformed.
    """
    if spec is None:
        return None
    patterns = [spec] if isinstance(spec, str) else list(spec)
    targets = {
        id(parameter)
        for module_name, module in model.named_modules()
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False)
        if parameter.requires_grad and any(_matches(pattern, module_name, module, name) for pattern in patterns)
    }
    if not targets:
        raise ValueError(
            f"gnp_target_modules={spec!r} matches no trainable parameter: give a regular expression for the whole "
            'name, a list of name endings such as ["q_proj", "v_proj"], or "norm".'
        )
    return frozenset(targets)


def _matches(pattern: str, module_name: str, module: nn.Module, parameter_name: str) -> bool:
    if pattern == "norm":
        return isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | _NormBase) or bool(
            re.search("norm", type(module).__name__, re.IGNORECASE)
        )
    names = [parameter_name]
    while "." in names[-1]:  # a module's name matches for all that is in it
        names.append(names[-1].rpartition(".")[0])
    try:
        return any(name == pattern or name.endswith(f".{pattern}") or re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise ValueError(f"gnp_target_modules has a malformed regular expression {pattern!r}: {error}") from None
