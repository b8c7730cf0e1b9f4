"""Tables and pictures of a study's runs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .methods import BASELINES, METHODS, TWICE
from .statistics import Run, holm, mean_and_error, p_value, paired, plus_minus


# Of each report the measures, with what they are called, their scale and digits.
PERCENT = (100, 1)
SHORT = {TWICE: "twice"}
REPORTS = {
    "accuracy": {"best": ("best epoch %", *PERCENT), "final": ("last epoch %", *PERCENT)},
    "calibration": {
        "calibration_error": ("calibration error %", *PERCENT),
        "calibration_error_scaled": ("with temperature %", *PERCENT),
        "loss_scaled": ("loss with temperature", 1, 3),
    },
    "quantisation": {f"lost_{bits}_bits": (f"lost at {bits} bits, points", *PERCENT) for bits in (8, 4, 3, 2)},
    "flatness": {
        "top_eigenvalue": ("largest eigenvalue", 1, 1),
        "trace": ("trace", 1, 0),
        "ascent": ("rise at r = 0.05", 1, 3),
        "train_grad_norm": ("‖∇L‖", 1, 2),
    },
    "forgetting": {"forgotten": ("of the first task lost, points", *PERCENT)},
    "shift": {"shift_accuracy": ("other sentences %", *PERCENT)},
}
Runs = dict[str, dict[int, Run]]


def measures_of(runs: Runs, report: str) -> dict[str, tuple[str, float, int]]:
    """Those of the report that were taken of all runs."""
    taken = [run for by_seed in runs.values() for run in by_seed.values()]
    return {name: how for name, how in REPORTS[report].items() if taken and all(name in run for run in taken)}


def table(runs: Runs, report: str, baselines: Sequence[str] = BASELINES) -> str:
    """
    Markdown: means ± standard errors, and differences to the baselines over seeds with p.

    p is Holm's, over all tests of penalised methods in the table.
    """
    measures = measures_of(runs, report)
    tests = [(method, name, baseline) for method in runs for name in measures for baseline in baselines]
    tests = [test for test in tests if test[0] not in (*BASELINES, *baselines)]
    gains = {test: paired(_values(runs[test[0]], test[1]), _values(runs.get(test[2], {}), test[1])) for test in tests}
    corrected = dict(zip(tests, holm([p for _, _, p in gains.values()]), strict=True))
    header = ["method", "r", "cost", "seeds"]
    for label, _, _ in measures.values():
        header += [label, *(f"Δ {SHORT.get(baseline, baseline)} (p)" for baseline in baselines)]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for method, by_seed in runs.items():
        cells = [method, _radius(by_seed), f"{METHODS[method].cost:g}", str(len(by_seed))]
        for name, (_, scale, digits) in measures.items():
            cells.append(plus_minus(*mean_and_error(list(_values(by_seed, name).values())), scale, digits))
            for baseline in baselines:
                gain = gains.get((method, name, baseline))
                text = "" if gain is None else plus_minus(*gain[:2], scale, digits, "+")
                cells.append(text and f"{text} ({p_value(corrected[method, name, baseline])})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _values(by_seed: dict[int, Run], name: str) -> dict[int, float]:
    return {seed: run[name] for seed, run in by_seed.items()}


def _radius(by_seed: dict[int, Run]) -> str:
    r = next(iter(by_seed.values()))["gnp"].get("gnp_r")
    return "" if r is None else f"{r:g}"


def sweep_table(chosen: dict[str, dict[float, float]]) -> str:
    """Of each tuned method the validation accuracy in % by r, from which r was chosen."""
    radii = sorted({r for by_r in chosen.values() for r in by_r})
    lines = [f"| method | {' | '.join(f'r = {r:g}' for r in radii)} |", "|---" * (1 + len(radii)) + "|"]
    for method, by_r in chosen.items():
        cells = [f"{100 * by_r[r]:.1f}" if r in by_r else "" for r in radii]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(cases: dict[str, Runs], title: str, path: Path) -> None:
    """A row for each case: accuracy on the validation data over the passes, and on the test data at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = {name: runs for name, runs in cases.items() if runs}
    if not cases:
        return
    figure, panels = plt.subplots(len(cases), 2, figsize=(11, 3.6 * len(cases)), layout="constrained", squeeze=False)
    methods = dict.fromkeys(method for runs in cases.values() for method in runs)
    colours = {method: f"C{index}" for index, method in enumerate(methods)}
    for (name, runs), (curves, bars) in zip(cases.items(), panels, strict=True):
        _draw_curves(curves, runs, colours)
        _draw_bars(bars, runs, colours)
        curves.set(ylabel="validation accuracy %", title=name)
    panels[-1][0].set_xlabel("cost so far, in epochs of plain training")
    panels[-1][1].set_xlabel("test accuracy %, mean ± standard error (axis cut)")
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_sweeps(cases: dict[str, dict[str, dict[float, float]]], title: str, path: Path) -> None:
    """A panel for each method: validation accuracy by r, a line for each case, with its best r marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods = list(dict.fromkeys(method for sweep in cases.values() for method in sweep))
    if not methods:
        return
    figure, panels = plt.subplots(
        1, len(methods), figsize=(5.5 * len(methods), 3.8), layout="constrained", squeeze=False, sharey=True
    )
    for method, axes in zip(methods, panels[0], strict=True):
        for index, (name, sweep) in enumerate(cases.items()):
            points = sorted(sweep.get(method, {}).items())
            if points:
                axes.plot(*zip(*((r, 100 * a) for r, a in points), strict=True), "o-", color=f"C{index}", label=name)
                best = max(points, key=lambda point: point[1])
                axes.plot(best[0], 100 * best[1], "*", color=f"C{index}", markersize=16)
        axes.set(xscale="log", xlabel="r", title=method)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("validation accuracy %")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_curves(axes: Any, runs: Runs, colours: dict[str, str]) -> None:
    for method, by_seed in runs.items():
        curves = np.array([run["curve"] for run in by_seed.values()]) * 100
        cost = METHODS[method].cost / METHODS[method].epochs
        passes = cost * np.arange(1, 1 + curves.shape[1])
        mean = curves.mean(0)
        axes.plot(passes, mean, color=colours[method], label=method)
        if len(curves) > 1:
            error = curves.std(0, ddof=1) / math.sqrt(len(curves))
            axes.fill_between(passes, mean - error, mean + error, color=colours[method], alpha=0.2, linewidth=0)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _draw_bars(axes: Any, runs: Runs, colours: dict[str, str]) -> None:
    marks = (("best", "best epoch", -0.15, "o", None), ("final", "last epoch", 0.15, "s", "white"))
    for index, (method, by_seed) in enumerate(runs.items()):
        colour = colours[method]
        for name, label, offset, marker, face in marks:
            mean, error = mean_and_error([100 * run[name] for run in by_seed.values()])
            kwargs = {"fmt": marker, "color": colour, "capsize": 3, "label": None if index else label}
            error = None if math.isnan(error) else error
            axes.errorbar(mean, index + offset, xerr=error, markerfacecolor=face or colour, **kwargs)
    axes.set_yticks(range(len(runs)), list(runs))
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=7)
