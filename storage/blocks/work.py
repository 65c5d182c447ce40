"""Work: what is done to the data of an hour, as functions that other processes can run.

They take and return values, read and write the store, and name nothing in a manifest: that is the
compactor's. So they can be run again, in any process or machine, and one that was killed leaves
files that nothing names.
"""

import contextlib
import functools
import itertools
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from storage.blocks.block import Block, BlockBuilder
from storage.blocks.daily import DAILY, HOURLY, DayFiles, write_day
from storage.blocks.functions import write_hour
from storage.blocks.heads import write_heads
from storage.blocks.loading import SUMS
from storage.blocks.manifest import (
    File,
    Part,
    Unreadable,
    block_key,
    part_id,
    producer,
)
from storage.blocks.parquet import reading_engine
from storage.blocks.scans import LocalFile
from storage.blocks.schema import DETAIL, DICTIONARY, HEADS, ROLLUPS
from storage.blocks.tables import merge_parts, roll_up, write_block
from storage.columns import Columns
from storage.formats.limits import OutOfMemoryError
from storage.hashing import Hasher
from storage.objects.copies import Copies
from storage.objects.keys import (
    CPU,
    LARGEST_OBJECT_BYTES,
    ObjectKey,
    ObjectMissing,
    ObjectStore,
    ObjectTooLarge,
    content16,
    type_in_key,
)
from storage.profile import ProfileError
from storage.query.decoding import cpu_limited, decode_object
from storage.query.threads import map_ahead
from storage.query.workers import LoneWorker, Place
from symbolizer.text import readable

_PART_BYTES = 128 << 20
"""Objects whose rows and tables have so many bytes are written as one part."""
_FETCHES = 4
_FETCHED_AT_ONCE = 8
"""Objects that a thread fetches before it wakes the one that decodes: each time takes both 0.5 ms,
as they take turns. A batch is bounded (`storage.blocks.compactor`), so all may be in memory."""
_COPIES_BYTES = 2 << 30
_TYPE_UNITS = {CPU: "nanoseconds"}
"""Types whose unit is fixed. Of other types the first part decides for an hour."""
_REASON_LIMIT = 500
_LAST_S = (1 << 32) - 1
"""Tables have times of 32 bits."""
_ROLLED_UP = frozenset({DETAIL, ROLLUPS[600], *HEADS, *DICTIONARY})
"""Tables of parts of which the rollups of an hour are made."""
_WORK = "work-"
_WORK_LASTS_S = 3 * 3600.0
"""A folder of work that was not touched for so long is a killed process's."""

_hasher_of = functools.lru_cache(maxsize=1)(Hasher)


class NewPart(NamedTuple):
    """A part whose files are stored, and which no manifest names yet."""

    part: Part
    unit: str
    keys: tuple[str, ...]
    """Of its objects."""
    contents: frozenset[str]
    """The content16 of each of them."""


class Folded(NamedTuple):
    parts: list[NewPart]
    unreadable: list[Unreadable]


def fold_objects(place: Place, keys: Sequence[ObjectKey]) -> Folded:
    """Decode level-0 objects and store the parts made of them, which nothing names yet.

    An object that is gone is left out: whoever deleted it knows that it is in a part.

    Raises:
        StoreError: the store cannot be reached, or refuses.
        MemoryError: there is too little. What took it may be any of several objects.
    """
    hasher = _hasher_of(place.key)
    folded = Folded([], [])
    by_unit: dict[str, BlockBuilder] = {}

    def make_parts() -> None:
        while by_unit:
            folded.parts.append(_make_part(place, by_unit.popitem()[1].build()))

    def fetch(some: Sequence[ObjectKey]) -> list[bytes | ObjectTooLarge | None]:
        return [_fetch(place.store, key) for key in some]

    groups = [keys[i : i + _FETCHED_AT_ONCE] for i in range(0, len(keys), _FETCHED_AT_ONCE)]
    with ThreadPoolExecutor(_FETCHES, "fetch") as pool:
        fetched = itertools.chain.from_iterable(map_ahead(pool, fetch, groups, _FETCHES))
        for key, content in zip(keys, fetched, strict=True):
            if content is None:
                continue
            columns = _decode(key, content, hasher)
            if isinstance(columns, str):
                reason = columns[:_REASON_LIMIT]
                folded.unreadable.append(Unreadable(key.text, reason, producer(), time.time_ns()))
                continue
            by_unit.setdefault(columns.unit, BlockBuilder(hasher)).add(key, columns)
            if sum(each.size_bytes for each in by_unit.values()) > _PART_BYTES:
                make_parts()
    make_parts()
    return folded


