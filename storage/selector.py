r"""Selector: which label sets are selected, in the syntax of Prometheus.

    {service="api",version=~"1\\.5.*",host!="web-3"}

Matchers are `=`, `!=`, `=~` and `!~`, separated by commas, and all of them must match. A missing
label is the empty value. A pattern must match the whole value. Values are in double or single
quotes with Go's escapes, or in backquotes without escapes; a name that is not an identifier is
quoted as well. `{}` and the empty text select everything.

Patterns come from anybody who can reach the service. They run in RE2, whose time is linear in the
value for every pattern (google/re2, "Syntax"); its memory and the length of patterns are bounded.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

TEXT_LIMIT = 4096
"""Characters of a selector."""
PATTERN_LIMIT = 1024
"""Characters of one pattern."""
_PATTERN_MEMORY_BYTES = 1 << 20
"""Memory of RE2 for a pattern; one that needs more is refused. RE2's default is 8 MiB."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_OPERATOR = re.compile(r"=~|!~|!=|=")
_SPACES = re.compile(r"[ \t\r\n]*")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|' r"'(?:[^'\\]|\\.)*'|`[^`]*`", re.DOTALL)
_ESCAPE = re.compile(
    r"\\(?:(?P<plain>[abfnrtv\\\"'])|x(?P<x>[0-9A-Fa-f]{2})|u(?P<u>[0-9A-Fa-f]{4})"
    r"|U(?P<U>[0-9A-Fa-f]{8})|(?P<other>.))",
    re.DOTALL,
)
_PLAIN = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


class SelectorError(ValueError):
    """Text that is not a selector; the message says what is wrong, and where."""

    def __init__(self, problem: str, text: str, position: int) -> None:
        shown = text if len(text) <= 80 else f"{text[:80]}…"
        super().__init__(f"cannot read the selector {shown}: {problem} at character {position + 1}")
        self.position = position
        """The first wrong character, counted from 0."""


class Operator(StrEnum):
    EQUAL = "="
    NOT_EQUAL = "!="
    MATCH = "=~"
    NOT_MATCH = "!~"


class Matcher(NamedTuple):
    name: str
    operator: Operator
    value: str

    def accepts(self, value: str) -> bool:
        """Return whether the matcher selects a label of this value; a missing label is empty."""
        match self.operator:
            case Operator.EQUAL:
                return value == self.value
            case Operator.NOT_EQUAL:
                return value != self.value
            case Operator.MATCH:
                return _compile(self.value).fullmatch(value) is not None
            case Operator.NOT_MATCH:
                return _compile(self.value).fullmatch(value) is None

    def __str__(self) -> str:
        name = self.name if _NAME.fullmatch(self.name) else _quote(self.name)
        return f"{name}{self.operator}{_quote(self.value)}"


@dataclass(frozen=True, slots=True)
class Selector:
    """Matchers that must all match. `str` returns text that parses to the same selector."""

    matchers: tuple[Matcher, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Selector":
        """Return the selector of a text.

        Raises:
            SelectorError: the text is not a selector.
        """
        return _Parser(text).parse()

    @property
    def names(self) -> frozenset[str]:
        """The labels that its matchers read."""
        return frozenset(matcher.name for matcher in self.matchers)

    def accepts(self, labels: Mapping[str, str]) -> bool:
        return all(m.accepts(labels.get(m.name, "")) for m in self.matchers)

    def choose(self, label_sets: Iterable[Mapping[str, str]]) -> list[bool]:
        """Return whether each label set is selected; each distinct value is matched once."""
        rules: list[tuple[str, Callable[[str], bool]]] = [
            (matcher.name, functools.cache(matcher.accepts)) for matcher in self.matchers
        ]
        return [
            all(accepts(labels.get(name, "")) for name, accepts in rules) for labels in label_sets
        ]

    def __str__(self) -> str:
        return "{" + ",".join(map(str, self.matchers)) + "}"


class _Pattern(Protocol):
    def fullmatch(self, text: str) -> object | None: ...


@functools.lru_cache(maxsize=64)
def _compile(pattern: str) -> _Pattern:
    # Only patterns need the library, which takes 20 ms to load.
    import re2  # noqa: PLC0415

    options = re2.Options()
    options.max_mem = _PATTERN_MEMORY_BYTES
    options.log_errors = False
    options.dot_nl = True  # as in Prometheus: `.*` accepts every value
    options.never_capture = True
    try:
        compiled: _Pattern = re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0] if error.args else b"unknown error"
        raise ValueError(reason.decode("utf-8", "replace")) from error
    return compiled


class _Parser:
    """Reads a text in one pass; `_at` is the next character."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def parse(self) -> Selector:
        if len(self._text) > TEXT_LIMIT:
            raise self._error(f"it is longer than {TEXT_LIMIT} characters", TEXT_LIMIT)
        if not self._text.strip():
            return Selector()
        self._expect("{", "expected {")
        matchers = []
        while not self._skip("}"):
            matchers.append(self._matcher())
            if not self._skip(","):
                self._expect("}", "expected , or }")
                break
        self._skip_spaces()
        if self._at < len(self._text):
            raise self._error("there is something behind the }")
        return Selector(tuple(matchers))

    def _matcher(self) -> Matcher:
        self._skip_spaces()
        match = _NAME.match(self._text, self._at)
        if match is not None:
            name = match[0]
            self._at = match.end()
        elif self._next() in {'"', "'", "`"}:
            name = self._quoted()
        else:
            raise self._error("expected the name of a label")
        self._skip_spaces()
        operator = _OPERATOR.match(self._text, self._at)
        if operator is None:
            raise self._error(f"expected =, !=, =~ or !~ behind {name!r}")
        self._at = operator.end()
        self._skip_spaces()
        start = self._at
        matcher = Matcher(name, Operator(operator[0]), self._quoted())
        if matcher.operator in {Operator.MATCH, Operator.NOT_MATCH}:
            self._check_pattern(matcher.value, start)
        return matcher

    def _check_pattern(self, pattern: str, start: int) -> None:
        if len(pattern) > PATTERN_LIMIT:
            raise self._error(f"a pattern of more than {PATTERN_LIMIT} characters", start)
        try:
            _compile(pattern)
        except ValueError as error:
            raise self._error(f"a pattern that RE2 refuses ({error})", start) from error

    def _quoted(self) -> str:
        start = self._at
        match = _QUOTED.match(self._text, start)
        if match is None:
            if self._next() in {'"', "'", "`"}:
                raise self._error(f"there is no closing {self._next()} for the quote")
            raise self._error("expected a value in quotes")
        self._at = match.end()
        inner = match[0][1:-1]
        if match[0][0] != "`":
            inner = _ESCAPE.sub(lambda escape: self._unescape(escape, start + 1), inner)
        if any(0xD800 <= ord(character) < 0xE000 for character in inner):
            raise self._error("the quoted text is not Unicode", start)
        return inner

    def _unescape(self, escape: re.Match[str], start: int) -> str:
        if escape["plain"]:
            return _PLAIN.get(escape["plain"], escape["plain"])
        digits = escape["x"] or escape["u"] or escape["U"]
        if digits is None or int(digits, 16) > 0x10FFFF:
            raise self._error(
                f"unknown escape {escape[0]} (a backslash is written \\\\, or use `…`)",
                start + escape.start(),
            )
        return chr(int(digits, 16))

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _skip_spaces(self) -> None:
        match = _SPACES.match(self._text, self._at)
        self._at = match.end() if match else self._at

    def _skip(self, character: str) -> bool:
        self._skip_spaces()
        if self._next() != character:
            return False
        self._at += 1
        return True

    def _expect(self, character: str, problem: str) -> None:
        if not self._skip(character):
            raise self._error(problem)

    def _error(self, problem: str, position: int | None = None) -> SelectorError:
        return SelectorError(problem, self._text, self._at if position is None else position)


def _quote(text: str) -> str:
    escaped = "".join(
        f"\\{character}"
        if character in {'"', "\\"}
        else character
        if character.isprintable()
        else f"\\U{ord(character):08x}"
        for character in text
    )
    return f'"{escaped}"'


EMPTY = Selector()
"""Selects everything."""
