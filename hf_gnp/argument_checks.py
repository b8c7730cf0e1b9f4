"""The values that the `gnp_*` arguments may have, and the pairs that exclude each other."""

import math
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .arguments import GNPArguments


WARMUP_TYPES = ("auto", "none", "r", "lambda", "zero")
SCOPES = ("step", "micro_batch", "rank", "rank_micro_batch")
DIRECTIONS = ("gradient", "momentum")
METRICS = ("l2", "layer", "element")

CHOICES = {"gnp_warmup_type": WARMUP_TYPES, "gnp_scope": SCOPES, "gnp_direction": DIRECTIONS, "gnp_metric": METRICS}
HIGHEST = {"gnp_r": math.inf, "gnp_warmup_steps": math.inf, "gnp_interval": math.inf}
HIGHEST |= dict.fromkeys(("gnp_alpha", "gnp_start", "gnp_end", "gnp_probability"), 1.0)
FLAGS = {"gnp_normalize_gradient": ("true", "false"), "gnp_stochastic_rounding": ("true", "false", "auto")}


def check_values(args: "GNPArguments") -> None:
    """Check each argument by itself, and give it its type: command lines and YAML may have made it a string."""
    for name, choices in CHOICES.items():
        if getattr(args, name) not in choices:
            raise ValueError(f"{name} must be one of {choices}, but it is {getattr(args, name)!r}.")
    typed = vars(args)  # not by `setattr`, after which a default would count as the user's value
    for name, highest in HIGHEST.items():
        if name != "gnp_warmup_steps" or args.gnp_warmup_steps is not None:
            typed[name] = _number(name, getattr(args, name), highest)
    for name, words in FLAGS.items():
        word = str(getattr(args, name)).lower()
        if word not in words:
            raise ValueError(f"{name} must be {' or '.join(words)}, but it is {getattr(args, name)!r}.")
        typed[name] = {"true": True, "false": False}.get(word, word)
    if args.gnp_interval < 1 or args.gnp_interval != int(args.gnp_interval):
        raise ValueError(f"gnp_interval must be a whole number of steps, at least 1, but it is {args.gnp_interval}.")
    args.gnp_interval = int(args.gnp_interval)
    if args.gnp_probability == 0:
        raise ValueError("gnp_probability must be above 0, but it is 0: set gnp_alpha=0 for plain training.")
    modules: Any = args.gnp_target_modules
    is_list = isinstance(modules, list | tuple | set) and all(isinstance(name, str) for name in modules)
    if not (modules is None or isinstance(modules, str) or is_list):
        raise ValueError(f"gnp_target_modules must be a string or a list of strings, but it is {modules!r}.")
    if isinstance(modules, tuple | set):
        args.gnp_target_modules = sorted(modules)  # as JSON keeps it
    if modules is not None and not modules:
        raise ValueError("gnp_target_modules is empty: leave it out to move all parameters.")


def check_pairs(args: "GNPArguments") -> None:
    """Refuse arguments that exclude each other."""
    if args.gnp_r == 0 and args.gnp_alpha != 0:
        raise ValueError("gnp_r is 0, which moves nothing: set gnp_r > 0, or gnp_alpha=0 for plain training.")
    if args.gnp_warmup_type in ("auto", "none"):
        if args.gnp_warmup_steps is not None:
            raise ValueError("gnp_warmup_steps needs a gnp_warmup_type: r, lambda or zero.")
    elif args.gnp_warmup_steps is None and not getattr(args, "warmup_steps", True):
        raise ValueError(
            f"gnp_warmup_type={args.gnp_warmup_type} without a learning-rate warm-up (warmup_steps) to follow: "
            "set gnp_warmup_steps."
        )
    if args.gnp_start >= args.gnp_end:
        raise ValueError(f"gnp_start ({args.gnp_start}) of the run must come before gnp_end ({args.gnp_end}).")
    if args.gnp_interval > 1 and args.gnp_probability < 1:
        raise ValueError("gnp_interval and gnp_probability both thin out penalised steps: give one of the two.")
    if args.gnp_direction == "momentum":
        _check_momentum(args)


def _check_momentum(args: "GNPArguments") -> None:
    excluded = {
        f"gnp_scope={args.gnp_scope}": args.gnp_scope != "step",
        "gnp_normalize_gradient": args.gnp_normalize_gradient,
        "gnp_warmup_type=lambda": args.gnp_warmup_type == "lambda",
    }
    if others := [name for name, is_given in excluded.items() if is_given]:
        raise ValueError(
            "gnp_direction=momentum moves before there is a gradient, along one direction for the whole step: leave "
            f"out {' and '.join(others)}."
        )
    if args.gnp_alpha not in (0, 1):
        raise ValueError(
            "gnp_direction=momentum has one gradient, that of the moved weights, so gnp_alpha is 1 (or 0, for "
            f"plain training), but it is {args.gnp_alpha}: leave it out."
        )


def _number(name: str, value: Any, highest: float) -> float:
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not (math.isfinite(result) and 0 <= result <= highest):
        limit = "finite" if highest == math.inf else f"at most {highest:g}"
        raise ValueError(f"{name} must be a number, at least 0 and {limit}, but it is {value!r}.")
    return result
