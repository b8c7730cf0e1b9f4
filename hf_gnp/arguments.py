"""The `gnp_*` arguments, as a dataclass to mix into any `TrainingArguments`."""

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from .argument_checks import DIRECTIONS, SCOPES, WARMUP_TYPES, check_pairs, check_perturbation, check_schedule, number


DEFAULT_ALPHA = 0.8


@dataclass
class GNPArguments:
    r"""
    Arguments of the gradient-norm penalty, to be mixed in before a `TrainingArguments` class:

    ```python
    @dataclass
    class GNPSeq2SeqTrainingArguments(GNPArguments, Seq2SeqTrainingArguments): ...
    ```

    The step uses \\((1-\alpha)\, g_1 + \alpha\, g_2\\) with \\(g_1 = \nabla L(\theta)\\) and
    \\(g_2 = \nabla L(\theta + r\, g_1/\lVert g_1\rVert)\\), a first-order estimate of the gradient of
    \\(L(\theta) + \lambda \lVert\nabla L(\theta)\rVert\\) with \\(\lambda = \alpha r\\).

    Args: Strength
        gnp_r (`float`, *optional*, defaults to 0.05):
            r, the distance by which the weights are moved along the normalised gradient for the second pass.
            Published settings: 0.1 for CIFAR, 0.05 for ImageNet.
        gnp_alpha (`float`, *optional*, defaults to 0.8):
            α, the share of the second gradient, from 0 (plain training, one pass) to 1 (SAM). With
            `gnp_direction="momentum"`, which has one gradient, it is 1.
        gnp_lambda (`float`, *optional*):
            λ = α r, the coefficient of the penalty, instead of `gnp_alpha`; it is folded into `gnp_alpha`.

    Args: Schedule
        gnp_warmup_type (`str`, *optional*, defaults to `"auto"`):
            How the penalty starts: `"r"` raises r linearly at fixed α, `"lambda"` raises α linearly at fixed r,
            `"zero"` has no penalty during the warm-up, `"none"` the full penalty from the first step. `"auto"` is
            `"zero"` with an adaptive optimizer and a learning-rate warm-up, where an early penalty harms (arXiv
            2406.09723), and else `"none"`.
        gnp_warmup_steps (`float`, *optional*):
            The length of that warm-up: steps, or a fraction of the run if below 1. Default: the learning-rate warm-up.
        gnp_start (`float`, *optional*, defaults to 0.0):
            Penalise from this fraction of the run on (late-phase SAM, arXiv 2410.10373).
        gnp_end (`float`, *optional*, defaults to 1.0):
            Penalise up to this fraction of the run.
        gnp_interval (`int`, *optional*, defaults to 1):
            k, penalise every k-th optimizer step, at a cost of 1 + 1/k.
        gnp_probability (`float`, *optional*, defaults to 1.0):
            p, penalise a step with this probability, drawn from `seed` and the step: equal on all ranks, unchanged by
            resuming. Costs 1 + p on average.

    Args: Perturbation
        gnp_scope (`str`, *optional*, defaults to `"step"`):
            The examples that share one perturbation (m of m-sharpness, arXiv 2206.06232; the gain grows as it falls):
            `"step"`, the whole global batch; `"micro_batch"`, each micro-batch of all ranks; `"rank"`, all
            micro-batches of each rank; `"rank_micro_batch"`, each micro-batch of each rank. The last two on one
            process and DDP only.
        gnp_ascent_fraction (`float`, *optional*, defaults to 1.0):
            f, take g₁ from the first ⌈f M⌉ of the M accumulated micro-batches, scaled to the window, at a cost of
            1 + f (arXiv 2110.08529). Without accumulation, from the first rows of the micro-batch. For the scopes
            `"step"` and `"rank"`.
        gnp_direction (`str`, *optional*, defaults to `"gradient"`):
            `"gradient"` moves along g₁. `"momentum"` moves by -r m/‖m‖ along the optimizer's first moment and steps
            with the gradient there: one pass, at a cost of 1 (MSAM, arXiv 2401.12033). Its r is far larger: 3 for a
            ViT with AdamW. A step without a moment yet, the first, is a plain step.
        gnp_reuse (`bool`, *optional*, defaults to `False`):
            With `gnp_interval`, add to the gradients of the steps between the component v of the last g₂ that was
            orthogonal to its g₁, as α ‖g‖ v/‖v‖ (LookSAM, arXiv 2203.02714).
        gnp_precondition (`bool`, *optional*, defaults to `False`):
            Move by r D⁻¹g₁/√(g₁ᵀD⁻¹g₁) with D = √v̂ + ε of Adam's second moment v̂ (arXiv 2502.02407). A step without a
            second moment yet, the first, is a plain step.
        gnp_normalize_gradient (`bool`, *optional*, defaults to `False`):
            Step with (1-α) g₁/‖g₁‖ + α g₂, as the authors' code does by default.
        gnp_adaptive (`bool`, *optional*, defaults to `False`):
            Move by r θ²g₁/‖θ ⊙ g₁‖, which does not depend on the scale of the weights (ASAM, arXiv 2102.11600). Its r
            is about ten times larger.
        gnp_target_modules (`list[str]`, *optional*):
            Move only these parameters: a regular expression for the whole name, name endings (as in PEFT), or `"norm"`
            for those of normalisation layers (SAM-ON, arXiv 2306.04226).

    Args: Precision and engines
        gnp_stochastic_rounding (`str` or `bool`, *optional*, defaults to `"auto"`):
            Whether the moved 16-bit weights are rounded stochastically, so that a small move is not rounded away.
            `"auto"`: where no fp32 master exists.
        gnp_allow_unchecked (`bool`, *optional*, defaults to `False`):
            Run with DeepSpeed options that nobody has checked the penalty with, and that are refused otherwise.

    Raises:
        ValueError: naming the argument, for a value outside its range or for arguments that exclude each other.

    Reference:
        Zhao, Zhang and Hu, "Penalizing Gradient Norm for Efficiently Improving Generalization in Deep Learning",
        ICML 2022, arXiv 2202.03599, Algorithm 1.
    """

    # Strength
    gnp_r: float = field(
        default=0.05,
        metadata={
            "help": "r: the distance by which the weights are moved along the normalised gradient for the second pass."
        },
    )
    gnp_alpha: float | None = field(
        default=None,
        metadata={"help": "α: the share of the second gradient, from 0 (plain training) to 1 (SAM). Default: 0.8."},
    )
    gnp_lambda: float | None = field(
        default=None,
        metadata={"help": "λ = α r: the coefficient of the gradient-norm penalty, to be given instead of gnp_alpha."},
    )
    # Schedule
    gnp_warmup_type: str = field(
        default="auto",
        metadata={
            "help": "How the penalty starts: r or lambda (α) rises linearly, none in the warm-up (zero), all at once "
            "(none); auto: zero with an adaptive optimizer and a learning-rate warm-up, else none.",
            "choices": list(WARMUP_TYPES),
        },
    )
    gnp_warmup_steps: float | None = field(
        default=None,
        metadata={"help": "Its length: steps, or a fraction of the run. Default: the learning-rate warm-up."},
    )
    gnp_start: float = field(default=0.0, metadata={"help": "Penalise from this fraction of the run on."})
    gnp_end: float = field(default=1.0, metadata={"help": "Penalise up to this fraction of the run."})
    gnp_interval: int = field(
        default=1, metadata={"help": "k: penalise every k-th optimizer step, at a cost of 1 + 1/k."}
    )
    gnp_probability: float = field(
        default=1.0, metadata={"help": "p: penalise a step with this probability, at a cost of 1 + p on average."}
    )
    # Perturbation
    gnp_scope: str = field(
        default="step",
        metadata={
            "help": "The examples that share one perturbation; fewer are stronger. rank scopes: one process and DDP.",
            "choices": list(SCOPES),
        },
    )
    gnp_ascent_fraction: float = field(
        default=1.0,
        metadata={
            "help": "f: take the direction from the first f of a step's accumulated micro-batches, at a cost of 1 + f."
        },
    )
    gnp_direction: str = field(
        default="gradient",
        metadata={
            "help": "Where to move: along the gradient, or against the optimizer's momentum, in one pass (MSAM).",
            "choices": list(DIRECTIONS),
        },
    )
    gnp_reuse: bool = field(
        default=False,
        metadata={"help": "With gnp_interval, add the last penalty's component to the steps between (LookSAM)."},
    )
    gnp_precondition: bool = field(
        default=False,
        metadata={"help": "Move along g₁/(√v̂ + ε) with Adam's second moment v̂, normalised in the same metric."},
    )
    gnp_normalize_gradient: bool = field(
        default=False, metadata={"help": "Step with (1-α) g₁/‖g₁‖ + α g₂, as the authors' code does by default."}
    )
    gnp_adaptive: bool = field(
        default=False, metadata={"help": "Move by r θ²g₁/‖θ ⊙ g₁‖, independent of the scale of the weights (ASAM)."}
    )
    gnp_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Move only these parameters: a regular expression, name endings, or norm (SAM-ON)."},
    )
    # Precision and engines
    gnp_stochastic_rounding: str = field(
        default="auto",
        metadata={
            "help": "Round moved 16-bit weights stochastically: true, false, or auto (where no fp32 master exists)."
        },
    )
    gnp_allow_unchecked: bool = field(
        default=False, metadata={"help": "Run with DeepSpeed options that the penalty was not checked with."}
    )

    def __post_init__(self) -> None:
        post_init = getattr(super(), "__post_init__", None)
        if post_init is not None:
            post_init()
        self.check_gnp_values()

    def check_gnp_values(self) -> None:
        """
        Fold `gnp_lambda` into `gnp_alpha`, and check all gnp arguments. Called when the arguments are made and at the
        beginning of each `train`, as a notebook or a hyperparameter search sets them in between.

        Raises:
            ValueError: naming the argument.
        """
        self._check_strength()
        check_schedule(self)
        check_perturbation(self)
        check_pairs(self)

    def _check_strength(self) -> None:
        self.gnp_r = number("gnp_r", self.gnp_r)
        if self.gnp_lambda is not None:
            if self.gnp_alpha not in (None, vars(self).get("_gnp_checked_alpha")):
                raise ValueError("gnp_alpha and gnp_lambda (= gnp_alpha * gnp_r) say the same: give one of the two.")
            gnp_lambda = number("gnp_lambda", self.gnp_lambda)
            if gnp_lambda > self.gnp_r:
                raise ValueError(
                    f"gnp_lambda is gnp_alpha * gnp_r and at most gnp_r ({self.gnp_r}), but it is {gnp_lambda}: "
                    "raise gnp_r or lower gnp_lambda."
                )
            # One of the two stays set, so that a copy built from all the fields is valid again.
            self.gnp_alpha = gnp_lambda / self.gnp_r if self.gnp_r > 0 else 0.0
            self.gnp_lambda = None
        if vars(self).get("_gnp_default_alpha") == self.gnp_alpha:  # no user's, as another direction has another
            self.gnp_alpha = None
        self._gnp_default_alpha = None
        if self.gnp_alpha is None:
            self.gnp_alpha = self._gnp_default_alpha = 1.0 if self.gnp_direction == "momentum" else DEFAULT_ALPHA
        self.gnp_alpha = number("gnp_alpha", self.gnp_alpha)
        if self.gnp_alpha > 1:
            raise ValueError(f"gnp_alpha is the share of the second gradient, at most 1, but it is {self.gnp_alpha}.")
        if self.gnp_r == 0 and self.gnp_alpha > 0:
            raise ValueError("gnp_r is 0, which moves nothing: set gnp_r > 0, or gnp_alpha=0 for plain training.")
        self._gnp_checked_alpha = self.gnp_alpha  # one that differs later was set by the user

    def gnp_values(self) -> dict[str, Any]:
        """What a run should say of itself: r, α, and the other `gnp_*` arguments that are not at their defaults."""
        strength = {"gnp_r": self.gnp_r, "gnp_alpha": self.gnp_alpha}
        defaults = {f.name: f.default for f in fields(GNPArguments) if f.name not in (*strength, "gnp_lambda")}
        return strength | {n: getattr(self, n) for n, default in defaults.items() if getattr(self, n) != default}


@dataclass
class GNPTrainingArguments(GNPArguments, TrainingArguments):
    __doc__ = (
        "[`~transformers.TrainingArguments`] with the arguments of the gradient-norm penalty.\n\n"
        "    Example:\n\n"
        "    ```python\n"
        '    >>> args = GNPTrainingArguments(output_dir="out", gnp_r=0.05, gnp_alpha=0.8)\n'
        "    ```\n"
        f"{GNPArguments.__doc__}"
    )


def gnp_arguments_of(args: TrainingArguments) -> GNPArguments:
    """`args` itself if it has the `gnp_*` arguments; else the defaults, to be kept beside it."""
    return args if isinstance(args, GNPArguments) else GNPArguments()


def take_over(gnp_args: GNPArguments, args: TrainingArguments | GNPArguments | dict[str, Any]) -> None:
    """Take the gnp values that were set on plain `TrainingArguments`, or that a trial has, and check them all."""
    if args is not gnp_args:
        values = args if isinstance(args, dict) else vars(args)
        for name in {f.name for f in fields(GNPArguments)} & values.keys():
            setattr(gnp_args, name, values[name])
    gnp_args.check_gnp_values()
