"""The `gnp_*` arguments, as a dataclass to mix into any `TrainingArguments`."""

import re
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from transformers import TrainingArguments

from .argument_checks import CHOICES, check_pairs, check_values


UNNAMED = {"gnp_metric": "l2"}  # the paper's: what it means that `gnp_values` has no metric


@dataclass
class GNPArguments:
    r"""
    Holds the arguments of the gradient-norm penalty. Mix it in before a `TrainingArguments` class:

    ```python
    @dataclass
    class GNPSeq2SeqTrainingArguments(GNPArguments, Seq2SeqTrainingArguments): ...
    ```

    The step uses \\((1-\alpha)\, g_1 + \alpha\, g_2\\) with \\(g_1 = \nabla L(\theta)\\) and
    \\(g_2 = \nabla L(\theta + r\, g_1/\lVert g_1\rVert)\\), a first-order estimate of the gradient of
    \\(L(\theta) + \lambda \lVert\nabla L(\theta)\rVert\\) with \\(\lambda = \alpha r\\).

    Args: Strength
        gnp_r (`float`, *optional*, defaults to 0.05 with `gnp_metric="layer"`):
            r, the radius: how far the weights move along the normalised gradient for the second pass. Left out, it is
            0.05 with `gnp_metric="layer"`. An r that is given has `gnp_metric="l2"`, unless that is given too.
            Published settings for it: 0.1 for CIFAR, 0.05 for ImageNet.
        gnp_alpha (`float`, *optional*, defaults to 0.8):
            α, the share of the second gradient, from 0 (plain training, one pass) to 1 (SAM). The default is 0.8.
            With `gnp_direction="momentum"`, which has one gradient, it is 1.

    Args: Schedule
        gnp_warmup_type (`str`, *optional*, defaults to `"auto"`):
            How the penalty starts: `"r"` or `"lambda"` raises r or α linearly, `"zero"` has no penalty in the warm-up,
            `"none"` no warm-up. `"auto"` is `"zero"` with an adaptive optimizer and a learning-rate warm-up, where an
            early penalty harms (arXiv 2406.09723), and else `"none"`.
        gnp_warmup_steps (`float`, *optional*):
            The length of that warm-up: steps, or a fraction of the run if below 1. Default: the learning-rate warm-up.
        gnp_start (`float`, *optional*, defaults to 0.0):
            Penalise from this fraction of the run on (late-phase SAM, arXiv 2410.10373).
        gnp_end (`float`, *optional*, defaults to 1.0):
            Penalise up to this fraction of the run.
        gnp_interval (`int`, *optional*, defaults to 1):
            k: penalise every k-th optimizer step, at a cost of 1 + 1/k.
        gnp_probability (`float`, *optional*, defaults to 1.0):
            p: penalise a step with this probability, at a cost of 1 + p on average. The draw depends on `seed` and the
            step alone.

    Args: Perturbation
        gnp_scope (`str`, *optional*, defaults to `"step"`):
            The examples that share one perturbation (m of m-sharpness, arXiv 2206.06232). The gain often grows as m
            falls. `"step"` is the whole global batch, `"micro_batch"` each micro-batch of all ranks, `"rank"` all
            micro-batches of each rank, `"rank_micro_batch"` each micro-batch of each rank. The last two need one
            process or DDP.
        gnp_direction (`str`, *optional*, defaults to `"gradient"`):
            `"gradient"` moves along g₁. `"momentum"` moves by -r m/‖m‖ along the optimizer's first moment and steps
            with the gradient there, in one pass (MSAM, arXiv 2401.12033). Start at two to four times
            the r of the gradient. The first step has no moment yet, and is plain.
        gnp_normalize_gradient (`bool`, *optional*, defaults to `False`):
            Step with (1-α) g₁/‖g₁‖ + α g₂, as the authors' code does by default.
        gnp_metric (`str`, *optional*, defaults to `"layer"`, or to `"l2"` if `gnp_r` is given):
            How tensors share the move. `"l2"`, the paper's formula, moves all weights by r g₁/‖g₁‖. Published values
            of r are for it, so it is the default for an r that is given. `"layer"` moves each tensor in proportion to
            its own norm, by r (‖θ_l‖/‖θ‖) g_l/‖g_l‖. Its best r differs less between models. `"element"` moves by
            r θ²g₁/‖θ ⊙ g₁‖ (ASAM, arXiv 2102.11600), with an r about ten times larger. Unlike the code of its authors,
            it scales every parameter by |θ|: also biases, and without 0.01 added.
        gnp_target_modules (`list[str]`, *optional*):
            Move only these parameters: a regular expression for the whole name, name endings (as in PEFT), or `"norm"`
            for those of normalisation layers (SAM-ON, arXiv 2306.04226).

    Args: Precision
        gnp_stochastic_rounding (`str` or `bool`, *optional*, defaults to `"auto"`):
            Round moved 16-bit weights stochastically, so that rounding keeps a small move on average: `True`, `False`,
            or `"auto"`, which is `True` where there is no fp32 master.

    Raises:
        ValueError: naming the argument, for a value outside its range or for arguments that exclude each other.

    Reference:
        Zhao, Zhang and Hu, "Penalizing Gradient Norm for Efficiently Improving Generalization in Deep Learning",
        ICML 2022, arXiv 2202.03599, Algorithm 1.
    """

    # Strength
    gnp_r: float | None = None
    gnp_alpha: float | None = None
    # Schedule
    gnp_warmup_type: str = "auto"
    gnp_warmup_steps: float | None = None
    gnp_start: float = 0.0
    gnp_end: float = 1.0
    gnp_interval: int = 1
    gnp_probability: float = 1.0
    # Perturbation
    gnp_scope: str = "step"
    gnp_direction: str = "gradient"
    gnp_normalize_gradient: bool = False
    gnp_metric: str | None = None
    gnp_target_modules: list[str] | None = None
    # Precision
    gnp_stochastic_rounding: str = "auto"  # argparse has no bool that may be a word too

    def __post_init__(self) -> None:
        post_init = getattr(super(), "__post_init__", None)
        if post_init is not None:
            post_init()
        self.check_gnp_values()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if self.is_default(name):  # the user's from now on, also if it equals the default
            vars(self)["_gnp_defaults"] -= {name}

    def is_default(self, name: str) -> bool:
        """Return whether the user left out `gnp_r`, `gnp_alpha` or `gnp_metric`, whose defaults follow others."""
        return name in vars(self).get("_gnp_defaults", ())

    def check_gnp_values(self) -> None:
        """Check all gnp arguments, also at the beginning of each `train`: a search sets them in between."""
        names = ("gnp_r", "gnp_alpha", "gnp_metric")
        left_out = frozenset(name for name in names if self.is_default(name) or getattr(self, name) is None)
        defaults = {
            "gnp_r": 0.05,
            "gnp_alpha": 1.0 if self.gnp_direction == "momentum" else 0.8,
            "gnp_metric": "layer" if "gnp_r" in left_out else "l2",  # published values of r are for l2
        }
        vars(self).update({name: defaults[name] for name in left_out}, _gnp_defaults=left_out)
        check_values(self)
        check_pairs(self)

    def gnp_values(self) -> dict[str, Any]:
        """Return r, α, and the `gnp_*` arguments that are not at their defaults, or not the paper's metric."""
        defaults = {f.name: f.default for f in fields(GNPArguments)} | UNNAMED  # r and α have none
        return {n: getattr(self, n) for n, default in defaults.items() if getattr(self, n) != default}


