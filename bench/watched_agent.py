"""`everflame agent` whose turns are timed: how long its sampler was away from draining.

Run as `python -P watched_agent.py TREE TURNS ARGUMENT...`, with the Python of that tree. For each
turn of the recorder that took longer than `LOGGED_S`, a line is written to TURNS: when it ended
(CLOCK_MONOTONIC), its wall-clock and CPU seconds, and its name. It works for older trees as well.
"""

import functools
import sys
import time
from pathlib import Path

LOGGED_S = 0.005
TURNS = ("catch_up", "step", "drain", "cut_window")


def main() -> None:
    tree, turns, *arguments = sys.argv[1:]
    sys.path.insert(0, tree)
    from profiler import cli  # noqa: PLC0415 - of that tree
    from profiler.agent.recorder import Recorder  # noqa: PLC0415

    file = Path(turns).open("a", buffering=1)  # noqa: SIM115 - as long as the process runs
    is_inside = False

    def timed(name: str) -> None:
        run = getattr(Recorder, name)

        @functools.wraps(run)
        def turn(*values: object, **options: object) -> object:
            nonlocal is_inside
            if is_inside:
                return run(*values, **options)
            is_inside = True
            wall_s, cpu_s = time.monotonic(), time.thread_time()
            try:
                return run(*values, **options)
            finally:
                is_inside = False
                ended_s = time.monotonic()
                if ended_s - wall_s > LOGGED_S:
                    spent_s = time.thread_time() - cpu_s
                    file.write(f"{ended_s} {ended_s - wall_s} {spent_s} {name}\n")

        setattr(Recorder, name, turn)

    for name in TURNS:
        timed(name)
    sys.exit(cli.main(["agent", *arguments]))


if __name__ == "__main__":
    main()
