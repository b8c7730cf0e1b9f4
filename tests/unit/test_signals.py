"""Signals that wait: all handlers run, in the order in which the signals came."""

import signal

import pytest

from hf_gnp.signals import deferred_signals


@pytest.fixture
def ran():
    """The signals whose handlers have run. Ctrl-C and SIGTERM raise, as a shell's and a cluster's handlers do."""
    ran = []

    def note(number, frame):
        ran.append(number)
        assert frame.f_code.co_filename == __file__  # the one that was interrupted
        if number != signal.SIGUSR1:
            raise {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}[number]

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield ran
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "numbers, error",
    [
        ([signal.SIGINT, signal.SIGUSR1], KeyboardInterrupt),
        ([signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR1], SystemExit),
        ([signal.SIGUSR1, signal.SIGINT], KeyboardInterrupt),
        ([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], KeyboardInterrupt),
    ],
)
def test_pending_handlers_run_after_one_that_raises(ran, numbers, error):
    with pytest.raises(error), deferred_signals():
        for number in numbers:
            signal.raise_signal(number)
        assert ran == []
    assert ran == list(dict.fromkeys(numbers))


def test_second_ctrl_c_does_not_wait(ran):
    with pytest.raises(KeyboardInterrupt), deferred_signals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert ran == [signal.SIGINT]
