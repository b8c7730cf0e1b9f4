"""Deferral of signals while weights are perturbed."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


# The signals that stop a run or save it. Others are not deferred.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """
    Defer Python's signal handlers until the context ends, so that they see unperturbed weights.

    Ctrl-C has such a handler. A second Ctrl-C is not deferred.
    """
    is_main = threading.current_thread() is threading.main_thread()  # others cannot set handlers
    found = {number: signal.getsignal(number) for number in SIGNALS if is_main}
    handlers = {number: handler for number, handler in found.items() if callable(handler)}
    pending: dict[int, Any] = {}  # the frame of each signal

    def note(number: int, frame: Any) -> None:
        if number in pending and number == signal.SIGINT:
            handlers[number](number, frame)
        pending[number] = frame

    try:
        for number in handlers:
            signal.signal(number, note)
        yield
    finally:
        for number, handler in reversed(handlers.items()):  # Ctrl-C last, as it may interrupt this
            signal.signal(number, handler)
        with contextlib.ExitStack() as stack:  # all handlers run, also after one that raises
            for number, frame in reversed(pending.items()):
                stack.callback(handlers[number], number, frame)
