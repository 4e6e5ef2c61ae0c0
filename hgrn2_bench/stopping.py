"""How a cell ends early. Training looks after each step whether it should stop; all other work has nothing to keep, and is left at once.

A worker hears of a stop in a thread of its own, which then sends SIGNAL to the main thread; that waits, blocked, for the work which it may
end. Processes that run a cell together send none: all of them must stop at the same step.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNAL = signal.SIGUSR1


class InterruptedTrainingError(Exception):
    """The user stopped the run; of training a checkpoint was written."""


@contextmanager
def at_once(stop: Callable[[], bool]) -> Iterator[None]:
    """Within, SIGNAL ends the work wherever it is, once `stop()` is true: InterruptedTrainingError. For the main thread."""

    def leave(*_: Any) -> None:
        if stop():
            raise KeyboardInterrupt  # which no `except Exception` on the way takes for a fault of the work

    before, blocked = signal.signal(SIGNAL, leave), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (SIGNAL,))
        yield
    except KeyboardInterrupt:
        if not stop():
            raise
        raise InterruptedTrainingError from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(SIGNAL, before)


@contextmanager
def in_its_own_time() -> Iterator[None]:
    """Within `at_once`, work that looks itself whether it should stop; a stop that it did not see takes effect after it."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (SIGNAL,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
