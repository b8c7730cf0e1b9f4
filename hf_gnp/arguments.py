"""The `gnp_*` arguments, as a dataclass to mix into any `TrainingArguments`."""

import copyreg
import functools
import math
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments


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

    Args:
        gnp_r (`float`, *optional*, defaults to 0.05):
            r, the distance by which the weights are moved along the normalised gradient for the second pass.
            Published settings: 0.1 for CIFAR, 0.05 for ImageNet.
        gnp_alpha (`float`, *optional*, defaults to 0.8):
            α, the share of the second gradient, from 0 (plain training, one pass) to 1 (SAM).
        gnp_lambda (`float`, *optional*):
            λ = α r, the coefficient of the penalty, instead of `gnp_alpha`; it is folded into `gnp_alpha`.

    Raises:
        ValueError: naming the argument, for a value outside its range or for `gnp_alpha` and `gnp_lambda` together.

    Reference:
        Zhao, Zhang and Hu, "Penalizing Gradient Norm for Efficiently Improving Generalization in Deep Learning",
        ICML 2022, arXiv 2202.03599, Algorithm 1.
    """

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

    def __post_init__(self):
        if hasattr(super(), "__post_init__"):
            super().__post_init__()
        self.gnp_r = _number("gnp_r", self.gnp_r)
        if self.gnp_lambda is not None:
            if self.gnp_alpha is not None:
                raise ValueError("gnp_alpha and gnp_lambda (= gnp_alpha * gnp_r) say the same: give one of the two.")
            self._fold_lambda(_number("gnp_lambda", self.gnp_lambda))
        self.gnp_alpha = _number("gnp_alpha", DEFAULT_ALPHA if self.gnp_alpha is None else self.gnp_alpha)
        if self.gnp_alpha > 1:
            raise ValueError(f"gnp_alpha is the share of the second gradient, at most 1, but it is {self.gnp_alpha}.")
        if self.gnp_r == 0 and self.gnp_alpha > 0:
            raise ValueError("gnp_r is 0, which moves nothing: set gnp_r > 0, or gnp_alpha=0 for plain training.")

    def _fold_lambda(self, gnp_lambda: float) -> None:
        if gnp_lambda > self.gnp_r:
            raise ValueError(
                f"gnp_lambda is gnp_alpha * gnp_r and at most gnp_r ({self.gnp_r}), but it is {gnp_lambda}: "
                "raise gnp_r or lower gnp_lambda."
            )
        # One of the two stays set, so that a copy built from all the fields is valid again.
        self.gnp_alpha = gnp_lambda / self.gnp_r if self.gnp_r > 0 else 0.0
        self.gnp_lambda = None

    def gnp_values(self) -> dict[str, Any]:
        """The `gnp_*` arguments that are set, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(GNPArguments)}
        return {name: value for name, value in values.items() if value is not None}


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


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, but it is {value!r}.") from None
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be finite and not negative, but it is {value!r}.")
    return number


def with_gnp_arguments(args: TrainingArguments) -> TrainingArguments:
    """
    `args` itself if it has the `gnp_*` arguments; else a twin that has them, at their defaults.

    Every attribute of `args` is kept as it is (tokens, the DeepSpeed and accelerator configuration, devices already
    set up), so `__post_init__` is not run again.
    """
    if isinstance(args, GNPArguments):
        return args
    twin = _new_twin(type(args))
    twin.__dict__.update(vars(GNPArguments()) | vars(args))
    return twin


@functools.cache
def _twin_class(base: type[TrainingArguments]) -> type[TrainingArguments]:
    if base is TrainingArguments:
        return GNPTrainingArguments
    twin_class = dataclass(type(f"GNP{base.__name__}", (GNPArguments, base), {"__doc__": base.__doc__}))
    # The class exists in this process only: a pickle (training_args.bin) holds its base and makes it again.
    copyreg.pickle(twin_class, lambda twin: (_new_twin, (base,), twin.__dict__))
    return twin_class


def _new_twin(base: type[TrainingArguments]) -> TrainingArguments:
    return object.__new__(_twin_class(base))
