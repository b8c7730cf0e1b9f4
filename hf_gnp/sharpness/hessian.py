"""
Products of the Hessian of the loss with vectors: by central differences on any engine, exactly on one process.

    H v = (∇L(θ + h v/‖v‖) - ∇L(θ - h v/‖v‖)) ‖v‖/2h + O(h²)
"""

import math
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .loss import SampleLoss


# The factor from one tried step to the next, and the number of tries.
NEXT_STEP, STEPS = 0.25, 8
# Below this error a step is near the best one. Above it errors may rise and fall, as the steps are far too large.
ROUGH = 0.1


class ExactHessian:
    """
    Compute H v as the gradient of ⟨∇L, v⟩. It needs one process, and kernels with a second derivative.

    Attributes:
        error: An estimate of ‖error of H v‖/‖H v‖.
        products: The number of products so far.
    """

    error = 0.0

    def __init__(self, loss: SampleLoss):
        self.loss, self.products = loss, 0

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        """Return H v."""
        self.products += 1
        loss, vectors = self.loss, self.loss.vectors
        parameters = [shard.parameter for shard in vectors.shards]
        result, parts = vectors.zeros(), vectors.parts(vector)
        for batch in loss.batches:
            with sdpa_kernel(SDPBackend.MATH):
                value = loss.micro_batch_loss(batch) * batch.share
                gradients = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
                pairs = [(g, v) for g, v in zip(gradients, parts, strict=True) if g is not None]
                slope: Any = sum((g * v.to(g.device, g.dtype)).sum() for g, v in pairs)
                products = torch.autograd.grad(slope, parameters, allow_unused=True)
            vectors.add_(result, products)
        loss.end_pass()
        return result


class DifferenceHessian(ExactHessian):
    """
    Compute H v from two gradients. No kernel needs a second derivative.

    The weights move by h, whatever ‖v‖ is. The best h is the one at which products along the gradient with the steps
    h and h/4 differ least. Their difference estimates the error.

    Args:
        gradient: ∇L, which lies mostly in the directions of large curvature.
        step: h. Default: the best one.
    """

    def __init__(self, loss: SampleLoss, gradient: torch.Tensor, step: float | None = None):
        super().__init__(loss)
        direction = gradient if loss.vectors.norm(gradient) > 0 else loss.vectors.random(0)
        if step is None:
            self.step, self.error = self._choose_step(direction)
        else:
            self.step = step
            self.error = self._change(self._difference(direction, step * NEXT_STEP), self._difference(direction, step))

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        self.products += 1
        return self._difference(vector, self.step)

    def _difference(self, vector: torch.Tensor, step: float) -> torch.Tensor:
        norm, result = self.loss.vectors.norm(vector), self.loss.vectors.zeros()
        if norm > 0:
            for sign in (1.0, -1.0):
                self.loss.move(vector, sign * step / norm)
                self.loss.add_gradient_(result, sign * norm / (2 * step))
        return result

    def _choose_step(self, direction: torch.Tensor) -> tuple[float, float]:
        """Return the step whose error is smallest, and that error."""
        dtypes = {parameter.dtype for parameter in self.loss.model.parameters() if parameter.is_floating_point()}
        if self.loss.trainer.accelerator.mixed_precision == "bf16":
            dtypes.add(torch.bfloat16)
        round_off = max(torch.finfo(dtype).eps for dtype in dtypes)
        # Rounding (∝ 1/h) and truncation (∝ h²) are equal here for a function of size 1. A network needs less.
        step = round_off ** (1 / 3) * max(self.loss.vectors.norm(self.loss.origin()), 1e-3)
        last, best = self._difference(direction, step), (math.inf, step)
        for _ in range(STEPS):
            step *= NEXT_STEP
            product = self._difference(direction, step)
            error = self._change(last, product)
            if error >= best[0] and best[0] < ROUGH:
                break  # smaller steps have larger rounding errors
            last, best = product, min(best, (error, step))
        return best[1], best[0]

    def _change(self, last: torch.Tensor, product: torch.Tensor) -> float:
        difference, size = self.loss.vectors.norm(product - last), self.loss.vectors.norm(product)
        return difference / size if size > 0 else (math.inf if difference > 0 else 0.0)


def make_hessian(
    loss: SampleLoss, gradient: torch.Tensor, method: str = "differences", step: float | None = None
) -> ExactHessian:
    """Return the Hessian for the `method` of `measure_sharpness`."""
    if method == "differences":
        return DifferenceHessian(loss, gradient, step)
    if method != "exact":
        raise ValueError(f"method must be 'differences' or 'exact', but it is {method!r}.")
    if loss.trainer.accelerator.num_processes > 1 or loss.trainer.is_deepspeed_enabled:
        raise ValueError("method='exact' is for one process: use method='differences' on this engine.")
    return ExactHessian(loss)
