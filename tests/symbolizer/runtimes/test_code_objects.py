"""Code objects of real interpreters, read from their memory as the kernel side copies them."""

import ast
import json
import os
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbolizer.runtimes.code_objects import UNNAMED, CodeObject, Parts, parse_code
from symbolizer.runtimes.cpython import Image, Layout, read_image
from symbolizer.runtimes.layouts import LAYOUTS
from symbolizer.symbols.elf import FileSource, read_elf
from symbolizer.text import readable
from tests.support.pythons import VERSIONS, Interpreter, need, need_python

PROGRAM = Path(__file__).with_name("sample_code.py")
NAME_BYTES, FILE_BYTES, LINES_BYTES = 512, 512, 4096
"""The most that the kernel side copies."""
FROM_3_12 = LAYOUTS[12]
FREE_THREADED = FROM_3_12._replace(
    object_type=24, code_first_line=84, str_length=32, str_state=48, str_ascii=56, str_compact=72,
    bytes_size=32, bytes_data=48, str_kind_bit=8,
)  # fmt: skip


@dataclass(frozen=True)
class Running:
    pid: int
    version_hex: int
    layout: Layout
    codes: list[dict[str, Any]]

    def parts(self, code: dict[str, Any]) -> Parts:
        """Return what the kernel side copies of a code object."""
        layout = self.layout
        head = self._read(code["address"], layout.code_bytes)

        def behind(offset: int, limit: int) -> bytes:
            return self._read(int.from_bytes(head[offset : offset + 8], "little"), limit)

        return Parts(
            head,
            behind(layout.code_name, NAME_BYTES),
            behind(layout.code_file, FILE_BYTES),
            behind(layout.code_lines, LINES_BYTES),
        )

    def parse(self, code: dict[str, Any]) -> CodeObject:
        parsed = parse_code(self.version_hex, self.layout, self.parts(code))
        assert parsed is not None
        return parsed

    def _read(self, address: int, size: int) -> bytes:
        with Path(f"/proc/{self.pid}/mem").open("rb", buffering=0) as memory:
            return os.pread(memory.fileno(), size, address)


@pytest.fixture(scope="module", params=[*VERSIONS, "3.14t-own"], ids=str)
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    """A process of an interpreter, with its own description of its code objects."""
    wanted = request.param
    interpreter = need(wanted) if isinstance(wanted, str) else need_python(wanted)
    command = interpreter.command("-X", "utf8", PROGRAM)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        image = image_of(interpreter)
        assert image.layout is not None, image.refusal
        described = json.loads(process.stdout.readline())
        assert described["version_hex"] == image.version
        for code in described["codes"]:
            code["name"], code["file"] = map(ast.literal_eval, (code["name"], code["file"]))
        yield Running(process.pid, image.version, image.layout, described["codes"])
        assert process.stdin is not None
        process.stdin.close()


def image_of(interpreter: Interpreter) -> Image:
    with interpreter.runtime_file.open("rb") as file:
        image = read_image(read_elf(FileSource(file.fileno())))
    assert image is not None
    return image


def shown(text: str) -> str:
    return readable(text.encode("utf-8", "backslashreplace"))


def step_of(version_hex: int) -> int:
    """Return by how much a frame's instruction grows from one to the next."""
    return 1 if version_hex >> 16 == 0x030A else 2


def test_names_and_first_lines_are_those_of_the_interpreter(running):
    """Names of all widths, with surrogates and controls; what was cut is what it begins with."""
    for code in running.codes:
        parsed = running.parse(code)

        assert parsed.first_line == code["first_line"]
        for text, is_cut, whole in (
            (parsed.name, parsed.is_name_cut, shown(code["name"]) or UNNAMED),
            (parsed.file, parsed.is_file_cut, shown(code["file"])),
        ):
            if is_cut:
                assert text.endswith("…")
                assert whole.startswith(text[:-1])
                assert len(text) > 100
            else:
                assert text == whole


def test_only_names_beyond_the_limit_are_cut(running):
    """A name is cut if and only if its object takes more than is copied."""
    cut = [code for code in running.codes if running.parse(code).is_name_cut]
    names = {code["name"][:1] for code in cut}

    assert names == {"n", "数", "é", "😀"}


def test_each_instruction_has_the_line_that_the_interpreter_says(running):
    """Compared for every instruction of every code object whose table is whole."""
    step = step_of(running.version_hex)
    compared = 0
    for code in running.codes:
        parsed = running.parse(code)
        if parsed.is_line_table_cut:
            continue

        lines = [parsed.line(k * step) for k in range(len(code["lines"]))]

        assert lines == code["lines"], code["name"]
        compared += len(lines)
    assert compared > 500


def test_lines_beyond_a_cut_are_unknown_and_those_before_are_right(running):
    """Of a table that is longer than the limit, the copied part is used."""
    step = step_of(running.version_hex)
    long = next(code for code in running.codes if code["name"] == "long")
    parsed = running.parse(long)

    lines = [parsed.line(k * step) for k in range(len(long["lines"]))]
    known = [line for line in lines if line]

    assert parsed.is_line_table_cut
    assert 500 < len(known) < len(lines)
    assert known == long["lines"][: len(known)]
    assert set(lines[len(known) :]) == {0}


