"""Pictures of the loss around trained weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .hessian import DifferenceHessian
from .loss import SampleLoss, sample_loss
from .measure import eigenpairs_of
from .slices import filter_normalized_, losses_along, name_of, to_checkpoint


DIRECTIONS = ("filters", "eigenvectors", "line")
UNITS = {
    "filters": ("filter norms along a random direction", "filter norms along another"),
    "eigenvectors": ("‖Δθ‖ along eigenvector 1", "‖Δθ‖ along eigenvector 2"),
    "line": ("share of the way",),
}


def plot_loss_surface(
    trainer: Any,
    path: str | Path,
    checkpoints: Sequence[str | Path] = (),
    *,
    directions: str = "filters",
    dimensions: int = 1,
    distance: float = 1.0,
    points: int = 21,
    dataset: Any = None,
    samples: int = 256,
    tolerance: float = 1e-2,
    max_products: int = 40,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Draw slices of the loss around one or several checkpoints of the trainer's model, as PNG and as JSON beside it.

    The loss is that of `measure_sharpness`, at weights θ + x d (+ y d'). Every rank calls this, on any engine for the
    trainer's own weights. Buffers and frozen weights are those of the trainer's model, which comes back as it was.

    Args:
        path: Of the PNG; the JSON has the suffix .json.
        checkpoints: Folders with other weights of the same model, to be drawn instead of the trainer's own. They are
            read whole on each process, which DeepSpeed is refused for.
        directions: "filters": random ones, each filter as long as that of the weights, comparable between models;
            "eigenvectors": of the largest eigenvalues, each checkpoint's own; "line": from one checkpoint to another
            (or from the trainer's weights to one), 0 and 1 being the two.
        dimensions: 1, a curve for each checkpoint; or 2, a map for each. A line has 1.
        distance: How far to go to each side.
        points: In each dimension: a map takes the square of it in forward passes over the sample.
        dataset, samples, seed: As in `measure_sharpness`.
        tolerance, max_products: For eigenvectors, as there.

    Returns:
        What the JSON has: caption, axes and their units, and for each checkpoint its name and losses, and the
        eigenvalues of the directions.

    Raises:
        ValueError: for an argument out of range.
        NotImplementedError: for checkpoints under DeepSpeed.

    Reference:
        Li et al., "Visualizing the loss landscape of neural nets", NeurIPS 2018, arXiv 1712.09913.

    Example:

    ```python
    >>> plot_loss_surface(trainer, "surface.png", ["plain", "penalised"], directions="eigenvectors", dimensions=2)
    ```
    """
    _check(trainer, checkpoints, directions, dimensions, points, distance)
    slices = []
    with sample_loss(trainer, dataset, samples, seed) as loss:
        axes = [np.linspace(-distance, distance, points)] * dimensions
        if directions == "line":
            axes = [np.linspace(-distance / 4, 1 + distance / 4, points)]
            slices.append(_along_line(loss, checkpoints, axes))
        else:
            own: list[Any] = [None]
            for checkpoint in checkpoints or own:
                loss.set_origin(None if checkpoint is None else to_checkpoint(loss, str(checkpoint)))
                name = "the trainer's weights" if checkpoint is None else name_of(checkpoint)
                if directions == "eigenvectors":
                    gradient = loss.vectors.zeros()
                    loss.add_gradient_(gradient)
                    pairs = eigenpairs_of(DifferenceHessian(loss, gradient), dimensions, tolerance, max_products, seed)
                    found = {"eigenvalues": pairs.values}
                    vectors = [_uphill_(vector, gradient, loss) for vector in pairs.vectors[:dimensions]]
                else:
                    found = {}
                    vectors = [filter_normalized_(loss.vectors.random(seed, 3, i), loss) for i in range(dimensions)]
                slices.append({"checkpoint": name, "losses": losses_along(loss, vectors, axes).tolist()} | found)
    result = {
        "caption": _caption(trainer, directions, dimensions, loss.samples, seed, slices),
        "directions": directions,
        "units": list(UNITS[directions][:dimensions]),
        "axes": [axis.tolist() for axis in axes],
        "slices": slices,
    }
    if trainer.is_world_process_zero():
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in result.items())
        path.with_suffix(".json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        draw(result, path.with_suffix(".png"))
    return result


def _check(
    trainer: Any, checkpoints: Sequence[Any], directions: str, dimensions: int, points: int, distance: float
) -> None:
    if directions not in DIRECTIONS:
        raise ValueError(f"directions must be one of {DIRECTIONS}, but it is {directions!r}.")
    if dimensions not in (1, 2) or points < 2 or not distance > 0:
        raise ValueError(
            f"dimensions must be 1 or 2, points at least 2 and distance positive: {dimensions}, {points}, {distance}."
        )
    if directions == "line" and (dimensions != 1 or len(checkpoints) not in (1, 2)):
        raise ValueError("A line has one dimension and two ends: give one or two checkpoints.")
    if checkpoints and trainer.is_deepspeed_enabled:
        raise NotImplementedError("Checkpoints are read whole, not into ZeRO's shards: use one process, DDP or FSDP2.")


def _along_line(loss: SampleLoss, checkpoints: Sequence[Any], axes: Sequence[np.ndarray]) -> dict[str, Any]:
    ways = [to_checkpoint(loss, str(checkpoint)) for checkpoint in checkpoints]
    names = [name_of(checkpoint) for checkpoint in checkpoints]
    if len(ways) == 2:
        loss.set_origin(ways[0])
        ways[1].sub_(ways[0])
    else:
        names.insert(0, "the trainer's weights")
    return {
        "checkpoint": f"{names[0]} (0) to {names[1]} (1)",
        "distance": loss.vectors.norm(ways[-1]),
        "losses": losses_along(loss, [ways[-1]], axes).tolist(),
    }


def _uphill_(vector: torch.Tensor, gradient: torch.Tensor, loss: SampleLoss) -> torch.Tensor:
    """An eigenvector has no sign of its own; two pictures should show the same."""
    return vector.neg_() if loss.vectors.dot(vector, gradient) < 0 else vector


def _caption(
    trainer: Any, directions: str, dimensions: int, samples: int, seed: int, slices: Sequence[dict[str, Any]]
) -> str:
    kinds = {
        "filters": f"{dimensions} filter-normalised random direction{'s' if dimensions > 1 else ''} (seed {seed})",
        "eigenvectors": f"the eigenvector{'s' if dimensions > 1 else ''} of the largest eigenvalues of the Hessian",
        "line": f"the line between two checkpoints, ‖Δθ‖ = {slices[0].get('distance', 0):.3g} apart",
    }
    return f"Loss of {type(trainer.model).__name__}, mean over {samples} samples, along {kinds[directions]}"


def draw(result: dict[str, Any], path: Path) -> None:
    """The curves in one picture, or a map for each checkpoint with one colour bar."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("Pictures need matplotlib: pip install 'hf_gnp[sharpness]'.") from None
    slices, axes, units = result["slices"], result["axes"], result["units"]
    if len(axes) == 1:
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        (panel,) = figure.subplots(1, 1, squeeze=False)[0]
        for item in slices:
            panel.plot(axes[0], item["losses"], marker=".", label=_label(item))
        panel.set(xlabel=f"x, {units[0]}", ylabel="loss")
        panel.legend()
    else:
        figure = Figure(figsize=(1 + 5 * len(slices), 4.8), layout="constrained")
        panels = figure.subplots(1, len(slices), squeeze=False)[0]
        losses = np.array([item["losses"] for item in slices])
        finite = losses[np.isfinite(losses)]
        low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
        levels = np.linspace(low, high if high > low else low + 1e-12, 25)
        for panel, item, grid in zip(panels, slices, losses, strict=True):
            # The first axis is x: contourf wants it last.
            filled = panel.contourf(*axes, grid.T, levels=levels, cmap="viridis")
            panel.contour(*axes, grid.T, levels=levels[::2], colors="white", linewidths=0.4)
            panel.plot(0, 0, marker="+", color="red", markersize=10)
            panel.set(xlabel=f"x, {units[0]}", ylabel=f"y, {units[1]}", title=_label(item))
            panel.locator_params(nbins=5)
            panel.set_aspect("equal")
        figure.colorbar(filled, ax=list(panels), label="loss", format="%.3g")
    figure.suptitle(result["caption"], fontsize=9, wrap=True)
    figure.savefig(path, dpi=120)


def _label(item: dict[str, Any]) -> str:
    eigenvalues = ", ".join(f"{value:.3g}" for value in item.get("eigenvalues", []))
    return item["checkpoint"] + (f" (λ = {eigenvalues})" if eigenvalues else "")
