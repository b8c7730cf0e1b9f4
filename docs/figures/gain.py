"""Draws gain.png, the figure of README.md, from the runs of two studies:  python docs/figures/gain.py"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


FOLDER = Path(__file__).parent
WRONG = 40
# Method, study, r, passes for each epoch, label, colour.
LINES = (
    ("plain", "wrong_labels", None, 1, "plain", "tab:gray"),
    ("plain, twice the epochs", "wrong_labels", None, 1, "plain, twice the epochs", "tab:orange"),
    ("m = 4", "wrong_labels", 0.2, 2, 'penalised, gnp_scope="micro_batch"', "tab:blue"),
    ("momentum", "cheaper_steps", 0.8, 1, 'penalised, gnp_direction="momentum"', "tab:green"),
)


def curves_of(method: str, study: str, r: float | None) -> np.ndarray:
    """Return the validation accuracy in % after each epoch, a row for each reported seed."""
    runs = json.loads((FOLDER / f"study_{study}.json").read_text(encoding="utf-8"))["runs"]
    rows = [
        run["curve"]
        for run in runs
        if run["method"] == method
        and run["settings"]["wrong"] == WRONG
        and run["gnp"].get("gnp_r") == r
        and run["seed"] < 100  # the seeds from 100 on chose r
    ]
    return 100 * np.array(rows)


def main() -> None:
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    for method, study, r, cost, label, color in LINES:
        curves = curves_of(method, study, r)
        passes = cost * np.arange(1, 1 + curves.shape[1])
        mean = curves.mean(0)
        error = curves.std(0, ddof=1) / np.sqrt(len(curves))
        axes.plot(passes, mean, color=color, label=label)
        axes.fill_between(passes, mean - error, mean + error, color=color, alpha=0.25, linewidth=0)
    axes.set(xlabel="cost, in passes over the training data", ylabel="accuracy on clean data, %", xlim=(0, 40))
    axes.set_title(f"A small ViT on digits, {WRONG}% of the training labels wrong", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="lower right")
    figure.savefig(FOLDER / "gain.png", dpi=130)


if __name__ == "__main__":
    main()
