"""
The Hessian of the loss: its products with vectors, its largest eigenvalues, and its trace.

    H v = (∇L(θ + h v/‖v‖) - ∇L(θ - h v/‖v‖)) ‖v‖/2h + O(h²)

Reference:
    Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal. 2000.
    Meyer et al., "Hutch++: optimal stochastic trace estimation", SOSA 2021, arXiv 2010.09649.
"""

import math
import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .loss import SampleLoss
from .vectors import BLOCK, ShardVectors


# The factor from one tried step to the next, and the number of tries.
NEXT_STEP, STEPS = 0.25, 8
# Below this error a step is near the best one. Above it errors may rise and fall, as the steps are far too large.
ROUGH = 0.1
# A rest below this share of the largest eigenvalue is rounding error: the space is exhausted.
EXHAUSTED = 1e-10
# A random start has a Rayleigh quotient near 0 and a far larger residual. Even noisy products must not accept it.
LARGEST_TOLERANCE = 0.5


class Hessian:
    """Compute H v by the `method` of `measure_sharpness`, with h = `step`, or the best h for products with ∇L."""

    error = 0.0  # an estimate of ‖error of H v‖/‖H v‖

    def __init__(self, loss: SampleLoss, gradient: torch.Tensor, method: str, step: float | None):
        if method not in ("differences", "exact"):
            raise ValueError(f"method must be 'differences' or 'exact', but it is {method!r}.")
        self.loss, self.products, self._is_exact = loss, 0, method == "exact"
        if not self._is_exact:
            self._choose_step(gradient, step)
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
        result = vectors.zeros()
        for batch in loss.batches:
            with sdpa_kernel(SDPBackend.MATH):
                value = loss.micro_batch_loss(batch) * batch.share
                gradients = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
                pairs = zip(gradients, vectors.parts(vector), strict=True)
                slope: Any = sum((gradient * part.to(gradient)).sum() for gradient, part in pairs)
                vectors.add_(result, torch.autograd.grad(slope, parameters, allow_unused=True))
        loss.end_pass()
        return result

    def _difference(self, vector: torch.Tensor, step: float) -> torch.Tensor:
        norm, result = self.loss.vectors.norm(vector), self.loss.vectors.zeros()
        if norm > 0:
            for sign in (1.0, -1.0):
                self.loss.move(vector, sign * step / norm)
                self.loss.add_gradient_(result, sign * norm / (2 * step))
        return result

    def _choose_step(self, direction: torch.Tensor, step: float | None) -> None:
        """Choose the step h at which the products with `direction` for 4h and h differ least."""
        loss, norm = self.loss, self.loss.vectors.norm
        if step is not None:
            steps = [step * NEXT_STEP, step]
        else:
            dtypes = [parameter.dtype for parameter in loss.model.parameters() if parameter.is_floating_point()]
            if loss.trainer.accelerator.mixed_precision == "bf16":
                dtypes.append(torch.bfloat16)
            # Rounding (∝ 1/h) and truncation (∝ h²) are equal here for a function of size 1. A network needs less.
            first = max(torch.finfo(dtype).eps for dtype in dtypes) ** (1 / 3) * max(norm(loss.theta()), 1e-3)
            steps = [first * NEXT_STEP**i for i in range(STEPS + 1)]
        last, self.error, self._step = self._difference(direction, steps[0]), math.inf, steps[1]
        for tried in steps[1:]:
            product = self._difference(direction, tried)
            error = norm(last.sub_(product)) / max(norm(product), sys.float_info.min)
            if error < self.error:
                self.error, self._step = error, tried
            elif self.error < ROUGH:
                break  # smaller steps have larger rounding errors
            last = product


class Eigenpairs(NamedTuple):
    """Hold the largest eigenvalues of H, largest first."""

    values: list[float]
    vectors: list[torch.Tensor]  # orthonormal: the eigenvectors, then the rest of the basis
    residuals: list[float]  # ‖Hv - λv‖, from one more product with each eigenvector
    trace: float  # that of H within the basis


