"""Slices of the loss around trained weights, along a line or in a plane."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from hf_gnp.engines import whole_shape

from .hessian import Hessian, top_eigenpairs
from .loss import SampleLoss, sample_loss
from .pictures import draw_slices
from .sample import draw_sample


# The unit of each axis, for each kind of directions.
UNITS = {
    "filters": ["filter norms along a random direction", "filter norms along another"],
    "eigenvectors": ["‖Δθ‖ along eigenvector 1", "‖Δθ‖ along eigenvector 2"],
    "line": ["share of the way"],
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
    Draw slices of the loss of `measure_sharpness` around one or several checkpoints of the trainer's model.

    Each point is at weights θ + x d (+ y d'). Buffers and frozen weights are the trainer's. State is restored as by
    `measure_sharpness`. Every rank calls this.

    Args:
        path: The file of the PNG. A file with the suffix .json gets the numbers.
        checkpoints: Folders with weights of the same model, drawn instead of the trainer's own. Each process reads
            them whole, so DeepSpeed is refused.
        directions: "filters": random directions whose filters are as long as those of the weights, comparable between
            models. "eigenvectors": those of the largest eigenvalues. "line": from one checkpoint (0), or the
            trainer's weights, to another (1).
        dimensions: 1 for curves, 2 for maps. A line has 1.
        distance: How far each axis extends from the weights. A line extends by a quarter of it beyond each end.
        points: The number of points in each dimension. Each costs a forward pass over the sample.
        dataset, samples, tolerance, max_products, seed: As in `measure_sharpness`.

    Returns:
        The contents of the JSON: caption, axes, units, and for each slice its checkpoint, losses and eigenvalues.

    Raises:
        ValueError: for an argument out of range.
        NotImplementedError: for checkpoints under DeepSpeed.

    Reference:
        Li et al., "Visualizing the loss landscape of neural nets", NeurIPS 2018, arXiv 1712.09913.
    """
    if directions not in UNITS:
        raise ValueError(f"directions must be one of {tuple(UNITS)}, but it is {directions!r}.")
    if dimensions not in (1, 2) or points < 2 or not distance > 0:
        raise ValueError(f"{dimensions=} must be 1 or 2, {points=} at least 2, and {distance=} positive.")
    if directions == "line" and (dimensions != 1 or len(checkpoints) not in (1, 2)):
        raise ValueError("A line has one dimension and two ends: give one or two checkpoints.")
    if checkpoints and trainer.is_deepspeed_enabled:
        raise NotImplementedError("Checkpoints are read whole, not into ZeRO's shards: use one process, DDP or FSDP2.")
    origins: list[Any] = list(checkpoints) or [None]  # None stands for the trainer's own weights
    axes = [np.linspace(-distance, distance, points).tolist()] * dimensions
    if directions == "line":
        origins = [None, *checkpoints][-2:-1]
        axes = [np.linspace(-distance / 4, 1 + distance / 4, points).tolist()]
    slices = []
    with sample_loss(trainer, seed) as loss:
        loss.batches, size = draw_sample(trainer, dataset, samples, seed)
        own = loss.origin
        for origin in origins:
            loss.origin = own if origin is None else _weights_in(origin, loss)
            item: dict[str, Any] = {"checkpoint": _name(origin)}
            if directions == "line":
                vectors = [loss.vectors.add_(loss.theta().neg_(), _weights_in(checkpoints[-1], loss))]
                length = loss.vectors.norm(vectors[0])
                item = {"checkpoint": f"{_name(origin)} (0) to {_name(checkpoints[-1])} (1)", "distance": length}
                along = f"the line between two checkpoints, ‖Δθ‖ = {length:.3g} apart"
            elif directions == "eigenvectors":
                item["eigenvalues"], vectors = _eigenvectors(loss, dimensions, tolerance, max_products, seed)
                along = "eigenvectors of the largest eigenvalues of the Hessian"
            else:
                vectors = [filter_normalized_(loss.vectors.random(seed, 3, i), loss) for i in range(dimensions)]
                along = f"filter-normalised random directions (seed {seed})"
            losses = []
            for place in itertools.product(*axes):
                loss.move(sum(x * vector for x, vector in zip(place, vectors, strict=True)))
                losses.append(loss.value())
            slices.append(item | {"losses": np.reshape(losses, [points] * dimensions).tolist()})
    result = {
        "caption": f"Loss of {type(trainer.model).__name__}, mean over {size} samples, along {along}",
        "directions": directions,
        "units": UNITS[directions][:dimensions],
        "axes": axes,
        "slices": slices,
    }
    if trainer.is_world_process_zero():
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(result), encoding="utf-8")
        draw_slices(result, path.with_suffix(".png"))
    return result


def _eigenvectors(loss: SampleLoss, count: int, tolerance: float, max_products: int, seed: int) -> tuple[Any, Any]:
    gradient = loss.vectors.zeros()
    loss.move(gradient)
    loss.add_gradient_(gradient)
    pairs = top_eigenpairs(Hessian(loss, gradient, "differences", None), count, tolerance, max_products, seed)
    for vector in pairs.vectors[:count]:  # it has no sign: let the loss rise to the right, so that pictures compare
        if loss.vectors.dot(vector, gradient) < 0:
            vector.neg_()
    return pairs.values, pairs.vectors[:count]


def filter_normalized_(direction: torch.Tensor, loss: SampleLoss) -> torch.Tensor:
    """Scale each row of a matrix or kernel to the norm of that row of the weights. Other parameters become 0."""
    for part, shard in zip(loss.vectors.parts(direction), loss.vectors.shards, strict=True):
        if len(whole_shape(shard.parameter)) < 2:
            part.zero_()
    loss.vectors.match_norms_(direction, loss.theta(), by_rows=True)
    return direction


def _weights_in(folder: str | Path, loss: SampleLoss) -> list[torch.Tensor]:
    """Return this rank's part of the trainable weights that are saved in a folder."""
    model, named, missing = loss.trainer.model, {}, set()
    if isinstance(model, PreTrainedModel):
        pair: Any = type(model).from_pretrained(folder, output_loading_info=True)
        named, missing = dict(pair[0].named_parameters()), {*pair[1]["missing_keys"], *pair[1]["mismatched_keys"]}
    elif (file := Path(folder) / "model.safetensors").is_file():
        named = load_file(file)
    names = [name for name, _ in model.named_parameters()]
    missing |= set(names) - named.keys()
    if missing:
        raise ValueError(
            f"{folder} has not all weights of {type(model).__name__}, such as {min(missing)}: give folders that "
            "save_model or a checkpoint wrote, of a whole model as its configuration makes it. Save PEFT's models "
            "after merge_and_unload."
        )
    pairs = [(named[names[shard.number]].detach(), shard) for shard in loss.vectors.shards]
    return [shard.part_of(whole).to(shard.weight.device) for whole, shard in pairs]


def _name(checkpoint: Any) -> str:
    path = Path(checkpoint or "the trainer's weights")
    return f"{path.parent.name}/{path.name}" if path.name.startswith("checkpoint-") else path.name