def _make_part(place: Place, block: Block) -> NewPart:
    keys = [each.key for each in block.objects]
    contents = frozenset(key.content16 for key in keys)
    with _working_folder(place.folder) as folder:
        files = [_put(place, file) for file in write_block(block, folder)]
    part = Part(
        id=part_id(contents),
        objects=len(contents),
        samples=sum(block.times.samples.tolist()),
        value=sum(block.times.values.tolist()),
        start_s=min(key.start_s for key in keys),
        end_s=max(key.start_s + max(1, key.length_s) for key in keys),
        files=tuple(files),
        made_ns=time.time_ns(),
    )
    return NewPart(part, block.unit, tuple(key.text for key in keys), contents)


def fold_alone(worker: LoneWorker, place: Place, keys: Sequence[ObjectKey]) -> Folded:
    """Fold in a process apart; what kills it or takes all its memory is found by halves.

    Raises:
        StoreError: the store cannot be reached, or refuses.
        NoWorkersError: the process cannot be started.
    """
    try:
        return worker.run(fold_objects, place, keys)
    except (BrokenExecutor, MemoryError) as error:
        if len(keys) > 1:
            middle = len(keys) // 2
            one = fold_alone(worker, place, keys[:middle])
            other = fold_alone(worker, place, keys[middle:])
            return Folded(one.parts + other.parts, one.unreadable + other.unreadable)
        reason = "compacting it takes more memory than a worker may have"
        if isinstance(error, BrokenExecutor):
            reason = "two workers were killed while they compacted it: is memory short?"
        return Folded([], [Unreadable(keys[0].text, reason, producer(), time.time_ns())])


def merge_files(place: Place, parts: Sequence[Part], memory_bytes: int) -> list[File]:
    """Merge some parts; return the files of the merged one, which nothing names yet.

    Raises:
        ObjectTooLarge: one would be too large for a store.
        StoreError: a file is missing, or the store cannot be reached.
        ProfileError: a file is damaged, or the sums of the merged part differ.
    """
    files = [file for part in parts for file in part.files]
    with _fetched(place, files) as local, _working_folder(place.folder) as folder:
        merged = merge_parts(local, folder, _hasher_of(place.key), memory_bytes)
        _check_sums(merged, (DETAIL, ROLLUPS[600], "times"), *_sums_of(parts))
        return [_put(place, file) for file in merged]


def roll_up_hour(place: Place, parts: Sequence[Part], memory_bytes: int) -> list[File]:
    """Make the rollups of all parts of an hour; return their files, which nothing names yet.

    Raises: as `merge_files` does.
    """
    files = files_to_roll_up(parts)
    with _fetched(place, files) as local, _working_folder(place.folder) as folder:
        made = roll_up(local, folder, memory_bytes)
        made += write_heads(local, folder, _hasher_of(place.key), memory_bytes)
        if all(part.files_of(DETAIL) for part in parts):
            made += write_hour(local, folder, _hasher_of(place.key), memory_bytes)
        _check_sums(made, (HOURLY, "times_10m"), *_sums_of(parts))
        return [_put(place, file) for file in made]


def files_to_roll_up(parts: Sequence[Part]) -> list[File]:
    """Return the files of which `roll_up_hour` makes the rollups of some parts."""
    return [file for part in parts for file in part.files if file.table in _ROLLED_UP]


def write_day_files(
    place: Place, source: "DaySource", samples: int, value: int, memory_bytes: int
) -> list[File]:
    """Make the files of a day, which nothing names yet; all its samples must have these sums.

    Raises: as `merge_files` does.
    """
    groups = (source.previous, source.rollups, source.dictionary)
    files = [file for group in groups for file in group]
    with _fetched(place, files) as local, _working_folder(place.folder) as folder:
        rest = iter(local)
        previous, rollups, dictionary = ([next(rest) for _ in group] for group in groups)
        day = DayFiles(previous, rollups, dictionary, source.replaced)
        made = write_day(day, folder, _hasher_of(place.key), memory_bytes)
        _check_sums(made, (HOURLY, DAILY, "times_10m"), samples, value)
        return [_put(place, file) for file in made]


class DaySource(NamedTuple):
    """What a day is made of, as `storage.blocks.daily.DayFiles`."""

    previous: Sequence[File]
    rollups: Sequence[File]
    dictionary: Sequence[File]
    replaced: Sequence[int] = ()


def _sums_of(parts: Sequence[Part]) -> tuple[int, int]:
    return sum(part.samples for part in parts), sum(part.value for part in parts)


