"""The layouts of CPython's structures, against what compilers make of its headers."""

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbolizer.runtimes.image import NONE, Layout, Refusal, Style
from symbolizer.runtimes.layouts import (
    DEBUG_OFFSETS_BYTES,
    DEBUG_WORDS,
    HOLDERS,
    KEYS,
    LAYOUTS,
    read_debug_offsets,
)
from symbolizer.runtimes.object_layouts import (
    OBJECT_LAYOUTS,
    OBJECT_WORDS,
    ObjectLayout,
    object_layout,
)
from tests.support.debian_roots import CannotFetchError, fetch_root
from tests.support.elf_files import build
from tests.support.python_images import VERSION, debug_offsets
from tests.support.unwind_tables import needs

PROGRAM = Path(__file__).with_name("layout.c")
WITH_DEBUG_OFFSETS = (13, 14, 15)
OPTIONS = ("", "-DPy_DEBUG", "-DPy_GIL_DISABLED=1")


def header_folders(minor: int) -> Iterator[Path]:
    """Return folders with the headers of a version: of installations, and of Debian's packages."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    name = f"python3.{minor}"
    for folder in (*pyenv.glob(f"versions/*/include/{name}"), Path("/usr/include", name)):
        if (folder / "internal" / "pycore_pystate.h").exists():
            yield folder
    if minor in WITH_DEBUG_OFFSETS:
        try:
            packages = [f"libpython3.{each}-dev" for each in WITH_DEBUG_OFFSETS]
            yield fetch_root("python-headers", "sid", packages) / "usr" / "include" / name
        except CannotFetchError:
            pass


def compiled(minor: int, option: str, folder: Path) -> Iterator[tuple[dict[str, int], Path]]:
    """Return what programs say that are compiled with headers of a version, and these."""
    folders = list(header_folders(minor))
    if not folders:
        pytest.skip(f"there are no headers of Python 3.{minor}")
    for number, headers in enumerate(folders):
        program = compile_with(headers, option, folder / str(number))
        told = subprocess.run([program], capture_output=True, check=True, text=True).stdout
        numbers = re.findall(r"(.+) (\d+)\n", told)
        yield {name: int(number) for name, number in numbers}, program


def compile_with(headers: Path, option: str, program: Path) -> Path:
    # Debian has pyconfig.h in a folder by architecture.
    flags = [f"-I{headers}", f"-I{headers}/internal", f"-idirafter{headers.parent}"]
    # The initial state refers to much of the interpreter, which is not there.
    flags += ["-Wl,--unresolved-symbols=ignore-all", "-no-pie"]
    return build(program, PROGRAM.read_text(), *flags, *option.split())


def assert_agree(layout: Layout, told: Mapping[str, int]) -> None:
    known = layout._asdict()
    assert {name: known[name] for name in told if name in known} == {
        name: number for name, number in told.items() if name in known
    }
    unknown = {name for name, offset in known.items() if offset == NONE}
    assert not unknown & told.keys()
    in_code_object = [
        getattr(layout, name)
        for name in ("code_name", "code_file", "code_lines", "code_first_line", "code_tlbc")
    ]
    assert layout.code_bytes >= max(each for each in in_code_object if each != NONE) + 8


@needs("gcc", "gcc")
@pytest.mark.parametrize("option", OPTIONS[:2])
@pytest.mark.parametrize("minor", LAYOUTS)
def test_the_table_agrees_with_the_headers(minor, option, tmp_path):
    """To 3.12 the offsets are ours; a debug build has the same."""
    for told, _ in compiled(minor, option, tmp_path):
        assert_agree(LAYOUTS[minor], told)
        assert (KEYS.get(minor), HOLDERS.get(minor)) == (told.get("key"), told.get("holder"))


@needs("gcc", "gcc")
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("minor", WITH_DEBUG_OFFSETS)
def test_debug_offsets_are_read_where_the_headers_have_them(minor, option, tmp_path):
    """From 3.13 on the offsets are those of the build, free-threaded or not."""
    for told, program in compiled(minor, option, tmp_path):
        content = program.with_suffix(".offsets").read_bytes()
        read = read_debug_offsets(content, told["version"])

        assert not isinstance(read, Refusal)
        is_free_threaded, layout = read
        assert is_free_threaded == ("GIL_DISABLED" in option)
        assert_agree(layout, told)
        words = {f"word {name}": by_minor[minor - 13] for name, by_minor in DEBUG_WORDS.items()}
        assert {name: word for name, word in words.items() if word != NONE} == {
            name: word for name, word in told.items() if name in words
        }


def assert_objects_agree(layout: ObjectLayout, told: Mapping[str, int]) -> None:
    known = {f"object {name}": number for name, number in layout._asdict().items()}
    assert {name: known[name] for name in told if name in known} == {
        name: number for name, number in told.items() if name in known
    }
    assert told["object main_interpreter"] == layout.interpreters + 8
    assert told["object int_digit_bits"] == 30
    if "object keys_size" in told:  # what is read of keys as bytes
        assert [told[f"object keys_{name}"] for name in ("size", "index_bytes", "kind")] == [
            8,
            9,
            10,
        ]


@needs("gcc", "gcc")
@pytest.mark.parametrize("option", OPTIONS[:2])
@pytest.mark.parametrize("minor", OBJECT_LAYOUTS)
def test_the_table_of_objects_agrees_with_the_headers(minor, option, tmp_path):
    for told, program in compiled(minor, option, tmp_path):
        is_first = minor < 13 or told["version"] == 0x030D00F0
        if is_first:
            assert_objects_agree(OBJECT_LAYOUTS[minor], told)
        if minor == 13:
            content = program.with_suffix(".offsets").read_bytes()
            read = object_layout(told["version"], content)
            assert read is not None
            assert_objects_agree(read, told)
            words = {f"word {name}": word for name, word in OBJECT_WORDS.items()}
            assert words == {name: word for name, word in told.items() if name in words}


@needs("gcc", "gcc")
def test_objects_of_free_threaded_builds_are_not_known(tmp_path):
    """Theirs have another header."""
    for told, program in compiled(13, OPTIONS[2], tmp_path):
        content = program.with_suffix(".offsets").read_bytes()
        assert object_layout(told["version"], content) is None


@pytest.mark.parametrize("version", [0x030E00F0, 0x030C00B1, 0x030700F0, 0])
def test_objects_of_other_versions_are_not_known(version):
    assert object_layout(version, debug_offsets(version)) is None


def test_debug_offsets_give_a_layout():
    read = read_debug_offsets(debug_offsets(), VERSION)

    assert not isinstance(read, Refusal)
    assert (read[1].style, read[1].code_bytes, read[1].str_compact) == (Style.ENTRY_FRAME, 144, 56)


@pytest.mark.parametrize(
    "version", [0x030E02C1, 0x030E00B4, 0x031000F0, 0x030C00F0, 0x020712F0, 0, 0xFFFFFFFF]
)
def test_versions_that_are_not_final_or_not_known_are_refused(version):
    """Candidates and betas have other structures by the same minor version."""
    read = read_debug_offsets(debug_offsets(version), version)

    assert read == Refusal.UNKNOWN_VERSION


@pytest.mark.parametrize(
    "changes",
    [
        {"version": VERSION + 0x100},
        {"free_threaded": 2},
        {"thread_state.current_frame": 4096},
        {"thread_state.thread_id": 1 << 63},
        {"interpreter_frame.owner": 0xFFFF},
        {"code_object.linetable": 249},
        {"unicode_object.length": 24},
        {"pyobject.ob_type": 16},
    ],
)
def test_offsets_that_cannot_be_are_refused(changes):
    read = read_debug_offsets(debug_offsets(changes=changes), VERSION)

    assert read == Refusal.UNKNOWN_DEBUG_OFFSETS


@pytest.mark.parametrize("content", [b"", b"xdebugpy", b"xdebugpz" + debug_offsets()[8:]])
def test_what_are_no_debug_offsets_is_refused(content):
    assert read_debug_offsets(content, VERSION) == Refusal.UNKNOWN_DEBUG_OFFSETS


@given(st.binary(min_size=DEBUG_OFFSETS_BYTES - 16, max_size=DEBUG_OFFSETS_BYTES + 16))
def test_any_debug_offsets_are_refused_or_bounded(content):
    read = read_debug_offsets(debug_offsets()[:16] + content, VERSION)

    assert isinstance(read, Refusal) or read[1].is_sound


def test_layouts_of_the_table_are_bounded():
    assert all(layout.is_sound for layout in LAYOUTS.values())
    assert {layout.style for layout in LAYOUTS.values()} == set(Style)
