"""Deferral of signals while weights are perturbed."""

import contextlib
import signal
import threading
from typing import Any


# The signals that stop a run or save it. Others are not deferred.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class DeferredSignals:
    """
    Defer Python's signal handlers until the context ends, so that they see unperturbed weights.

    Ctrl-C has such a handler. A second Ctrl-C is not deferred.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._pending: dict[int, Any] = {}  # the frame of each signal

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
        with contextlib.ExitStack() as stack:  # all handlers run, also after one that raises
            for number, frame in reversed(self._pending.items()):
                stack.callback(self._handlers[number], number, frame)
