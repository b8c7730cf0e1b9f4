"""`measure_sharpness`: the gradient norm, the spectrum of the Hessian, and the rise of the loss."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import Trainer

from .hessian import Hessian, top_eigenpairs, trace
from .loss import SampleLoss, sample_loss
from .sample import draw_sample


def measure_sharpness(
    trainer: Any,
    dataset: Any = None,
    *,
    k: int = 1,
    radii: float | Sequence[float] = 0.05,
    samples: int = 256,
    probes: int = 10,
    tolerance: float = 1e-3,
    max_products: int = 60,
    basis: int | None = None,
    method: str = "differences",
    step: float | None = None,
    seed: int = 0,
    log: bool = True,
) -> dict[str, Any]:
    r"""
    Measure the flatness of the loss at the trainer's weights \\(\theta\\): the gradient norm, the spectrum of the
    Hessian \\(H = \nabla^2 L\\), and the rise of the loss at distances r.

    \\(L\\) is the trainer's own loss in evaluation mode, a mean over the labels of a sample. A seed gives the same
    sample and directions on every engine and number of ranks. Weights, buffers, random generators and gradients are
    restored bit for bit, also after an interruption. Every rank calls this.

    Cost: two gradients of the sample for each product. Memory: θ, the gradient and at most `basis` + 4 vectors, in
    float32, of this rank's trainable shard.

    Args:
        trainer: A [`GNPTrainer`], or any [`~transformers.Trainer`].
        dataset: A dataset, or the name of one of several, as in `evaluate`. Default: the `eval_dataset`.
        k: The number of largest eigenvalues, or 0.
        radii: One or several distances r.
        samples: The size of the sample over all ranks. An iterable dataset gives its first elements.
        probes: The number of random vectors for the trace and for the rise along random directions, or 0.
        tolerance: The residual ‖Hv - λv‖ at which an eigenvalue is good enough, as a share of the largest one.
        max_products: The largest number of products for the eigenvalues. The residuals tell whether it was enough.
        basis: The number of vectors in memory for the eigenvalues, k + 9 by default. Fewer take more products.
        method: "differences" of gradients (central, every engine), or "exact" by double backward (one process).
        step: The distance of the differences. Default: the one at which two products agree best.
        seed: The seed of the sample and of the random vectors.
        log: Whether to log the result, each name with the prefix `sharpness_`.

    Returns:
        loss, grad_norm (‖∇L‖), top_eigenvalues and residuals (largest first), trace and trace_standard_error,
        product_error (the estimated relative error of a product), products, samples, radii. For each r the rise along
        the gradient (ascent), its mean over random directions (ascent_random), and the larger one of the two along
        the top eigenvector (ascent_top_eigenvector).

    Raises:
        ValueError: for an argument out of range, missing data, or a model in fp16.
        RuntimeError: before `train` under DeepSpeed or FSDP, or between the micro-batches of a step.
        NotImplementedError: for an engine on which the weights cannot be moved.

    Reference:
        Pearlmutter, "Fast exact multiplication by the Hessian", 1994. Spectrum and trace: see `hessian.py`.
    """
    radii = [float(r) for r in np.atleast_1d(radii)]
    check_positive(radii=radii, tolerance=[tolerance])
    check_counts(k=(k, 0), samples=(samples, 1), probes=(probes, 0), max_products=(max_products, 1))
    with sample_loss(trainer, seed) as loss:
        loss.batches, size = draw_sample(trainer, dataset, samples, seed)
        vectors, pairs = loss.vectors, None
        gradient = vectors.zeros()
        start = loss.add_gradient_(gradient)
        result = {"samples": size, "radii": radii, "loss": start, "grad_norm": vectors.norm(gradient)}
        if k > 0 or probes > 0:
            hessian = Hessian(loss, gradient, method, step)
            if k > 0:
                pairs = top_eigenpairs(hessian, k, tolerance, max_products, seed, basis)
                result |= {"top_eigenvalues": pairs.values, "residuals": pairs.residuals}
            if probes > 0:
                result["trace"], result["trace_standard_error"] = trace(hessian, probes, seed, pairs)
            result |= {"product_error": hessian.error, "products": hessian.products}
        result["ascent"] = _rises(loss, start, gradient, radii)
        if pairs is not None:
            both = [_rises(loss, start, pairs.vectors[0], [sign * r for r in radii]) for sign in (1, -1)]
            result["ascent_top_eigenvector"] = np.max(both, axis=0).tolist()
        if probes > 0:
            rises = [_rises(loss, start, vectors.random(seed, 2, probe), radii) for probe in range(probes)]
            result["ascent_random"] = np.mean(rises, axis=0).tolist()
    if log:
        should_log = trainer.control.should_log
        Trainer.log(trainer, _as_logs(result))  # TRL's own would add, and clear, the metrics of its training
        trainer.control.should_log = should_log  # without this, a callback would suppress the log of the step
    return result


def check_counts(**counts: tuple[int, int]) -> None:
    for name, (value, least) in counts.items():
        if value < least or value != int(value):
            raise ValueError(f"{name} must be a whole number, at least {least}, but it is {value!r}.")


def check_positive(**values: Sequence[float]) -> None:
    if not all(value > 0 and math.isfinite(value) for several in values.values() for value in several):
        raise ValueError(f"{' and '.join(values)} must be positive: {', '.join(map(str, values.values()))}.")


def _rises(loss: SampleLoss, start: float, direction: torch.Tensor, radii: Sequence[float]) -> list[float]:
    """Return L(θ + r v/‖v‖) - L(θ) for each r."""
    norm, rises = loss.vectors.norm(direction) or math.inf, []
    for r in radii:
        loss.move(direction, r / norm)
        rises.append(loss.value() - start)
    return rises


def _as_logs(result: dict[str, Any]) -> dict[str, float]:
    """Return one number a name, as loggers need, such as `sharpness_ascent_r_0.05`."""
    logs: dict[str, float] = {}
    for name, value in result.items():
        if name.startswith("ascent"):
            logs |= {f"sharpness_{name}_r_{r:g}": rise for r, rise in zip(result["radii"], value, strict=True)}
        elif isinstance(value, list) and name != "radii":
            logs |= {f"sharpness_{name.removesuffix('s')}_{i}": number for i, number in enumerate(value, 1)}
        elif name not in ("radii", "samples"):
            logs[f"sharpness_{name}"] = value
    return logs
