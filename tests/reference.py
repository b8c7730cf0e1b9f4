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


def along_the_gradient(parameters: Tensors, g1: Tensors) -> list[torch.Tensor]:
    """g₁/‖g₁‖"""
    return [g / norm(g1) for g in g1]


def scale_invariant(parameters: Tensors, g1: Tensors) -> list[torch.Tensor]:
    """w² g₁/‖w g₁‖: ASAM (Kwon et al. 2021), equation 9 with T_w = |w|."""
    length = norm(p * g for p, g in zip(parameters, g1, strict=True))
    return [p.square() * g / length for p, g in zip(parameters, g1, strict=True)]


def in_the_metric_of_adam(parameters: Tensors, g1: Tensors, optimizer: torch.optim.Adam) -> list[torch.Tensor]:
    """D⁻¹g₁/√(g₁ᵀD⁻¹g₁) with D = √v̂ + ε, for the elements that have a v; 0 before there is any."""
    group = optimizer.param_groups[0]
    states = [optimizer.state[p] for p in group["params"]]
    if not all(states):
        return [torch.zeros_like(g) for g in g1]
    scaled = []
    for g, state in zip(g1, states, strict=True):
        second_moment = state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"])
        scaled.append(torch.where(second_moment > 0, g / (second_moment.sqrt() + group["eps"]), 0.0))
    length = torch.stack([(g.double() * d.double()).sum() for g, d in zip(g1, scaled, strict=True)]).sum().sqrt()
    return [d / length for d in scaled]


def paper_mix(g1: Tensors, g2: Tensors, alpha: float) -> list[torch.Tensor]:
    """(1-α) g₁ + α g₂"""
    return [(1 - alpha) * a + alpha * b for a, b in zip(g1, g2, strict=True)]


def authors_mix(g1: Tensors, g2: Tensors, alpha: float) -> list[torch.Tensor]:
    """(1-α) g₁/‖g₁‖ + α g₂: `norm_perturbations=True` in the authors' code."""
    return paper_mix([g / norm(g1) for g in g1], g2, alpha)


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
    ascent: Callable[[Any], tuple[Any, float]] = lambda group: (group, 1.0),
) -> list[dict[str, float]]:
    """
    Step once on each batch, with the r and α that `penalty` has for the step. Return the clean loss, ‖g₁‖ and the
    perturbed loss of each step. `groups` are the parts of a batch with a perturbation each, whose losses and mixed
    gradients add up to those of the step (Foret et al. 2021, section 4.1: m-sharpness); ‖g₁‖ is summed over them.
    `ascent` is what of a group g₁ is taken from, and what its loss lacks to that of the group (Bahri et al. 2022).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    logs = []
    for step, batch in enumerate(batches):
        r, alpha = penalty(step)
        log = {"loss": 0.0, "gnp_grad_norm": 0.0, "gnp_perturbed_loss": 0.0}
        total = [torch.zeros_like(p) for p in parameters]
        for group in groups(batch):
            part, share = ascent(group)
            loss = share * loss_function(model, part)
            g1 = gradient(model, loss)
            e = [r * d for d in direction([p.detach() for p in parameters], g1)]
            perturbed_loss, g2 = gradient_at(model, e, loss_function, group)
            add_(total, mix(g1, g2, alpha) if alpha > 0 else g1)
            log["loss"] += loss.item()
            log["gnp_grad_norm"] += norm(g1).item()
            log["gnp_perturbed_loss"] += perturbed_loss.item()
        step_along(optimizer, parameters, total, max_norm)
        logs.append(log)
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


def train_looksam(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Any],
    loss_function: Callable[[torch.nn.Module, Any], torch.Tensor],
    r: float,
    alpha: float,
    interval: int,
    max_norm: float | None = None,
) -> list[float]:
    """
    LookSAM (arXiv 2203.02714, Algorithm 1): at every k-th step v is what of g₂ is orthogonal to g₁, and at the others
    α ‖g‖ v/‖v‖ is added to the gradient g. Penalised steps use (1-α) g₁ + α g₂. Return the clean losses.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses, v = [], None
    for step, batch in enumerate(batches):
        loss = loss_function(model, batch)
        g1 = gradient(model, loss)
        step_gradient = g1
        if (step + 1) % interval == 0:
            _, g2 = gradient_at(model, [r * g / norm(g1) for g in g1], loss_function, batch)
            cosine = sum((a.double() * b.double()).sum() for a, b in zip(g1, g2, strict=True)) / norm(g1) / norm(g2)
            v = [b - norm(g2) * cosine * a / norm(g1) for a, b in zip(g1, g2, strict=True)]
            step_gradient = paper_mix(g1, g2, alpha)
        elif v is not None:
            step_gradient = [a + alpha * norm(g1) / norm(v) * b for a, b in zip(g1, v, strict=True)]
        step_along(optimizer, parameters, step_gradient, max_norm)
        losses.append(loss.item())
    return losses
