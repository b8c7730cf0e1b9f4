"""
Products of the Hessian of the loss with vectors: by central differences on any engine, exactly on one process.

    H v = (∇L(θ + h v/‖v‖) - ∇L(θ - h v/‖v‖)) ‖v‖/2h + O(h²)
"""

import math
import sys
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .loss import SampleLoss


# The factor from one tried step to the next, and the number of tries.
NEXT_STEP, STEPS = 0.25, 8
# Below this error a step is near the best one. Above it errors may rise and fall, as the steps are far too large.
ROUGH = 0.1


class Hessian:
    """
    Compute H v, exactly or from two gradients at weights that move by ±h, whatever ‖v‖ is.

    The best h is the one at which products along the gradient with the steps 4h and h differ least.

    Args:
        gradient: ∇L, which lies mostly in the directions of large curvature.
        method: "differences" or "exact", as in `measure_sharpness`.
        step: h. Default: the best one.

    Attributes:
        error: An estimate of ‖error of H v‖/‖H v‖: the difference of the products with two steps.
        products: The number of products so far.
    """

    error = 0.0

    def __init__(
        self, loss: SampleLoss, gradient: torch.Tensor, method: str = "differences", step: float | None = None
    ):
        self.loss, self.products, self._step = loss, 0, step
        if method not in ("differences", "exact"):
            raise ValueError(f"method must be 'differences' or 'exact', but it is {method!r}.")
        self._is_exact = method == "exact"
        if not self._is_exact:
            self._choose_step(gradient)
        elif loss.trainer.accelerator.num_processes > 1 or loss.trainer.is_deepspeed_enabled:
            raise ValueError("method='exact' is for one process: use method='differences' on this engine.")

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        """Return H v."""
        self.products += 1
        return self._exact(vector) if self._is_exact else self._difference(vector, self._step)

    def _exact(self, vector: torch.Tensor) -> torch.Tensor:
        """Return the gradient of ⟨∇L, v⟩. This needs kernels with a second derivative."""
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

    def _difference(self, vector: torch.Tensor, step: Any) -> torch.Tensor:
        norm, result = self.loss.vectors.norm(vector), self.loss.vectors.zeros()
        if norm > 0:
            for sign in (1.0, -1.0):
                self.loss.move(vector, sign * step / norm)
                self.loss.add_gradient_(result, sign * norm / (2 * step))
        return result

    def _choose_step(self, direction: torch.Tensor) -> None:
        """Set the step and its error."""
        norm, last = self.loss.vectors.norm, None
        steps = [self._step * NEXT_STEP, self._step] if self._step else self._steps()
        self.error, self._step = math.inf, steps[1]
        for step in steps:
            product = self._difference(direction, step)
            if last is not None:
                error = norm(last.sub_(product)) / max(norm(product), sys.float_info.min)
                if error >= self.error and self.error < ROUGH:
                    break  # smaller steps have larger rounding errors
                if error < self.error:
                    self.error, self._step = error, step
            last = product

    def _steps(self) -> list[float]:
        """Return steps to try, from the largest."""
        dtypes = {parameter.dtype for parameter in self.loss.model.parameters() if parameter.is_floating_point()}
        if self.loss.trainer.accelerator.mixed_precision == "bf16":
            dtypes.add(torch.bfloat16)
        round_off = max(torch.finfo(dtype).eps for dtype in dtypes)
        # Rounding (∝ 1/h) and truncation (∝ h²) are equal here for a function of size 1. A network needs less.
        first = round_off ** (1 / 3) * max(self.loss.vectors.norm(self.loss.theta()), 1e-3)
        return [first * NEXT_STEP**i for i in range(STEPS + 1)]
