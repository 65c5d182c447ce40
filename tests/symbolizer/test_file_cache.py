"""Files within a byte budget, shared by symbol tables, unwind tables and decoded objects."""

import contextlib
import os
import time
from pathlib import Path

import pytest

from symbolizer.file_cache import FileCache

HOUR_S = 3600


def put(cache: FileCache, name: str, size: int, age_s: float = 0) -> None:
    with cache.create(name) as file:
        file.write(bytes(size))
    used_s = time.time() - age_s
    os.utime(cache.folder / name, (used_s, used_s))


def names(cache: FileCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()}


def test_what_was_created_is_read_back(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 1000)
    with cache.create("one") as file:
        file.write(b"content")

    found = cache.open("one")

    assert found is not None
    with found:
        assert found.read() == b"content"
    assert cache.open("two") is None


def test_a_block_that_raises_leaves_nothing(tmp_path: Path) -> None:
    """Neither half a file nor its partial one."""
    cache = FileCache(tmp_path, 1000)

    with contextlib.suppress(ZeroDivisionError), cache.create("one") as file:
        file.write(b"half")
        raise ZeroDivisionError

    assert names(cache) == set()


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 1000)
    put(cache, "one", 1)

    assert (cache.folder / "one").stat().st_mode & 0o777 == 0o600
    assert cache.folder.stat().st_mode & 0o777 == 0o700


def test_the_longest_unused_are_evicted_to_nine_tenths_of_the_budget(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 1000)
    for number in range(9):
        put(cache, f"{number}", 100, age_s=HOUR_S - number)
    cache.touch("0")

    put(cache, "new", 200)

    assert names(cache) == {"0", "new", *(str(number) for number in range(3, 9))}
    assert cache.size_bytes() == 900


def test_reading_a_file_keeps_it(tmp_path: Path) -> None:
    """The time of the last use decides, not that of writing."""
    cache = FileCache(tmp_path, 1000)
    put(cache, "read", 400, age_s=2 * HOUR_S)
    put(cache, "unread", 400, age_s=HOUR_S)
    found = cache.open("read")
    assert found is not None
    found.close()

    put(cache, "new", 400)

    assert names(cache) == {"read", "new"}


def test_the_budget_counts_only_what_the_pattern_matches(tmp_path: Path) -> None:
    """Other files may lie in the folder, and stay."""
    cache = FileCache(tmp_path, 1000, files="*.table")
    (tmp_path / "foreign").write_bytes(bytes(5000))

    put(cache, "a.table", 600, age_s=HOUR_S)
    put(cache, "b.table", 600)

    assert names(cache) == {"foreign", "b.table"}


def test_partial_files_of_a_crash_go_after_an_hour(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 1000)
    for name, age_s in ((".old.part", 2 * HOUR_S), (".young.part", 60)):
        (tmp_path / name).write_bytes(bytes(10))
        used_s = time.time() - age_s
        os.utime(tmp_path / name, (used_s, used_s))

    put(cache, "one", 1)

    assert names(cache) == {".young.part", "one"}


def test_a_folder_that_cannot_be_written_is_an_error_of_the_write_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = FileCache(tmp_path / "file" / "cache", 1000)

    with pytest.raises(OSError, match="Not a directory"), cache.create("one"):
        pass

    assert cache.open("one") is None
    assert cache.touch("one") == 0
    assert cache.size_bytes() == 0


def test_a_pinned_file_is_not_evicted(tmp_path: Path) -> None:
    """By whichever cache object or process; another one goes in its place."""
    cache = FileCache(tmp_path, 1000, files="[a-z]*")
    put(cache, "old", 400, age_s=2 * HOUR_S)
    put(cache, "young", 400, age_s=HOUR_S)
    pins = [cache.pin(["old", "not there"]), cache.pin(["old"])]

    put(FileCache(tmp_path, 1000, files="[a-z]*"), "new", 400, age_s=60)
    assert names(cache) == {".pins", "old", "new"}

    del pins[0]
    put(cache, "newer", 400, age_s=30)
    assert "old" in names(cache)
    pins.clear()
    put(cache, "newest", 400)
    assert "old" not in names(cache)
