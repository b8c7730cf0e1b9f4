"""Measure how flat the loss is around the weights, and how far a penalised step should move them, on any engine."""

from .callback import SharpnessCallback
from .find_r import find_r
from .measure import measure_sharpness
from .surface import plot_loss_surface


__all__ = ["SharpnessCallback", "find_r", "measure_sharpness", "plot_loss_surface"]
