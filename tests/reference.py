"""The penalised training loop, written out: whole batches, no Trainer, no engine. Every engine must match it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch


def gradient(model: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]


def norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt()


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Any],
    loss_function: Callable[[torch.nn.Module, Any], torch.Tensor],
    r: float,
    alpha: float,
    max_norm: float | None = None,
) -> list[dict[str, float]]:
    """Step once on each batch; return the clean loss, ‖g₁‖ and the perturbed loss of each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    logs = []
    for batch in batches:
        loss = loss_function(model, batch)
        g1 = gradient(model, loss)
        start = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, g in zip(parameters, g1, strict=True):
                p += r * g / norm(g1)  # climb along the normalised gradient
        perturbed_loss = loss_function(model, batch)
        g2 = gradient(model, perturbed_loss)
        with torch.no_grad():
            for p, origin, a, b in zip(parameters, start, g1, g2, strict=True):
                p.copy_(origin)
                p.grad = (1 - alpha) * a + alpha * b
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        optimizer.zero_grad()
        logs.append(
            {"loss": loss.item(), "gnp_grad_norm": norm(g1).item(), "gnp_perturbed_loss": perturbed_loss.item()}
        )
    return logs
