"""
Trains a small ViT on scikit-learn's digits twice, plainly and with the gradient-norm penalty, and compares the two.

    python examples/demo.py

Both runs start from the same weights and see the same images in the same order. It takes the flags of
`vit_finetune.py`, and writes loss_curves.png into its output directory, outputs/demo.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from common import parse_args, setup_logging
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from vit_finetune import EMBEDDED_DEFAULTS, ImageDataArguments, build_trainer

from hf_gnp import GNPTrainer


# The last epoch is reported and not the best: to pick one by its test accuracy would flatter both.
DEMO_DEFAULTS = EMBEDDED_DEFAULTS | {"save_strategy": "no", "logging_steps": 15}


@dataclass
class Run:
    """What one training run came to."""

    name: str
    accuracy: float
    loss: float
    seconds: float
    passes: int
    history: list[dict[str, float]]


def count_backward_passes(trainer: GNPTrainer) -> list[None]:
    """A list that grows by one with each backward pass through the whole model."""
    passes: list[None] = []
    # The last parameter is the classifier's, which every forward uses once: one gradient arrives in each backward.
    *_, parameter = trainer.model.parameters()
    parameter.register_post_accumulate_grad_hook(lambda _: passes.append(None))
    return passes


def train(name: str, trainer: GNPTrainer) -> Run:
    """Trains to the end and evaluates there."""
    print(f"\n{name}")
    passes = count_backward_passes(trainer)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    metrics = trainer.evaluate()
    return Run(name, metrics["eval_accuracy"], metrics["eval_loss"], seconds, len(passes), trainer.state.log_history)


def table(runs: list[Run]) -> str:
    """The runs as rows; costs also relative to the first run."""
    rows = [
        f"{'run':<26}{'test accuracy':>14}{'test loss':>11}{'passes':>8}{'seconds':>9}{'cost in passes, seconds':>26}"
    ]
    for run in runs:
        passes, seconds = run.passes / runs[0].passes, run.seconds / runs[0].seconds
        rows.append(
            f"{run.name:<26}{run.accuracy:>14.4f}{run.loss:>11.4f}{run.passes:>8}{run.seconds:>9.1f}"
            f"{f'{passes:.2f}x, {seconds:.2f}x':>26}"
        )
    return "\n".join(rows)


def draw(runs: list[Run], path: Path) -> None:
    """Draws the clean training loss and the test loss of each run over the steps."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for run, color in zip(runs, ("tab:gray", "tab:blue"), strict=True):
        for key, label, style in (("loss", "training", "-"), ("eval_loss", "test", "o--")):
            points = [(entry["step"], entry[key]) for entry in run.history if key in entry]
            axes.plot(*zip(*points, strict=True), style, color=color, label=f"{run.name}: {label}", markersize=4)
    axes.set(
        xlabel="optimizer step",
        ylabel="cross-entropy at the unperturbed weights",
        title="A small ViT on scikit-learn's digits, one run each",
        yscale="log",
    )
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    model_args, data_args, args = parse_args(ImageDataArguments, DEMO_DEFAULTS)
    setup_logging(args)
    runs = []
    for name, alpha in (("plain", 0.0), (f"GNP (r={args.gnp_r:g}, α={args.gnp_alpha:g})", args.gnp_alpha)):
        run_args = replace(args, gnp_alpha=alpha)
        runs.append(train(name, build_trainer(model_args, data_args, run_args)))
    picture = Path(args.output_dir) / "loss_curves.png"
    draw(runs, picture)
    print(f"\n{table(runs)}\n\nLoss curves: {picture}")
    print(
        "A pass is a forward and a backward of one batch; seconds include the evaluation after each epoch.\n"
        "One small run of each proves nothing about accuracy: another seed may well turn the order around."
    )


if __name__ == "__main__":
    main()
