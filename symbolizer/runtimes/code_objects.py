"""Parse what the kernel side has copied of a CPython code object.

It copies the bytes when it first sees a code object, so names are those of the moment of the
sample, and no process is read later. All of it comes from a process that may have changed it
meanwhile, or means harm: nothing here raises, and the work is bounded by the size of the parts.

Formats: Include/cpython/unicodeobject.h; Objects/lnotab_notes.txt of 3.9 and of 3.10;
InternalDocs/code_objects.md of 3.14 for 3.11 and later.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from symbolizer.runtimes.image import Layout
from symbolizer.text import readable

UNNAMED = "<unnamed>"
"""What a code object is called whose name is the empty string."""

_PYTHON_3_10 = 0x030A0000
_PYTHON_3_11 = 0x030B0000

_BEFORE_FIRST = 0xFFFFFFFF
_BEFORE_FIRST_3_11 = 0xFFFFFFFE
"""Up to 3.12 a frame has the instruction executed last, which is -1, or one of two bytes before."""

_MOST_LINE = (1 << 31) - 1
_MOST_LENGTH = (1 << 31) - 1
_OPEN_END = (1 << 31) - 1
"""Beyond any instruction: code is at most that long."""


class Parts(NamedTuple):
    """What was copied. A part is empty if its memory was not readable, and may be cut.

    Attributes:
        code: the first `layout.code_bytes` of the code object.
        name: the str object of its qualified name (up to 3.10: its name), header included.
        file: the str object of its file name.
        lines: the bytes object of its line table.
    """

    code: bytes
    name: bytes
    file: bytes
    lines: bytes


@dataclass(frozen=True)
class CodeObject:
    """A function as the interpreter knows it.

    Attributes:
        name: readable; ends in `…` if it was cut.
        file: as the interpreter has it, readable; empty if it could not be read, and ends in `…`
            if it was cut.
        first_line: of the definition, decorators included; 0 if it has none.
        line_table: as copied, without the object's header; None if it could not be read.
        is_line_table_cut: the lines of the instructions beyond the copied part are unknown.
    """

    version_hex: int
    name: str
    is_name_cut: bool
    file: str
    is_file_cut: bool
    first_line: int
    line_table: bytes | None
    is_line_table_cut: bool

    def line(self, instruction: int) -> int:
        """Return the line of an instruction; 0 if it has none or is not known.

        The instruction is as the frame has it, as 32 bits: bytes from the first instruction on;
        in 3.10 a number of instructions, which are two bytes each. One before the first belongs to
        a frame that has not begun: the interpreter says the first line, too.
        """
        is_from_3_11 = self.version_hex >= _PYTHON_3_11
        if instruction == (_BEFORE_FIRST_3_11 if is_from_3_11 else _BEFORE_FIRST):
            return self.first_line
        is_counted = self.version_hex >= _PYTHON_3_10 and not is_from_3_11
        offset = instruction * 2 if is_counted else instruction
        ends, lines = self._runs
        run = bisect_right(ends, offset)
        return lines[run] if run < len(lines) else 0

    @cached_property
    def _runs(self) -> "_Runs":
        if self.line_table is None:
            return _collect(())
        if self.version_hex >= _PYTHON_3_11:
            steps = _read_locations(self.line_table, self.first_line, self.is_line_table_cut)
        elif self.version_hex >= _PYTHON_3_10:
            steps = _read_pairs(self.line_table, self.first_line)
        else:
            steps = _read_lnotab(self.line_table, self.first_line, self.is_line_table_cut)
        return _collect(steps)


def parse_code(version_hex: int, layout: Layout, parts: Parts) -> CodeObject | None:
    """Return the code object; None if its first line or its name could not be read.

    `version_hex` is as PY_VERSION_HEX has it (0x030b07f0: 3.11.7), `layout` of that interpreter.
    """
    first_line = parts.code[layout.code_first_line :][:4]
    function = read_text(layout, parts.name)
    if len(first_line) < 4 or function is None:
        return None
    path = read_text(layout, parts.file) or Text("", is_cut=False)
    table = _read_bytes(layout, parts.lines)
    return CodeObject(
        version_hex=version_hex,
        name=function.text or UNNAMED,
        is_name_cut=function.is_cut,
        file=path.text,
        is_file_cut=path.is_cut,
        first_line=max(0, int.from_bytes(first_line, "little", signed=True)),
        line_table=table and table.content,
        is_line_table_cut=table is not None and table.is_cut,
    )


class Text(NamedTuple):
    text: str
    is_cut: bool


def read_text(layout: Layout, part: bytes) -> Text | None:
    """Return a str object as readable text; None if this is none, or one that lies elsewhere.

    Only compact objects have their characters behind their header. All strings that a compiler or
    an importer makes are compact.
    """
    if len(part) < layout.str_ascii:
        return None
    length = _signed(part, layout.str_length, 8)
    form = form_of(layout, int.from_bytes(part[layout.str_state :][:4], "little"))
    if form is None or not 0 <= length <= _MOST_LENGTH:
        return None
    start = layout.str_ascii if form.is_ascii else layout.str_compact
    content = part[start : start + length * form.width]
    characters = len(content) // form.width
    text = _decode(content[: characters * form.width], form.width)
    # As Python itself writes lone surrogates where they cannot be encoded.
    shown = readable(text.encode("utf-8", "backslashreplace"))
    is_cut = characters < length
    return Text(shown + "…" if is_cut else shown, is_cut)


class Form(NamedTuple):
    width: int
    is_ascii: bool


def form_of(layout: Layout, state: int) -> Form | None:
    """Return what the state of a str object says; None if it is not of a compact one."""
    bits = state >> layout.str_kind_bit
    kind, is_compact, is_ascii = bits & 7, bits & 8, bits & 16
    if kind not in (1, 2, 4) or not is_compact or (is_ascii and kind != 1):
        return None
    return Form(kind, bool(is_ascii))


def _decode(content: bytes, width: int) -> str:
    """Return the characters; what is beyond Unicode is shown as U+FFFD."""
    if width == 1:
        return content.decode("latin-1")
    points = memoryview(content).cast("H" if width == 2 else "I")
    return "".join(chr(point) if point <= 0x10FFFF else "\ufffd" for point in points)


class _Content(NamedTuple):
    content: bytes
    is_cut: bool


def _read_bytes(layout: Layout, part: bytes) -> _Content | None:
    """Return the content of a bytes object; None if this is none."""
    size = _signed(part, layout.bytes_size, 8)
    if len(part) < layout.bytes_data or not 0 <= size <= _MOST_LENGTH:
        return None
    content = part[layout.bytes_data : layout.bytes_data + size]
    return _Content(content, len(content) < size)


def _signed(content: bytes, start: int, size: int) -> int:
    return int.from_bytes(content[start : start + size], "little", signed=True)


class _Runs(NamedTuple):
    """Where the bytes of instructions of one line end, ascending, and their lines (0: none)."""

    ends: "array[int]"
    lines: "array[int]"


def _collect(steps: Iterable[tuple[int, int]]) -> _Runs:
    """Join steps (end, line) of the same line, and leave out those without instructions."""
    runs = _Runs(array("i"), array("i"))
    last = 0
    for end, stated in steps:
        line = stated if 0 < stated <= _MOST_LINE else 0
        if end == last:
            continue
        if runs.lines and runs.lines[-1] == line:
            runs.ends[-1] = end
        else:
            runs.ends.append(end)
            runs.lines.append(line)
        last = end
    return runs


def _read_lnotab(table: bytes, line: int, is_cut: bool) -> Iterator[tuple[int, int]]:
    """Yield the steps of a table up to 3.9: (bytes to go on, unsigned; lines to go on, signed).

    The last line holds to the end of the code, which the table does not say.
    """
    end = 0
    for advance, delta in zip(table[::2], table[1::2], strict=False):
        end += advance
        yield end, line
        line += _from_byte(delta)
    if not is_cut:
        yield _OPEN_END, line


_NO_LINE = -128


def _read_pairs(table: bytes, line: int) -> Iterator[tuple[int, int]]:
    """Yield the steps of a table of 3.10: (bytes of instructions; lines from the last to them)."""
    end = 0
    for size, byte in zip(table[::2], table[1::2], strict=False):
        end += size
        delta = _from_byte(byte)
        line += 0 if delta == _NO_LINE else delta
        yield end, 0 if delta == _NO_LINE else line


def _from_byte(byte: int) -> int:
    return byte - 256 if byte >= 128 else byte


_ENTRY = 0x80
"""The bit that only the first byte of an entry has."""
_ONE_LINE = range(10, 13)
_WITH_DELTA = (13, 14)
_NO_LOCATION = 15


def _read_locations(table: bytes, line: int, is_cut: bool) -> Iterator[tuple[int, int]]:
    """Yield the steps of a table from 3.11 on. A cut table's last entry may lack bytes."""
    starts = [at for at, byte in enumerate(table) if byte & _ENTRY]
    if table and starts[:1] != [0]:
        return
    bounds = starts if is_cut else [*starts, len(table)]
    end = 0
    for start, following in pairwise(bounds):
        code, units = table[start] >> 3 & 15, (table[start] & 7) + 1
        if code in _WITH_DELTA:
            delta = _read_svarint(table[start + 1 : following])
            if delta is None:
                return
            line += delta
        elif code in _ONE_LINE:
            line += code - _ONE_LINE.start
        end += 2 * units
        yield end, 0 if code == _NO_LOCATION else line


_MOST_CHUNKS = 6
"""Of 6 bits each: enough for 32 bits and a sign."""


def _read_svarint(content: bytes) -> int | None:
    """Return the first number; None if it does not end or takes more than 36 bits."""
    value = 0
    for k, byte in enumerate(content[:_MOST_CHUNKS]):
        value |= (byte & 0x3F) << (6 * k)
        if not byte & 0x40:
            return -(value >> 1) if value & 1 else value >> 1
    return None
