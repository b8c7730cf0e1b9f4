"""Make the table and the picture of demo.py."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats


Runs = list[dict[str, Any]]
COLORS = {"plain": "tab:gray", "plain, twice the epochs": "tab:orange", "penalised": "tab:blue"}


def accuracies(runs: Runs, method: str) -> dict[str, np.ndarray]:
    """Return the test accuracy in % of each seed, at the best validation epoch and at the last epoch."""
    of_method = sorted((run for run in runs if run["method"] == method), key=lambda run: run["seed"])
    best = [run["test"][int(np.argmax(run["validation"]))] for run in of_method]
    return {"best epoch": 100 * np.array(best), "last epoch": 100 * np.array([run["test"][-1] for run in of_method])}


def table(runs: Runs) -> str:
    """Return a table with mean ± standard error, and p of Student's paired test against the penalised runs."""
    penalised = accuracies(runs, "penalised")
    count = len(penalised["best epoch"])
    lines = [
        f"Test accuracy in %, {count} seeds, mean ± standard error; p: paired test against the penalised runs\n",
        f"{'':<26}{'passes':>8}{'best epoch':>16}{'p':>10}{'last epoch':>16}{'p':>10}",
    ]
    for method in COLORS:
        passes = np.mean([run["passes"] for run in runs if run["method"] == method])
        line = f"{method:<26}{passes:>8.1f}"
        for when, values in accuracies(runs, method).items():
            line += f"{f'{values.mean():.1f} ± {stats.sem(values):.1f}':>16}"
            p = stats.ttest_rel(penalised[when], values).pvalue if method != "penalised" else None
            line += f"{'' if p is None else f'{p:.1g}':>10}"
        lines.append(line)
    return "\n".join(lines)


def draw(runs: Runs, surfaces: dict[str, Any], path: Path) -> None:
    """Draw the accuracy over the passes, and the loss around the final weights of runs."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    curves, *maps = figure.subplots(1, 1 + len(surfaces["slices"]))
    draw_curves(curves, runs)
    losses = [np.array(item["losses"]) for item in surfaces["slices"]]
    levels = np.linspace(min(loss.min() for loss in losses), max(loss.max() for loss in losses), 25)
    for axes, item, loss in zip(maps, surfaces["slices"], losses, strict=True):
        filled = axes.contourf(*surfaces["axes"], loss.T, levels=levels, cmap="viridis")
        axes.contour(*surfaces["axes"], loss.T, levels=levels[::2], colors="white", linewidths=0.4)
        axes.plot(0, 0, marker="+", color="red", markersize=12)
        title = f"Loss on test images around the end of: {item['checkpoint']}"
        title += f"\nlargest eigenvalue of its Hessian: {item['eigenvalues'][0]:.3g}"
        axes.set(aspect="equal", xlabel="distance along the most curved direction", ylabel="along the second")
        axes.set_title(title, fontsize=10)
        axes.locator_params(nbins=5)
    figure.colorbar(filled, ax=maps, label="loss", format="%.2g")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_curves(axes: Axes, runs: Runs) -> None:
    """Draw the test accuracy over the passes: means, with bands of one standard error."""
    for method, color in COLORS.items():
        of_method = [run for run in runs if run["method"] == method]
        values = 100 * np.array([run["test"] for run in of_method])
        passes = np.linspace(0, np.mean([run["passes"] for run in of_method]), 1 + values.shape[1])[1:]
        mean, error = values.mean(0), stats.sem(values)
        axes.plot(passes, mean, color=color, label=method)
        axes.fill_between(passes, mean - error, mean + error, color=color, alpha=0.25, linewidth=0)
    title = f"Digits, 40% of the training labels wrong\nmean ± standard error of {len(of_method)} seeds"
    axes.set(xlabel="passes over the training data (cost)", ylabel="accuracy on test images, %")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
