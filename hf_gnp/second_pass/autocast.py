"""Autocast around `compute_loss`: the second pass enters it again, as it does not call a user's `training_step`."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch


class Autocast:
    """Record at construction whether autocast is enabled for a device type, and its dtype."""

    def __init__(self, device_type: str):
        self._device_type = device_type
        self._state = self._now()

    def _now(self) -> tuple[bool, torch.dtype | None]:
        is_on = torch.is_autocast_enabled(self._device_type)
        return is_on, torch.get_autocast_dtype(self._device_type) if is_on else None

    def set(self) -> AbstractContextManager[Any]:
        """Return a context with the recorded autocast."""
        if self._state == self._now():
            return contextlib.nullcontext()
        is_on, dtype = self._state
        return torch.autocast(self._device_type, dtype=dtype, enabled=is_on)
