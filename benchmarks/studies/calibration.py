"""Whether a model's confidence is right, also after its temperature was set on the validation data."""

import numpy as np
import torch
from torch.nn.functional import cross_entropy


BINS = 15


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """
    The expected calibration error: how far confidence is from accuracy, over bins of equal width.

    Args:
        probabilities: (n, classes).
        labels: (n,), the right classes.
    """
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))


def best_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The T with the least loss of logits / T (Guo et al. 2017, arXiv 1706.04599), to 2%, from 0.1 to 20."""
    grid = torch.logspace(-1, np.log10(20), 270)
    losses = torch.stack([cross_entropy(logits / temperature, labels) for temperature in grid])
    return float(grid[losses.argmin()])


def calibration(
    logits: np.ndarray, labels: np.ndarray, validation_logits: np.ndarray, validation_labels: np.ndarray
) -> dict[str, float]:
    """Calibration error and loss on the test data, as they are and with the temperature of the validation data."""
    scores, validation = torch.from_numpy(logits).float(), torch.from_numpy(validation_logits).float()
    temperature = best_temperature(validation, torch.from_numpy(validation_labels))
    result = {"temperature": temperature}
    for suffix, scaled in (("", scores), ("_scaled", scores / temperature)):
        result[f"calibration_error{suffix}"] = calibration_error(scaled.softmax(-1).numpy(), labels)
        result[f"loss{suffix}"] = float(cross_entropy(scaled, torch.from_numpy(labels)))
    return result
