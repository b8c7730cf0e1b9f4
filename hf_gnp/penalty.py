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
from collections.abc import Sequence

import torch


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


def add_scaled_(tensors: Sequence[torch.Tensor], directions: Sequence[torch.Tensor], scale: float) -> None:
    """`tensors += scale * directions`, in place, rounded once to the dtype of each tensor."""
    if tensors:
        torch._foreach_add_(tensors, directions, alpha=scale)


def set_moved_(
    weights: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    masters: Sequence[torch.Tensor],
    scale: float,
) -> None:
    """
    `weights = masters + scale * gradients`, in place, rounded once from the dtype of `masters`.

    Args:
        weights, gradients, masters: Local tensors, of the same shapes pairwise, each list with its own dtype and
            device. `weights` may be `masters` themselves.
    """
    # One at a time: a list of sums would be a second copy of the masters.
    for weight, gradient, master in zip(weights, gradients, masters, strict=True):
        weight.copy_(torch.add(master, gradient.to(master.device), alpha=scale))


def scale_(tensors: Sequence[torch.Tensor], scale: float) -> None:
    """`tensors *= scale`, in place."""
    if tensors:
        torch._foreach_mul_(tensors, scale)


def copy_(tensors: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """`tensors = sources`, bit for bit and into the same storage, which shards and views share."""
    if tensors:
        torch._foreach_copy_(tensors, sources)


def lerp_(tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor], weight: float) -> None:
    """`tensors = (1 - weight) * tensors + weight * others`, in place, rounded once."""
    if tensors:
        torch._foreach_lerp_(tensors, others, weight)
