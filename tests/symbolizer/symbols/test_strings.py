"""The strings that a symbol table's file holds: those of its functions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbolizer.location import Miss
from symbolizer.symbols import strings as module
from symbolizer.symbols.elf import FileSource, MemorySource, UnreadableElf, read_elf
from symbolizer.symbols.functions import read_functions
from symbolizer.symbols.strings import Strings
from tests.support.elf_files import build
from tests.support.frame_files import make_elf


def areas(*contents: bytes) -> tuple[Strings, bytes]:
    strings = Strings(read_elf(MemorySource(make_elf({}))))
    for content in contents:
        strings.add_text(content)
    return strings, b"".join(content + b"\0" for content in contents)


def kept(strings: Strings, positions: list[int]) -> tuple[list[bytes], bytes]:
    found, pieces = strings.keep(np.array(positions, dtype=np.uint32))
    text = b"".join(pieces)
    moved = found.moved(np.array(positions, dtype=np.uint32)).tolist()
    return [text[at:].partition(b"\0")[0] for at in moved], text


@given(data=st.data(), contents=st.lists(st.binary(max_size=60), min_size=1, max_size=4))
def test_every_string_is_kept_as_it_was(small_pieces, data, contents):
    """Wherever the pieces that are read end, and if a string is the end of another."""
    contents = [content.replace(b"\1", b"\0") for content in contents]
    strings, text = areas(*contents)
    positions = data.draw(st.lists(st.integers(0, len(text) - 1), max_size=20))

    found, stored = kept(strings, positions)

    assert found == [text[at:].partition(b"\0")[0] for at in positions]
    assert len(stored) <= len(text)


@pytest.fixture(scope="module")
def small_pieces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE_BYTES", 8)
        yield


def test_strings_that_no_function_needs_are_not_kept(tmp_path):
    """Names of variables, of sections and of what other files define take no room."""
    variables = "".join(f"int a_long_name_of_a_variable_{n};\n" for n in range(2000))
    path = build(tmp_path / "program", variables + "int main() { return 0; }")
    with path.open("rb") as file:
        functions, pieces = read_functions(read_elf(FileSource(file.fileno())))
        stored = b"".join(pieces)

    assert len(functions.starts) > 3
    assert b"\0main\0" in b"\0" + stored
    assert b"a_long_name_of_a_variable" not in stored


def test_more_strings_than_the_cache_has_room_for_are_refused(monkeypatch):
    """Before any of them is stored."""
    monkeypatch.setattr(module, "_MAX_KEPT_BYTES", 1000)
    strings, _ = areas(b"n" * 600 + b"\0" + b"m" * 600)

    with pytest.raises(UnreadableElf) as raised:
        strings.keep(np.array([0, 601], dtype=np.uint32))

    assert raised.value.reason == Miss.TOO_LARGE
    assert kept(strings, [0])[0] == [b"n" * 600]
