"""What /proc says a process has mapped, and how often it is worth asking again."""

import os
from dataclasses import replace
from pathlib import Path

from profiler.processes.generations import living_thread
from symbolizer.maps import Mapping, read_maps

_FIRST_PAUSE_NS, _LONGEST_PAUSE_NS = 1_000_000_000, 60_000_000_000
_MAX_PROCESSES = 1024


class Doubts:
    """Limits how often a process is looked at again: it may be made so that it always seems wrong.

    Between two looks at a process the time doubles, up to a minute.
    """

    def __init__(self) -> None:
        self._pauses: dict[tuple[int, int], tuple[int, int]] = {}

    def is_due(self, pid: int, start_ns: int, now_ns: int) -> bool:
        """Return whether to look at a process now; if so, the next time is later."""
        process = pid, start_ns
        next_ns, pause_ns = self._pauses.pop(process, (0, _FIRST_PAUSE_NS))
        is_due = now_ns >= next_ns
        if is_due:
            next_ns, pause_ns = now_ns + pause_ns, min(2 * pause_ns, _LONGEST_PAUSE_NS)
        self._pauses[process] = next_ns, pause_ns
        if len(self._pauses) > _MAX_PROCESSES:
            del self._pauses[next(iter(self._pauses))]
        return is_due


def maps_of(pid: int, proc: str = "/proc") -> list[Mapping]:
    """Return what a process has mapped, read from another thread when the first one has exited.

    There is nothing where the kernel forbids it (ptrace(2), "access mode checking"). Paths are
    relative to the root of the process, as they are in records.

    Raises:
        ProcessLookupError: it is gone.
        TooManyMappings: it has more than a process may have here.
    """
    folder = f"{proc}/{living_thread(pid, proc)}"
    try:
        root = os.fsencode(Path(f"{folder}/root").readlink())
        with Path(f"{folder}/maps").open("rb", 0) as maps:
            mappings = read_maps(maps.fileno())
    except PermissionError:
        return []
    except OSError as error:
        raise ProcessLookupError from error
    return mappings if root == b"/" else [_inside(root, m) for m in mappings]


def _inside(root: bytes, mapping: Mapping) -> Mapping:
    if mapping.path.startswith(root + b"/"):
        return replace(mapping, path=mapping.path.removeprefix(root))
    return mapping
