"""
The math of the penalised step, on lists of local tensors: no collective, no engine, no Trainer.

    g₁ = ∇L(θ)
    g₂ = ∇L(θ + e)              e = r g₁/‖g₁‖, or in another metric (perturbation.py)
    g  = (1-α) g₁ + α g₂        = ∇L(θ) + λ H(θ) g₁/‖g₁‖ + O(λ r)        λ = α r

Most engines need no second gradient buffer: they scale g₁ by (1-α)/α, the second pass adds g₂, and they scale the sum
by α. ZeRO-2 and 3 keep g₁ and interpolate.

Reference: Zhao, Zhang and Hu, ICML 2022, arXiv 2202.03599, equations (6) to (9).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from .rounding import round_stochastically


# The most elements that `move_` and the cosine copy at once.
PART = 2**22
WIDE = {torch.float32, torch.float64}

Tensors = list[torch.Tensor] | tuple[torch.Tensor, ...]

Item = TypeVar("Item")


def local_sq_norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Return the sum of squares of each local tensor.

    Args:
        tensors: Local tensors of any shapes, floating dtypes and devices. Empty ones count as 0.

    Returns:
        A vector on the device of the first tensor (on the CPU for an empty list), in float32, or in float64 where a
        tensor is: squares of 16-bit gradients neither overflow nor round.
    """
    by_kind = defaultdict(list)
    for i, tensor in enumerate(tensors):
        by_kind[tensor.get_device(), tensor.dtype].append(i)
    norms = [torch.zeros(())] * len(tensors)
    for (_, dtype), indices in by_kind.items():
        wide = torch.float32 if dtype.itemsize < 4 else None  # None is faster than the same dtype
        group = torch._foreach_norm([tensors[i] for i in indices], 2, dtype=wide)
        for i, norm in zip(indices, group, strict=True):
            norms[i] = norm
    if len(by_kind) > 1:
        norms = [norm.to(norms[0].device) for norm in norms]
    return torch.stack(norms).square_() if norms else torch.zeros(0)


