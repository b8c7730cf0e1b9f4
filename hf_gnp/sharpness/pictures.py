"""Pictures of slices of the loss, and of what `find_r` measured. They need matplotlib, an optional dependency."""

from pathlib import Path
from typing import Any

import numpy as np


def new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("Pictures need matplotlib: pip install matplotlib.") from None
    return Figure(figsize=(width, height), layout="constrained")


def draw_slices(result: dict[str, Any], path: Path) -> None:
    """Draw the curves of `plot_loss_surface` in one panel, or a map for each checkpoint, all with one colour bar."""
    slices, axes, units = result["slices"], result["axes"], result["units"]
    losses = np.ma.masked_invalid([item["losses"] for item in slices])
    labels = []
    for item in slices:
        eigenvalues = ", ".join(f"{value:.3g}" for value in item.get("eigenvalues", []))
        labels.append(item["checkpoint"] + (f" (λ = {eigenvalues})" if eigenvalues else ""))
    if len(axes) == 1:
        figure = new_figure(7, 4.5)
        panel = figure.subplots()
        panel.plot(*axes, losses.T, marker=".", label=labels)
        panel.set(xlabel=f"x, {units[0]}", ylabel="loss")
        panel.legend()
    else:
        figure = new_figure(1 + 5 * len(slices), 4.8)
        panels = figure.subplots(1, len(slices), squeeze=False)[0]
        low, high = (losses.min(), losses.max()) if losses.count() else (0.0, 0.0)
        levels = np.linspace(low, high if high > low else low + 1.0, 25)  # a flat map has one colour
        for panel, label, grid in zip(panels, labels, losses, strict=True):
            filled = panel.contourf(*axes, grid.T, levels=levels, cmap="viridis")  # it wants the first axis last
            panel.contour(*axes, grid.T, levels=levels[::2], colors="white", linewidths=0.4)
            panel.plot(0, 0, marker="+", color="red", markersize=10)
            panel.set(xlabel=f"x, {units[0]}", ylabel=f"y, {units[1]}", title=label, aspect="equal")
            panel.locator_params(nbins=5)
        figure.colorbar(filled, ax=list(panels), label="loss", format="%.3g")
    figure.suptitle(result["caption"], fontsize=9, wrap=True)
    figure.savefig(path, dpi=120)


def draw_radii(result: dict[str, Any], limits: dict[str, float], model: str, path: Path) -> None:
    """Draw cosine, kept and the rise of `find_r` over r, with the limits of the first two and the suggestion."""
    radii, figure = result["radii"], new_figure(7, 4.5)
    panel = figure.subplots()
    for name, color in (("cosine", "tab:blue"), ("kept", "tab:green")):
        means, errors = np.array(result[name]), np.array(result[f"{name}_standard_error"])
        panel.plot(radii, means, marker=".", color=color, label=name)
        panel.fill_between(radii, means - errors, means + errors, color=color, alpha=0.2, linewidth=0)
        panel.axhline(limits[name], color=color, linewidth=0.6, linestyle=":")
    panel.set(xlabel=f"r (metric {result['metric']})", ylabel="cosine, kept", xscale="log", ylim=(-0.5, 2))
    right = panel.twinx()
    right.plot(radii, result["rise_share"], marker=".", color="tab:red", label="rise / loss (right)")
    right.set(ylabel="rise / loss", yscale="log")
    panel.axvline(result["suggestion"], color="black", linestyle="--", label=f"suggestion: {result['suggestion']:.2g}")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    loss, norm = result["loss"], result["grad_norm"]
    figure.suptitle(f"{model}: loss {loss:.3g}, gradient norm {norm:.3g}, {result['batches']} batches", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
