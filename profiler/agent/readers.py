"""Readers: child processes that read files and processes of others for the sampler.

`ask` returns at once; what was read arrives with a later `poll`, which calls back. A child that
takes too much memory or CPU time, hangs or crashes costs the item that it was reading, and another
child takes its place. One that cannot even be killed, because a file system does not answer, is
left behind. Children exit when nothing was asked for a while, and all but one of them soon.
"""

import logging
import os
import select
import signal
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from profiler.agent.reader_budget import ReaderBudget
from profiler.agent.reader_child import Answer, Failure, Item, Patience, ReaderChild, Take
from symbolizer.file_cache import UnwrittenError
from symbolizer.text import readable

log = logging.getLogger(__name__)

KINDS = "profiler.agent.reader_kinds"
_CHILDREN = max(3, min(4, os.cpu_count() or 1))
_BATCH = 32
"""Items that a child is given at once. Of long ones it is given one, so that others stay free."""
_FIRST_IDLE_S, _OTHERS_IDLE_S = 90.0, 2.0
"""For how long one child stays when nothing is asked, and others. To start one takes 0.2 s of CPU
time, and each takes some 30 MB: so one stays from one window to the next."""
_MAX_WAITING = 8192
"""Items that wait for a child. Beyond it those go that have waited longest of the last turn."""
_SECOND_AFTER_S = 0.5
"""Another child is started when something has waited for so long: most are answered earlier, also
by a child that has just been started."""
_LOOK_S = 0.5
_HANGS_AFTER_S = 2.0
"""A child that has used no CPU time for so long, and does not wait for a CPU, hangs."""
_LAST_LOOK_S, _LAST_HANGS_AFTER_S = 0.2, 0.75
"""The same where the end of the sampler waits for readers."""
_SET_ASIDE_S = 60.0
_LONGEST_ASIDE_S = 3600.0
_MAX_GROUPS = 1024
_MAX_LEFT_BEHIND = 16
"""Children that cannot be killed. Beyond it nothing is read until one of them is gone."""
_START_PAUSE_S = 1.0
_WARN_EVERY_S = 10.0
_WARN_OF_CACHE_EVERY_S = 600.0
_REAP_S = 0.05
"""How long a child that has closed its socket is waited for, as its status says why."""
_CLOSE_S = 0.3
"""Killed children are waited for so long, all together."""


_FAILURES = {
    MemoryError.__name__: Failure.MEMORY,
    UnwrittenError.__name__: Failure.UNWRITTEN,
}
"""By the error that a reader sends; others are Failure.ERROR."""


