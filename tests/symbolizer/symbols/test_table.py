"""The directory of symbol tables: it is bounded, and damaged tables are not used."""

import os

import numpy as np
import pytest

from symbolizer.location import Miss, Segment
from symbolizer.symbols.candidates import AT_PLT, Functions
from symbolizer.symbols.elf import UnreadableElf
from symbolizer.symbols.table import SymbolCache

KEY = "ab" * 20
SEGMENTS = (Segment(0x401000, 0x1000, 0x5000),)
STRINGS = b"\0main\0helper\0puts\0"


def functions(base=0x1000):
    return Functions(
        base,
        np.array([0, 16, 64], dtype=np.uint32),
        np.array([16, 32, 80], dtype=np.uint32),
        np.array([1, 6, 13 | AT_PLT], dtype=np.uint32),
    )


@pytest.fixture
def cache(tmp_path):
    return SymbolCache(tmp_path / "cache", 1 << 20)


def store(cache, key=KEY, strings=STRINGS):
    cache.store(key, functions(), SEGMENTS, [strings]).close()


def path_of(tmp_path, key=KEY):
    return tmp_path / "cache" / f"{key}.symbols"


def test_stored_table_is_loaded_unchanged(cache):
    store(cache)

    table = cache.load(KEY)

    offsets = np.array([0, 0x1000, 0x100F, 0x1010, 0x1020, 0x1040, 1 << 40], dtype=np.uint64)
    assert table.find(offsets).tolist() == [-1, 0, 0, 1, -1, 2, -1]
    assert [table.name(number) for number in range(3)] == [b"main", b"helper", b"puts@plt"]
    assert table.segments == SEGMENTS


def test_every_damaged_byte_is_detected(cache, tmp_path):
    """A file with a wrong byte anywhere counts as missing, and is removed."""
    store(cache)
    whole = path_of(tmp_path).read_bytes()

    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x41
        path_of(tmp_path).write_bytes(damaged)
        assert cache.load(KEY) is None, place
        assert not path_of(tmp_path).exists()


def test_every_truncated_file_is_detected(cache, tmp_path):
    store(cache)
    whole = path_of(tmp_path).read_bytes()

    for length in [*range(len(whole)), len(whole) + 1]:
        path_of(tmp_path).write_bytes((whole + b"x")[:length])
        assert cache.load(KEY) is None


def test_a_table_extends_another_one_that_names_less_of_the_same(cache):
    """One that names something else at an address does not."""
    named = cache.store(KEY, functions(), SEGMENTS, [STRINGS])
    fewer = Functions(
        0x1010,
        np.array([0, 48], dtype=np.uint32),
        np.array([16, 64], dtype=np.uint32),
        np.array([6, 13 | AT_PLT], dtype=np.uint32),
    )
    less = cache.store("cd" * 20, fewer, SEGMENTS, [STRINGS])
    other = cache.store("ef" * 20, fewer, SEGMENTS, [STRINGS.replace(b"helper", b"attack")])

    assert (named.named, named.named_code) == (3, 2)
    assert (less.named, less.named_code) == (2, 1)
    assert named.extends(less)
    assert not less.extends(named)
    assert not named.extends(other)
    assert named.ranges(np.array([1, 2])).tolist() == [[0x1010, 0x1020], [0x1040, 0x1050]]


def test_file_of_another_content_is_detected(cache, tmp_path):
    """The key is in the file, not only in its name."""
    store(cache)
    other = "cd" * 20
    path_of(tmp_path).rename(path_of(tmp_path, other))

    assert cache.load(other) is None


def test_least_recently_used_table_is_removed(tmp_path):
    """The directory stays within its limit; a table that was used recently stays."""
    cache = SymbolCache(tmp_path / "cache", 10_000)
    keys = [f"{number:040x}" for number in range(30)]
    for number, key in enumerate(keys):
        store(cache, key, STRINGS + bytes(1000))
        os.utime(path_of(tmp_path, key), ns=(number, number))
        if number:
            cache.load(keys[0]).close()

    left = list((tmp_path / "cache").glob("*"))
    assert sum(path.stat().st_size for path in left) <= 10_000
    assert path_of(tmp_path, keys[0]) in left
    assert path_of(tmp_path, keys[-1]) in left


def test_limit_holds_for_existing_files(tmp_path):
    """A directory that was filled under a higher limit shrinks with the next table."""
    store(SymbolCache(tmp_path / "cache", 1 << 20), strings=STRINGS + bytes(5000))
    os.utime(path_of(tmp_path), ns=(1, 1))
    other = "cd" * 20

    store(SymbolCache(tmp_path / "cache", 1000), other)

    assert list((tmp_path / "cache").glob("*")) == [path_of(tmp_path, other)]


def test_failed_write_leaves_nothing(cache, tmp_path):
    """If the strings cannot be read to their end, no partial table is left."""

    def broken():
        yield STRINGS
        raise UnreadableElf(Miss.DAMAGED)

    with pytest.raises(UnreadableElf):
        cache.store(KEY, functions(), SEGMENTS, broken())

    assert list((tmp_path / "cache").glob("*")) == []


@pytest.mark.parametrize(
    "key", ["../../etc/passwd", "", "[exited]", "a/b", "AB", "hash-ab", "ab" * 200]
)
def test_key_that_is_no_hash_is_not_a_file_name(cache, tmp_path, key):
    """It comes from outside."""
    table = cache.store(key, functions(), SEGMENTS, [STRINGS])

    assert table.name(0) == b"main"
    assert cache.load(key) is None
    assert list((tmp_path / "cache").glob("*")) == []


def test_cache_is_private(cache, tmp_path):
    store(cache)

    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert path_of(tmp_path).stat().st_mode & 0o777 == 0o600
