"""What generalization.py keeps and says: runs in a JSON, means and paired tests, figures."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from scipy import stats


Run = dict[str, Any]
MEASURES = {"accuracy": "accuracy %", "calibration_error": "calibration error %", "loss": "loss"}
BINS = 15


class Store:
    """The runs in a JSON file, which is replaced as a whole each time one is added. Processes may share it."""

    def __init__(self, path: Path):
        self.path = path
        self.runs = self._read()

    def _read(self) -> list[Run]:
        return json.loads(self.path.read_text(encoding="utf-8"))["runs"] if self.path.is_file() else []

    def add(self, run: Run) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            self.runs = [*self._read(), run]
            new = self.path.with_suffix(".new")
            lines = ",\n".join(json.dumps(run) for run in self.runs)  # one a run
            new.write_text(f'{{"runs": [\n{lines}\n]}}\n', encoding="utf-8")
            os.replace(new, self.path)

    def of(self, settings: dict[str, Any], methods: dict[str, dict[str, Any]]) -> dict[str, dict[int, Run]]:
        """Of each method the runs by seed, those with the gnp arguments that `methods` says it has."""
        found: dict[str, dict[int, Run]] = {method: {} for method in methods}
        for run in self.runs:
            if run["settings"] == settings and methods.get(run["method"]) == run["gnp"]:
                found[run["method"]][run["seed"]] = run
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


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error (nan for a single value)."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(error)


def summarise(runs: dict[str, dict[int, Run]], baseline: str) -> list[dict[str, Any]]:
    """
    Per method: the mean of each measure and its standard error; its gain, the difference to `baseline` over the seeds
    that both have, likewise; and p, of Student's paired test (nan where differences do not vary).
    """
    rows = []
    for method, by_seed in runs.items():
        row: dict[str, Any] = {"method": method, "seeds": len(by_seed)}
        shared = sorted(by_seed.keys() & runs.get(baseline, {}).keys()) if method != baseline else []
        for name in MEASURES:
            row[name] = mean_and_error([run[name] for run in by_seed.values()])
            if shared:
                pairs = np.array([(by_seed[s][name], runs[baseline][s][name]) for s in shared])
                row[f"{name}_gain"] = gain = mean_and_error(pairs[:, 0] - pairs[:, 1])
                row[f"{name}_p"] = float(stats.ttest_rel(*pairs.T).pvalue) if gain[1] > 0 else math.nan
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Means, and in the columns "Δ" the paired gains over the first method with p."""
    header = ["method", "seeds", *(f"{name} | Δ (p)" for name in MEASURES.values())]
    lines = [f"| {' | '.join(header)} |", "|---" * (2 + 2 * len(MEASURES)) + "|"]
    for row in rows:
        cells = [row["method"], str(row["seeds"])]
        for name, label in MEASURES.items():
            scale, digits = (100, 2) if "%" in label else (1, 3)
            cells.append(pair(row[name], scale, digits))
            gain = row.get(f"{name}_gain")
            cells.append("" if gain is None else f"{pair(gain, scale, digits, '+')} ({p_value(row[f'{name}_p'])})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def p_value(p: float) -> str:
    return "–" if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def pair(value: tuple[float, float], scale: float, digits: int = 2, sign: str = "") -> str:
    mean, error = value
    return f"{mean * scale:{sign}.{digits}f}" + ("" if math.isnan(error) else f" ± {error * scale:.{digits}f}")


def draw(runs: dict[str, dict[int, Run]], rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Learning curves (mean over seeds) and final accuracies (mean ± standard error)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (10, max(3.5, 0.4 * len(rows)))
    figure, (curves, bars) = plt.subplots(1, 2, figsize=size, layout="constrained")
    for index, (method, by_seed) in enumerate(runs.items()):
        by_run = np.array([[100 * accuracy for _, accuracy in run["curve"]] for run in by_seed.values()])
        epochs = [epoch for epoch, _ in next(iter(by_seed.values()))["curve"]]
        curves.plot(epochs, by_run.mean(0), marker="." if len(epochs) < 20 else "", label=method, color=f"C{index}")
    for index, row in enumerate(rows):
        mean, error = (100 * value for value in row["accuracy"])
        bars.barh(row["method"], mean, xerr=None if math.isnan(error) else error, capsize=4, color=f"C{index}")
    means = [100 * row["accuracy"][0] for row in rows]
    bars.set_xlim(max(0, min(means) - 3), min(100, max(means) + 3))
    bars.invert_yaxis()
    curves.set(xlabel="epoch", ylabel="accuracy %", title=title)
    bars.set(xlabel="accuracy %, mean ± standard error (axis cut)")
    curves.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)
