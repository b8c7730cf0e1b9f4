"""What `measure_sharpness` measures, out of loss, Hessian and spectrum."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .hessian import DifferenceHessian, ExactHessian, Hessian
from .loss import SampleLoss, sample_loss
from .spectrum import Eigenpairs, top_eigenpairs, trace


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
    The flatness of the loss at the trainer's weights \\(\theta\\): gradient norm, spectrum of the Hessian
    \\(H = \nabla^2 L\\), and the rise of the loss at distances r.

    \\(L\\) is the trainer's own loss, a mean over the labels of a sample, in evaluation mode. Weights, buffers,
    random generators and gradients are bit for bit as before, also when the measurement is interrupted. Every rank
    calls this. A seed gives the same sample and the same random directions on every engine and number of ranks.

    Memory, in float32 copies of this rank's trainable shard: θ, the gradient, and at most `basis` + 4 vectors. Cost: a
    product takes two gradients of the sample.

    Args:
        trainer: A [`GNPTrainer`], or any [`~transformers.Trainer`].
        dataset: What `evaluate` takes: a dataset, or the name of one of several. Default: the `eval_dataset`.
        k: How many of the largest eigenvalues; 0 for none.
        radii: One or several distances r.
        samples: The size of the sample that is drawn, over all ranks; of an iterable dataset, its first elements.
        probes: Random vectors for the trace and for the rise along random directions; 0 for neither.
        tolerance: Residuals ‖Hv - λv‖ at which the eigenvalues are good enough, as a share of the largest.
        max_products: At most so many products for the eigenvalues, which are then less good than asked: see the
            residuals.
        basis: How many vectors are held for the eigenvalues. Default: k + 9. Fewer take less memory and more products.
        method: "differences": products by central differences of gradients, on every engine. "exact": by
            differentiating twice, on one process, where every kernel of the model can be.
        step: The distance of the differences. Default: chosen by the dtype, ‖θ‖ and two products that agree best.
        seed: Of the sample and of the random vectors.
        log: Whether to log the result, each name with `sharpness_` before it.

    Returns:
        loss, grad_norm (‖∇L‖), top_eigenvalues and residuals (largest first), trace and trace_standard_error,
        product_error (the estimated relative error of a product), products, samples, radii; and for each r the rise
        of the loss along the gradient (ascent), along the top eigenvector, up or down, whichever rises more
        (ascent_top_eigenvector), and its mean over random directions (ascent_random).

    Raises:
        ValueError: for an argument out of range, missing data, or a model in fp16.
        RuntimeError: before `train` under DeepSpeed or FSDP, or between the micro-batches of a step.
        NotImplementedError: for an engine on which the weights cannot be moved.

    Reference:
        Central differences: Pearlmutter 1994. Spectrum and trace: see `spectrum.py`.

    Example:

    ```python
    >>> trainer = GNPTrainer(model, args, eval_dataset=eval_dataset)
    >>> trainer.measure_sharpness(k=2)["top_eigenvalues"]
    ```
    """
    radii = [float(r) for r in (radii if isinstance(radii, Sequence) else [radii])]
    _check(k=k, radii=radii, samples=samples, probes=probes, tolerance=tolerance, max_products=max_products)
    with sample_loss(trainer, dataset, samples, seed) as loss:
        result: dict[str, Any] = {"samples": loss.samples, "radii": radii}
        gradient = loss.vectors.zeros()
        result["loss"] = loss.add_gradient_(gradient)
        result["grad_norm"] = loss.vectors.norm(gradient)
        pairs = None
        if k > 0 or probes > 0:
            hessian = make_hessian(loss, gradient, method, step)
            if k > 0:
                pairs = eigenpairs_of(hessian, k, tolerance, max_products, seed, basis)
                result |= {"top_eigenvalues": pairs.values, "residuals": pairs.residuals}
            if probes > 0:
                estimate = trace(hessian.product, loss.vectors, probes, seed, pairs)
                result["trace"], result["trace_standard_error"] = estimate
            result |= {"product_error": hessian.error, "products": hessian.products}
        result |= _ascents(loss, result["loss"], gradient, pairs, radii, probes, seed)
    if log:
        should_log = trainer.control.should_log
        trainer.log(as_logs(result))
        trainer.control.should_log = should_log  # else, in a callback, the step's own log is taken for done
    return result


def _check(**arguments: Any) -> None:
    least = {"k": 0, "samples": 1, "probes": 0, "max_products": 1}
    for name, minimum in least.items():
        if arguments[name] < minimum or arguments[name] != int(arguments[name]):
            raise ValueError(f"{name} must be a whole number, at least {minimum}, but it is {arguments[name]!r}.")
    if not all(r > 0 and math.isfinite(r) for r in (*arguments["radii"], arguments["tolerance"])):
        raise ValueError(f"radii and tolerance must be positive: {arguments['radii']}, {arguments['tolerance']}.")


def make_hessian(loss: SampleLoss, gradient: torch.Tensor, method: str, step: float | None) -> Hessian:
    if method == "differences":
        return DifferenceHessian(loss, gradient, step)
    if method != "exact":
        raise ValueError(f"method must be 'differences' or 'exact', but it is {method!r}.")
    accelerator = loss.trainer.accelerator
    if accelerator.num_processes > 1 or loss.trainer.is_deepspeed_enabled:
        raise ValueError("method='exact' is for one process: use method='differences' on this engine.")
    return ExactHessian(loss)


def eigenpairs_of(
    hessian: Hessian, k: int, tolerance: float, max_products: int, seed: int, basis: int | None = None
) -> Eigenpairs:
    """No better than the products are."""
    tolerance = max(tolerance, hessian.error)
    return top_eigenpairs(hessian.product, hessian.loss.vectors, k, tolerance, max_products, seed, basis)


def _ascents(
    loss: SampleLoss,
    start: float,
    gradient: torch.Tensor,
    pairs: Eigenpairs | None,
    radii: Sequence[float],
    probes: int,
    seed: int,
) -> dict[str, list[float]]:
    result = {"ascent": [_rise(loss, start, gradient, r) for r in radii]}
    if pairs is not None:
        vector = pairs.vectors[0]
        result["ascent_top_eigenvector"] = [
            max(_rise(loss, start, vector, sign * r) for sign in (1, -1)) for r in radii
        ]
    if probes > 0:
        rises = []
        for probe in range(probes):
            direction = loss.vectors.random(seed, 2, probe)
            rises.append([_rise(loss, start, direction, r) for r in radii])
        result["ascent_random"] = np.mean(rises, axis=0).tolist()
    return result


def _rise(loss: SampleLoss, start: float, direction: torch.Tensor, r: float) -> float:
    """L(θ + r v/‖v‖) - L(θ)"""
    norm = loss.vectors.norm(direction)
    if norm == 0:
        return 0.0
    loss.move(direction, r / norm)
    return loss.value() - start


def as_logs(result: dict[str, Any]) -> dict[str, float]:
    """One number for each name, as loggers take them: `sharpness_top_eigenvalue_1`, `sharpness_ascent_r_0.05`."""
    logs = {}
    for name, value in result.items():
        if name in ("radii", "samples"):
            continue
        if not isinstance(value, list):
            logs[f"sharpness_{name}"] = value
        elif name.startswith("ascent"):
            logs |= {f"sharpness_{name}_r_{r:g}": rise for r, rise in zip(result["radii"], value, strict=True)}
        else:
            singular = name.removesuffix("s")
            logs |= {f"sharpness_{singular}_{i}": number for i, number in zip(itertools.count(1), value)}
    return logs
