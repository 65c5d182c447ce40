"""Which processes run: those that have used CPU time since a moment."""

from collections.abc import Collection

from profiler.processes.generations import list_processes, read_proc

_MAX_PROCESSES = 4096
"""Reading /proc/PID/stat takes about 20 us each."""


class Activity:
    """The CPU time of processes, to be compared with an earlier reading.

    `pids` restricts it to these; None is for all. Of very many processes the youngest are read.
    """

    def __init__(self, pids: Collection[int] | None = None) -> None:
        self._pids = pids
        self._ticks = self._read()

    def busiest(self, limit: int) -> list[int]:
        """Return the processes that have used most CPU time in their lives, the busiest first."""
        return sorted(self._ticks, key=self._ticks.__getitem__, reverse=True)[:limit]

    def since(self, limit: int) -> list[int]:
        """Return those that have used CPU time since the construction, the busiest first."""
        used = {pid: ticks - self._ticks.get(pid, 0) for pid, ticks in self._read().items()}
        busy = sorted((pid for pid in used if used[pid] > 0), key=used.__getitem__, reverse=True)
        return busy[:limit]

    def _read(self) -> dict[int, int]:
        pids = list_processes() if self._pids is None else self._pids
        ticks = {}
        for pid in sorted(pids, reverse=True)[:_MAX_PROCESSES]:
            stat = read_proc(pid, "stat")
            if stat:  # utime and stime, of all its threads (proc_pid_stat(5))
                ticks[pid] = sum(map(int, stat.rpartition(b")")[2].split()[11:13]))
        return ticks
