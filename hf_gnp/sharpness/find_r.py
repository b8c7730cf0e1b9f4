"""`find_r`: how far a penalised step should move the weights, measured before training with it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_gnp.arguments import update_arguments
from hf_gnp.engines import Shard
from hf_gnp.perturbation import find_targets

from .loss import SampleLoss, sample_loss
from .measure import check_counts, check_positive
from .pictures import draw_radii, new_figure
from .sample import WeightedBatch, choose, micro_batches, weighted


# The default grid of each metric, in powers of ten.
GRIDS = {"l2": (-3, 0), "layer": (-2, 1), "element": (-2, 1)}
POINTS = 10
# The number of batches that are drawn for each one that is measured. G is the mean gradient of the others.
OTHERS = 8
# The suggestion is the largest r at which cosine and kept are not below, and rise_share is not above these.
LIMITS = {"cosine": 0.8, "kept": 0.9, "rise": 1.0}


def find_r(
    trainer: Any,
    dataset: Any = None,
    *,
    radii: Sequence[float] | None = None,
    batches: int = 4,
    seed: int = 0,
    path: str | Path | None = None,
    metric: str | None = None,
    log: bool = True,
) -> dict[str, Any]:
    r"""
    Measure what a perturbation of radius r does to the gradient at the present weights, and suggest a `gnp_r`.

    A batch has the gradient \\(g_1\\), a perturbation e of radius r along it, and \\(g_2 = \nabla L(\theta + e)\\).

    - cosine is that of \\(g_1\\) and \\(g_2\\). It is 1 while the gradient does not turn.
    - rise is \\(L(\theta + e) - L(\theta)\\). rise_share is the mean rise over the mean loss.
    - kept is \\(\langle g_2, G\rangle / \langle g_1, G\rangle\\), with the mean gradient G of other batches: the part
      of the descent of a plain step that a step along \\(g_2\\) keeps.

    The loss is that of training, with the same dropout mask in all passes over a batch. A batch is what shares one
    perturbation in training: `per_device_train_batch_size` samples of each rank, and with the scopes "step" and "rank"
    all micro-batches of a step. The gradient is always that of all ranks. For the two scopes of a rank, call this on
    one process. Weights, buffers, random generators and gradients are afterwards bit for bit as before, also after an
    interruption. Every rank calls this.

    Cost: `batches` times (number of radii + 9) forward and backward passes over a batch, 76 by default. Memory: θ and
    five vectors, in float32, of this rank's trainable shard.

    Args:
        trainer: A [`GNPTrainer`], or any [`~transformers.Trainer`].
        dataset: The data. Default: the `train_dataset`.
        radii: Values of r. Default: ten from 0.001 to 1, or from 0.01 to 10 in the metrics "layer" and "element".
        batches: The number of batches that are measured. G is the mean over up to eight times as many.
        seed: The seed of the samples and of the dropout masks.
        path: The file of a picture, a PNG.
        metric: "l2": e = r g₁/‖g₁‖. "layer": e_l = r (‖θ_l‖/‖θ‖) g_l/‖g_l‖ for each tensor l, with ‖θ‖ that of the
            tensors that have a gradient. "element": e = r θ²g₁/‖θ ⊙ g₁‖. Default: the trainer's `gnp_metric`, or "l2".
        log: Whether the main process prints a table.

    Returns:
        radii, and for each r cosine, rise and kept, their standard errors over the batches (`cosine_standard_error`
        and so on), and rise_share. The means loss and grad_norm at θ. metric and batches. suggestion, and limited_by:
        the quantity that stops the suggestion, or "grid".

        The suggestion is the largest r up to which cosine ≥ 0.8, rise_share ≤ 1, and kept is not below 0.9 by more
        than its standard error, interpolated in log r and within the grid. kept is NaN, and does not count, where
        plain steps on a batch do not lower the loss of the others, as near a minimum.

        Begin a sweep at the suggestion. It is not the r of the best accuracy, which depends on noisy labels and on the
        length of training. It holds for the present weights only, and random weights say little.

    Raises:
        ValueError: for an argument out of range, the momentum's direction, fewer than two batches of data, a gradient
            that is 0 or not finite, or a model in fp16.
        RuntimeError, NotImplementedError: as in `measure_sharpness`.

    Example:

    ```python
    >>> trainer = GNPTrainer(model, args, train_dataset=train_dataset)
    >>> trainer.find_r(path="find_r.png")["suggestion"]
    ```
    """
    gnp_args = getattr(trainer, "gnp_args", None)
    if gnp_args is not None:
        update_arguments(gnp_args, trainer.args)  # which the user may have set since the last run
    metric = _checked_metric(gnp_args, metric)
    radii = np.logspace(*GRIDS[metric], POINTS).tolist() if radii is None else sorted(float(r) for r in radii)
    check_positive(radii=radii)
    check_counts(batches=(batches, 1))
    if path is not None:
        new_figure(1, 1)  # so that a missing matplotlib stops all ranks, and before the work
    with sample_loss(trainer, seed, training=True, name="find_r") as loss:
        targets = find_targets(trainer.model, getattr(gnp_args, "gnp_target_modules", None))
        steps = _draw_steps(trainer, dataset, OTHERS * batches, seed)
        loss.progress.total = len(steps) + len(steps[:batches]) * (1 + len(radii))
        total = loss.vectors.zeros()
        for step in steps:
            loss.batches = step
            loss.add_gradient_(total)
        rows = [_measure(loss, step, total, radii, metric, targets) for step in steps[:batches]]
    result = {"metric": metric, "batches": len(rows), "radii": radii} | _summary(np.array(rows))
    result["suggestion"], result["limited_by"] = suggest(result)
    if trainer.is_world_process_zero():
        if log:
            print(_table(result))
        if path is not None:
            draw_radii(result, LIMITS, type(trainer.model).__name__, Path(path).with_suffix(".png"))
    return result


def _checked_metric(gnp_args: Any, metric: str | None) -> str:
    """Return the metric of a trainer's arguments, unless one is given."""
    if getattr(gnp_args, "gnp_direction", "gradient") == "momentum":
        raise ValueError(
            "find_r moves along the gradient, and gnp_direction=momentum does not: call it on a trainer with "
            "gnp_direction=gradient. The momentum's r is two to four times the one that it suggests."
        )
    metric = metric or getattr(gnp_args, "gnp_metric", "l2")
    if metric not in GRIDS:
        raise ValueError(f"metric must be one of {tuple(GRIDS)}, but it is {metric!r}.")
    return metric


