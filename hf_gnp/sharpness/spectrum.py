"""
Eigenvalues and trace of the Hessian from its products with vectors.

Reference:
    Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal. 2000.
    Meyer et al., "Hutch++: optimal stochastic trace estimation", SOSA 2021, arXiv 2010.09649.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from .hessian import Hessian
from .vectors import ShardVectors


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
    hessian: Hessian, k: int, tolerance: float, max_products: int, seed: int, basis: int | None = None
) -> Eigenpairs:
    """
    Find the k largest eigenvalues by Lanczos with full reorthogonalisation, restarted when the basis is full.

    Args:
        tolerance: Stop when the residuals are below this share, at most half, of the largest |eigenvalue| so far. It
            is at least the error of a product.
        max_products: Stop after this number of products. The residuals take k more.
        basis: The largest number of vectors in memory, k + 9 by default.
    """
    space, tolerance = hessian.loss.vectors, min(max(tolerance, hessian.error), LARGEST_TOLERANCE)
    start = space.random(seed, 0)
    ones = torch.ones_like(start)
    dimension = round(space.dot(ones, ones))
    del ones
    k = min(k, dimension)
    limit = min(max(basis or k + 9, k + 2), dimension)
    vectors, matrix = [start.div_(space.norm(start))], np.zeros((limit, limit))
    for used in range(1, max_products + 1):
        rest, size = hessian.product(vectors[-1]), len(vectors)
        matrix[:size, size - 1] = matrix[size - 1, :size] = _orthogonalize_(rest, vectors, space)
        values, rotation = (array[..., ::-1] for array in np.linalg.eigh(matrix[:size, :size]))
        length, largest = space.norm(rest), np.abs(values).max()
        is_exhausted = size == dimension or length <= EXHAUSTED * largest
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
    result = vectors[: rotation.shape[1]]
    for place, _ in space.blocks:
        old = space.precise(vectors, place)
        rotated = torch.from_numpy(rotation.T.copy()).to(old) @ old
        for vector, row in zip(result, rotated, strict=True):
            vector[place] = row
    return result


def trace(hessian: Hessian, probes: int, seed: int, known: Eigenpairs | None = None) -> tuple[float, float]:
    """
    Return tr H by Hutchinson's estimator with random signs, and its standard error.

    As in Hutch++, only the trace outside of the known basis is estimated. The largest eigenvalues make up most of the
    variance, so that takes far fewer probes.
    """
    space, estimates = hessian.loss.vectors, []
    for probe in range(probes):
        z = space.random(seed, 1, probe).sign_()
        if known is not None:
            _orthogonalize_(z, known.vectors, space)
        estimates.append(space.dot(z, hessian.product(z)))
    error = float(np.std(estimates, ddof=1)) / math.sqrt(probes) if probes > 1 else math.nan
    return (0.0 if known is None else known.trace) + float(np.mean(estimates)), error
