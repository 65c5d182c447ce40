"""Images as bytes, and files that only look like interpreters."""

import random
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbolizer.runtimes.cpython import NONE, Image, Layout, Refusal, StateKind, read_image
from symbolizer.runtimes.image import MAX_IMAGE_BYTES, MAX_OFFSET, MAX_RANGES
from symbolizer.runtimes.layouts import LAYOUTS
from symbolizer.symbols.elf import FileSource, MemorySource, UnreadableElf, read_elf
from symbolizer.symbols.named import SYMBOL
from symbolizer.unwind.build import build
from symbolizer.unwind.rules import EVALUATES
from symbolizer.unwind.table import PAGE_BITS, UnwindTable
from tests.support.elf_files import build as compile_c
from tests.support.elf_files import strip
from tests.support.python_images import debug_offsets, image_of, imitation, known_image_of
from tests.support.pythons import VERSIONS, need_python
from tests.support.unwind_tables import needs

WORDS = st.integers(0, (1 << 64) - 1)
SIGNED = st.integers(-(1 << 63), (1 << 63) - 1)
OFFSETS = st.integers(0, MAX_OFFSET - 1) | st.just(NONE)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    numbers = [draw(OFFSETS) for _ in Layout._fields]
    return Layout(*numbers)._replace(
        style=draw(st.integers(1, 3)), code_bytes=draw(st.integers(1, 256))
    )


IMAGES = st.builds(
    Image,
    version=st.integers(0, (1 << 32) - 1),
    free_threaded=st.booleans(),
    layout=st.none() | layouts(),
    refusal=st.sampled_from(Refusal),
    evaluation=st.lists(st.tuples(WORDS, WORDS), max_size=MAX_RANGES).map(tuple),
    code_type=WORDS,
    state_kind=st.sampled_from(StateKind),
    state_address=WORDS,
    state_offset=SIGNED,
    code_shift=SIGNED,
    detached_kind=st.sampled_from(StateKind),
    detached_address=WORDS,
    detached_offset=SIGNED,
    runtime=WORDS,
)


@given(IMAGES)
def test_an_image_is_unpacked_as_it_was(image):
    packed = image.pack()

    assert Image.unpack(packed) == image
    assert len(packed) <= MAX_IMAGE_BYTES


@given(IMAGES, st.data())
def test_damaged_bytes_are_no_image_or_a_sound_one(image, data):
    packed = bytearray(image.pack())
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    packed = packed[: data.draw(st.integers(0, len(packed)))]

    unpacked = Image.unpack(bytes(packed))

    assert unpacked is None or unpacked.layout is None or unpacked.layout.is_sound


@pytest.mark.parametrize(
    "changes",
    [
        {"style": 0},
        {"style": 4},
        {"code_bytes": 0},
        {"code_bytes": 257},
        {"frame_code": 4096},
        {"str_length": 65534},
    ],
)
def test_a_wild_layout_is_not_sound(changes):
    assert not LAYOUTS[12]._replace(**changes).is_sound


@pytest.mark.parametrize("minor", [11, 12, 13, 14, 15])
def test_rows_of_the_evaluation_loop_are_marked(minor):
    """Those and no others, and but for the mark the table is what it would be without."""
    path = need_python((3, minor)).runtime_file
    image, _ = known_image_of(path)

    with path.open("rb") as file:
        by_address = build(FileSource(file.fileno()))
        by_offset = build(FileSource(file.fileno()), by_file_offset=True)

    assert marked_ranges(by_address) == image.evaluation
    assert marked_ranges(by_offset) == tuple(
        (start - image.code_shift, end - image.code_shift) for start, end in image.evaluation
    )


def marked_ranges(table: UnwindTable) -> tuple[tuple[int, int], ...]:
    pages = np.repeat(table.pages["number"].astype(np.uint64), table.pages["count"])
    addresses = (pages << np.uint64(PAGE_BITS)) + table.rows["pc_low"]
    is_marked = (table.rows["cfa_kind"] & EVALUATES > 0).astype(np.int8)
    edges = addresses[np.flatnonzero(np.diff(is_marked, prepend=0))].tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


@needs("gcc", "gcc")
@pytest.mark.parametrize(
    ("version", "refusal"),
    [
        (0x030E02C1, Refusal.UNKNOWN_VERSION),
        (0x031002F0, Refusal.UNKNOWN_VERSION),
        (0x030702F0, Refusal.UNKNOWN_VERSION),
        (0, Refusal.UNKNOWN_VERSION),
        (0x030D02F0, Refusal.UNKNOWN_DEBUG_OFFSETS),  # those of 3.14
    ],
)
def test_versions_that_are_not_known_are_refused(version, refusal, tmp_path):
    program = compile_c(tmp_path / "program", imitation(version=version), "-shared", "-fPIC")

    image = image_of(program)

    assert image is not None
    assert (image.version, image.refusal, image.layout) == (version, refusal, None)


