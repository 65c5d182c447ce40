"""Copies: objects of a bucket and of a directory as files, verified, shared and bounded."""

import concurrent.futures
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from storage.objects.copies import Copies, FetchedFiles
from storage.objects.directory import DirectoryStore
from storage.objects.keys import (
    DamagedObject,
    ObjectMissing,
    ObjectStore,
    ObjectTooLarge,
    StoreRefused,
    content16,
)
from storage.objects.open import open_store
from tests.support.weed import BUCKET, Weed, using_keys

HOUR_S = 3600
LIMIT_BYTES = 1 << 30
MB = 1_000_000


def key_of(content: bytes, table: str = "frames") -> str:
    return f"v1/default/blocks/cpu/2026-11-30/09-{table}-{content16(content)}.parquet"


def put(store: ObjectStore, count: int, size: int = 1000) -> dict[str, bytes]:
    """Put objects of random bytes; return their contents by key."""
    contents = (random.Random(number).randbytes(size) for number in range(count))
    objects = {key_of(content): content for content in contents}
    for key, content in objects.items():
        store.put(key, content)
    return objects


def read(paths: Sequence[Path]) -> list[bytes]:
    return [path.read_bytes() for path in paths]


@pytest.fixture
def bucket(weed: Weed, tmp_path: Path) -> Iterator[ObjectStore]:
    with using_keys():
        yield open_store(f"s3://{BUCKET}/{tmp_path.name}", weed.endpoint)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache/copies"