def in_groups(items: Iterable[Item], size_of: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Yield the items in order, in groups of total size `limit` or less. A larger item is a group by itself."""
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


class _Part(NamedTuple):
    """Hold the rows of one tensor that move at once."""

    weight: torch.Tensor
    direction: torch.Tensor
    master: torch.Tensor
    scale: float
    generator: torch.Generator | None


def move_(
    weights: Tensors,
    directions: Tensors,
    masters: Tensors,
    scale: float | Sequence[float],
    elementwise: bool = False,
    generators: Sequence[torch.Generator] | None = None,
    measure: bool = False,
) -> torch.Tensor | None:
    """
    Set `weights = masters + e`, with `e = scale * directions` or `e = scale * masters² * directions`.

    Args:
        weights, directions, masters: Local tensors, of the same shapes pairwise, each list with its own dtype and
            device. `masters` may be the weights themselves. The result is rounded once to the weights' dtype.
        scale: One number, or one for each tensor.
        elementwise: Whether e has the factor `masters²`.
        generators: One for each tensor, to round 16-bit weights stochastically. None: round to nearest.
        measure: Whether to compare e with the change after rounding.

    Returns:
        The local sums ⟨weights - weights before, e⟩ and ‖e‖², in float32. None if not measured.
    """
    is_in_place = all(weight is master for weight, master in zip(weights, masters, strict=True))
    is_wide = all(weight.dtype.itemsize > 2 for weight in weights)
    if is_wide:
        generators = None
    if weights and is_in_place and not (elementwise or measure or generators):
        if isinstance(scale, float):
            torch._foreach_add_(weights, directions, alpha=scale)
            return None
        if is_wide and sum(weight.numel() for weight in weights) <= PART:
            torch._foreach_add_(weights, torch._foreach_mul(directions, _factors(directions, scale)))
            return None
    scales = [scale] * len(weights) if isinstance(scale, float) else scale
    noise: Sequence[torch.Generator | None] = generators or [None] * len(weights)
    tensors = [_Part(*parts) for parts in zip(weights, directions, masters, scales, noise, strict=True)]
    alpha = scale if isinstance(scale, float) and not elementwise else None
    sums = torch.zeros(2, device=weights[0].device if weights else "cpu")
    # One group at a time: all moved tensors together would take the memory of the masters.
    rows = (part for tensor in tensors for part in _by_rows(tensor))
    for parts in in_groups(rows, lambda part: part.weight.numel(), PART):
        if (measured := _move_parts(parts, alpha, elementwise, measure)) is not None:
            sums += measured.to(sums.device)
    return sums if measure else None


def _by_rows(tensor: _Part) -> Iterator[_Part]:
    """Yield parts of a tensor, of at most `PART` elements or one row each."""
    if tensor.weight.numel() <= PART:
        yield tensor
        return
    rows = len(tensor.weight)
    at_once = max(1, PART * rows // tensor.weight.numel())
    for start in range(0, rows, at_once):
        weight, direction, master = (local[start : start + at_once] for local in tensor[:3])
        yield tensor._replace(weight=weight, direction=direction, master=master)


def _move_parts(parts: Sequence[_Part], alpha: float | None, elementwise: bool, measure: bool) -> torch.Tensor | None:
    """Do what `move_` does, with a few copies of these parts in memory. `alpha` is a scale that all parts have."""
    weights = [part.weight for part in parts]
    starts = [p.master.to(torch.promote_types(p.master.dtype, torch.float32)) for p in parts]
    moves = [p.direction.to(start.device, start.dtype) for p, start in zip(parts, starts, strict=True)]
    if alpha is None:
        moves = list(torch._foreach_mul(moves, [part.scale for part in parts]))
        alpha = 1.0
    if elementwise:
        moves = list(torch._foreach_mul(torch._foreach_mul(starts, starts), moves))
    moved = list(torch._foreach_add(starts, moves, alpha=alpha))  # as in `move_`: logging must not change a step
    for i, part in enumerate(parts):
        if part.generator is not None and part.weight.dtype.itemsize == 2:
            moved[i] = round_stochastically(moved[i].to(part.weight.device), part.weight.dtype, part.generator)
    if not measure:
        copy_(weights, moved)
        return None
    before = [weight.clone() for weight in weights]
    copy_(weights, moved)
    changes = [weight.float() - old.float() for weight, old in zip(weights, before, strict=True)]
    moves = [alpha * move.to(weight.device, torch.float32) for weight, move in zip(weights, moves, strict=True)]
    dots = [torch.dot(change.flatten(), move.flatten()) for change, move in zip(changes, moves, strict=True)]
    return torch.stack([torch.stack([dot.to(dots[0].device) for dot in dots]).sum(), local_sq_norms(moves).sum()])


def clones(tensors: Tensors) -> list[torch.Tensor]:
    """Return bit-for-bit copies."""
    if tensors and hasattr(torch, "_foreach_clone"):  # from torch 2.13 on, half the time on a CPU
        return list(torch._foreach_clone(tensors))
    return [tensor.clone() for tensor in tensors]


def scale_(tensors: Tensors, scale: float) -> None:
    """Compute `tensors *= scale` in place."""
    if not tensors or scale == 1:
        return
    torch._foreach_mul_(tensors, _factors(tensors, scale))


def _factors(tensors: Tensors, scale: float | Sequence[float]) -> Any:
    """Return one factor, or one for each tensor. On a CPU a number takes three times as long as a tensor."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or not dtypes <= WIDE or not all(tensor.is_cpu for tensor in tensors):
        return scale
    factors = torch.tensor(scale, dtype=tensors[0].dtype, device="cpu")  # whatever the default device
    return factors if factors.dim() == 0 else factors.unbind()


def copy_(tensors: Tensors, sources: Tensors) -> None:
    """Copy sources bit for bit into the storage of `tensors`, which shards and views share."""
    if tensors:
        torch._foreach_copy_(tensors, sources)


def lerp_(tensors: Tensors, others: Tensors, weight: float) -> None:
    """Compute `tensors = (1 - weight) * tensors + weight * others` in place, rounded once."""
    if tensors:
        torch._foreach_lerp_(tensors, others, weight)
