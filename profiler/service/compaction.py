"""Compaction beside an agent: a small process that starts `everflame compact` every ten minutes.

`everflame up` supervises it. A compactor takes 100 MB and works for a second, so it does not stay.
It leaves the CPU to others (nice 10), but not for ever: on a host that is always busy it must get
done before level-0 objects expire. It ends with its parent, and so does what it has started; a
compactor may be killed at any moment.

Run as `python -m profiler.service.compaction --parent=PID COMMAND...`.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

PERIOD_S = 600.0
_FIRST_AFTER_S = 60.0
"""The start of the agent and the first look at the page come first."""
_LONGEST_RUN_S = 3600.0
"""A compactor that takes longer hangs, in a request to a store for example, and is killed."""
_NICE = 10
_PR_SET_PDEATHSIG = 1  # prctl(2)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m profiler.service.compaction")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--first-after-s", type=float, default=_FIRST_AFTER_S)
    parser.add_argument("--period-s", type=float, default=PERIOD_S)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != options.parent:
        return 0  # the parent died before prctl could report it
    os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    time.sleep(options.first_after_s)
    while True:
        begun_s = time.monotonic()
        run(options.command)
        time.sleep(max(0.0, begun_s + options.period_s - time.monotonic()))


def run(command: list[str]) -> None:
    """Run a compactor that dies with this process."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # memory or processes are short
        subprocess.run(  # kills it after the time
            ending_with_us(command), stdin=subprocess.DEVNULL, timeout=_LONGEST_RUN_S, check=False
        )


def ending_with_us(command: list[str]) -> list[str]:
    """Return a command that runs another one, which is killed when this process ends."""
    code = (
        "import ctypes, os, sys;"
        f" ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGKILL)}, 0, 0, 0);"
        f" os.getppid() == {os.getpid()} and os.execv(sys.argv[1], sys.argv[1:])"
    )
    return [sys.executable, "-I", "-S", "-c", code, *command]


if __name__ == "__main__":
    sys.exit(main())