def test_table_cut_anywhere_says_nothing_wrong(running):
    """Whatever byte the cut falls on, a line is the right one or unknown."""
    step = step_of(running.version_hex)
    plain = next(code for code in running.codes if code["name"] in ("backwards", "generator"))
    whole = running.parts(plain)
    for size in range(running.layout.bytes_data + 60):
        parts = whole._replace(lines=whole.lines[:size])
        parsed = parse_code(running.version_hex, running.layout, parts)

        assert parsed is not None
        for k, line in enumerate(plain["lines"]):
            assert parsed.line(k * step) in (0, line)


def test_instruction_before_the_first_has_the_first_line(running):
    """A frame that has not begun points before the first; to 3.10 it has -1 for an instruction."""
    parsed = running.parse(next(code for code in running.codes if code["name"] == "backwards"))

    if running.version_hex >> 16 >= 0x030B:
        assert parsed.line(0xFFFFFFFE) == parsed.first_line
        assert parsed.line(0xFFFFFFFF) == 0
        assert parsed.line(1 << 20) == 0
    else:
        assert parsed.line(0xFFFFFFFF) == parsed.first_line
    assert parsed.line(0x80000000) == 0


def test_unreadable_parts_leave_what_is_known(running):
    """Without its name or its first line there is no code object; the rest may be missing."""
    parts = running.parts(next(code for code in running.codes if code["name"] == "backwards"))

    def parse(**changed: bytes) -> CodeObject | None:
        return parse_code(running.version_hex, running.layout, parts._replace(**changed))

    assert parse(name=b"") is None
    assert parse(code=parts.code[:40]) is None
    without = parse(file=b"", lines=b"")
    assert without is not None
    assert (without.name, without.file, without.line(0)) == ("backwards", "", 0)


def str_object(layout: Layout, state: int, text: bytes, length: int) -> bytes:
    content = bytearray(layout.str_ascii)
    struct.pack_into("<Q", content, layout.str_length, length)
    struct.pack_into("<I", content, layout.str_state, state)
    return bytes(content) + text


def test_free_threaded_strings_have_their_width_elsewhere():
    """From 3.14 on `interned` is a byte of its own there."""
    name = str_object(FREE_THREADED, 3 | (1 | 8 | 16) << 8, b"run", 3)

    parsed = parse_code(0x030E00F0, FREE_THREADED, Parts(bytes(256), name, b"", b""))

    assert parsed is not None
    assert parsed.name == "run"


@pytest.mark.parametrize(
    "name",
    [
        str_object(FROM_3_12, 1 << 2 | 16 << 2, b"run", 3),  # not compact
        str_object(FROM_3_12, 3 << 2 | 8 << 2, b"run", 3),  # no width
        str_object(FROM_3_12, (1 | 8 | 16) << 2, b"run", 1 << 40),
        str_object(FROM_3_12, (1 | 8 | 16) << 2, b"run", (1 << 64) - 1),
        bytes(30),
    ],
)
def test_what_is_no_string_has_no_name(name):
    """Memory that was reused is not shown as a name where its header tells it."""
    assert parse_code(0x030C0000, FROM_3_12, Parts(bytes(256), name, b"", b"")) is None


def test_characters_beyond_unicode_are_replaced():
    """Four bytes per character may hold any number."""
    content = bytes(16) + struct.pack("<II", 0x11FFFF, 0x41)
    name = str_object(FROM_3_12, (4 | 8) << 2, content, 2)

    parsed = parse_code(0x030C0000, FROM_3_12, Parts(bytes(256), name, b"", b""))

    assert parsed is not None
    assert parsed.name == "\ufffdA"


KNOWN = st.sampled_from(
    [
        *((3 << 24 | minor << 16, layout) for minor, layout in LAYOUTS.items()),
        (0x030E00F0, FREE_THREADED),
    ]
)
PART = st.binary(max_size=600)


@given(KNOWN, st.builds(Parts, PART, PART, PART, PART), st.integers(0, 2**32 - 1))
def test_any_bytes_are_read_or_refused(known, parts, instruction):
    """Nothing raises, and lines are numbers that a line can have."""
    parsed = parse_code(*known, parts)

    assert parsed is None or 0 <= parsed.line(instruction) < 1 << 31


@given(KNOWN, st.sampled_from([9, 10, 12, 25]), PART, st.integers(0, 1000))
def test_any_characters_become_one_printable_line(known, form, content, length):
    """Whatever a string's memory has in it, its name is bounded, and it encodes to UTF-8."""
    _, layout = known
    name = str_object(layout, form << layout.str_kind_bit, content, length)

    parsed = parse_code(*known, Parts(bytes(256), name, name, b""))

    assert parsed is not None
    assert parsed.name.isprintable()
    assert 0 < len(parsed.name.encode()) <= 4 * 1025
    assert parsed.file == (parsed.name if length else "")


@given(KNOWN, st.binary(max_size=4096), st.integers(-(1 << 63), (1 << 63) - 1))
def test_any_line_table_is_read_within_bounds(known, table, size):
    """A table of any bytes gives at most one line for each of its bytes."""
    _, layout = known
    name = str_object(layout, (1 | 8 | 16) << layout.str_kind_bit, b"run", 3)
    header = bytearray(layout.bytes_data)
    struct.pack_into("<q", header, layout.bytes_size, size)

    parsed = parse_code(*known, Parts(bytes(256), name, b"", bytes(header) + table))

    assert parsed is not None
    seen = [parsed.line(offset) for offset in range(0, 70000, 70)]
    assert all(0 <= line < 1 << 31 for line in seen)
    assert len(parsed._runs.ends) <= len(table) + 1
