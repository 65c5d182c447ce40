"""Readers: how the parts of a window are read, by this process or by another one.

What a reader is asked for is a value (`Asked`), so that it can be handed to another process, which
makes a reader of its own of it (`storage.query.wide`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol

from storage.blocks.times import Lines
from storage.columns import Columns
from storage.query.compacted import Compacted
from storage.query.coverage import Kept, ListedObject, Part
from storage.selector import EMPTY, Selector

if TYPE_CHECKING:
    from storage.query.parts import Parts

Span = tuple[list[ListedObject], bool]
"""Objects of one host, and whether they are all of a span that may be kept merged."""
Source = Sequence[ListedObject] | Compacted
"""What one part is read from."""


class Asked(NamedTuple):
    """What a reader returns of each source: a kind of value, and what it may leave out."""

    kind: type[Any]
    hosts: Selector
    """Matchers of the label `host`: objects of other hosts may be left out."""
    selector: Selector = EMPTY
    """What is not selected may be left out of compacted hours."""
    lines: Lines = Lines.EACH
    """How far the lines of Times may be added up in compacted hours."""
    names: bytes = b""
    """For FunctionTotals: a table of locations that other parts name better, as the cache keeps
    Columns."""
    has_stacks: bool = True
    """Without stacks, Columns are the tables of locations of each part."""

    @property
    def is_merged(self) -> bool:
        """Return whether the parts of several sources may be merged: they are large."""
        return self.kind is Columns and self.has_stacks

    @property
    def mark(self) -> str:
        """What tells values of one kind apart that are made of one compacted hour."""
        return "" if self.lines is Lines.EACH else self.lines.name


@dataclass(frozen=True, slots=True)
class Reader(Generic[Kept]):
    """How to read one kind of value: of an object, and of all objects of a span."""

    kind: type[Kept]
    of_object: Callable[[ListedObject], Part[Kept]]
    of_span: Callable[[Sequence[ListedObject]], list[Part[Kept]]]
    of_hour: Callable[[Compacted], Part[Kept]]
    asked: Asked | None = None
    """None: only this process can read it."""
    name_of: Callable[[Source], str] | None = None
    """Returns the name by which what is read of a source is kept, if it is not the usual one."""

    def of(self, source: Source) -> list[Part[Kept]]:
        if isinstance(source, Compacted):
            return [self.of_hour(source)]
        return self.of_span(source) if len(source) > 1 else [self.of_object(source[0])]


class ReadsElsewhere(Protocol):
    """What has other processes read much of a window (`storage.query.wide`)."""

    def read(
        self, parts: "Parts", reader: Reader[Kept], sources: Sequence[Span | Compacted]
    ) -> Iterator[Part[Kept]]:
        """Return the parts of sources in their order."""

    def profile(
        self, parts: "Parts", hours: Sequence[Compacted], selector: Selector, *, rolls_up: bool
    ) -> list[Part[Columns]]:
        """Return what `Blocks.profile` does of large hours."""
