"""Signals as values: a loop waits for the next one or for a deadline, and nothing interrupts it."""

import contextlib
import signal
import time
from collections.abc import Iterator

ENDING = frozenset({signal.SIGINT, signal.SIGTERM})
_HELD = ENDING | {signal.SIGCHLD}


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold SIGINT, SIGTERM and SIGCHLD back inside of the block, to be met by `wait` only."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def release() -> None:
    """Let held signals through again, as a program that is about to be started expects."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)


def wait(until_s: float) -> signal.Signals | None:
    """Give the next held signal, or None when `time.monotonic()` has reached `until_s`."""
    met = signal.sigtimedwait(_HELD, max(0.0, until_s - time.monotonic()))
    return signal.Signals(met.si_signo) if met else None