def _add_help(cls: type[GNPArguments]) -> None:
    """Give each field its text in the docstring as help, and its choices, for `HfArgumentParser`."""
    texts = dict(re.findall(r"^ {8}(gnp_\w+) .*\n((?: {12}.*\n)+)", cls.__doc__ or "", re.MULTILINE))
    for field in fields(cls):
        metadata: dict[str, Any] = {"help": " ".join(texts.get(field.name, "").split())}
        if field.name in CHOICES:
            metadata["choices"] = CHOICES[field.name]
        field.metadata = MappingProxyType(metadata)


_add_help(GNPArguments)


@dataclass
class GNPTrainingArguments(GNPArguments, TrainingArguments):
    __doc__ = (
        "[`~transformers.TrainingArguments`] with the arguments of the gradient-norm penalty.\n\n"
        "    Example:\n\n"
        "    ```python\n"
        '    >>> args = GNPTrainingArguments(output_dir="out")\n'
        "    ```\n"
        f"{GNPArguments.__doc__}"
    )


def update_arguments(gnp_args: GNPArguments, args: TrainingArguments | GNPArguments | dict[str, Any]) -> None:
    """Set the gnp values that plain `TrainingArguments` or a trial carry, and check them all."""
    if args is not gnp_args:
        values = args if isinstance(args, dict) else vars(args)
        for name in {f.name for f in fields(GNPArguments)} & values.keys():
            setattr(gnp_args, name, values[name])
    gnp_args.check_gnp_values()
