"""
Eigenvalues and trace of a symmetric operator from products with vectors.

Reference:
    Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal. 2000.
    Meyer et al., "Hutch++: optimal stochastic trace estimation", SOSA 2021, arXiv 2010.09649.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from .vectors import ShardVectors, precise


Product = Callable[[torch.Tensor], torch.Tensor]

# Below this share of the largest eigenvalue, what is left of a product is rounding: the space is exhausted.
EXHAUSTED = 1e-10


class Eigenpairs(NamedTuple):
    """
    The largest eigenvalues, largest first, and ‖Hv - λv‖ from one more product with each. `vectors` are orthonormal:
    those of these eigenvalues, and the others of the basis that they were found in. `trace` is that of H within it.
    """

    values: list[float]
    vectors: list[torch.Tensor]
    residuals: list[float]
    trace: float


def top_eigenpairs(
    product: Product, space: ShardVectors, k: int, tolerance: float, max_products: int, seed: int, basis: int | None
) -> Eigenpairs:
    """
    The k largest eigenvalues by Lanczos with full reorthogonalisation, restarted when `basis` vectors are held.

    Args:
        product: H v, of local parts.
        tolerance: Stop when the residuals are below this share of the largest |eigenvalue| seen.
        max_products: Stop after that many products, and k more for the residuals.
        basis: How many vectors are held at most; k + 9 by default.
    """
    ones = torch.ones_like(space.zeros())
    dimension = round(space.dot(ones, ones))
    k = min(k, dimension)
    limit = min(max(basis or k + 9, k + 2), dimension)
    start = space.random(seed, 0)
    vectors, matrix = [start / space.norm(start)], np.zeros((limit, limit))
    for used in range(1, max_products + 1):
        rest = product(vectors[-1])
        coefficients = _orthogonalize_(rest, vectors, space)
        last = len(vectors) - 1
        matrix[: last + 1, last] = matrix[last, : last + 1] = coefficients
        values, rotation = np.linalg.eigh(matrix[: last + 1, : last + 1])
        values, rotation = values[::-1], rotation[:, ::-1]
        length = space.norm(rest)
        largest = np.abs(values).max()
        is_exhausted = len(vectors) == dimension or length <= EXHAUSTED * largest
        residuals = length * np.abs(rotation[-1, :k])
        if is_exhausted or (len(vectors) >= k and residuals.max() <= tolerance * largest) or used == max_products:
            break
        if len(vectors) == limit:
            kept = k + (limit - k) // 2
            vectors = _rotated(vectors, rotation[:, :kept])
            matrix[:] = 0
            matrix[range(kept), range(kept)] = values[:kept]
        vectors.append(rest.div_(length))
    return _with_residuals(product, space, _rotated(vectors, rotation), k, values)


def _orthogonalize_(rest: torch.Tensor, vectors: list[torch.Tensor], space: ShardVectors) -> np.ndarray:
    """Take the components along orthonormal `vectors` out of `rest`, twice, and return them."""
    total = np.zeros(len(vectors))
    for _ in range(2):
        components = space.dots(vectors, rest)
        for component, vector in zip(components, vectors, strict=True):
            rest.sub_(vector, alpha=float(component))
        total += components
    return total


def _rotated(vectors: list[torch.Tensor], rotation: np.ndarray) -> list[torch.Tensor]:
    """The combinations of `vectors` in the columns of `rotation`, one at a time: no copy of all of them at once."""
    size, block = vectors[0].numel(), 2**22
    matrix = torch.from_numpy(np.ascontiguousarray(rotation)).to(vectors[0].device, precise(vectors[0].device))
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
    tr H by Hutchinson's estimator with random signs, and its standard error.

    Within the basis of known eigenpairs the trace is known, and only the rest is estimated, as Hutch++ does: without
    the largest eigenvalues, which make up most of the variance, far fewer probes are needed.
    """
    vectors = known.vectors if known is not None else []
    estimates = []
    for probe in range(probes):
        z = space.random(seed, 1, probe, signs=True)
        if vectors:
            _orthogonalize_(z, vectors, space)
        estimates.append(space.dot(z, product(z)))
    exact = known.trace if known is not None else 0.0
    error = float(np.std(estimates, ddof=1)) / math.sqrt(probes) if probes > 1 else math.nan
    return exact + float(np.mean(estimates)), error
