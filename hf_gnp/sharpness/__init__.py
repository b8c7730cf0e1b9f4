"""How flat the loss is around trained weights, on any engine: `python -m hf_gnp.sharpness` measures checkpoints."""

from .callback import SharpnessCallback
from .measure import measure_sharpness
from .surface import plot_loss_surface


__all__ = ["SharpnessCallback", "measure_sharpness", "plot_loss_surface"]
