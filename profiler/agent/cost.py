"""What a process of the agent costs in CPU time and memory."""

import ctypes
import resource
import time
from collections import Counter
from pathlib import Path
from types import TracebackType

_M_MMAP_THRESHOLD = -3  # malloc.h


class Cost:
    """CPU time by part of the work, in ns since the start."""

    def __init__(self) -> None:
        self.cpu_ns: Counter[str] = Counter()

    def of(self, part: str) -> "_Part":
        """Count the time that a block takes."""
        return _Part(self.cpu_ns, part)


class _Part:
    """Measures a block: by a class, as a generator would cost as much as many of the blocks."""

    __slots__ = ("_begun_ns", "_cpu_ns", "_part")

    def __init__(self, cpu_ns: Counter[str], part: str) -> None:
        self._cpu_ns, self._part = cpu_ns, part

    def __enter__(self) -> None:
        self._begun_ns = time.thread_time_ns()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._cpu_ns[self._part] += time.thread_time_ns() - self._begun_ns


def rss_bytes() -> int:
    """Return the resident memory of this process (proc_pid_statm(5))."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def return_large_blocks() -> None:
    """Keep what symbol tables needed while they were read from staying with this process.

    glibc raises its threshold for mmap with each large block that is freed, and then keeps them on
    the heap (mallopt(3)). Fixed at 64 KB, 5 MB of 55 less stay resident (bench/bench_cost.py).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has no such thing, and no such habit
        libc.mallopt(_M_MMAP_THRESHOLD, 64 << 10)


def return_freed_pages() -> None:
    """Give back to the kernel what was freed between blocks that are in use (malloc_trim(3))."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
