"""Signals wait while weights are moved."""

import signal
import threading
from typing import Any


# Those on which people stop a run or save it; others keep their handlers.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class DeferredSignals:
    """
    Inside, a signal that has a handler in Python (Ctrl-C has) is noted, and its handler runs on leaving: it finds
    clean weights, and an exception that it raises interrupts nothing half way. A second Ctrl-C does not wait.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._pending: dict[int, Any] = {}

    def __enter__(self) -> "DeferredSignals":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        if number in self._pending and number == signal.SIGINT:
            self._handlers[number](number, frame)
        self._pending[number] = frame

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for number in list(self._pending):
            self._handlers[number](number, self._pending.pop(number))
