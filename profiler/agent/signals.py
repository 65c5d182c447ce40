"""Signals as values: a loop waits for a signal, for a descriptor or for a deadline.

Nothing else is interrupted by them: what ends a recording is met between two steps of it.
"""

import os
import select
import signal
import time
from collections import deque
from types import FrameType, TracebackType
from typing import Self

ENDING = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGTERM})
"""Those that ask to end: of a service manager, of Ctrl-C, of a terminal or ssh connection that has
gone."""


class Signals:
    """Takes the signals that ask to end, and SIGCHLD, for as long as its block lasts.

    One at a time. SIGHUP that was ignored before stays so: nohup(1) has asked for that.
    """

    def __init__(self) -> None:
        self._met: deque[signal.Signals] = deque()
        self._poll = select.poll()
        self._urgent = select.poll()
        self._only_signals = select.poll()

    def __enter__(self) -> Self:
        self._wakes, self._woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for poll in (self._poll, self._urgent, self._only_signals):
            poll.register(self._wakes, select.POLLIN)
        self._wakeup_before = signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in self._numbers}
        if self._before[signal.SIGHUP] == signal.SIG_IGN:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    @property
    def ignored(self) -> frozenset[signal.Signals]:
        """Those that were ignored before, as SIGINT is by what a script starts with `&`."""
        return frozenset(n for n, before in self._before.items() if before == signal.SIG_IGN)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._wakes)
        os.close(self._woken)

    _numbers = (*sorted(ENDING), signal.SIGCHLD)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._met.append(signal.Signals(number))

    def watch(self, fd: int, *, may_rest: bool = False) -> None:
        """Let `wait` return as well when the descriptor has become readable.

        With `may_rest` it is not looked at before the `rest_until_s` of `wait`: what comes until
        then is met at once.
        """
        self._poll.register(fd, select.POLLIN)
        if not may_rest:
            self._urgent.register(fd, select.POLLIN)

    def wait(
        self, until_s: float, *, only_signals: bool = False, rest_until_s: float = 0.0
    ) -> signal.Signals | None:
        """Return the next signal; None at `time.monotonic()` = `until_s`, or for a descriptor.

        With `only_signals` the watched descriptors do not matter.
        """
        if self._met:
            return self._met.popleft()
        if only_signals:
            self._wait_for(self._only_signals, until_s)
        elif not self._wait_for(self._urgent, min(until_s, rest_until_s)):
            self._wait_for(self._poll, until_s)
        return self._met.popleft() if self._met else None

    def _wait_for(self, poll: select.poll, until_s: float) -> bool:
        """Return whether anything has come before `time.monotonic()` = `until_s`."""
        left_s = until_s - time.monotonic()
        if left_s <= 0 and poll is self._urgent:
            return False
        left_s = max(0.0, left_s)
        ready = dict(poll.poll(None if left_s == float("inf") else left_s * 1000))
        if self._wakes in ready:
            os.read(self._wakes, 4096)
        return bool(ready or self._met)
