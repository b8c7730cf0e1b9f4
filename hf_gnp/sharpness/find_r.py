"""`find_r`: how far a penalised step should move the weights, measured before training with it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_gnp.arguments import GNPArguments, update_arguments
from hf_gnp.perturbation import find_targets

from .loss import SampleLoss, sample_loss
from .measure import check_counts, check_positive
from .pictures import draw_radii, new_figure
from .sample import WeightedBatch, draw, weighted


# The default grid of each metric: the first and last power of ten, and the number of points.
GRIDS = {"l2": (-3, 0, 10), "layer": (-2, 1, 10), "element": (-2, 1, 10)}
# The number of batches that are drawn for each one that is measured. G is the mean gradient of the others.
OTHERS = 8
# The suggestion is the largest r at which cosine and kept are not below, and rise_share is not above these.
LIMITS = {"cosine": 0.8, "rise": 1.0, "kept": 0.9}


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
    Measure what a perturbation e of radius r does to the gradient at the present weights, and suggest a `gnp_r`.

    A batch has the gradients \\(g_1 = \nabla L(\theta)\\), along which e points, and \\(g_2 = \nabla L(\theta + e)\\).

    - cosine is that of \\(g_1\\) and \\(g_2\\). It is 1 while the gradient does not turn.
    - rise is \\(L(\theta + e) - L(\theta)\\). rise_share is the mean rise over the mean loss.
    - kept is \\(\langle g_2, G\rangle / \langle g_1, G\rangle\\), with the mean gradient G of other batches: the part
      of the descent of a plain step that a step along \\(g_2\\) keeps.

    L is the loss of training, with the same dropout mask in all passes over a batch. A batch is what shares one
    perturbation in training: `per_device_train_batch_size` samples of each rank, and with the scopes "step" and "rank"
    all micro-batches of a step. Gradients are those of all ranks, so for the two scopes of a rank use one process.
    State is restored as by `measure_sharpness`. Every rank calls this.

    Cost: `batches` times (number of radii + 9) forward and backward passes over a batch, 76 by default. Memory: θ and
    five vectors, in float32, of this rank's trainable shard.

    Args:
        trainer: A [`GNPTrainer`], or any [`~transformers.Trainer`].
        dataset: The data, which `data_collator` makes into batches. Default: the `train_dataset`.
        radii: Values of r. Default: ten from 0.001 to 1, or from 0.01 to 10 in the metrics "layer" and "element".
        batches: The number of batches that are measured. G is the mean over up to eight times as many.
        seed: The seed of the samples and of the dropout masks.
        path: The file of a picture, a PNG.
        metric: "l2": e = r g₁/‖g₁‖. "layer": e_l = r (‖θ_l‖/‖θ‖) g_l/‖g_l‖ for each tensor l, with ‖θ‖ that of the
            tensors that have a gradient. "element": e = r θ²g₁/‖θ ⊙ g₁‖. Default: the trainer's `gnp_metric`, or "l2".
        log: Whether the main process prints a table.

    Returns:
        radii, and for each r cosine, rise, kept, their standard errors over the batches (`cosine_standard_error` and
        so on), and rise_share. The means loss and grad_norm at θ. metric and batches. suggestion, and limited_by: the
        quantity that stops the suggestion, or "grid".

        The suggestion is the largest r up to which cosine ≥ 0.8, rise_share ≤ 1, and kept is not below 0.9 by more
        than its standard error, interpolated in log r within the grid. kept is NaN, and does not count, where plain
        steps do not lower the loss of other batches, as near a minimum. The suggestion is for the present weights,
        and not the r of the best accuracy: begin a sweep there.

    Raises:
        ValueError: for an argument out of range, the momentum's direction, data for fewer than two batches, a
            gradient that is 0 or not finite, or a model in fp16.
        RuntimeError, NotImplementedError: as in `measure_sharpness`.
    """
    gnp_args = getattr(trainer, "gnp_args", None) or GNPArguments(gnp_metric="l2")
    update_arguments(gnp_args, trainer.args)  # which the user may have set since the last run
    if gnp_args.gnp_direction == "momentum":
        raise ValueError(
            "find_r moves along the gradient, and gnp_direction=momentum does not: call it on a trainer with "
            "gnp_direction=gradient. The momentum's r is two to four times the one that it suggests."
        )
    metric = metric or gnp_args.gnp_metric
    if metric not in GRIDS:
        raise ValueError(f"metric must be one of {tuple(GRIDS)}, but it is {metric!r}.")
    radii = sorted(float(r) for r in np.atleast_1d(np.logspace(*GRIDS[metric]) if radii is None else radii))
    check_positive(radii=radii)
    check_counts(batches=(batches, 1))
    if path is not None:
        new_figure(1, 1)  # so that a missing matplotlib stops all ranks, and before the work
    with sample_loss(trainer, seed, training=True, name="find_r") as loss:
        targets = find_targets(trainer.model, gnp_args.gnp_target_modules)
        steps = _draw_steps(trainer, dataset, OTHERS * batches, seed, gnp_args.gnp_scope)
        loss.progress.total = len(steps) + len(steps[:batches]) * (1 + len(radii))
        total, rows = loss.vectors.zeros(), []
        for step in steps:
            loss.batches = step
            loss.add_gradient_(total)
        for step in steps[:batches]:
            loss.batches = step
            rows.append(_measure(loss, total, radii, metric, targets))
    result = {"metric": metric, "batches": len(rows), "radii": radii} | _summary(np.array(rows))
    result["suggestion"], result["limited_by"] = suggest(result)
    if trainer.is_world_process_zero():
        if log:
            print(_table(result))
        if path is not None:
            draw_radii(result, LIMITS, type(trainer.model).__name__, Path(path).with_suffix(".png"))
    return result


