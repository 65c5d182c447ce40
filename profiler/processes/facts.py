"""What a process says about itself: its arguments, its environment, its files.

A process can make all of that slow to read (its arguments may lie in memory on a file system of its
own), and the files are somebody else's. So it is read by a reader child, for one generation of a
process, and handed to the sampler as a plain record. Everything in it is bounded and readable, and
nothing of the environment is in it but a version.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from profiler.processes.generations import read_stat
from profiler.processes.programs import Program, describe
from profiler.processes.versions import MAX_VERSION, Sources, Versions
from symbolizer.files import ProcessFiles
from symbolizer.text import READABLE_LIMIT, readable

_MAX_CMDLINE_BYTES = 128 << 10
_MAX_ARGUMENTS = 512
_MAX_COMMAND_BYTES = 4_096
"""Of the arguments, for rules to be matched against."""


class Facts(NamedTuple):
    """What was read of a process. `exe` is a path, empty if not known.

    `stack` is where its stack lies, which an exec changes (`Stat`). `command` are the arguments,
    joined by spaces: only where a rule looks at them.
    """

    stack: int
    exe: str = ""
    program: Program = Program("")
    command: str = ""
    sources: Sources = Sources()

    def as_json(self) -> dict[str, Any]:
        return {
            "stack": self.stack,
            "exe": self.exe,
            "name": self.program.name,
            "is_own_code": self.program.is_own_code,
            "is_part_of_parent": self.program.is_part_of_parent,
            "command": self.command,
            **self.sources._asdict(),
        }

    @classmethod
    def of_json(cls, values: object) -> "Facts | None":
        """Return what `as_json` was made of; None for anything else."""
        if not isinstance(values, dict):
            return None
        texts = {name: _text(values.get(name)) for name in _TEXTS}
        sources = Sources(*(texts[name][:MAX_VERSION] for name in Sources._fields))
        program = Program(
            texts["name"],
            is_own_code=values.get("is_own_code") is True,
            is_part_of_parent=values.get("is_part_of_parent") is True,
        )
        stack = values.get("stack")
        if not isinstance(stack, int) or not program.name:
            return None
        return cls(stack, texts["exe"], program, texts["command"], sources)


_TEXTS = ("exe", "name", "command", *Sources._fields)


def _text(value: object) -> str:
    return value[: max(READABLE_LIMIT, _MAX_COMMAND_BYTES)] if isinstance(value, str) else ""


Ask = Callable[[int, int], None]
"""Asks for the facts of a process: its pid, and when it started, in ticks."""


class FactsReader:
    """Reads facts. What executables say is kept from one process to the next."""

    def __init__(self) -> None:
        self._versions: dict[tuple[str, ...], Versions] = {}

    def read(self, values: Mapping[str, Any]) -> Any:
        """Answer a request of kind `process`: what `request` returns becomes what `as_json` does.

        The answer is None if the process has ended.
        """
        variables = tuple(values["variables"])
        versions = self._versions.setdefault(variables, Versions(variables))
        facts = read_facts(values["pid"], values["start_ticks"], versions, values["wants_command"])
        return facts.as_json() if facts else None


def request(
    pid: int, start_ticks: int, variables: Sequence[str], *, wants_command: bool
) -> dict[str, Any]:
    """Return the values of a request of kind `process`."""
    return {
        "pid": pid,
        "start_ticks": start_ticks,
        "variables": list(variables),
        "wants_command": wants_command,
    }


def read_facts(pid: int, start_ticks: int, versions: Versions, wants_command: bool) -> Facts | None:
    """Read what a process says about itself; None if it has ended, or was another one."""
    with ProcessFiles(pid) as files:
        before = read_stat(pid)
        if before is None or before.start_ticks != start_ticks or before.is_dead:
            return None
        exe, cwd = files.link("exe"), files.link("cwd")
        cmdline = (files.read("cmdline", _MAX_CMDLINE_BYTES) or b"").rstrip(b"\0")
        arguments = cmdline.split(b"\0", _MAX_ARGUMENTS)[:_MAX_ARGUMENTS]
        program = describe(exe, arguments, before.comm, cwd)
        sources = versions.read(files, program)
        after = read_stat(pid)
    if after is None or after.stack != before.stack:
        return None  # it has exec'd: it is asked for again as what it is now
    command = cmdline[:_MAX_COMMAND_BYTES].replace(b"\0", b" ").decode(errors="replace")
    return Facts(
        before.stack,
        readable(exe.removesuffix(b" (deleted)")),
        program,
        command if wants_command else "",
        sources,
    )