def _check_sums(
    files: Sequence[LocalFile], tables: Sequence[str], samples: int, value: int
) -> None:
    """Check that each of some tables has all samples, as nothing may be lost.

    Raises:
        ProfileError: one does not.
    """
    for table in tables:
        chosen = [each for each in files if each.table == table]
        if not chosen:
            continue
        with reading_engine() as opened:
            opened.load("summed", f"SELECT {SUMS} FROM {{files}}", chosen)
            ((found, found_value),) = opened.rows(
                "SELECT coalesce(samples, 0), coalesce(value, 0) FROM summed"
            )
        if (found, found_value) != (samples, value):
            raise ProfileError(
                f"cannot compact: {table} would have {found:,} samples of {samples:,} and a value"
                f" of {found_value:,} of {value:,}"
            )


def _fetch(store: ObjectStore, key: ObjectKey) -> bytes | ObjectTooLarge | None:
    try:
        return store.get(key.text)
    except ObjectMissing:
        return None
    except ObjectTooLarge as error:
        return error


def _decode(key: ObjectKey, content: bytes | ObjectTooLarge, hasher: Hasher) -> Columns | str:
    """Return an object's columns, or why it cannot be read.

    Raises:
        MemoryError: there is too little.
    """
    if isinstance(content, ObjectTooLarge):
        return str(content)
    if key.start_s + key.length_s > _LAST_S:
        return "its window ends after the year 2105"
    # A signal measures CPU time, and only the main thread of a process gets those.
    is_main = threading.current_thread() is threading.main_thread()
    try:
        with cpu_limited() if is_main else contextlib.nullcontext():
            columns = decode_object(key, content, hasher)
    except OutOfMemoryError:
        raise MemoryError from None
    except ProfileError as error:
        return readable(str(error).encode())
    if type_in_key(columns.type) != key.type:
        return f"it is of the type {columns.type!r}, and its key says {key.type}"
    unit = _TYPE_UNITS.get(key.type, columns.unit)
    if columns.unit != unit:
        return f"it is measured in {columns.unit!r} instead of {unit}"
    return columns


def _put(place: Place, file: LocalFile) -> File:
    """Store a file under a name that nothing had before.

    Raises:
        ObjectTooLarge: it has more bytes than a reader takes.
    """
    content = _make_unique(file.path.read_bytes())
    key = block_key(place.tenant, place.type, place.name, file.table, content16(content))
    if len(content) > LARGEST_OBJECT_BYTES:
        raise ObjectTooLarge(key)
    place.store.put(key, content)
    return File(file.table, key, len(content), file.rows, _hosts_of(file))


def _hosts_of(file: LocalFile) -> tuple[str, str] | None:
    """Return the range of the hosts of detail, as a manifest has it; None for other tables."""
    if file.table != DETAIL or not file.rows:
        return None
    with reading_engine() as opened:
        query = "SELECT min(host_id) AS first, max(host_id) AS last FROM {files}"
        found = opened.arrays_of(query, [file])
    return f"{int(found['first'][0]):016x}", f"{int(found['last'][0]):016x}"


def _make_unique(parquet: bytes) -> bytes:
    """Return a Parquet file of the same content that is equal to no other.

    A file that was put before may be garbage that somebody is just deleting: a put that finds it
    would name what is gone a moment later. Random bytes stand before the footer, where no offset
    leads: the footer is found from the end, and its offsets count from the start.
    """
    footer_bytes = int.from_bytes(parquet[-8:-4], "little") + 8
    at = len(parquet) - footer_bytes
    return parquet[:at] + secrets.token_bytes(16) + parquet[at:]


@contextlib.contextmanager
def _fetched(place: Place, files: Sequence[File]) -> Iterator[list[LocalFile]]:
    """Return local copies of files, which stay for the length of the block."""
    paths = copies_in(place.store, place.folder).fetch([file.key for file in files])
    yield local_files(files, paths)
    del paths


def local_files(files: Sequence[File], paths: Sequence[Path]) -> list[LocalFile]:
    return [LocalFile(file.table, path, file.rows) for file, path in zip(files, paths, strict=True)]


def copies_in(store: ObjectStore, folder: Path) -> Copies:
    return Copies(store, folder / "copies", _COPIES_BYTES)


@contextlib.contextmanager
def _working_folder(folder: Path) -> Iterator[Path]:
    """Make a folder for the length of the block; `clean` removes what a killed process left."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=_WORK, dir=folder) as name:
        yield Path(name)


def clean(folder: Path) -> None:
    """Remove what killed processes have left in the folder of compactors."""
    oldest_s = time.time() - _WORK_LASTS_S
    for path in folder.glob(f"{_WORK}*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < oldest_s:
                shutil.rmtree(path, ignore_errors=True)
