"""The parameters that move, and the metric of the move."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@dataclass(frozen=True)
class Perturbation:
    r"""
    Define the move e of the weights θ along a direction d, which is g₁ or minus the optimizer's first moment:

        "l2"         e = r d/‖d‖
        "layer"      e_l = r (‖θ_l‖/‖θ‖) d_l/‖d_l‖      for each tensor l, with ‖θ‖² = Σ ‖θ_l‖²
        "element"    e = r θ²d/‖θ ⊙ d‖

    Args:
        targets: The ids of the parameters that move. None: all.
        metric: One of `METRICS` in argument_checks.py. With "layer" a tensor with θ_l = 0 or d_l = 0 does not move,
            and does not count in ‖θ‖.
        normalize_gradient: Whether the step uses (1-α) g₁/‖g₁‖ + α g₂.
        scope: The examples that share one direction: one of `SCOPES` in argument_checks.py.
        is_momentum: Whether to move against the optimizer's first moment.
        stochastic_rounding: Whether to round 16-bit weights stochastically. "auto": if they have no fp32 master.

    Reference:
        "layer": as in LARS, and layer-wise ASAM of arXiv 2306.04226. "element": ASAM, arXiv 2102.11600.
    """

    targets: frozenset[int] | None = None
    metric: str = "l2"
    normalize_gradient: bool = False
    scope: str = "step"
    is_momentum: bool = False
    stochastic_rounding: bool | str = "auto"

    @classmethod
    def from_args(cls, args: Any, model: nn.Module) -> "Perturbation":
        return cls(
            targets=find_targets(model, args.gnp_target_modules),
            metric=args.gnp_metric,
            normalize_gradient=args.gnp_normalize_gradient,
            scope=args.gnp_scope,
            is_momentum=args.gnp_direction == "momentum",
            stochastic_rounding=args.gnp_stochastic_rounding,
        )

    @property
    def is_per_rank(self) -> bool:
        """Return whether each rank moves along its own gradient."""
        return self.scope in ("rank", "rank_micro_batch")

    @property
    def is_per_micro_batch(self) -> bool:
        """Return whether each micro-batch has its own direction and its own second pass."""
        return self.scope in ("micro_batch", "rank_micro_batch")

    def check_rounding(self, model: nn.Module) -> None:
        """Raise a ValueError if `stochastic_rounding` is True and no trainable weight has 16 bits."""
        if self.stochastic_rounding is not True:
            return
        if all(parameter.dtype.itemsize > 2 for parameter in model.parameters() if parameter.requires_grad):
            raise ValueError("gnp_stochastic_rounding=True is for 16-bit weights, and these are not: use 'auto'.")


def find_targets(model: nn.Module, spec: str | Sequence[str] | None) -> frozenset[int] | None:
    """
    Return the ids of the trainable parameters that `gnp_target_modules` names. None: all.

    Args:
        spec: "norm" for normalisation layers, or as in PEFT: a regular expression that matches a whole name, or a list
            of name endings. A name is that of a module or of a parameter.

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
    while "." in names[-1]:  # a module's name matches all its parameters
        names.append(names[-1].rpartition(".")[0])
    try:
        return any(name == pattern or name.endswith(f".{pattern}") or re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise ValueError(f"gnp_target_modules has a malformed regular expression {pattern!r}: {error}") from None
