"""Files made to be expensive for whoever takes them for CPython: within limits they are refused."""

import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from symbolizer.location import Miss
from symbolizer.runtimes.cpython import Image
from symbolizer.symbols.elf import FileSource, UnreadableElf
from symbolizer.symbols.named import SYMBOL
from symbolizer.unwind.build import build
from tests.support.frame_files import FRAMES, FrameSection
from tests.support.hostile_files import CODE, MB, RELA, Part, symbols, write_elf
from tests.support.python_images import VERSION, debug_offsets, image_of

CPU_S = 5
NAMES = (
    *(b"_PyRuntime", b"_PyEval_EvalFrameDefault", b"_PyEval_EvalFrameDefault.cold"),
    *(b"PyCode_Type", b"Py_Version", b"PyThreadState_GetUnchecked"),
    b"PyGILState_GetThisThreadState",
)
OFFSETS = debug_offsets()
LOOP = CODE + 0x1000
# lea 0x1000(%rip), %rdi; call; mov (%rax), %rax; ret: a variable by the global offset table.
GET_STATE = bytes.fromhex("488d3d00100000 e800000000 488b00 c3")


def interpreter(
    *parts: Part,
    repeated: int = 1,
    copies: int = 1,
    loop_bytes: int = 4096,
    loop: bytes = b"",
    eh_frame: bytes = b"",
) -> Callable[[Path], None]:
    """Return what writes a file that has the symbols and the debug offsets of an interpreter."""
    names = b"\0" + b"".join(name + b"\0" for name in NAMES) * copies
    rows = np.zeros((repeated, len(NAMES)), dtype=SYMBOL)
    rows["st_name"] = [names.index(b"\0" + name + b"\0") + 1 for name in NAMES]
    rows["st_info"], rows["st_shndx"], rows["st_size"] = 0x12, 1, 64
    getter = CODE + len(OFFSETS) + 8
    rows["st_value"] = [CODE, LOOP, LOOP, CODE, getter - 8, getter, getter]
    rows["st_size"][:, 1] = loop_bytes
    content = (OFFSETS + struct.pack("<Q", VERSION) + GET_STATE).ljust(LOOP - CODE, b"\0") + loop
    table = symbols(rows.reshape(-1), strings=names, table=b".dynsym")
    frames = [Part(b".eh_frame", eh_frame, address=FRAMES)] if eh_frame else []
    return lambda path: write_elf(
        path, [*table, *frames, *parts], code=content, code_bytes=max(8 * MB, len(content))
    )


def parts_of_code(count: int) -> bytes:
    """Return FDEs of code none of which begins as a function does."""
    section = FrameSection()
    section.add_cie()
    for number in range(count):
        section.add_fde(LOOP + 40 * number, 40, b"\x0e\x20")
    return bytes(section.content)


def jumping_handlers(count: int, distance: int) -> Callable[[Path], None]:
    """Return what writes a file with a table of functions, each of which jumps so far."""
    section = FrameSection()
    section.add_cie()
    table, first = LOOP + 0x1000, LOOP + 0x2000
    for number in range(count):
        section.add_fde(first + 40 * number, 40, b"")
    loop = (b"\xff\x14\xc5" + struct.pack("<I", table)).ljust(0x1000, b"\x90")
    pointers = struct.pack("<256Q", *(first + 40 * number for number in range(256)))
    jumps = (b"\xe9" + struct.pack("<i", distance - 5)) * 8
    code = loop + pointers.ljust(0x1000, b"\x90") + jumps * count
    return interpreter(loop=code, loop_bytes=64, eh_frame=bytes(section.content))


def many_tables() -> Callable[[Path], None]:
    """Return what writes a file with a loop of 16 KB each of whose words is that of a table."""
    addresses = [LOOP + 0x8000 + 8 * number for number in range(2048)]
    loop = b"".join(struct.pack("<Q", address) for address in addresses)
    pointers = struct.pack("<Q", LOOP + 40) * (2048 + 256)
    return interpreter(
        loop=loop.ljust(0x8000, b"\x90") + pointers,
        loop_bytes=len(loop),
        eh_frame=parts_of_code(1000),
    )


KINDS: dict[str, Callable[[], Callable[[Path], None]]] = {
    "plain": interpreter,
    "1.4 M symbols": lambda: interpreter(repeated=200_000),
    "names in 40 MB": lambda: interpreter(copies=250_000),
    "4 MB of jumps to 100,000 parts": lambda: interpreter(
        loop=b"\xe9\x00\x01\x00\x00" * 800_000,
        loop_bytes=4 * MB - 8,
        eh_frame=parts_of_code(100_000),
    ),
    "jumps from one part to the next": lambda: interpreter(
        loop=b"\xe9\x00\x01\x00\x00" * 800_000, eh_frame=parts_of_code(100_000)
    ),
    "1,000 sections of 30 MB of relocations": lambda: interpreter(
        *[Part(b".rela", type=RELA, size=30 * MB, offset=0x1000) for _ in range(1000)],
        loop=bytes(32 * MB),
    ),
    "handlers that jump from one to the next": lambda: jumping_handlers(60_000, 40),
    "handlers that jump far away": lambda: jumping_handlers(60_000, 40 * 256),
    "2,048 tables of handlers": many_tables,
}


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_interpreters_are_read_or_refused_in_time(kind, tmp_path):
    """Their tables are built all the same, with or without an image."""
    path = tmp_path / "hostile"
    KINDS[kind]()(path)
    begun = time.process_time()

    with path.open("rb") as file:
        table = build(FileSource(file.fileno()))

    assert time.process_time() - begun < CPU_S
    assert table.image is None or Image.unpack(table.image.pack()) == table.image


def test_the_plain_one_is_looked_at_as_an_interpreter(tmp_path):
    """Otherwise the others would be refused for nothing."""
    path = tmp_path / "plain"
    interpreter()(path)

    image = image_of(path)

    assert image is not None
    assert image.version == VERSION


def test_too_many_relocations_are_an_error(tmp_path):
    path = tmp_path / "hostile"
    KINDS["1,000 sections of 30 MB of relocations"]()(path)

    with pytest.raises(UnreadableElf) as caught:
        image_of(path)

    assert caught.value.reason == Miss.TOO_LARGE
