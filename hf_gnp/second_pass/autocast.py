"""The autocast that stands around `compute_loss`: a user's own is there in the first pass only."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch


class Autocast:
    """Whether autocast is on for a device type, and to which dtype, as it is when this is made."""

    def __init__(self, device_type: str):
        self._device_type = device_type
        self._state = self._now()

    def _now(self) -> tuple[bool, torch.dtype | None]:
        is_on = torch.is_autocast_enabled(self._device_type)
        return is_on, torch.get_autocast_dtype(self._device_type) if is_on else None

    def set(self) -> AbstractContextManager[Any]:
        """Set it again, where it is another now."""
        if self._state == self._now():
            return contextlib.nullcontext()
        is_on, dtype = self._state
        return torch.autocast(self._device_type, dtype=dtype, enabled=is_on)
