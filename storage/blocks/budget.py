"""Memory budget: how much the work of compactors may take at once, in all processes together.

An hour of a large fleet takes as much memory as ten usual ones, and there is a process for each
CPU. So each piece of work waits until what it is expected to take is free. That follows from the
bytes of the files that it reads, which are known before.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError

PROCESS_BYTES, WORKER_BYTES = 64 << 20, 64 << 20
"""What the process that hands out work takes, and each worker that has nothing to do."""
FOLD_BYTES = 300 << 20
"""A batch of level-0 objects: 240 of 25 MB in all, as arrays and as tables."""
_READ_RATIO, _ENGINE_RATIO = 2, 25
"""Memory by byte of the Parquet files that are read: arrays, and DuckDB's as far as it may. An hour
of 640,000 stacks and 4.5 million rows (24 MB) takes 0.6 GB."""
_LEAST_BYTES, _MOST_BYTES = 64 << 20, 300 << 20
"""What is taken beside DuckDB: arrays are fetched in pieces."""
_APART_BYTES = 16 << 20
"""Work that reads more is done by a process of its own. A worker keeps 80 to 200 MB after it, in
pieces that cannot be given back; to start a process takes 0.2 s of CPU, and such work ten."""
_LEAST_ENGINE_BYTES = 128 << 20
"""No lower limit is given to DuckDB, which moves to a disk what does not fit."""


class MemoryBudget:
    """Memory that pieces of work share; each waits for its turn. Safe to use from several threads.

    Who came first is first, so a large piece does not wait for ever. One that would take more than
    all runs alone.
    """

    def __init__(self, total_bytes: int | None = None) -> None:
        """None: it is not limited, as where each worker has a machine of its own."""
        self.total_bytes = total_bytes
        self._taken_bytes = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()
        self._is_over = False

    def end(self) -> None:
        """Let no further work begin: who waits, or comes later, gets a CancelledError."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def take(self, size_bytes: int) -> int:
        """Wait until so much is free; return what `give_back` is to be called with.

        Raises:
            CancelledError: no further work is to begin.
        """
        total_bytes = self.total_bytes
        if total_bytes is None:
            self._refuse()
            return 0
        size_bytes = min(size_bytes, total_bytes)
        me = object()
        with self._changed:
            self._waiting.append(me)
            try:
                self._changed.wait_for(
                    lambda: (
                        self._is_over
                        or (
                            self._waiting[0] is me and self._taken_bytes + size_bytes <= total_bytes
                        )
                    )
                )
                self._refuse()
                self._taken_bytes += size_bytes
            finally:
                self._waiting.remove(me)
                self._changed.notify_all()
        return size_bytes

    def _refuse(self) -> None:
        if self._is_over:
            raise CancelledError

    def give_back(self, size_bytes: int) -> None:
        with self._changed:
            self._taken_bytes -= size_bytes
            self._changed.notify_all()

    @contextlib.contextmanager
    def taking(self, size_bytes: int) -> Iterator[None]:
        """Take memory for the length of the block."""
        taken_bytes = self.take(size_bytes)
        try:
            yield
        finally:
            self.give_back(taken_bytes)

    def is_apart(self, read_bytes: int) -> bool:
        """Return whether work that reads so much is done by a process that ends after it."""
        return self.total_bytes is not None and read_bytes > _APART_BYTES

    def engine_bytes(self, read_bytes: int, most_bytes: int) -> int:
        """Return DuckDB's limit for work that reads files of so many bytes."""
        if self.total_bytes is None:
            return most_bytes
        free_bytes = self.total_bytes - beside_engine(read_bytes)
        return min(most_bytes, max(free_bytes, _LEAST_ENGINE_BYTES))


def budget_of(memory_bytes: int, workers: int) -> MemoryBudget:
    """Return what pieces of work may take if all processes together take so much."""
    return MemoryBudget(max(memory_bytes - PROCESS_BYTES - workers * WORKER_BYTES, FOLD_BYTES))


def expected_bytes(read_bytes: int, engine_bytes: int) -> int:
    """Return what work takes that reads files of so many bytes with such a limit of DuckDB's."""
    return beside_engine(read_bytes) + min(engine_bytes, _ENGINE_RATIO * read_bytes)


def beside_engine(read_bytes: int) -> int:
    return min(_LEAST_BYTES + _READ_RATIO * read_bytes, _MOST_BYTES)
