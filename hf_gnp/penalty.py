"""
The math of the penalised step, on lists of local tensors: no collective, no engine, no Trainer.

    g₁ = ∇L(θ)
    g₂ = ∇L(θ + r g₁/‖g₁‖)
    g  = (1-α) g₁ + α g₂        = ∇L(θ) + λ H(θ) g₁/‖g₁‖ + O(λ r)        λ = α r

`g` is made without a second gradient buffer: g₁ is scaled by (1-α)/α, the second pass accumulates g₂ into it, and
the sum is scaled by α.

Reference: Zhao, Zhang and Hu, ICML 2022, arXiv 2202.03599, equations (6) to (9).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch

from hf_gnp.moments import SecondMoment
from hf_gnp.rounding import Place, round_stochastically, uniform_noise


# At most so many elements of a list are moved together, where moving them takes memory.
PART = 2**22

# What torch._foreach_* take.
Tensors = list[torch.Tensor] | tuple[torch.Tensor, ...]

Item = TypeVar("Item")


def local_sq_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    The sum of squares of all elements of local tensors.

    Args:
        tensors: Local tensors of any shapes, floating dtypes and devices; empty ones count as 0.

    Returns:
        A scalar on the device of the first tensor (on the CPU for an empty list), in float32, or in float64 where a
        tensor is: squares of 16-bit gradients neither overflow nor round.
    """
    by_kind = defaultdict(list)
    for tensor in tensors:
        by_kind[tensor.device, torch.promote_types(tensor.dtype, torch.float32)].append(tensor)
    total = torch.zeros((), device=tensors[0].device if tensors else "cpu")
    for (_, dtype), group in by_kind.items():
        norms = torch.stack(torch._foreach_norm(group, 2, dtype=dtype))
        total = total + norms.square().sum().to(total.device)
    return total