class Readers:
    """Asks reader children. Not to be used from several threads at once.

    Attributes:
        failures: how many items failed, by Failure.
        cpu_ns: what the children have used so far.
        answered: how many items were answered.
        left_behind: how many children hang so that they cannot be killed.
    """

    def __init__(self, cache: Path, *, kinds: str = KINDS, children: int = _CHILDREN) -> None:
        """Start nothing yet. `kinds` is the module that defines what can be asked for."""
        self.failures: Counter[Failure] = Counter()
        self.cpu_ns = 0
        self.answered = 0
        self._cache = cache
        self._kinds = kinds
        self._limit = children
        # By turn, and within a turn those that are short first.
        self._waiting: tuple[deque[Item], ...] = tuple(deque() for _ in range(6))
        self._children: dict[int, ReaderChild] = {}
        self._refused: deque[tuple[Item, Failure]] = deque()
        self._left: list[_Left] = []
        self._aside = SetAside()
        self._epoll = select.epoll()
        self._next_warning_s: dict[Failure, float] = {}
        self._pause_until_s = 0.0
        self._is_closed = False
        self._budget = ReaderBudget(time.monotonic())
        self._patience = Patience(_LOOK_S, _HANGS_AFTER_S)

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when there are answers."""
        return self._epoll.fileno()

    @property
    def is_idle(self) -> bool:
        is_asked = self.has_waiting or self._refused
        return not is_asked and all(child.is_idle for child in self._children.values())

    @property
    def has_waiting(self) -> bool:
        """Whether there is more to read than children were given."""
        return any(self._waiting)

    @property
    def left_behind(self) -> int:
        return len(self._left)

    def status(self) -> dict[str, int]:
        """Return what the agent's status shows of them."""
        return {
            "children": len(self._children),
            "waiting": sum(map(len, self._waiting)),
            "answered": self.answered,
            "left_behind": self.left_behind,
            "cpu_ns": self.cpu_ns,
            **{f"failed_{failure}": number for failure, number in self.failures.items()},
        }

    def ask(
        self,
        kind: str,
        values: Mapping[str, Any],
        take: Take,
        *,
        turn: int = 1,
        group: str = "",
        owner: str = "",
        is_long: bool = False,
    ) -> None:
        """Ask for something. `take` is called with the Answer, in a later `poll`.

        `turn` is 0 for what comes first, 2 for what comes last. What takes long waits for the other
        items of its turn; neither it nor a later turn ever has all children. When an item hangs,
        others of its `group`, as those on the same file system, are not read for a while. What one
        `owner` has may not take the readers from all others: beyond the owner's part of the budget
        it fails, and may be asked for again later.
        """
        place = 2 * turn + is_long
        self._waiting[place].append(Item(kind, values, take, group, owner, time.monotonic(), place))
        if sum(map(len, self._waiting)) > _MAX_WAITING:
            last = next(waiting for waiting in reversed(self._waiting) if waiting)
            self._refused.append((last.popleft(), Failure.BUDGET))
        self._hand_out()

    def poll(self) -> None:
        """Call back with what has been answered, and look after the children."""
        for _ in range(len(self._refused)):
            item, failure = self._refused.popleft()
            self._call(item, failure=failure)
        for fd, _ in self._epoll.poll(0):
            child = self._children.get(fd)
            if child is not None:
                self._take_from(child)
        now_s = time.monotonic()
        for child in list(self._children.values()):
            if child.is_idle:
                is_first = child is next(iter(self._children.values()))
                if now_s - child.since_s > (_FIRST_IDLE_S if is_first else _OTHERS_IDLE_S):
                    self._end(child)
            elif child.hangs(now_s, self._patience):
                self._fail(child, Failure.HUNG)
        self._left = [left for left in self._left if left.process.poll() is None]
        self._hand_out()

    def wait(self, until_s: float, is_done: Callable[[], bool]) -> bool:
        """Poll until `is_done` or until `time.monotonic()` = `until_s`; return whether it is."""
        while not is_done():
            left_s = until_s - time.monotonic()
            if left_s <= 0 or self.is_idle:
                return is_done()
            select.select([self._epoll], [], [], min(left_s, 0.05))
            self.poll()
        return True

    def hasten(self) -> None:
        """Give up sooner what hangs: the sampler is about to end."""
        self._patience = Patience(_LAST_LOOK_S, _LAST_HANGS_AFTER_S)

    def close(self) -> None:
        """End all children. What is asked for afterwards is never answered."""
        self._is_closed = True
        for child in list(self._children.values()):
            self._kill(child)
        until_s = time.monotonic() + _CLOSE_S
        for left in self._left:
            left.process.kill()
            try:
                left.process.wait(max(0.0, until_s - time.monotonic()))
            except subprocess.TimeoutExpired:  # it hangs in the kernel: init will reap it
                left.process.returncode = -signal.SIGKILL
        self._epoll.close()

    def _take_from(self, child: ReaderChild) -> None:
        is_open = child.receive()
        for message in child.messages():
            if "is_last" in message:
                child.look()
                self._count(child)
                child.rest()
                if message["is_last"]:
                    self._end(child)
                    return
                continue
            item = child.answered()
            if item is None:  # an answer to nothing: it is not itself any more
                self._fail(child, Failure.CRASHED)
                return
            self.answered += 1
            if "error" in message:
                log.debug("cannot read kind=%s: %s", item.kind, message["error"])
                failure = _FAILURES.get(str(message["error"]), Failure.ERROR)
                if failure == Failure.UNWRITTEN:
                    self._warn_of_cache(str(message.get("reason")))
                self._call(item, failure=failure)
            else:
                self._call(item, result=message.get("result"))
        if not is_open:
            self._fail(child, None)

    def _call(self, item: Item, *, result: Any = None, failure: Failure | None = None) -> None:
        if failure is not None:
            self.failures[failure] += 1
        item.take(Answer(result, failure))

    def _fail(self, child: ReaderChild, failure: Failure | None) -> None:
        """Give up a child and the item that it was reading; the others are asked again."""
        self._kill(child, _REAP_S if failure is None else 0.0)
        self._count(child)
        if failure is None:
            failure = Failure.TIME if child.process.returncode == -signal.SIGPROF else None
            failure = failure or Failure.CRASHED
        items = child.unanswered()
        if not items:
            return
        failed, *rest = items
        self._warn(failed, failure)
        if failure == Failure.HUNG and failed.group:
            self._aside.add(failed.group, time.monotonic())
        for item in reversed(rest):
            self._waiting[item.place].appendleft(item)
        self._call(failed, failure=failure)

    def _warn(self, item: Item, failure: Failure) -> None:
        """Log what any user may bring about as often as he likes, each failure now and then."""
        now_s = time.monotonic()
        if now_s >= self._next_warning_s.get(failure, 0.0):
            self._next_warning_s[failure] = now_s + _WARN_EVERY_S
            before = self.failures[failure]
            log.warning("a reader failed kind=%s cause=%s before=%d", item.kind, failure, before)

    def _warn_of_cache(self, reason: str) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_warning_s.get(Failure.UNWRITTEN, 0.0):
            self._next_warning_s[Failure.UNWRITTEN] = now_s + _WARN_OF_CACHE_EVERY_S
            log.warning(
                "cannot write to the cache folder %s: %s; stacks through files without an unwind"
                " table are not whole for as long",
                self._cache,
                readable(reason.encode("utf-8", "backslashreplace")),
            )

    def _count(self, child: ReaderChild) -> None:
        used_s = child.used()
        self.cpu_ns += round(used_s * 1e9)
        self._budget.spend(child.owner, used_s, time.monotonic())

    def _hand_out(self) -> None:
        now_s = time.monotonic()
        while any(self._next_turns) and self._budget.is_left(now_s):
            child = next((child for child in self._children.values() if child.is_idle), None)
            if child is not None and not child.receive():  # somebody has killed it
                self._fail(child, None)
                continue
            if child is None:
                child = self._start(now_s)
            if child is None:
                return
            batch = list(self._next_batch(now_s))
            if not batch:
                return
            if not child.ask(batch):
                self._fail(child, None)

    @property
    def _next_turns(self) -> Sequence[deque[Item]]:
        """Return what may be handed out: one child is kept for short items of the first turn."""
        others = sum(child.is_patient for child in self._children.values())
        return self._waiting if others < max(1, self._limit - 1) else self._waiting[:1]

    def _next_batch(self, now_s: float) -> Iterator[Item]:
        """Take those that wait longest, of one kind and owner, of the first turn that has any."""
        kind, owner, taken = "", "", 0
        hanging = {left.group for left in self._left if left.group}
        for place, waiting in enumerate(self._next_turns):
            limit = 1 if place % 2 else _BATCH
            while waiting and taken < limit:
                item = waiting[0]
                if taken and (item.kind, item.owner) != (kind, owner):
                    break
                waiting.popleft()
                if item.group in hanging or self._aside.holds(item.group, now_s):
                    self._refused.append((item, Failure.SET_ASIDE))
                    continue
                if not self._budget.is_left_of(item.owner, now_s):
                    self._refused.append((item, Failure.BUDGET))
                    continue
                kind, owner, taken = item.kind, item.owner, taken + 1
                yield item
            if taken:
                return

    def _start(self, now_s: float) -> ReaderChild | None:
        oldest_s = min(waiting[0].asked_s for waiting in self._next_turns if waiting)
        if (
            self._is_closed
            or len(self._children) >= self._limit
            or (self._children and now_s - oldest_s < _SECOND_AFTER_S)
            or now_s < self._pause_until_s
            or len(self._left) >= _MAX_LEFT_BEHIND
        ):
            return None
        try:
            child = ReaderChild(self._kinds, self._cache)
        except OSError as error:
            log.warning("cannot start a reader: %s", error.strerror)
            self._pause_until_s = now_s + _START_PAUSE_S
            return None
        self._children[child.fileno()] = child
        self._epoll.register(child.fileno(), select.EPOLLIN)
        return child

    def _end(self, child: ReaderChild) -> None:
        """Let a child exit by itself."""
        self._forget(child)
        self._left.append(_Left(child.process, ""))

    def _kill(self, child: ReaderChild, wait_s: float = 0.0) -> None:
        self._forget(child)
        child.look()
        child.process.kill()
        try:
            child.process.wait(wait_s)
        except subprocess.TimeoutExpired:  # it may wait for a file system that does not answer
            self._left.append(_Left(child.process, child.group))

    def _forget(self, child: ReaderChild) -> None:
        self._epoll.unregister(child.fileno())
        del self._children[child.fileno()]
        child.close()


class _Left(NamedTuple):
    """A child that has not ended yet, and the group at which it hangs."""

    process: subprocess.Popen[bytes]
    group: str


class _Pause(NamedTuple):
    until_s: float
    length_s: float


class SetAside:
    """Groups of which an item hung, and until when (`time.monotonic()`) nothing of them is read.

    A pause is twice as long as the one before it, if a group hangs again soon after that.
    """

    def __init__(self) -> None:
        self._pauses: dict[str, _Pause] = {}

    def holds(self, group: str, now_s: float) -> bool:
        pause = self._pauses.get(group)
        return pause is not None and now_s < pause.until_s

    def add(self, group: str, now_s: float) -> None:
        before = self._pauses.pop(group, None)
        length_s = _SET_ASIDE_S
        if before and now_s < before.until_s + before.length_s:
            length_s = min(2 * before.length_s, _LONGEST_ASIDE_S)
        self._pauses[group] = _Pause(now_s + length_s, length_s)
        if len(self._pauses) > _MAX_GROUPS:
            del self._pauses[next(iter(self._pauses))]
