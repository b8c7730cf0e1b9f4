"""What generalization.py keeps and says: runs in a JSON, means and paired tests, figures."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np


Run = dict[str, Any]
BINS = 15


class Store:
    """The runs in a JSON file, which is replaced as a whole each time one is added."""

    def __init__(self, path: Path):
        self.path = path
        self.runs: list[Run] = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []

    def has(self, settings: dict[str, Any], method: str, seed: int) -> bool:
        wanted = (settings, method, seed)
        return any((run["settings"], run["method"], run["seed"]) == wanted for run in self.runs)

    def add(self, run: Run) -> None:
        self.runs.append(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({"runs": self.runs}, indent=1) + "\n", encoding="utf-8")
        os.replace(new, self.path)

    def of(self, settings: dict[str, Any]) -> dict[str, dict[int, Run]]:
        """By method and seed."""
        found: dict[str, dict[int, Run]] = {}
        for run in self.runs:
            if run["settings"] == settings:
                found.setdefault(run["method"], {})[run["seed"]] = run
        return found


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """
    The expected calibration error: how far confidence is from accuracy, over bins of equal width.

    Args:
        probabilities: (n, classes).
        labels: (n,), the right classes.
    """
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error (nan for a single value)."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(error)


def paired_test(differences: list[float]) -> float:
    """The two-sided p of Student's test that the differences have mean 0 (nan where they do not vary)."""
    mean, error = mean_and_error(differences)
    if not error > 0:
        return math.nan
    return student_tail(abs(mean / error), len(differences) - 1)


def student_tail(t: float, freedom: int) -> float:
    """P(|T| > t): with T = √ν tan x the density is ∝ cos^(ν-1) x, which is smooth on a finite range."""
    x = np.linspace(math.atan(t / math.sqrt(freedom)), math.pi / 2, 20001)
    y = np.cos(x) ** (freedom - 1)
    area = float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum())
    return 2 * area * math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)


def summarise(runs: dict[str, dict[int, Run]], baseline: str) -> list[dict[str, Any]]:
    """Per method: accuracy and calibration error, and the difference to `baseline` over the seeds that both have."""
    rows = []
    for method, by_seed in runs.items():
        row: dict[str, Any] = {"method": method, "seeds": len(by_seed)}
        for name in ("accuracy", "calibration_error", "loss", "seconds"):
            row[name] = mean_and_error([run[name] for run in by_seed.values()])
        shared = sorted(by_seed.keys() & runs.get(baseline, {}).keys())
        if method != baseline and shared:
            differences = [by_seed[s]["accuracy"] - runs[baseline][s]["accuracy"] for s in shared]
            row |= {"pairs": len(shared), "gain": mean_and_error(differences), "p": paired_test(differences)}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | seeds | accuracy % | minus the first, paired | p | calibration error % | loss | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gain, p = (pair(row["gain"], 100), f"{row['p']:.2f}") if "gain" in row else ("", "")
        lines.append(
            f"| {row['method']} | {row['seeds']} | {pair(row['accuracy'], 100)} | {gain} | {p} "
            f"| {pair(row['calibration_error'], 100)} | {pair(row['loss'], 1, 3)} | {row['seconds'][0]:.0f} |"
        )
    return "\n".join(lines)


def pair(value: tuple[float, float], scale: float, digits: int = 2) -> str:
    mean, error = value
    return f"{mean * scale:.{digits}f}" + ("" if math.isnan(error) else f" ± {error * scale:.{digits}f}")


def draw(runs: dict[str, dict[int, Run]], rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Learning curves (mean over seeds) and final accuracies (mean ± standard error)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curves, bars) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for index, (method, by_seed) in enumerate(runs.items()):
        by_run = np.array([[100 * accuracy for _, accuracy in run["curve"]] for run in by_seed.values()])
        epochs = [epoch for epoch, _ in next(iter(by_seed.values()))["curve"]]
        curves.plot(epochs, by_run.mean(0), marker="." if len(epochs) < 20 else "", label=method, color=f"C{index}")
    for index, row in enumerate(rows):
        mean, error = (100 * value for value in row["accuracy"])
        bars.bar(row["method"], mean, yerr=None if math.isnan(error) else error, capsize=4, color=f"C{index}")
    means = [100 * row["accuracy"][0] for row in rows]
    bars.set_ylim(max(0, min(means) - 3), min(100, max(means) + 3))
    curves.set(xlabel="epoch", ylabel="accuracy %", title=title)
    bars.set(title="mean ± standard error (axis cut)")
    bars.tick_params(axis="x", rotation=20)
    curves.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)
