"""
Eigenvalues and trace of a symmetric operator from products with vectors.

Reference:
    Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal. 2000.
    Meyer et al., "Hutch++: optimal stochastic trace estimation", SOSA 2021, arXiv 2010.09649.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from .vectors import ShardVectors, precise


Product = Callable[[torch.Tensor], torch.Tensor]

# A rest below this share of the largest eigenvalue is rounding error: the space is exhausted.
EXHAUSTED = 1e-10
# A random start has a Rayleigh quotient near 0 and a far larger residual. Even noisy products must not accept it.
LARGEST_TOLERANCE = 0.5


class Eigenpairs(NamedTuple):
    """
    Hold the largest eigenvalues, largest first, and ‖Hv - λv‖ from one more product with each eigenvector.

    The `vectors` are orthonormal: the eigenvectors, then the rest of the basis. `trace` is that of H within the basis.
    """

    values: list[float]
    vectors: list[torch.Tensor]
    residuals: list[float]
    trace: float


def top_eigenpairs(
    hessian: Any, k: int, tolerance: float, max_products: int, seed: int, basis: int | None = None
) -> Eigenpairs:
    """
    Find the k largest eigenvalues by Lanczos with full reorthogonalisation, restarted when the basis is full.

    Args:
        hessian: An `ExactHessian` or a `DifferenceHessian`.
        tolerance: Stop when the residuals are below this share, at most half, of the largest |eigenvalue| so far. It
            is at least the error of a product.
        max_products: Stop after this number of products. The residuals take k more.
        basis: The largest number of vectors in memory, k + 9 by default.
    """
    product, space, tolerance = hessian.product, hessian.loss.vectors, max(tolerance, hessian.error)
    ones = torch.ones_like(space.zeros())
    dimension = round(space.dot(ones, ones))
    k = min(k, dimension)
    limit = min(max(basis or k + 9, k + 2), dimension)
    start = space.random(seed, 0)
    vectors, matrix = [start / space.norm(start)], np.zeros((limit, limit))
    for used in range(1, max_products + 1):
        rest = product(vectors[-1])
        coefficients = _orthogonalize_(rest, vectors, space)
        size = len(vectors)
        matrix[:size, size - 1] = matrix[size - 1, :size] = coefficients
        values, rotation = np.linalg.eigh(matrix[:size, :size])
        values, rotation = values[::-1], rotation[:, ::-1]
        length, largest = space.norm(rest), np.abs(values).max()
        residuals = length * np.abs(rotation[-1, :k])
        is_exhausted = size == dimension or length <= EXHAUSTED * largest
        is_converged = size >= k and residuals.max() <= min(tolerance, LARGEST_TOLERANCE) * largest
        if is_exhausted or is_converged or used == max_products:
            break
        if size == limit:
            kept = k + (limit - k) // 2
            vectors = _rotated(vectors, rotation[:, :kept])
            matrix[:] = 0
            matrix[range(kept), range(kept)] = values[:kept]
        vectors.append(rest.div_(length))
    return _with_residuals(product, space, _rotated(vectors, rotation), k, values)


def _orthogonalize_(rest: torch.Tensor, vectors: list[torch.Tensor], space: ShardVectors) -> np.ndarray:
    """Subtract from `rest` its components along orthonormal `vectors`, and return them."""
    total = np.zeros(len(vectors))
    for _ in range(2):  # once would leave a part of them, by rounding
        components = space.dots(vectors, rest)
        for component, vector in zip(components, vectors, strict=True):
            rest.sub_(vector, alpha=float(component))
        total += components
    return total


def _rotated(vectors: list[torch.Tensor], rotation: np.ndarray) -> list[torch.Tensor]:
    """Return the combinations of `vectors` in the columns of `rotation`. They overwrite the first `vectors`."""
    size, block = vectors[0].numel(), 2**22
    matrix = torch.from_numpy(rotation.copy()).to(vectors[0].device, precise(vectors[0].device))
    result = vectors[: matrix.shape[1]]
    for first in range(0, max(size, 1), block):
        place = slice(first, first + block)
        rotated = matrix.T @ torch.stack([vector[place] for vector in vectors]).to(matrix.dtype)
        for vector, row in zip(result, rotated, strict=True):
            vector[place] = row
    return result


def _with_residuals(
    product: Product, space: ShardVectors, vectors: list[torch.Tensor], k: int, ritz_values: np.ndarray
) -> Eigenpairs:
    found = []
    for vector in vectors[:k]:
        rest = product(vector)
        value = space.dot(vector, rest)
        found.append((value, vector, space.norm(rest.sub_(vector, alpha=value))))
    found.sort(key=lambda pair: -pair[0])
    values, best, residuals = (list(column) for column in zip(*found, strict=True))
    return Eigenpairs(values, best + vectors[k:], residuals, sum(values) + float(ritz_values[k:].sum()))


def trace(
    product: Product, space: ShardVectors, probes: int, seed: int, known: Eigenpairs | None = None
) -> tuple[float, float]:
    """
    Return tr H by Hutchinson's estimator with random signs, and its standard error.

    As in Hutch++, only the trace outside of the known basis is estimated. The largest eigenvalues make up most of the
    variance, so that takes far fewer probes.
    """
    vectors, exact = (known.vectors, known.trace) if known is not None else ([], 0.0)
    estimates = []
    for probe in range(probes):
        z = space.random(seed, 1, probe, signs=True)
        if vectors:
            _orthogonalize_(z, vectors, space)
        estimates.append(space.dot(z, product(z)))
    error = float(np.std(estimates, ddof=1)) / math.sqrt(probes) if probes > 1 else math.nan
    return exact + float(np.mean(estimates)), error