def _draw_steps(trainer: Any, dataset: Any, count: int, seed: int) -> list[list[WeightedBatch]]:
    """Draw this rank's micro-batches of at most `count` steps of training, from shuffled data."""
    args, dataset = trainer.args, trainer.train_dataset if dataset is None else dataset
    if isinstance(dataset, dict):
        raise ValueError(
            f"find_r needs one dataset, and these are several: give it dataset=...[{next(iter(dataset))!r}]."
        )
    scope = getattr(getattr(trainer, "gnp_args", None), "gnp_scope", "step")
    accumulation = args.gradient_accumulation_steps if scope in ("step", "rank") else 1
    size = args.per_device_train_batch_size * accumulation * trainer.accelerator.num_processes
    chosen = [] if dataset is None else choose(dataset, count * size, seed, shuffle=True)
    if len(chosen) < 2 * size:
        raise ValueError(f"find_r needs data for two steps: {2 * size} samples, but it has {len(chosen)}.")
    drawn = micro_batches(trainer, chosen, args.per_device_train_batch_size, seed)
    starts = range(0, len(chosen) // size * accumulation, accumulation)
    return [weighted(trainer, drawn[start : start + accumulation]) for start in starts]


def _measure(
    loss: SampleLoss,
    step: list[WeightedBatch],
    total: torch.Tensor,
    radii: Sequence[float],
    metric: str,
    targets: frozenset[int] | None,
) -> list[list[float]]:
    """
    Return L, ‖g₂‖, ⟨g₂, g₁⟩ and ⟨g₂, G⟩ at θ, where g₂ is g₁, and at θ + e for each r.

    Args:
        total: The sum of the gradients of all steps. Without g₁ it is along G.
    """
    vectors, rows = loss.vectors, []
    loss.batches, first, direction = step, None, total
    for r in (0.0, *radii):
        loss.move(direction, r)
        second = vectors.zeros()
        value = loss.add_gradient_(second)
        if first is None:
            first, direction = second, _direction_of(loss, second, metric, targets)
        sq_norm, product, with_total = vectors.dots([second, first, total], second).tolist()
        rows.append([value, math.sqrt(sq_norm), product, with_total - product])
    return rows


def _direction_of(
    loss: SampleLoss, gradient: torch.Tensor, metric: str, targets: frozenset[int] | None
) -> torch.Tensor:
    """Return e/r, the perturbation of radius 1 of the targets. Tensors without a gradient or with θ = 0 stay."""
    vectors, theta, direction = loss.vectors, loss.theta(), gradient.clone()
    for place, shard in vectors.placed_shards:
        if targets is not None and id(shard.parameter) not in targets:
            direction[place] = 0.0
    if metric == "element":
        direction.mul_(theta)
    elif metric == "layer":

        def number_of(shard: Shard) -> torch.Tensor:
            return torch.full((shard.weight.numel(),), shard.number)

        vectors.match_norms_(direction, theta, number_of, len(list(loss.model.parameters())))
    norm = vectors.norm(direction)
    if not 0 < norm < math.inf:
        raise ValueError(f"find_r has no direction: the norm of a batch's gradient is {norm} in the metric {metric}.")
    direction.div_(norm)
    return direction.mul_(theta) if metric == "element" else direction


def _summary(rows: np.ndarray) -> dict[str, Any]:
    """Return means over batches with standard errors, without the column of r = 0, from the rows of `_measure`."""
    losses, norms, products, descents = np.moveaxis(rows, 2, 0)
    loss, slope = float(losses[:, 0].mean()), descents[:, 0].mean()
    result: dict[str, Any] = {"loss": loss, "grad_norm": float(norms[:, 0].mean())}
    with np.errstate(all="ignore"):  # at a large r a loss or a gradient may not be finite
        # A ratio of means: of the ratios of batches, one with ⟨g₁, G⟩ near 0 would outweigh the others.
        kept = descents.mean(axis=0) / (slope if slope > 0 else math.nan)
        by_batch = {
            "cosine": products / (norms * norms[:, :1]),
            "rise": losses - losses[:, :1],
            "kept": kept + (descents - kept * descents[:, :1]) / slope,
        }
        for name, values in by_batch.items():
            result[name] = values.mean(axis=0)[1:].tolist()
            result[f"{name}_standard_error"] = (values.std(axis=0) / np.sqrt(len(rows) - 1))[1:].tolist()
    result["rise_share"] = [rise / loss for rise in result["rise"]]
    return result


def suggest(result: dict[str, Any]) -> tuple[float, str]:
    """Return the suggested r and what limits it."""
    kept = np.array(result["kept"])
    columns = {"cosine": result["cosine"], "rise": [-share for share in result["rise_share"]]}
    if not np.isnan(kept).all():
        columns["kept"] = (kept + np.nan_to_num(result["kept_standard_error"])).tolist()
    limits = LIMITS | {"rise": -LIMITS["rise"]}
    found = {name: _largest_radius(result["radii"], values, limits[name]) for name, values in columns.items()}
    name = min(found, key=lambda name: found[name])
    return found[name], name if found[name] < result["radii"][-1] else "grid"


def _largest_radius(radii: Sequence[float], values: Sequence[float], limit: float) -> float:
    """Return the largest r up to which `values` stay at or above `limit`, interpolated in log r."""
    below = next((i for i, value in enumerate(values) if not value >= limit), None)
    if below is None:
        return radii[-1]
    if below == 0 or not math.isfinite(values[below]):
        return radii[max(below - 1, 0)]
    share = (values[below - 1] - limit) / (values[below - 1] - values[below])
    return float(radii[below - 1] * (radii[below] / radii[below - 1]) ** share)


def _table(result: dict[str, Any]) -> str:
    lines = [f"loss {result['loss']:.4g}, gradient norm {result['grad_norm']:.4g}, {result['batches']} batches"]
    lines.append(f"{'r':>9} {'cosine':>16} {'rise':>20} {'rise/loss':>10} {'kept':>16}")
    for i, r in enumerate(result["radii"]):
        cosine, rise, kept = (
            f"{result[name][i]:{form}} ± {result[f'{name}_standard_error'][i]:.1g}"
            for name, form in (("cosine", ".3f"), ("rise", ".4g"), ("kept", ".2f"))
        )
        lines.append(f"{r:>9.3g} {cosine:>16} {rise:>20} {result['rise_share'][i]:>10.1%} {kept:>16}")
    setting = f"gnp_r={result['suggestion']:.2g} with gnp_metric={result['metric']}"
    lines.append(f"suggestion: {setting} (limited by {result['limited_by']})")
    return "\n".join(lines)
