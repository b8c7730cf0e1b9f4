"""Draws step.svg, the figure of docs/how_it_works.md:  python docs/figures/step.py"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure


BOXES = (
    ("first pass, at θ", "each micro-batch as in Trainer;\ninputs and random states are recorded", "tab:blue"),
    ("‖g₁‖", "squares of this rank's shard,\none all-reduce", "tab:gray"),
    ("perturb", "θ + r g₁/‖g₁‖ on each shard,\nmade visible to the forward", "tab:orange"),
    ("second pass, at θ + e", "the same micro-batches,\nthe same dropout masks", "tab:orange"),
    ("restore and mix", "θ bit for bit;\n(1 − α) g₁ + α g₂", "tab:blue"),
    ("step", "clipping, optimizer, schedule,\nlogs: as in Trainer", "tab:gray"),
)


def draw_geometry(axes) -> None:
    """Two arrows on the contours of a quadratic loss: up along the gradient, and the step along the mixed one."""
    x, y = np.meshgrid(np.linspace(-2.2, 2.6, 200), np.linspace(-1.6, 1.9, 200))
    axes.contour(x, y, 0.25 * x**2 + y**2, levels=[0.1, 0.5, 1.1, 1.9, 2.9], colors="lightgray")
    theta, alpha, r, rate = np.array([1.1, 0.8]), 0.8, 0.6, 0.45
    curvature = np.array([0.5, 2.0])
    g1 = curvature * theta
    moved = theta + r * g1 / np.linalg.norm(g1)
    g2 = curvature * moved
    mixed = (1 - alpha) * g1 + alpha * g2
    arrows = (
        (theta, moved, "tab:orange"),
        (theta, theta - rate * g1, "tab:gray"),
        (theta, theta - rate * mixed, "tab:blue"),
    )
    for start, end, color in arrows:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color, "lw": 2})
    axes.plot(*theta, "ko", markersize=5)
    axes.plot(*moved, "o", color="tab:orange", markersize=5)
    axes.annotate("θ", theta, (8, -4), textcoords="offset points")
    axes.annotate("θ + e,  e = r g₁/‖g₁‖", moved, (8, 0), textcoords="offset points", color="tab:orange")
    axes.annotate("plain step", theta - rate * g1, (-62, 2), textcoords="offset points", color="gray")
    axes.annotate("penalised step", theta - rate * mixed, (-30, -14), textcoords="offset points", color="tab:blue")
    axes.set(xlim=(-2.2, 2.6), ylim=(-1.6, 1.9), aspect="equal")
    axes.axis("off")


def draw_order(axes) -> None:
    for row, (title, text, color) in enumerate(BOXES):
        y = len(BOXES) - row
        box = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": color}
        axes.text(0.27, y, f"{row + 1}  {title}", ha="center", va="center", bbox=box, fontweight="bold")
        axes.text(0.55, y, text, ha="left", va="center", fontsize=9)
        if row:
            axes.annotate("", (0.27, y + 0.32), (0.27, y + 0.68), arrowprops={"arrowstyle": "->", "color": "gray"})
    axes.set(xlim=(0, 1.1), ylim=(0.4, len(BOXES) + 0.6))
    axes.axis("off")


def main() -> None:
    # Text as text, and no random ids: the file can be read, searched and compared.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "step"}
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    order, geometry = figure.subplots(1, 2, width_ratios=(1.15, 1))
    draw_order(order)
    draw_geometry(geometry)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