def in_groups(items: Iterable[Item], size_of: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """The items in order, as many together as have at most `limit` in all; a larger one by itself."""
    group: list[Item] = []
    size = 0
    for item in items:
        if group and size + size_of(item) > limit:
            yield group
            group, size = [], 0
        group.append(item)
        size += size_of(item)
    if group:
        yield group


def local_dot(tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of products of all elements of local tensors of the same shapes pairwise: a scalar in float32."""
    total = torch.zeros((), device=tensors[0].device if tensors else "cpu")
    for tensor, other in zip(tensors, others, strict=True):
        total = total + torch.dot(tensor.flatten().float(), other.flatten().float()).to(total.device)
    return total


class _Part(NamedTuple):
    """A few rows of one tensor, or all: as much of it as is moved at once."""

    weight: torch.Tensor
    gradient: torch.Tensor
    master: torch.Tensor
    place: Place
    second_moment: SecondMoment | None


def move_(
    weights: Tensors,
    gradients: Tensors,
    masters: Tensors,
    scale: float,
    adaptive: bool = False,
    noise_seed: int | None = None,
    places: Sequence[Place] | None = None,
    measure: bool = False,
    second_moments: Sequence[SecondMoment] | None = None,
) -> torch.Tensor | None:
    """
    Set `weights = masters + e` with `e = scale * gradients`, or `scale * masters² * gradients` if adaptive, or
    `scale * D⁻¹ gradients` if second moments are given, rounded once to the dtype of the weights.

    Args:
        weights, gradients, masters: Local tensors, of the same shapes pairwise, each list with its own dtype and
            device. `masters` may be the weights themselves.
        noise_seed: If given, 16-bit weights are rounded stochastically; equal on all ranks.
        places: Where each tensor lies in its whole parameter, for the noise; None: each is whole.
        measure: Whether to compare the move with what rounding left of it.
        second_moments: One for each tensor.

    Returns:
        If measured, the local sums ⟨weights - weights before, e⟩ and ‖e‖², in float32; else None.
    """
    is_in_place = all(weight is master for weight, master in zip(weights, masters, strict=True))
    if all(weight.dtype.itemsize > 2 for weight in weights):
        noise_seed = None
    if is_in_place and not (adaptive or second_moments or measure) and noise_seed is None:
        if weights:
            torch._foreach_add_(weights, gradients, alpha=scale)
        return None
    if places is None:
        places = [Place.whole(i, weight.shape) for i, weight in enumerate(weights)]
    sums = torch.zeros(2, device=weights[0].device if weights else "cpu")
    moments: Sequence[SecondMoment | None] = second_moments or [None] * len(weights)
    tensors = [_Part(*parts) for parts in zip(weights, gradients, masters, places, moments, strict=True)]
    # A group at a time: of all, the moved tensors would be a second copy of the masters.
    for parts in in_groups((part for tensor in tensors for part in _by_rows(tensor)), _numel, PART):
        measured = _move_parts(parts, scale, adaptive, noise_seed, measure)
        if measured is not None:
            sums = sums + measured.to(sums.device)
    return sums if measure else None


def _numel(part: _Part) -> int:
    return part.weight.numel()


def _by_rows(tensor: _Part) -> Iterator[_Part]:
    """A tensor of more than `PART` elements, a few rows at a time."""
    if tensor.weight.numel() <= PART:
        yield tensor
        return
    rows = len(tensor.weight)
    at_once = max(1, PART * rows // tensor.weight.numel())
    for start in range(0, rows, at_once):
        end = min(start + at_once, rows)
        weight, gradient, master = (local[start:end] for local in tensor[:3])
        moment = tensor.second_moment and tensor.second_moment.rows(start, end)
        yield _Part(weight, gradient, master, tensor.place.rows(start, end), moment)


def _move_parts(
    parts: Sequence[_Part], scale: float, adaptive: bool, noise_seed: int | None, measure: bool
) -> torch.Tensor | None:
    """`move_`, for tensors of which a few copies fit."""
    weights = [part.weight for part in parts]
    starts = [p.master.to(torch.promote_types(p.master.dtype, torch.float32)) for p in parts]
    directions = [p.gradient.to(start.device, start.dtype) for p, start in zip(parts, starts, strict=True)]
    if adaptive:
        directions = list(torch._foreach_mul(torch._foreach_mul(starts, starts), directions))
    elif metrics := [p.second_moment.inverse_metric() for p in parts if p.second_moment is not None]:
        directions = [d * m.to(d.device, d.dtype) for d, m in zip(directions, metrics, strict=True)]
    moved = list(torch._foreach_add(starts, directions, alpha=scale))
    for i, (weight, part) in enumerate(zip(weights, parts, strict=True)):
        if noise_seed is not None and weight.dtype.itemsize == 2:
            noise = uniform_noise(part.place, noise_seed, weight.device)
            moved[i] = round_stochastically(moved[i].to(weight.device), weight.dtype, noise)
    if not measure:
        copy_(weights, moved)
        return None
    before = [weight.clone() for weight in weights]
    copy_(weights, moved)
    sums = torch.zeros(2, device=weights[0].device)
    for triple in zip(weights, before, directions, strict=True):
        sums = sums + _fidelity_sums(*triple, scale).to(sums.device)
    return sums


def _fidelity_sums(weight: torch.Tensor, before: torch.Tensor, direction: torch.Tensor, scale: float) -> torch.Tensor:
    e = (scale * direction).to(weight.device, torch.float32).flatten()
    change = (weight.float() - before.float()).flatten()
    return torch.stack([torch.dot(change, e), torch.dot(e, e)])


def scale_(tensors: Tensors, scale: float) -> None:
    """`tensors *= scale`, in place."""
    if tensors:
        torch._foreach_mul_(tensors, scale)


def copy_(tensors: Tensors, sources: Tensors) -> None:
    """`tensors = sources`, bit for bit and into the same storage, which shards and views share."""
    if tensors:
        torch._foreach_copy_(tensors, sources)


def add_(tensors: Tensors, others: Tensors) -> None:
    """`tensors += others`, in place."""
    if tensors:
        torch._foreach_add_(tensors, others)


def lerp_(tensors: Tensors, others: Tensors, weight: float) -> None:
    """`tensors = (1 - weight) * tensors + weight * others`, in place, rounded once."""
    if tensors:
        torch._foreach_lerp_(tensors, others, weight)