def _draw_steps(trainer: Any, dataset: Any, count: int, seed: int, scope: str) -> list[list[WeightedBatch]]:
    """Draw this rank's micro-batches of at most `count` steps of training, from shuffled data."""
    args, dataset = trainer.args, trainer.train_dataset if dataset is None else dataset
    if isinstance(dataset, dict):
        raise ValueError(f"find_r takes one dataset, not several: give it dataset=...[{next(iter(dataset))!r}].")
    accumulation = args.gradient_accumulation_steps if scope in ("step", "rank") else 1
    size = args.per_device_train_batch_size * accumulation * trainer.accelerator.num_processes
    dataset = [] if dataset is None else dataset
    drawn, found = draw(trainer, dataset, count * size, args.per_device_train_batch_size, seed, shuffle=True)
    if found < 2 * size:
        raise ValueError(f"find_r needs data for two steps: {2 * size} samples, but it has {found}.")
    starts = range(0, found // size * accumulation, accumulation)
    return [weighted(trainer, drawn[start : start + accumulation]) for start in starts]


def _measure(
    loss: SampleLoss, total: torch.Tensor, radii: Sequence[float], metric: str, targets: frozenset[int] | None
) -> list[list[float]]:
    """Return L, ‖g₂‖, ⟨g₂, g₁⟩ and ⟨g₂, G⟩ at θ, where g₂ is g₁, and at θ + e for each r."""
    vectors, rows, first, direction = loss.vectors, [], None, total
    for r in (0.0, *radii):
        loss.move(direction, r)
        second = vectors.zeros()
        value = loss.add_gradient_(second)
        if first is None:
            first, direction = second, _direction_of(loss, second, metric, targets)
        # The total is g₁ and the gradients of all other steps, which are along G.
        sq_norm, product, with_total = vectors.dots([second, first, total], second).tolist()
        rows.append([value, math.sqrt(sq_norm), product, with_total - product])
    return rows


def _direction_of(loss: SampleLoss, first: torch.Tensor, metric: str, targets: frozenset[int] | None) -> torch.Tensor:
    """Return e/r, the perturbation of radius 1 of the targets. Tensors without a gradient or with θ = 0 stay."""
    vectors, theta, direction = loss.vectors, loss.theta(), first.clone()
    for part, shard in zip(vectors.parts(direction), vectors.shards, strict=True):
        if targets is not None and id(shard.parameter) not in targets:
            part.zero_()
    if metric == "layer":
        vectors.match_norms_(direction, theta)
    factor = theta if metric == "element" else 1.0
    norm = vectors.norm(direction.mul_(factor))
    if not 0 < norm < math.inf:
        raise ValueError(f"find_r has no direction: a batch's gradient has the norm {norm} in the metric {metric}.")
    return direction.div_(norm).mul_(factor)


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
        result["rise_share"] = (np.array(result["rise"]) / loss).tolist()
    return result


def suggest(result: dict[str, Any]) -> tuple[float, str]:
    """Return the suggested r and what limits it."""
    margins = {
        "cosine": np.subtract(result["cosine"], LIMITS["cosine"]),
        "rise": np.subtract(LIMITS["rise"], result["rise_share"]),
        "kept": np.subtract(result["kept"], LIMITS["kept"]) + np.nan_to_num(result["kept_standard_error"]),
    }
    if np.isnan(result["kept"]).all():
        del margins["kept"]
    radii, found = result["radii"], {}
    padded = [radii[0], *radii, radii[-1]]
    for name, margin in margins.items():
        margin = np.nan_to_num([0.0, *margin, -math.inf], nan=-math.inf, neginf=-math.inf)
        i = int(np.argmax(margin < 0))
        share = margin[i - 1] / (margin[i - 1] - margin[i])
        found[name] = float(padded[i - 1] * (padded[i] / padded[i - 1]) ** share)
    name = min(found, key=lambda name: found[name])
    return found[name], name if found[name] < radii[-1] else "grid"


def _table(result: dict[str, Any]) -> str:
    lines = [f"loss {result['loss']:.4g}, gradient norm {result['grad_norm']:.4g}, {result['batches']} batches"]
    lines.append(f"{'r':>9} {'cosine':>16} {'rise':>20} {'rise/loss':>10} {'kept':>16}")
    for i, r in enumerate(result["radii"]):
        cosine, rise, kept = (
            f"{result[name][i]:{form}} ± {result[f'{name}_standard_error'][i]:.1g}"
            for name, form in (("cosine", ".3f"), ("rise", ".4g"), ("kept", ".2f"))
        )
        lines.append(f"{r:>9.3g} {cosine:>16} {rise:>20} {result['rise_share'][i]:>10.1%} {kept:>16}")
    suggestion, limit = result["suggestion"], result["limited_by"]
    note = ", and may be too large: give smaller radii" if suggestion == result["radii"][0] else ""
    lines.append(f"suggestion: gnp_r={suggestion:.2g} with gnp_metric={result['metric']} (limited by {limit}{note})")
    return "\n".join(lines)
