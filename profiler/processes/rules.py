r"""Which service a process belongs to, as the operator says it (TOML).

    version_variables = ["RELEASE"]

    [[service]]
    name = "api"
    unit = "api*.service"
    command = "--role=(web|worker)"

The first rule that matches sets the name. Within a rule all keys must match: `unit`, `cgroup` (any
of the process's paths) and `exe` are patterns as the shell's, in which `*` also matches `/`;
`command` is a regular expression that is looked for in the arguments, joined by spaces, of which
the first 4,096 bytes count. Anyone may choose arguments: an expression that backtracks without end
would hold up the profiler.
`version_variables` are environment variables that hold a version, besides the usual ones.
"""

import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path
from typing import NamedTuple

_RULE_KEYS = ("name", "unit", "cgroup", "exe", "command")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MAX_FILE_BYTES = 1 << 20


class RuleError(ValueError):
    """The rules cannot be used; the message names the file, the line and the key."""


@dataclass(frozen=True, slots=True)
class ServiceRule:
    """Names the service of the processes that it matches. A pattern that is None matches all."""

    name: str
    unit: re.Pattern[str] | None = None
    cgroup: re.Pattern[str] | None = None
    exe: re.Pattern[str] | None = None
    command: re.Pattern[str] | None = None

    @property
    def needs_process(self) -> bool:
        """Return whether it can only be held against a process that is still there."""
        return bool(self.exe or self.command)

    def matches(self, cgroups: Sequence[str], unit: str, exe: str = "", command: str = "") -> bool:
        return (
            (self.unit is None or bool(self.unit.match(unit)))
            and (self.cgroup is None or any(map(self.cgroup.match, cgroups)))
            and (self.exe is None or bool(self.exe.match(exe)))
            and (self.command is None or bool(self.command.search(command)))
        )


class Rules(NamedTuple):
    services: tuple[ServiceRule, ...] = ()
    version_variables: tuple[str, ...] = ()


def make_rule(
    name: str, *, unit: str = "", cgroup: str = "", exe: str = "", command: str = ""
) -> ServiceRule:
    """Build a rule from patterns; an empty one matches everything.

    Raises:
        re.error: `command` is not a regular expression.
    """
    glob: Callable[[str], re.Pattern[str] | None]
    glob = lambda pattern: re.compile(translate(pattern)) if pattern else None  # noqa: E731
    return ServiceRule(
        name, glob(unit), glob(cgroup), glob(exe), re.compile(command) if command else None
    )


def load_rules(path: Path) -> Rules:
    """Read the file of rules.

    Raises:
        RuleError: with the place and what to write instead.
    """
    try:
        with path.open("rb") as file:
            read = file.read(_MAX_FILE_BYTES + 1)
        if len(read) > _MAX_FILE_BYTES:
            raise RuleError(f"cannot read rules {path}: it is larger than 1 MiB")
        text = read.decode()
        content = tomllib.loads(text)
    except OSError as error:
        raise RuleError(f"cannot read rules {path}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RuleError(f"cannot read rules {path}: {error}") from error
    return _File(path, text).rules(content)


class _File:
    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._lines = text.splitlines()

    def rules(self, content: dict[str, object]) -> Rules:
        for key in content.keys() - {"service", "version_variables"}:
            hint = "a rule begins with [[service]]" if key in _RULE_KEYS else ""
            raise self._error(key, 0, "unknown key", hint or "known: service, version_variables")
        tables = content.get("service", [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise self._error("service", 0, "not a list of rules", "begin each with [[service]]")
        variables = content.get("version_variables", [])
        if not isinstance(variables, list) or not all(
            isinstance(name, str) and _VARIABLE.fullmatch(name) for name in variables
        ):
            raise self._error("version_variables", 0, "not a list of names", 'as ["RELEASE"]')
        rules = tuple(self._rule(number, table) for number, table in enumerate(tables, 1))
        return Rules(rules, tuple(variables))

    def _rule(self, number: int, table: dict[str, object]) -> ServiceRule:
        patterns: dict[str, str] = {}
        for key, value in table.items():
            if key not in _RULE_KEYS:
                raise self._error(key, number, "unknown key", f"known: {', '.join(_RULE_KEYS)}")
            if not isinstance(value, str) or not value:
                raise self._error(key, number, "not a text", "write it in quotation marks")
            patterns[key] = value
        name = patterns.pop("name", "")
        if not name or not name.isprintable():
            raise self._error("name", number, "missing", "each rule names a service")
        if not patterns:
            keys = ", ".join(_RULE_KEYS[1:])
            raise self._error("name", number, "the rule matches nothing", f"add one of {keys}")
        try:
            return make_rule(name, **patterns)
        except re.error as error:
            raise self._error(
                "command", number, f"not a regular expression ({error})", "mend it"
            ) from error

    def _error(self, key: str, number: int, problem: str, remedy: str) -> RuleError:
        """Name the line of the key in the rule of that number (0: before and outside of rules)."""
        place = f"service[{number}].{key}" if number else key
        line = self._line(key, number)
        return RuleError(
            f"cannot use rules {self._path}, line {line}: {place}: {problem}; {remedy}"
        )

    def _line(self, key: str, number: int) -> int:
        seen, header = 0, 1
        for line_number, line in enumerate(self._lines, 1):
            if re.match(r"\s*\[\[\s*service\s*\]\]", line):
                seen += 1
                header = line_number if seen == number else header
            if seen == number and re.match(rf"""\s*\[*["']?{re.escape(key)}\b""", line):
                return line_number
        return header
