"""The record of a window's passes, the state that its second pass restores, and the checks of both."""

from .probe import is_called_by_training_step, is_same_pass, not_logged, probe_same_forward, refuse_same_pass, replaced
from .window import MicroBatch, Window


__all__ = [
    "MicroBatch",
    "Window",
    "is_called_by_training_step",
    "is_same_pass",
    "not_logged",
    "probe_same_forward",
    "refuse_same_pass",
    "replaced",
]
