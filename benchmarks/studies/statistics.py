"""Means with errors, paired differences with p, and Holm's correction."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats


Run = dict[str, Any]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error (nan for a single value)."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(error)


def paired(values: dict[int, float], baseline: dict[int, float]) -> tuple[float, float, float]:
    """Over the seeds that both have: mean difference, its standard error, p of Student's paired test."""
    seeds = sorted(values.keys() & baseline.keys())
    differences = [values[seed] - baseline[seed] for seed in seeds]
    if not seeds:
        return math.nan, math.nan, math.nan
    mean, error = mean_and_error(differences)
    p = float(stats.ttest_1samp(differences, 0.0).pvalue) if error > 0 else math.nan
    return mean, error, p


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; nan is no test, and stays."""
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[index] = largest
    return corrected


def p_value(p: float) -> str:
    return "–" if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def plus_minus(mean: float, error: float, scale: float = 1, digits: int = 2, sign: str = "") -> str:
    return f"{mean * scale:{sign}.{digits}f}" + ("" if math.isnan(error) else f" ± {error * scale:.{digits}f}")
