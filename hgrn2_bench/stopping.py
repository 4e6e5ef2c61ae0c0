"""How a cell ends early. Training looks after each step whether it should stop; all other work has nothing to keep, and is left at once.

A worker hears of a stop in a thread of its own, which then sends its process SIGNAL.
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

    before = signal.signal(SIGNAL, leave)
    try:
        leave()
        yield
    except KeyboardInterrupt:
        if not stop():
            raise
        raise InterruptedTrainingError from None
    finally:
        signal.signal(SIGNAL, before)


@contextmanager
def in_its_own_time() -> Iterator[None]:
    """Within `at_once`, work that looks itself whether it should stop; a stop that it did not see takes effect after it."""
    before = signal.signal(SIGNAL, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(SIGNAL, before)
    if callable(before):
        before(SIGNAL, None)