@needs("gcc", "gcc")
def test_debug_offsets_of_another_version_than_the_file_says_are_refused(tmp_path):
    source = imitation(offsets=debug_offsets(0x030E03F0))
    program = compile_c(tmp_path / "program", source, "-shared", "-fPIC")

    image = image_of(program)

    assert image is not None
    assert image.refusal == Refusal.UNKNOWN_DEBUG_OFFSETS


@needs("gcc", "gcc")
@pytest.mark.parametrize("name", ["_PyRuntime", "_PyEval_EvalFrameDefault"])
def test_a_file_without_the_runtime_or_the_loop_is_no_interpreter(name, tmp_path):
    source = imitation().replace(name, "other")
    program = compile_c(tmp_path / "program", source, "-shared", "-fPIC")

    assert image_of(program) is None


@needs("gcc", "gcc")
def test_any_damage_to_an_interpreter_gives_a_sound_image_or_an_error(tmp_path):
    """Symbols, sections, code, offsets: whatever a file says is bounded."""
    library = compile_c(tmp_path / "library.so", imitation(), "-shared", "-fPIC")
    content = strip(library).read_bytes()
    rows = symbol_places(content)
    generator = random.Random(1)
    outcomes = set()
    begun = time.process_time()

    for number in range(600):
        damaged = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            place = generator.choice(rows) if number % 2 else generator.randrange(len(damaged))
            damaged[place] = generator.randrange(256)
        outcomes.add(outcome_of(bytes(damaged)))

    assert {"image", "no image", "error"} <= outcomes
    assert time.process_time() - begun < 60


def symbol_places(content: bytes) -> list[int]:
    """Return the positions of the bytes of .dynsym and of the debug offsets."""
    elf = read_elf(MemorySource(content))
    return [
        place
        for section in elf.sections
        if section.name in (b".dynsym", b".PyRuntime")
        for place in range(section.offset, section.offset + min(section.size, 1024))
    ]


def outcome_of(content: bytes) -> str:
    try:
        image = read_image(read_elf(MemorySource(content)))
    except UnreadableElf:
        return "error"
    if image is None:
        return "no image"
    assert Image.unpack(image.pack()) == image
    assert (image.layout is None) == bool(image.refusal)
    assert image.layout is None or image.layout.is_sound
    return "refusal" if image.refusal else "image"


@needs("gcc", "gcc")
@pytest.mark.parametrize("field", ["st_value", "st_size"])
@pytest.mark.parametrize("number", [0, 1 << 47, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_symbols_at_wild_addresses_give_no_wild_image(field, number, tmp_path):
    """Each symbol in turn; no number is too large to be stored."""
    library = compile_c(tmp_path / "library.so", imitation(), "-shared", "-fPIC")
    content = strip(library).read_bytes()
    elf = read_elf(MemorySource(content))
    symbols = next(section for section in elf.sections if section.name == b".dynsym")

    for place in range(symbols.offset, symbols.offset + symbols.size, SYMBOL.itemsize):
        damaged = bytearray(content)
        np.frombuffer(damaged, SYMBOL, 1, place)[field] = number
        assert outcome_of(bytes(damaged)) != "error"


@needs("gcc", "gcc")
def test_a_loop_as_large_as_the_file_is_refused(tmp_path):
    """Its code is not searched, however many parts a file says it has."""
    source = imitation() + 'asm(".text; .skip 32 << 20, 0xe9");'
    library = compile_c(tmp_path / "library.so", source, "-shared", "-fPIC")
    content = bytearray(strip(library).read_bytes())
    elf = read_elf(MemorySource(bytes(content)))
    symbols = next(section for section in elf.sections if section.name == b".dynsym")
    rows = np.frombuffer(content, SYMBOL, symbols.size // SYMBOL.itemsize, symbols.offset)
    rows["st_size"][rows["st_value"] == loop_of(library)] = 31 << 20
    begun = time.process_time()

    image = read_image(read_elf(MemorySource(bytes(content))))

    assert image is not None
    assert image.refusal == Refusal.NO_EVALUATION_LOOP
    assert time.process_time() - begun < 2


def loop_of(library: Path) -> int:
    image, _ = known_image_of(library)
    return image.evaluation[0][0]


def test_versions_to_3_10_are_in_no_symbol_but_in_code():
    """Each is found, and no other text that the code refers to is one."""
    known = [need_python(version) for version in VERSIONS[:3]]

    images = [known_image_of(interpreter.runtime_file)[0] for interpreter in known]

    assert [image.version >> 8 & 0xFF for image in images] == [each.version[2] for each in known]
    assert [image.version >> 16 & 0xFF for image in images] == [8, 9, 10]
