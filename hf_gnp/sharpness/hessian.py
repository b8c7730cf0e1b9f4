"""
Products of the Hessian of the loss with vectors: by central differences on any engine, exactly on one process.

    H v = (∇L(θ + h v/‖v‖) - ∇L(θ - h v/‖v‖)) ‖v‖/2h + O(h²)
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .loss import SampleLoss


# The first step that is tried, as a share of ‖θ‖ times the cube root of the unit round-off, where rounding (∝ 1/h) and
# truncation (∝ h²) meet for a function of size 1; each next one is a quarter of the one before.
FIRST_STEP, NEXT_STEP, STEPS = 1.0, 0.25, 8
# With steps that are far too large, differences do not fall in order.
ROUGH = 0.1


class Hessian(ABC):
    """
    The Hessian of a `SampleLoss` at θ.

    Attributes:
        error: An estimate of ‖error of H v‖/‖H v‖; 0 for exact products.
        products: How many have been made.
    """

    error = 0.0

    def __init__(self, loss: SampleLoss):
        self.loss, self.products = loss, 0

    @abstractmethod
    def product(self, vector: torch.Tensor) -> torch.Tensor:
        """H v, of local parts."""


class DifferenceHessian(Hessian):
    """
    Two gradients a product, through the engine: it needs no second derivative of any kernel.

    The weights move by h whatever ‖v‖ is. h is chosen once, where two products with steps h and h/4 along the gradient
    differ least: their difference is the estimate of the error.

    Args:
        gradient: ∇L, along which h is chosen; it lies mostly in the directions of large curvature.
        step: h, if it is not to be chosen.
    """

    def __init__(self, loss: SampleLoss, gradient: torch.Tensor, step: float | None = None):
        super().__init__(loss)
        vectors = loss.vectors
        if vectors.norm(gradient) == 0:
            gradient = vectors.random(0)
        if step is not None:
            self.step = step
            self.error = self._difference(gradient, step, step * NEXT_STEP)
        else:
            self.step, self.error = self._choose_step(gradient)

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        self.products += 1
        return self._product(vector, self.step)

    def _product(self, vector: torch.Tensor, step: float) -> torch.Tensor:
        norm = self.loss.vectors.norm(vector)
        result = self.loss.vectors.zeros()
        if norm == 0:
            return result
        for sign in (1.0, -1.0):
            self.loss.move(vector, sign * step / norm)
            self.loss.add_gradient_(result, sign * norm / (2 * step))
        return result

    def _choose_step(self, direction: torch.Tensor) -> tuple[float, float]:
        vectors = self.loss.vectors
        step = FIRST_STEP * _round_off(self.loss) ** (1 / 3) * max(vectors.norm(self.loss.origin()), 1e-3)
        last, best = self._product(direction, step), (step, math.inf)
        for _ in range(STEPS):
            step *= NEXT_STEP
            product = self._product(direction, step)
            error = _relative(vectors.norm(product - last), vectors.norm(product))
            if error >= best[1] and best[1] < ROUGH:
                break  # from here on, rounding grows
            last, best = product, min(best, (step, error), key=lambda pair: pair[1])
        return best

    def _difference(self, direction: torch.Tensor, step: float, other: float) -> float:
        product = self._product(direction, step)
        norm = self.loss.vectors.norm(product)
        return _relative(self.loss.vectors.norm(product - self._product(direction, other)), norm)


class ExactHessian(Hessian):
    """
    The derivative of ⟨∇L, v⟩: one process, and kernels that have a second derivative (attention uses its formula).
    """

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        self.products += 1
        loss, vectors = self.loss, self.loss.vectors
        result, parts = vectors.zeros(), vectors.parts(vector)
        for batch in loss.batches:
            with sdpa_kernel(SDPBackend.MATH):
                value = loss.micro_batch_loss(batch) * batch.share
                gradients = torch.autograd.grad(value, loss.parameters, create_graph=True, allow_unused=True)
                pairs = [(g, v) for g, v in zip(gradients, parts, strict=True) if g is not None]
                slope: Any = sum((g * v.to(g.device, g.dtype)).sum() for g, v in pairs)
                products = torch.autograd.grad(slope, loss.parameters, allow_unused=True)
            vectors.add_(result, products)
        loss.end_pass()
        return result


def _round_off(loss: SampleLoss) -> float:
    """Of the least precise dtype that a gradient goes through."""
    dtypes = {parameter.dtype for parameter in loss.model.parameters() if parameter.is_floating_point()}
    if loss.trainer.accelerator.mixed_precision == "bf16":
        dtypes.add(torch.bfloat16)
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _relative(difference: float, size: float) -> float:
    return difference / size if size > 0 else (math.inf if difference > 0 else 0.0)
