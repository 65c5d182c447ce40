"""What the sampler itself costs in CPU time and memory."""

import contextlib
import ctypes
import time
from collections import Counter
from collections.abc import Iterator

_M_MMAP_THRESHOLD = -3  # malloc.h


class Cost:
    """CPU time by part of the work, in ns since the start."""

    def __init__(self) -> None:
        self.cpu_ns: Counter[str] = Counter()

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        begun = time.thread_time_ns()
        try:
            yield
        finally:
            self.cpu_ns[part] += time.thread_time_ns() - begun


def return_large_blocks() -> None:
    """Keep what symbol tables needed while they were read from staying with this process.

    glibc raises its threshold for mmap with each large block that is freed, and then keeps them on
    the heap (mallopt(3)). Fixed at 64 KB, 5 MB of 55 less stay resident (bench/bench_cost.py).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has no such thing, and no such habit
        libc.mallopt(_M_MMAP_THRESHOLD, 64 << 10)
