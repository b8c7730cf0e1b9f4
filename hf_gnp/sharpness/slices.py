"""Directions through the space of weights, and the loss along them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from .loss import SampleLoss
from .vectors import precise


def filter_normalized_(direction: torch.Tensor, loss: SampleLoss) -> torch.Tensor:
    """
    Scale each filter of a direction, the row of a weight with two or more dimensions, to the norm of the same filter
    of the weights; set parameters of one dimension to 0. So models whose weights differ in scale can be compared.

    Reference:
        Li et al., "Visualizing the loss landscape of neural nets", NeurIPS 2018, arXiv 1712.09913.
    """
    vectors, shapes = loss.vectors, [whole_shape(parameter) for parameter in loss.model.parameters()]
    rows = [shape[0] if len(shape) > 1 else 0 for shape in shapes]
    first_row = np.cumsum([0, *rows])
    sq_norms = torch.zeros(2, first_row[-1], dtype=precise(vectors.device), device=vectors.device)
    places: list[Any] = []
    origin = loss.origin()
    for part, shard in zip(vectors.slices, vectors.held, strict=True):
        number = shard.place.parameter
        if rows[number] == 0:
            places.append(None)
            continue
        indices = shard.place.indices(vectors.device).reshape(-1)
        places.append(indices // math.prod(shapes[number][1:]) + int(first_row[number]))
        for sums, vector in zip(sq_norms, (origin, direction), strict=True):
            sums.index_add_(0, places[-1], vector[part].to(sums.dtype).square() / shard.copies)
    wanted, given = vectors.sum_over_ranks(sq_norms).sqrt().to(vectors.device)
    scales = torch.where(given > 0, wanted / given, 0.0)
    for part, place in zip(vectors.slices, places, strict=True):
        direction[part] *= 0.0 if place is None else scales[place].to(direction.dtype)
    return direction


def whole_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The shape of the whole parameter, where ZeRO-3 leaves an empty one."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def to_checkpoint(loss: SampleLoss, folder: str) -> torch.Tensor:
    """The way from θ to the weights that are saved in `folder`: those of the trainable parameters."""
    vectors, weights = loss.vectors, _saved_weights(loss.trainer.model, folder)
    way = vectors.theta().neg_()
    local = [
        weights[shard.place.parameter].reshape(-1)[shard.place.indices(torch.device("cpu")).reshape(-1)]
        for shard in vectors.held
    ]
    vectors.add_(way, local)
    return way


def _saved_weights(model: torch.nn.Module, folder: str) -> list[torch.Tensor]:
    """The parameters saved in `folder`, whole, in the model's order."""
    if isinstance(model, PreTrainedModel):
        return [parameter.detach() for parameter in type(model).from_pretrained(folder).parameters()]
    file = Path(folder) / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder} has no model.safetensors: give folders that save_model or a checkpoint wrote.")
    saved = load_file(file)
    return [saved[name] for name, _ in model.named_parameters()]


def losses_along(loss: SampleLoss, directions: Sequence[torch.Tensor], axes: Sequence[np.ndarray]) -> np.ndarray:
    """
    L(origin + x₁ d₁ + x₂ d₂ …) on a grid.

    Args:
        directions: One for each dimension of the grid.
        axes: The coordinates along each.

    Returns:
        The losses, of shape (len(axes[0]), …).
    """
    grid = np.empty([len(axis) for axis in axes])
    for index in np.ndindex(grid.shape):
        point: Any = sum(float(axis[i]) * d for axis, i, d in zip(axes, index, directions, strict=True))
        loss.move(point)
        grid[index] = loss.value()
    return grid


def name_of(checkpoint: Any) -> str:
    path = Path(str(checkpoint))
    return f"{path.parent.name}/{path.name}" if path.name.startswith("checkpoint-") else path.name
