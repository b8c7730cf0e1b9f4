"""The penalised training loop, written out: whole batches, no Trainer, no engine. Every engine must match it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch


Tensors = Sequence[torch.Tensor]


def gradient(model: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]


def norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt()


def unit(tensors: Tensors) -> list[torch.Tensor]:
    length = norm(tensors)
    return [t / length for t in tensors]


def along_the_gradient(parameters: Tensors, g1: Tensors) -> list[torch.Tensor]:
    """g₁/‖g₁‖"""
    return unit(g1)


def scale_invariant(parameters: Tensors, g1: Tensors) -> list[torch.Tensor]:
    """w² g₁/‖w g₁‖: ASAM (Kwon et al. 2021), equation 9 with T_w = |w|."""
    length = norm(p * g for p, g in zip(parameters, g1, strict=True))
    return [p.square() * g / length for p, g in zip(parameters, g1, strict=True)]


def along_some(chosen: Sequence[bool]) -> Callable[[Tensors, Tensors], list[torch.Tensor]]:
    """g₁/‖g₁‖ of the chosen parameters, with the norm of these, and 0 of the others: SAM-ON (Müller et al. 2023)."""

    def direction(parameters: Tensors, g1: Tensors) -> list[torch.Tensor]:
        length = norm(g for g, is_chosen in zip(g1, chosen, strict=True) if is_chosen)
        return [g / length if is_chosen else torch.zeros_like(g) for g, is_chosen in zip(g1, chosen, strict=True)]

    return direction


def in_proportion_to_each_tensor(parameters: Tensors, g1: Tensors) -> list[torch.Tensor]:
    """(‖w_l‖/‖w‖) g_l/‖g_l‖ for each tensor l with both norms above 0, over which ‖w‖ is taken."""
    moves = [bool(p.count_nonzero() and g.count_nonzero()) for p, g in zip(parameters, g1, strict=True)]
    length = norm([p for p, is_moved in zip(parameters, moves, strict=True) if is_moved] or parameters)
    triples = zip(parameters, g1, moves, strict=True)
    return [norm([p]) / length * g / norm([g]) if is_moved else torch.zeros_like(g) for p, g, is_moved in triples]


def cosine_of(g1: Tensors, g2: Tensors, moves: Tensors, scales: Tensors | None = None) -> float:
    """⟨g₁, g₂⟩/(‖g₁‖ ‖g₂‖) over the tensors that move or have no gradient at θ, or that of w g₁ and w g₂."""
    scales = scales or [torch.ones_like(g) for g in g1]
    quadruples = zip(g1, g2, scales, moves, strict=True)
    quadruples = [q for q in quadruples if q[3].count_nonzero() or not q[0].count_nonzero()]
    first, second = ([w.double() * q[i].double() for q in quadruples for w in [q[2]]] for i in (0, 1))
    product = sum((a * b).sum() for a, b in zip(first, second, strict=True))
    return float(product / (norm(first) * norm(second))) if quadruples else float("nan")


def paper_mix(g1: Tensors, g2: Tensors, alpha: float) -> list[torch.Tensor]:
    """(1-α) g₁ + α g₂"""
    return [(1 - alpha) * a + alpha * b for a, b in zip(g1, g2, strict=True)]


def authors_mix(g1: Tensors, g2: Tensors, alpha: float) -> list[torch.Tensor]:
    """(1-α) g₁/‖g₁‖ + α g₂: `norm_perturbations=True` in the authors' code."""
    return paper_mix(unit(g1), g2, alpha)


def authors_mix_of(share: float) -> Callable[[Tensors, Tensors, float], list[torch.Tensor]]:
    """Return `authors_mix` for one of several directions of a step, whose unit gradient counts with its share."""
    return lambda g1, g2, alpha: paper_mix([share * g for g in unit(g1)], g2, alpha)


def add_(parameters: Tensors, moves: Tensors) -> None:
    with torch.no_grad():
        for p, move in zip(parameters, moves, strict=True):
            p += move


def gradient_at(
    model: torch.nn.Module,
    moves: Tensors,
    loss_function: Callable[[torch.nn.Module, Any], torch.Tensor],
    batch: Any,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and its gradient at θ + e; the weights are θ again, bit for bit."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    add_(parameters, moves)  # climb
    loss = loss_function(model, batch)
    result = gradient(model, loss)
    with torch.no_grad():
        for p, origin in zip(parameters, start, strict=True):
            p.copy_(origin)
    return loss, result


def step_along(
    optimizer: torch.optim.Optimizer, parameters: Tensors, gradients: Tensors, max_norm: float | None
) -> None:
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.to(p.dtype)
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    optimizer.zero_grad()


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Any],
    loss_function: Callable[[torch.nn.Module, Any], torch.Tensor],
    penalty: Callable[[int], tuple[float, float]],
    max_norm: float | None = None,
    direction: Callable[[Tensors, Tensors], Tensors] = along_the_gradient,
    mix: Callable[[Tensors, Tensors, float], Tensors] = paper_mix,
    groups: Callable[[Any], Sequence[Any]] = lambda batch: [batch],
) -> list[dict[str, float]]:
    """
    Step once on each batch, with the r and α that `penalty` has for the step.

    Args:
        groups: Splits a batch into parts with a perturbation each. Their losses and mixed gradients add up to those of
            the step (m-sharpness: Foret et al. 2021, section 4.1), and their ‖g₁‖ are summed.

    Returns:
        The clean loss, ‖g₁‖ and the perturbed loss of each step, and the cosine of g₁ and g₂ (with ASAM's metric that
        of w g₁ and w g₂), the mean over parts.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    logs = []
    for step, batch in enumerate(batches):
        r, alpha = penalty(step)
        log = {"loss": 0.0, "gnp_grad_norm": 0.0, "gnp_perturbed_loss": 0.0}
        total, cosines = [torch.zeros_like(p) for p in parameters], []
        for group in groups(batch):
            loss = loss_function(model, group)
            g1 = gradient(model, loss)
            weights = [p.detach().clone() for p in parameters]
            e = [r * d for d in direction(weights, g1)]
            perturbed_loss, g2 = gradient_at(model, e, loss_function, group)
            cosines.append(cosine_of(g1, g2, e, weights if direction is scale_invariant else None))
            add_(total, mix(g1, g2, alpha) if alpha > 0 else g1)
            log["loss"] += loss.item()
            log["gnp_grad_norm"] += norm(g1).item()
            log["gnp_perturbed_loss"] += perturbed_loss.item()
        step_along(optimizer, parameters, total, max_norm)
        logs.append(log | {"gnp_cosine": sum(cosines) / len(cosines)})
    return logs


def train_msam(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Any],
    loss_function: Callable[[torch.nn.Module, Any], torch.Tensor],
    r: float,
    max_norm: float | None = None,
) -> list[float]:
    """
    Momentum-SAM as its authors write it (arXiv 2401.12033, Algorithm 1): the weights stay moved by -r m/‖m‖ between
    the steps, and are moved back at the end. Return the losses, which are those of the moved weights.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses, e = [], [torch.zeros_like(p) for p in parameters]
    for batch in batches:
        loss = loss_function(model, batch)
        g = gradient(model, loss)
        add_(parameters, [-moved_by for moved_by in e])
        step_along(optimizer, parameters, g, max_norm)
        states = [optimizer.state[p] for p in parameters]
        momentum = [state["exp_avg" if "exp_avg" in state else "momentum_buffer"] for state in states]
        length = norm(momentum)
        e = [-r * m / length for m in momentum]
        add_(parameters, e)
        losses.append(loss.item())
    add_(parameters, [-moved_by for moved_by in e])
    return losses
