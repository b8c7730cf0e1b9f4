"""The estimate against the exact formula: (g - g₁)/λ tends to H g₁/‖g₁‖ as r goes to 0, in float64."""

import itertools

import pytest
import reference
import torch
from runs import make_trainer, window_loss, windows
from tiny import Net, flat_weights, make_data
from torch import nn


RADII = (1e-1, 1e-2, 1e-3, 1e-4)
# The error is r/2 times a third derivative plus O(r²): at r = 0.1 the second term is 2% of the first on this network.
RATIO_TOLERANCE = 0.05
# The third derivative is about as large as H g₁/‖g₁‖ on this network: the relative error is 0.5 r to 0.7 r.
FINAL_TOLERANCE = RADII[-1]


def smooth_net() -> Net:
    return Net(nn.Tanh, lambda: nn.Linear(7, 7), nn.Tanh).double()


def double_data(size: int) -> list[dict[str, torch.Tensor]]:
    return [{"x": sample["x"].double(), "labels": sample["labels"]} for sample in make_data("net", size)]


def trainer_gradient(output_dir, accumulation: int, **kwargs) -> torch.Tensor:
    """The gradient of one step of the trainer: what SGD without momentum or clipping subtracts at learning rate 1."""
    trainer = make_trainer(
        output_dir,
        "net",
        model=smooth_net(),
        data=double_data(4 * accumulation),
        gradient_accumulation_steps=accumulation,
        learning_rate=1.0,
        max_grad_norm=0,
        **kwargs,
    )
    start = flat_weights(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 1
    return start - flat_weights(trainer.model)


def exact_penalty(accumulation: int) -> tuple[torch.Tensor, torch.Tensor]:
    """g₁, and H g₁/‖g₁‖ by double backward."""
    model = smooth_net()
    parameters = list(model.parameters())
    [window] = windows("net", accumulation, double_data(4 * accumulation))
    g1 = torch.autograd.grad(window_loss(model, window), parameters, create_graph=True)
    direction = [(g / reference.norm(g1)).detach() for g in g1]
    product = sum((g * v).sum() for g, v in zip(g1, direction, strict=True))
    hvp = torch.autograd.grad(product, parameters)
    return tuple(torch.cat([t.detach().flatten() for t in tensors]) for tensors in (g1, hvp))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("alpha", [0.3, 0.8, 1.0])
def test_penalty_tends_to_the_hessian_product(tmp_path, alpha, accumulation):
    g1, hvp = exact_penalty(accumulation)
    errors = []
    for r in RADII:
        g = trainer_gradient(tmp_path, accumulation, gnp_r=r, gnp_alpha=alpha)
        errors.append((((g - g1) / (alpha * r) - hvp).norm() / hvp.norm()).item())
    ratios = [larger / smaller for larger, smaller in itertools.pairwise(errors)]
    assert ratios == [pytest.approx(10, rel=RATIO_TOLERANCE)] * (len(RADII) - 1), errors
    assert errors[-1] < FINAL_TOLERANCE


def test_plain_step_is_the_gradient(tmp_path):
    g1, _ = exact_penalty(accumulation=2)
    g = trainer_gradient(tmp_path, accumulation=2, gnp_alpha=0.0)
    # One subtraction of numbers below 1 in float64.
    assert torch.allclose(g, g1, rtol=0, atol=1e-15)
