"""
Which values the `gnp_*` arguments may have, and which of them exclude each other. What is right is left as the type
that it should have; for what is not, a ValueError names the argument.
"""

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .arguments import GNPArguments


WARMUP_TYPES = ("auto", "none", "r", "lambda", "zero")
SCOPES = ("step", "micro_batch", "rank", "rank_micro_batch")
DIRECTIONS = ("gradient", "momentum")
METRICS = ("l2", "layer", "element")


def check_schedule(args: "GNPArguments") -> None:
    """Ranges, and what the warm-up needs."""
    if args.gnp_warmup_type not in WARMUP_TYPES:
        raise ValueError(f"gnp_warmup_type must be one of {WARMUP_TYPES}, but it is {args.gnp_warmup_type!r}.")
    if args.gnp_warmup_steps is not None:
        args.gnp_warmup_steps = number("gnp_warmup_steps", args.gnp_warmup_steps)
        if args.gnp_warmup_type in ("auto", "none"):
            raise ValueError("gnp_warmup_steps needs a gnp_warmup_type: r, lambda or zero.")
    elif args.gnp_warmup_type not in ("auto", "none") and not getattr(args, "warmup_steps", True):
        raise ValueError(
            f"gnp_warmup_type={args.gnp_warmup_type} without a learning-rate warm-up (warmup_steps) to follow: "
            "set gnp_warmup_steps."
        )
    args.gnp_start, args.gnp_end = number("gnp_start", args.gnp_start), number("gnp_end", args.gnp_end)
    if not args.gnp_start < args.gnp_end <= 1:
        raise ValueError(
            f"gnp_start ({args.gnp_start}) and gnp_end ({args.gnp_end}) are fractions of the run: "
            "0 <= gnp_start < gnp_end <= 1."
        )
    interval = number("gnp_interval", args.gnp_interval)
    if interval < 1 or interval != int(interval):
        raise ValueError(f"gnp_interval must be a whole number of steps, at least 1, but it is {interval}.")
    args.gnp_interval = int(interval)
    args.gnp_probability = number("gnp_probability", args.gnp_probability)
    if not 0 < args.gnp_probability <= 1:
        raise ValueError(
            f"gnp_probability must be above 0 and at most 1, but it is {args.gnp_probability}; "
            "set gnp_alpha=0 for plain training."
        )
    if args.gnp_interval > 1 and args.gnp_probability < 1:
        raise ValueError("gnp_interval and gnp_probability both thin out penalised steps: give one of the two.")


def check_perturbation(args: "GNPArguments") -> None:
    """Names, ranges, and true or false."""
    if args.gnp_scope not in SCOPES:
        raise ValueError(f"gnp_scope must be one of {SCOPES}, but it is {args.gnp_scope!r}.")
    if args.gnp_direction not in DIRECTIONS:
        raise ValueError(f"gnp_direction must be one of {DIRECTIONS}, but it is {args.gnp_direction!r}.")
    if args.gnp_metric not in METRICS:
        raise ValueError(f"gnp_metric must be one of {METRICS}, but it is {args.gnp_metric!r}.")
    names = [f.name for f in fields(args) if f.name.startswith("gnp_") and f.type is bool]
    if args.gnp_stochastic_rounding != "auto":  # a string for argparse, which has no bool that may be a word too
        names.append("gnp_stochastic_rounding")
    for name in names:
        setattr(args, name, boolean(name, getattr(args, name)))
    modules: Any = args.gnp_target_modules
    are_words = isinstance(modules, list | tuple | set) and all(isinstance(name, str) for name in modules)
    if not (modules is None or isinstance(modules, str) or are_words):
        raise ValueError(f"gnp_target_modules must be a string or a list of strings, but it is {modules!r}.")
    if modules is not None and not modules:
        raise ValueError("gnp_target_modules is empty: leave it out to move all parameters.")


def check_pairs(args: "GNPArguments") -> None:
    """Refuse what `gnp_direction="momentum"` excludes: it moves before there is a gradient, once for a whole step."""
    if args.gnp_direction != "momentum":
        return
    excluded = {
        f"gnp_scope={args.gnp_scope}": args.gnp_scope != "step",
        "gnp_normalize_gradient": args.gnp_normalize_gradient,
        "gnp_warmup_type=lambda": args.gnp_warmup_type == "lambda",
    }
    if others := [name for name, is_set in excluded.items() if is_set]:
        raise ValueError(
            "gnp_direction=momentum moves before there is a gradient, along one direction for the whole step: leave "
            f"out {' and '.join(others)}."
        )
    if args.gnp_alpha not in (0, 1):
        raise ValueError(
            "gnp_direction=momentum has one gradient, that of the moved weights, so gnp_alpha is 1 (or 0, for "
            f"plain training), but it is {args.gnp_alpha}: leave it out."
        )


def number(name: str, value: Any) -> float:
    """A value that is finite and not negative, of whatever a command line or YAML made of it."""
    try:
        if isinstance(value, bool):
            raise TypeError
        result = float(value)
    except OverflowError:
        result = math.inf
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be a number, but it is {value!r}.") from None
    if not (math.isfinite(result) and result >= 0):
        raise ValueError(f"{name} must be finite and not negative, but it is {value!r}.")
    return result


def boolean(name: str, value: Any) -> bool:
    words = {"true": True, "false": False}
    if isinstance(value, bool) or str(value).lower() in words:
        return value if isinstance(value, bool) else words[str(value).lower()]
    raise ValueError(f"{name} must be true or false, but it is {value!r}.")
