"""Read what a process says about itself. This is done in a reader child, see `facts`."""

from collections.abc import Mapping
from typing import Any

from profiler.processes.facts import MAX_COMMAND_BYTES, Facts
from profiler.processes.generations import read_stat
from profiler.processes.programs import describe
from profiler.processes.versions import Versions
from symbolizer.files import ProcessFiles
from symbolizer.text import readable

_MAX_CMDLINE_BYTES = 128 << 10
_MAX_ARGUMENTS = 512
_MAX_ARGUMENT_BYTES = 4096
"""Of each: no path is longer (PATH_MAX), and the patterns of names take time by its square."""


class FactsReader:
    """Reads facts. What executables say is kept from one process to the next."""

    def __init__(self) -> None:
        self._versions: dict[tuple[str, ...], Versions] = {}

    def read(self, values: Mapping[str, Any]) -> Any:
        """Answer a request of kind `process`: see `facts.request` and `Facts.as_json`.

        The answer is None if the process has ended.
        """
        variables = tuple(values["variables"])
        versions = self._versions.setdefault(variables, Versions(variables))
        facts = read_facts(values["pid"], values["start_ticks"], versions, values["wants_command"])
        return facts.as_json() if facts else None


def read_facts(pid: int, start_ticks: int, versions: Versions, wants_command: bool) -> Facts | None:
    """Read what a process says about itself; None if it has ended, or was another one."""
    with ProcessFiles(pid) as files:
        before = read_stat(pid)
        if before is None or before.start_ticks != start_ticks or before.is_dead:
            return None
        exe, cwd = files.link("exe"), files.link("cwd")
        cmdline = (files.read("cmdline", _MAX_CMDLINE_BYTES) or b"").rstrip(b"\0")
        arguments = cmdline.split(b"\0", _MAX_ARGUMENTS)[:_MAX_ARGUMENTS]
        arguments = [argument[:_MAX_ARGUMENT_BYTES] for argument in arguments]
        program = describe(exe, arguments, before.comm, cwd)
        sources = versions.read(files, program)
        after = read_stat(pid)
    if after is None or after.stack != before.stack:
        return None  # it has exec'd: it is asked for again as what it is now
    command = cmdline[:MAX_COMMAND_BYTES].replace(b"\0", b" ").decode(errors="replace")
    return Facts(
        before.stack,
        readable(exe.removesuffix(b" (deleted)")),
        program,
        command if wants_command else "",
        sources,
    )