def top_eigenpairs(
    hessian: Hessian, k: int, tolerance: float, max_products: int, seed: int, basis: int | None = None
) -> Eigenpairs:
    """Find the k largest eigenvalues by Lanczos with full reorthogonalisation, restarted when the basis is full."""
    space, tolerance = hessian.loss.vectors, min(max(tolerance, hessian.error), LARGEST_TOLERANCE)
    k = min(k, space.dimension)
    limit = min(max(basis or k + 9, k + 2), space.dimension)
    start = space.random(seed, 0)
    vectors, matrix = [start.div_(space.norm(start))], np.zeros((limit, limit))
    for used in range(1, max_products + 1):
        rest, size = hessian.product(vectors[-1]), len(vectors)
        matrix[:size, size - 1] = matrix[size - 1, :size] = _orthogonalize_(rest, vectors, space)
        values, rotation = (array[..., ::-1] for array in np.linalg.eigh(matrix[:size, :size]))
        length, largest = space.norm(rest), np.abs(values).max()
        is_exhausted = size == space.dimension or length <= EXHAUSTED * largest
        is_converged = size >= k and length * np.abs(rotation[-1, :k]).max() <= tolerance * largest
        if is_exhausted or is_converged or used == max_products:
            break
        if size == limit:
            kept = k + (limit - k) // 2
            vectors = _rotated(vectors, rotation[:, :kept], space)
            matrix = np.diag(np.pad(values[:kept], (0, limit - kept)))
        vectors.append(rest.div_(length))
    vectors, found = _rotated(vectors, rotation, space), []
    for vector in vectors[:k]:
        rest = hessian.product(vector)
        value = space.dot(vector, rest)
        found.append((value, vector, space.norm(rest.sub_(vector, alpha=value))))
    found.sort(key=lambda pair: -pair[0])
    top, best, residuals = (list(column) for column in zip(*found, strict=True))
    return Eigenpairs(top, best + vectors[k:], residuals, sum(top) + float(values[k:].sum()))


def _orthogonalize_(rest: torch.Tensor, vectors: list[torch.Tensor], space: ShardVectors) -> np.ndarray:
    """Subtract from `rest` its components along orthonormal `vectors`, and return them."""
    total = np.zeros(len(vectors))
    for _ in range(2):  # once would leave a part of them, by rounding
        components = space.dots(vectors, rest)
        for component, vector in zip(components, vectors, strict=True):
            rest.sub_(vector, alpha=float(component))
        total += components
    return total


def _rotated(vectors: list[torch.Tensor], rotation: np.ndarray, space: ShardVectors) -> list[torch.Tensor]:
    """Return the combinations of `vectors` in the columns of `rotation`. They overwrite the first `vectors`."""
    for blocks in zip(*(vector.split(BLOCK) for vector in vectors), strict=True):
        old = torch.stack(blocks).to(space.sum_dtype)
        for block, row in zip(blocks, torch.from_numpy(rotation.T.copy()).to(old) @ old, strict=False):
            block.copy_(row)
    return vectors[: rotation.shape[1]]


def trace(hessian: Hessian, probes: int, seed: int, known: Eigenpairs | None = None) -> tuple[float, float]:
    """Return tr H by Hutchinson's estimator outside of the known basis, as in Hutch++, and its standard error."""
    space, estimates = hessian.loss.vectors, []
    for probe in range(probes):
        z = space.random(seed, 1, probe).sign_()
        if known is not None:
            _orthogonalize_(z, known.vectors, space)
        estimates.append(space.dot(z, hessian.product(z)))
    error = float(np.std(estimates, ddof=1)) / math.sqrt(probes) if probes > 1 else math.nan
    return (0.0 if known is None else known.trace) + float(np.mean(estimates)), error