def copied(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.copy"))


def test_files_come_in_the_order_of_the_keys(store: ObjectStore, folder: Path) -> None:
    """A key may be named twice."""
    objects = put(store, 20)
    keys = [*reversed(objects), next(iter(objects))]
    copies = Copies(store, folder, LIMIT_BYTES)

    assert read(copies.fetch(keys)) == [objects[key] for key in keys]
    assert copies.fetch([]) == []


def test_an_object_is_fetched_once(bucket: ObjectStore, folder: Path) -> None:
    """By whichever thread or process asks first."""
    objects = put(bucket, 24)
    copies = Copies(bucket, folder, LIMIT_BYTES)
    start = threading.Barrier(6)

    def fetch(_: int) -> FetchedFiles:
        start.wait()
        return copies.fetch(list(objects))

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for paths in pool.map(fetch, range(6)):
            assert read(paths) == list(objects.values())
    later = Copies(bucket, folder, LIMIT_BYTES)
    later.fetch(list(objects))

    assert (copies.requests, later.requests) == (24, 0)


def test_copies_belong_to_their_owner_alone(bucket: ObjectStore, folder: Path) -> None:
    before = os.umask(0)
    try:
        Copies(bucket, folder, LIMIT_BYTES).fetch(list(put(bucket, 2)))
    finally:
        os.umask(before)

    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_objects_of_a_directory_are_not_copied(tmp_path: Path, folder: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    objects = put(store, 3)
    copies = Copies(store, folder, LIMIT_BYTES)

    assert copies.fetch(list(objects)) == [store.root / key for key in objects]

    assert copied(folder) == []
    assert copies.requests == 0


def test_copies_of_two_stores_share_a_folder(weed: Weed, tmp_path: Path, folder: Path) -> None:
    """One store's key is not looked up among the copies of another one."""
    with using_keys():
        one, other = (
            open_store(f"s3://{BUCKET}/{tmp_path.name}/{name}", weed.endpoint) for name in "ab"
        )
        objects = put(one, 1)
        Copies(one, folder, LIMIT_BYTES).fetch(list(objects))

        with pytest.raises(ObjectMissing):
            Copies(other, folder, LIMIT_BYTES).fetch(list(objects))


def test_a_missing_object_is_named(store: ObjectStore, folder: Path) -> None:
    objects = put(store, 30)
    missing = key_of(b"never stored")

    with pytest.raises(ObjectMissing, match=missing):
        Copies(store, folder, LIMIT_BYTES).fetch([*objects, missing])


@pytest.mark.parametrize("size", [0, 999, 1000, 1001])
def test_a_damaged_object_is_named(store: ObjectStore, folder: Path, size: int) -> None:
    """Cut short, replaced by another of its size, or longer: no file of it is left."""
    objects = put(store, 1)
    damaged = key_of(b"as it was")
    store.put(damaged, bytes(size))

    for _ in range(2):
        with pytest.raises(DamagedObject, match=damaged):
            Copies(store, folder, LIMIT_BYTES).fetch([damaged, *objects])

    assert len(copied(folder)) <= 1
    assert list(folder.glob(".*.part")) == []


@pytest.mark.parametrize("key", ["v1/default/key", "v1/a-0123456789abcde.parquet", "v1/a-0/b"])
def test_a_key_that_proves_nothing_is_refused(store: ObjectStore, folder: Path, key: str) -> None:
    with pytest.raises(ValueError, match="does not prove"):
        Copies(store, folder, LIMIT_BYTES).fetch([key])


def damage(path: Path, kind: str) -> None:
    if kind == "gone":
        path.unlink()
    elif kind == "empty":
        os.truncate(path, 0)
    elif kind == "shorter":
        os.truncate(path, 999)
    else:
        with path.open("rb+") as file:
            file.seek(500)
            byte = file.read(1)
            file.seek(500)
            file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("kind", ["gone", "empty", "shorter", "one bit"])
@pytest.mark.parametrize("is_same_process", [True, False])
def test_a_damaged_copy_is_fetched_again(
    bucket: ObjectStore, folder: Path, kind: str, is_same_process: bool
) -> None:
    """Also when it is damaged right after it was made, which the kernel's clock does not show."""
    objects = put(bucket, 3)
    copies = Copies(bucket, folder, LIMIT_BYTES)
    for path in copies.fetch(list(objects))[:2]:
        damage(path, kind)
    if not is_same_process:
        copies = Copies(bucket, folder, LIMIT_BYTES)
    before = copies.requests

    assert read(copies.fetch(list(objects))) == list(objects.values())

    assert copies.requests - before == 2


def test_an_object_that_is_damaged_in_its_directory_later_is_named(
    tmp_path: Path, folder: Path
) -> None:
    store = DirectoryStore(tmp_path / "store")
    (key,) = put(store, 1)
    copies = Copies(store, folder, LIMIT_BYTES)
    os.utime(tmp_path / "store" / key, (0, 0))
    copies.fetch([key])

    damage(store.root / key, "one bit")

    for each in (copies, Copies(store, folder, LIMIT_BYTES)):
        with pytest.raises(DamagedObject, match=key):
            each.fetch([key])


def test_a_file_is_hashed_once_for_all_processes(store: ObjectStore, folder: Path) -> None:
    """Nobody looks again into a file whose inode, size and time are the same: this one lies."""
    (key,) = put(store, 1)
    (path,) = Copies(store, folder, LIMIT_BYTES).fetch([key])
    status = path.stat()
    damage(path, "one bit")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    assert Copies(store, folder, LIMIT_BYTES).fetch([key]) == [path]

    (folder / ".verified").write_bytes(b"a write that was cut short")
    if isinstance(store, DirectoryStore):
        with pytest.raises(DamagedObject):
            Copies(store, folder, LIMIT_BYTES).fetch([key])
    else:
        assert content16(Copies(store, folder, LIMIT_BYTES).fetch([key])[0].read_bytes()) in key


def test_notes_of_what_was_verified_are_bounded(tmp_path: Path, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("storage.objects.copies._NOTES_LIMIT_BYTES", 16 * 16)
    store = DirectoryStore(tmp_path / "store")
    objects = put(store, 100)
    copies = Copies(store, folder, LIMIT_BYTES)

    for key in objects:
        copies.fetch([key])
        with contextlib.suppress(FileNotFoundError):
            assert (folder / ".verified").stat().st_size <= 16 * 16

    assert len(copies._verified._notes) <= 17


def age(paths: Sequence[Path], hours: int) -> None:
    """Let files be unused for so long."""
    for path in paths:
        status = path.stat()
        used_ns = status.st_atime_ns - hours * HOUR_S * 1_000_000_000
        os.utime(path, ns=(used_ns, status.st_mtime_ns))


def test_the_longest_unused_copies_are_evicted(bucket: ObjectStore, folder: Path) -> None:
    """Whose content was written when does not matter."""
    keys = list(put(bucket, 14, MB // 10))
    copies = Copies(bucket, folder, MB)
    for number, key in enumerate(keys[:9]):
        age(copies.fetch([key]), 20 - number)
    copies.fetch(keys[:2])  # used again

    for key in keys[9:]:
        copies.fetch([key])

    left = copied(folder)
    assert sum(path.stat().st_size for path in left) <= MB * 1.2
    names = {path.name[:16] for path in left}
    assert {key[-24:-8] for key in [*keys[:2], *keys[9:]]} <= names
    assert not {key[-24:-8] for key in keys[2:4]} & names
    assert copies.requests == len(keys)


def test_copies_in_use_are_not_evicted(bucket: ObjectStore, folder: Path) -> None:
    """Even if they are more than the limit; they are evicted once nobody has the list."""
    objects = put(bucket, 17, MB // 10)
    held = list(objects)[:14]
    copies = Copies(bucket, folder, MB)

    paths = copies.fetch(held)
    age(paths, 5)
    copies.fetch(list(objects)[14:15])

    assert read(paths) == [objects[key] for key in held]
    del paths
    copies.fetch(list(objects)[15:])
    assert sum(path.stat().st_size for path in copied(folder)) <= MB


FETCH = """
import json, sys
from pathlib import Path
from storage.objects.copies import Copies
from storage.objects.keys import content16, content16_in
from storage.objects.open import open_store
url, endpoint, folder, limit, keys = json.loads(sys.argv[1])
copies = Copies(open_store(url, endpoint), Path(folder), limit)
print("ready", flush=True)
sys.stdin.readline()
for turn in range(3):
    paths = copies.fetch(keys)
    assert [content16(path.read_bytes()) for path in paths] == [*map(content16_in, keys)]
print("fetched", flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def fetching(
    store: ObjectStore, folder: Path, limit_bytes: int, keys: Sequence[str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run another process that fetches at the first line it reads and keeps it to the next."""
    url, endpoint = str(store).split(" at ")
    given = json.dumps([url, endpoint, str(folder), limit_bytes, list(keys)])
    command = [sys.executable, "-c", FETCH, given]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        yield child


def tell(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    child.stdin.write(b"go\n")
    child.stdin.flush()


def heard(child: subprocess.Popen[bytes]) -> bytes:
    assert child.stdout is not None
    return child.stdout.readline()


def test_processes_share_a_folder_that_is_too_small(bucket: ObjectStore, folder: Path) -> None:
    """Each finds its own files complete though the others evict."""
    keys = list(put(bucket, 12, MB // 10))
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(fetching(bucket, folder, MB // 2, keys[first : first + 8]))
            for first in (0, 2, 4)
        ]
        for child in children:
            tell(child)
        assert [heard(child) for child in children] == [b"fetched\n"] * 3
        for child in children:
            tell(child)

    assert [child.returncode for child in children] == [0] * 3


def test_what_a_process_uses_stays_until_it_is_killed(bucket: ObjectStore, folder: Path) -> None:
    keys = list(put(bucket, 16, MB // 10))
    copies = Copies(bucket, folder, MB)
    with fetching(bucket, folder, MB, keys[:4]) as child:
        tell(child)
        assert heard(child) == b"fetched\n"
        used = copied(folder)
        age(used, 5)

        for key in keys[4:13]:
            copies.fetch([key])

        assert set(used) <= set(copied(folder))
        child.send_signal(signal.SIGKILL)
        child.wait()
    for key in keys[13:]:
        copies.fetch([key])

    assert not set(used) <= set(copied(folder))


def test_a_large_object_takes_several_requests(bucket: ObjectStore, folder: Path) -> None:
    """Its parts end where it ends; larger than the limit, it is refused."""
    sizes = [8 << 20, (8 << 20) + 1]
    for size in sizes:
        (key,) = put(bucket, 1, size)
        copies = Copies(bucket, folder, LIMIT_BYTES)

        (path,) = copies.fetch([key])

        assert path.stat().st_size == size
        assert copies.requests == 2
        with pytest.raises(ObjectTooLarge, match=key):
            Copies(bucket, folder / "small", 4 << 20).fetch([key])
        assert list((folder / "small").glob("*.copy")) == []


def test_a_folder_that_cannot_be_written_is_refused(bucket: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StoreRefused, match=r"cannot keep copies .*EVERFLAME_CACHE"):
        Copies(bucket, tmp_path / "file/cache", MB).fetch(list(put(bucket, 1)))


def test_a_directory_is_read_without_a_folder_for_notes(tmp_path: Path) -> None:
    """Noting what was verified is a saving and never an error."""
    (tmp_path / "file").touch()
    store = DirectoryStore(tmp_path / "store")
    objects = put(store, 2)

    paths = Copies(store, tmp_path / "file/cache", MB).fetch(list(objects))

    assert read(paths) == list(objects.values())
