"""Priority: the sampler gets a CPU in time on a busy host, and takes none from it.

The kernel's maps hold a few seconds of ticks. On two CPUs with 22 busy programs a sampler of usual
priority may wait for longer than that, and the ticks that find no room are lost. So it has a nice
value of -10, by which it gets about half of a CPU if it needs that, and is soon let run. It is a
share, not a right of way: a real-time policy (SCHED_RR) would let it run before everything else,
and a fault in it could starve a CPU. EVERFLAME_NICE sets another value, from -20 to 19; 0 leaves
the priority as it is. The child that compiles the BPF programs has the same one: else the first
tick comes 20 s after the start.

Other children begin with the usual priority (SCHED_RESET_ON_FORK, sched(7)): recorded commands,
readers of files, the uploader, the service.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

NICE_VARIABLE = "EVERFLAME_NICE"
DEFAULT_NICE = -10

_AUTOGROUP = Path("/proc/self/autogroup")

log = logging.getLogger(__name__)


def chosen_nice(environment: Mapping[str, str]) -> int:
    """Return the nice value that was asked for, the default one if it is not a nice value."""
    text = environment.get(NICE_VARIABLE, "")
    if not text:
        return DEFAULT_NICE
    try:
        nice = int(text)
    except ValueError:
        nice = 99
    if not -20 <= nice <= 19:
        log.warning("%s=%s is no number from -20 to 19", NICE_VARIABLE, text)
        return DEFAULT_NICE
    return nice


@contextlib.contextmanager
def raised(nice: int) -> Iterator[None]:
    """Run this thread at a nice value inside of the block, if it may (CAP_SYS_NICE)."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    if not nice or not _set(nice, os.SCHED_RESET_ON_FORK):
        yield
        return
    try:
        yield
    finally:
        _set(before, 0)


def _set(nice: int, flags: int) -> bool:
    try:
        os.sched_setscheduler(0, os.SCHED_OTHER | flags, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    except OSError as error:
        log.debug("cannot set the priority nice=%d: %s", nice, error.strerror)
        return False
    # Sessions that share a CPU as groups (CONFIG_SCHED_AUTOGROUP) have a nice value of their own.
    # Only a session of ours, as a service's is: others would gain or lose by it.
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):
            _AUTOGROUP.write_text(str(nice))
    return True
