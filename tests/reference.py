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


def paper_mix(g1: Tensors, g2: Tensors, alpha: float) -> list[torch.Tensor]:
    """(1-α) g₁ + α g₂"""
    return [(1 - alpha) * a + alpha * b for a, b in zip(g1, g2, strict=True)]


def authors_mix(g1: Tensors, g2: Tensors, alpha: float) -> list[torch.Tensor]:
    """(1-α) g₁/‖g₁‖ + α g₂: `norm_perturbations=True` in the authors' code."""
    return paper_mix([g / norm(g1) for g in g1], g2, alpha)


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
    Step once on each batch, with the r and α that `penalty` has for the step. Return the clean loss, ‖g₁‖ and the
    perturbed loss of each step. `groups` are the parts of a batch with a perturbation each, whose losses and mixed
    gradients add up to those of the step (Foret et al. 2021, section 4.1: m-sharpness); ‖g₁‖ is summed over them.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    logs = []
    for step, batch in enumerate(batches):
        r, alpha = penalty(step)
        log = {"loss": 0.0, "gnp_grad_norm": 0.0, "gnp_perturbed_loss": 0.0}
        total = [torch.zeros_like(p) for p in parameters]
        for group in groups(batch):
            loss = loss_function(model, group)
            g1 = gradient(model, loss)
            start = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p, d in zip(parameters, direction(start, g1), strict=True):
                    p += r * d  # climb
            perturbed_loss = loss_function(model, group)
            g2 = gradient(model, perturbed_loss)
            mixed = mix(g1, g2, alpha) if alpha > 0 else g1
            with torch.no_grad():
                for p, origin, g, sum_of_g in zip(parameters, start, mixed, total, strict=True):
                    p.copy_(origin)
                    sum_of_g += g
            log["loss"] += loss.item()
            log["gnp_grad_norm"] += norm(g1).item()
            log["gnp_perturbed_loss"] += perturbed_loss.item()
        for p, g in zip(parameters, total, strict=True):
            p.grad = g
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        optimizer.zero_grad()
        logs.append(log)
    return logs
