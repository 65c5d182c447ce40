"""What a process says about itself: its arguments, its environment, its files.

A process can make all of that slow to read (its arguments may lie in memory on a file system of its
own), and the files are somebody else's. So it is read by a reader child (`facts_reader`), for one
generation of a process, and handed to the sampler as a plain record. Everything in it is bounded
and readable, and nothing of the environment is in it but a version.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from profiler.processes.programs import Program
from symbolizer.text import READABLE_LIMIT

MAX_VERSION = 200
"""Characters of a version; what is longer is cut."""
MAX_COMMAND_BYTES = 4_096
"""Of the arguments, for rules to be matched against."""


class Sources(NamedTuple):
    """What a process and its files say of a version; empty where they say nothing.

    `go` and `build_id` are those of a service's own code, `release` that of its folder.
    """

    environment: str = ""
    go: str = ""
    release: str = ""
    build_id: str = ""

    def version(self, image: str, *, is_first: bool) -> str:
        """Return the version, empty if it is not known.

        `image` is the version that the container's image says. `is_first`: the process is the
        oldest of its service; of the others the executable may be any tool that the service runs.
        """
        found = self.environment or image or self.go or self.release
        return found[:MAX_VERSION] or (self.build_id if is_first else "")


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
    return value[: max(READABLE_LIMIT, MAX_COMMAND_BYTES)] if isinstance(value, str) else ""


Ask = Callable[[int, int], None]
"""Asks for the facts of a process: its pid, and when it started, in ticks."""


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
