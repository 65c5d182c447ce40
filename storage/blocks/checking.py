"""Check compacted files: each is there and undamaged, and together they say what was stored.

For each object of a part, ticks must be stored + idle + filtered + lost, and its rows must add up
to what was stored. Each table of samples must add up to what the manifest says, and all ids in it
must have a meaning; heads of ten minutes must stand for all objects and their ticks, and the tree
of a day's stacks for all of them. Files must have no other hosts and times than the manifest says:
by these readers leave them out. Files are read from the store. Rollups of an hour that do not count
are left out.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from storage.blocks.dictionary import clean
from storage.blocks.frame_tree import FrameTree, read_lists, read_locations, read_tree
from storage.blocks.functions import SERIES
from storage.blocks.manifest import (
    DayManifest,
    File,
    HourManifest,
    Manifests,
    Part,
    end_ns_of,
    manifests_prefix,
    start_s_of,
)
from storage.blocks.parquet import Engine, reading_engine
from storage.blocks.scans import LocalFile, of_table
from storage.blocks.schema import DETAIL, FUNCTIONS, ROLLUPS, STACK_TREE
from storage.blocks.slices import seconds_of
from storage.hashing import Hashes
from storage.objects.copies import Copies, FetchedFiles
from storage.objects.keys import (
    NS_PER_S,
    DamagedObject,
    ObjectKey,
    ObjectMissing,
    StoreError,
    hour_of,
    type_in_key,
)
from storage.objects.tenant import TenantStore
from storage.profile import Accounting, ProfileError, Window, add_counts

_COPIES_BYTES = 1 << 30
"""What is copied of a bucket at a time; an hour's files may be more."""
_ATTEMPTS = 3
_SAMPLES = (DETAIL, *ROLLUPS.values())
_FUNCTIONS = tuple(sorted(SERIES - {FUNCTIONS}))
_OF_OBJECTS = ("times", "presence", "times_10m", "presence_10m")
_BY_HOST = ("times", "times_10m", "functions_10m", "functions_1d")
_REFERENCES = (
    (_SAMPLES, "stack_id", "stacks", "stack_id"),
    (("stacks",), "unnest(frame_ids)", "frames", "frame_id"),
    ((*_SAMPLES, *_OF_OBJECTS, *_FUNCTIONS), "set_id", "label_sets", "set_id"),
    ((DETAIL, *_BY_HOST), "host_id", "label_sets", "set_id"),
    ((DETAIL,), "host_id", "times", "host_id"),
    (("times", "presence"), "object_id", "objects", "object_id"),
    (("times_10m", "presence_10m"), "object_id", "objects_10m", "object_id"),
    (_FUNCTIONS, "function_id", FUNCTIONS, "function_id"),
)
"""Tables, what their rows refer to, and the table and column that must have it."""
_COUNTS = ("ticks", "idle", "filtered", "stored", "uncounted")


class CheckedObject(NamedTuple):
    """A compacted object. `accounted` is idle + filtered + lost + what its rows add up to."""

    key: ObjectKey
    host: str
    ticks: int
    stored: int
    samples: int
    accounted: int


class Mismatch(NamedTuple):
    """An object or file that does not add up: what there should be, and the sum."""

    key: str
    expected: int
    sum: int


class Unreadable(NamedTuple):
    key: str
    reason: str


@dataclass(slots=True)
class Checked:
    """What was found in an hour or a day."""

    type: str
    name: str
    objects: list[CheckedObject] = field(default_factory=list)
    """Those that start in the window that was asked for."""
    accounting: Accounting = field(default_factory=Accounting)
    """Where the ticks of these objects went."""
    contents: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))
    """The content16 of all objects as numbers, sorted."""
    mismatches: list[Mismatch] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    quarantined: list[Unreadable] = field(default_factory=list)
    """Level-0 objects that are in no part because they could not be read."""
    is_missing_files: bool = False
    _named: set[str] = field(default_factory=set)

    def note(self, key: str, reason: str) -> None:
        """Note what cannot be read, unless something is wrong with it already."""
        if key not in self._named:
            self._named.add(key)
            self.unreadable.append(Unreadable(key, reason))

    def compare(self, key: str, expected: tuple[int, int], sums: tuple[int, int]) -> None:
        """Note that samples differ, else that the value does, as `note` does."""
        for should, is_ in zip(expected, sums, strict=True):
            if should != is_ and key not in self._named:
                self._named.add(key)
                self.mismatches.append(Mismatch(key, should, is_))

    def has(self, content16: str) -> bool:
        """Return whether an object is in a part."""
        number = np.uint64(int(content16, 16))
        at = int(np.searchsorted(self.contents, number))
        return at < len(self.contents) and self.contents[at] == number


class _Local(NamedTuple):
    """Files on this machine with their keys, for as long as this exists."""

    keys: dict[LocalFile, str]
    pins: tuple[FetchedFiles, ...]

    @property
    def files(self) -> list[LocalFile]:
        return list(self.keys)


def check_compacted(
    store: TenantStore, type_: str, window: Window, folder: Path
) -> Iterator[Checked]:
    """Check the hours and days that have a part in a window. Copies of files go into `folder`.

    Raises:
        StoreError: the manifests cannot be listed.
    """
    manifests = Manifests(store.store, store.tenant, type_)
    copies = Copies(store.store, folder, _COPIES_BYTES)
    first, last = (hour_of(at // NS_PER_S)[:10] for at in (window.start_ns, window.end_ns - 1))
    listed = manifests.list(first, last)
    for name, error in sorted(listed.problems.items()):
        key = _manifest_key(manifests, name)
        yield Checked(type_, name, unreadable=[Unreadable(key, _without(str(error), key))])
    for name in sorted(listed.hours):
        if _overlaps(name, window):
            yield _check_newest(manifests, copies, name, window)
    for name, day in sorted(listed.days.items()):
        hours = {hour: each for hour, each in listed.hours.items() if hour.startswith(name)}
        if _overlaps(name, window):
            yield _check_day(copies, day, hours)


def _check_newest(manifests: Manifests, copies: Copies, hour: str, window: Window) -> Checked:
    """Check an hour; again if a compactor has replaced its files meanwhile."""
    for _ in range(_ATTEMPTS):
        try:
            manifest = manifests.hour(hour)
            found = _check_hour(manifests, copies, manifest, window)
            if not found.is_missing_files or manifests.hour(hour) == manifest:
                break
        except (ProfileError, StoreError) as error:
            key = _manifest_key(manifests, hour)
            reason = _without(str(error), key)
            found = Checked(manifests.type, hour, unreadable=[Unreadable(key, reason)])
            break
    return found


def _check_hour(
    manifests: Manifests, copies: Copies, manifest: HourManifest, window: Window
) -> Checked:
    found = Checked(manifest.type, manifest.hour)
    start_s, end_s = seconds_of(window)
    for each in manifest.unreadable:
        key = ObjectKey.parse(each.key)
        if key is None or start_s <= key.start_s < end_s:
            found.quarantined.append(Unreadable(each.key, each.reason))
    whole: list[_Local] = []
    contents: list[Hashes] = []
    with reading_engine() as opened:
        for part in manifest.parts:
            local = _fetch(opened, copies, part.files, found)
            objects = _check_objects(opened, manifests, part, local, window=window, found=found)
            contents.append(objects)
            _check_ranges(opened, part, local, found)
            expected = (part.samples, part.value)
            for table in (DETAIL, ROLLUPS[600], "times"):
                _check_sums(opened, local, part.files_of(table), expected, found)
            if len(local.keys) == len(part.files):
                _check_references(opened, local, local, found)
                whole.append(local)
        if manifest.hourly is not None and manifest.has_hourly:
            local = _fetch(opened, copies, manifest.hourly.files, found)
            expected = (
                sum(part.samples for part in manifest.parts),
                sum(part.value for part in manifest.parts),
            )
            for table in (ROLLUPS[3600], "times_10m"):
                _check_sums(opened, local, manifest.hourly.files_of(table), expected, found)
            _check_functions(opened, local, manifest.hourly.files, found)
            if len(whole) == len(manifest.parts):
                _check_references(opened, local, _join([*whole, local]), found)
                _check_heads(opened, local, _join(whole), found)
    every = np.sort(np.concatenate([np.zeros(0, np.uint64), *contents]))
    found.contents = np.unique(every)
    if repeated := len(every) - len(found.contents):
        reason = f"{repeated} of its objects are in two parts, and count twice"
        found.note(_manifest_key(manifests, manifest.hour), reason)
    return found


def _check_day(copies: Copies, day: DayManifest, hours: dict[str, HourManifest]) -> Checked:
    """Check the rollups of a day; its sums are those of its hours, if all are still there."""
    found = Checked(day.type, day.day)
    expected = (day.samples, day.value)
    held = [hours.get(f"{day.day}T{hour}") for hour in day.hours]
    inside = [each for each in held if each is not None and day.holds(each)]
    if len(inside) == len(held):
        parts = [part for each in inside for part in each.parts]
        expected = (sum(part.samples for part in parts), sum(part.value for part in parts))
    with reading_engine() as opened:
        local = _fetch(opened, copies, day.files, found)
        for table in (*_SAMPLES, "times_10m"):
            _check_sums(opened, local, day.files_of(table), expected, found)
        _check_functions(opened, local, day.files, found)
        if len(local.keys) == len(day.files):
            _check_references(opened, local, local, found)
            _check_tree(opened, local, found)
    return found


def _check_tree(opened: Engine, day: _Local, found: Checked) -> None:
    """Check that the tree of a day has the same stacks as its lists. All must be readable."""
    for file in of_table(day.files, STACK_TREE):  # an older version has made days without one
        with _naming(day.keys[file], found):
            locations = read_locations(opened, day.files)
            tree = read_tree(opened, file, locations)
            lists = [
                read_lists(opened, each, locations)[0] for each in of_table(day.files, "stacks")
            ]
            if not tree.equals(FrameTree.joined(locations, lists)):
                found.note(day.keys[file], "its stacks are not those of the table stacks")


def _check_heads(opened: Engine, hourly: _Local, parts: _Local, found: Checked) -> None:
    """Check that heads of ten minutes stand for all objects of an hour. All must be readable."""
    heads, objects = of_table(hourly.files, "objects_10m"), of_table(parts.files, "objects")
    if not heads:
        return  # an older version made the rollup
    with _naming(hourly.keys[heads[0]], found):
        sums = [f"coalesce(sum({name}), 0)" for name in _COUNTS]
        counts = []
        for number, chosen in (("count(*)", objects), ("coalesce(sum(objects), 0)", heads)):
            opened.load("counted", f"SELECT {', '.join([number, *sums])} FROM {{files}}", chosen)
            counts.append(opened.rows("SELECT * FROM counted")[0])
        if counts[0] != counts[1]:
            names = ", ".join(("objects", *_COUNTS))
            reason = f"its {names} are {counts[1]}, those of the objects {counts[0]}"
            found.note(hourly.keys[heads[0]], reason)


def _fetch(opened: Engine, copies: Copies, files: Sequence[File], found: Checked) -> _Local:
    """Fetch files and check them each by itself; those that cannot be read are named."""
    keys: dict[LocalFile, str] = {}
    pins: list[FetchedFiles] = []
    with contextlib.suppress(StoreError):  # then one by one, to name which
        pins.append(copies.fetch([file.key for file in files]))
    for file in files:
        try:
            pins.append(copies.fetch([file.key]))
            local = LocalFile(file.table, pins[-1][0], file.rows)
            if (size := local.path.stat().st_size) != file.bytes:
                raise ProfileError(f"it has {size} bytes, its manifest says {file.bytes}")
            opened.check([local])
        except (ProfileError, StoreError, OSError) as error:
            found.note(file.key, _reason(error, file.key))
            found.is_missing_files |= isinstance(error, StoreError)
        else:
            keys[local] = file.key
    return _Local(keys, tuple(pins))


def _check_objects(
    opened: Engine,
    manifests: Manifests,
    part: Part,
    local: _Local,
    *,
    window: Window,
    found: Checked,
) -> Hashes:
    """Check the objects of a part; return the content16 of each as a number."""
    contents = np.zeros(0, np.uint64)
    objects, times = of_table(local.files, "objects"), of_table(local.files, "times")
    if not objects:
        if not part.files_of("objects"):
            reason = f"its part {part.id} has no table of objects"
            found.note(_manifest_key(manifests, found.name), reason)
        return contents
    with _naming(local.keys[objects[0]], found):
        opened.load("checked", "SELECT * FROM {files}", objects)
        contents = np.array(
            [int(content, 16) for (content,) in opened.rows("SELECT content16 FROM checked")],
            dtype=np.uint64,
        )
        if len(contents) != part.objects:
            reason = f"it has {len(contents)} objects, its manifest says {part.objects}"
            found.note(local.keys[objects[0]], reason)
        if times:
            opened.load(
                "sampled",
                "SELECT object_id, sum(samples) AS samples FROM {files} GROUP BY object_id",
                times,
            )
            _check_ticks(opened, manifests, window, found)
    return contents


def _check_ranges(opened: Engine, part: Part, local: _Local, found: Checked) -> None:
    """Check that a part has no other hosts and no other times than the manifest says."""
    hosts_of = {file.key: file.hosts for file in part.files}
    for file, key in local.keys.items():
        if not file.rows or file.table not in {DETAIL, "objects"}:
            continue
        with _naming(key, found):
            if (named := hosts_of[key]) is not None:
                first, last = _range_of(opened, file, "host_id")
                if first < int(named[0], 16) or last > int(named[1], 16):
                    found.note(key, "it has rows of other hosts than its manifest says")
            first, last = _range_of(opened, file, "ts" if file.table == DETAIL else "start_s")
            if first < part.start_s or last >= part.end_s:
                found.note(key, "it has rows of other times than its manifest says")


def _range_of(opened: Engine, file: LocalFile, column: str) -> tuple[int, int]:
    """Return the least and the largest value of a column of a file that has rows."""
    query = f"SELECT min({column}) AS first, max({column}) AS last FROM {{files}}"
    values = opened.arrays_of(query, [file])
    return int(values["first"][0]), int(values["last"][0])


def _check_ticks(opened: Engine, manifests: Manifests, window: Window, found: Checked) -> None:
    """Check the tables `checked` and `sampled`."""
    start_s, end_s = seconds_of(window)
    is_inside = f"start_s >= {start_s} AND start_s < {end_s}"
    lines = opened.rows(
        "SELECT host_key, start_s, length_s, content16, type, host, ticks, stored,"
        " coalesce(sampled.samples, 0), CAST(idle AS HUGEINT) + filtered"
        " + coalesce(list_sum(map_values(lost)), 0)"
        f" FROM checked LEFT JOIN sampled USING (object_id) WHERE {is_inside}"
        " ORDER BY start_s, host_key, length_s, content16"
    )
    for host_key, at_s, length_s, content, type_, host, ticks, stored, samples, others in lines:
        key = ObjectKey(
            manifests.tenant, host_key, at_s, length_s, content, type=type_in_key(type_)
        )
        accounted = int(others) + int(samples)
        each = CheckedObject(key, clean(host), ticks, stored, int(samples), accounted)
        found.objects.append(each)
        if each.ticks != each.accounted or each.stored != each.samples:
            found.mismatches.append(Mismatch(key.text, each.ticks, each.accounted))
    sums = ", ".join(f"coalesce(sum({name}), 0)" for name in _COUNTS)
    (counts,) = opened.rows(f"SELECT {sums} FROM checked WHERE {is_inside}")
    lost = opened.rows(
        "SELECT pair.key, sum(pair.value) FROM (SELECT unnest(map_entries(lost)) AS pair"
        f" FROM checked WHERE {is_inside}) GROUP BY pair.key ORDER BY pair.key"
    )
    by_cause: dict[str, int] = {}
    for cause, number in lost:
        by_cause = add_counts(by_cause, {clean(cause): int(number)})
    ticks, idle, filtered, stored, uncounted = map(int, counts)
    found.accounting = found.accounting.merge(
        Accounting(
            ticks=ticks,
            idle=idle,
            filtered=filtered,
            stored=stored,
            uncounted=uncounted,
            lost=by_cause,
        )
    )


def _check_sums(
    opened: Engine,
    local: _Local,
    files: Sequence[File],
    expected: tuple[int, int],
    found: Checked,
) -> None:
    """Check that the rows of files of samples add up to so many samples and such a value."""
    sums = _sums_of(opened, local, files, found)
    if sums is not None:
        found.compare(files[0].key, expected, sums)


def _check_functions(opened: Engine, local: _Local, files: Sequence[File], found: Checked) -> None:
    """Check that all series of functions add up to the same samples and value.

    They may be fewer than those of stacks: stacks without frames have no function.
    """
    expected: tuple[int, int] | None = None
    for table in _FUNCTIONS:
        chosen = [file for file in files if file.table == table]
        sums = _sums_of(opened, local, chosen, found)
        if sums is not None:
            found.compare(chosen[0].key, expected or sums, sums)
            expected = expected or sums


def _sums_of(
    opened: Engine, local: _Local, files: Sequence[File], found: Checked
) -> tuple[int, int] | None:
    """Return the sums of samples and of the value of files of a table; None if one is not there."""
    wanted = {file.key for file in files}
    chosen = [file for file, key in local.keys.items() if key in wanted]
    if not files or len(chosen) != len(wanted):
        return None  # expired, or named already
    sums: list[tuple[int, int]] = []
    with _naming(files[0].key, found):
        query = "SELECT sum(samples) AS samples, sum(value) AS value FROM {files}"
        opened.load("summed", query, chosen)
        query = "SELECT coalesce(samples, 0), coalesce(value, 0) FROM summed"
        sums = [(int(samples), int(value)) for samples, value in opened.rows(query)]
    return sums[0] if sums else None


def _check_references(opened: Engine, rows: _Local, known: _Local, found: Checked) -> None:
    """Check that everything that rows refer to is there. All files must be readable."""
    for tables, column, target, target_column in _REFERENCES:
        targets = of_table(known.files, target)
        for table in tables:
            mine = [each for each in rows.files if each.table == table]
            if not mine:
                continue
            # What they number may be in files that are not among the rows.
            numbered = (each for each in known.files if each.table in {"stacks", FUNCTIONS})
            some = of_table([*mine, *numbered], table)
            with _naming(rows.keys[some[0]], found):
                opened.load("wanted", f"SELECT DISTINCT {column} AS id FROM {{files}}", some)
                opened.load("known", f"SELECT {target_column} AS id FROM {{files}}", targets)
                ((count,),) = opened.rows("SELECT count(*) FROM wanted ANTI JOIN known USING (id)")
                if count:
                    found.note(
                        rows.keys[some[0]],
                        f"{count} of what its rows refer to are not in the table {target}",
                    )


@contextlib.contextmanager
def _naming(key: str, found: Checked) -> Iterator[None]:
    """Note what cannot be read as that of a file."""
    try:
        yield
    except (ProfileError, OSError) as error:
        found.note(key, _without(str(error), key))


def _join(several: Iterable[_Local]) -> _Local:
    keys: dict[LocalFile, str] = {}
    pins: list[FetchedFiles] = []
    for local in several:
        keys |= local.keys
        pins += local.pins
    return _Local(keys, tuple(pins))


def _overlaps(name: str, window: Window) -> bool:
    return start_s_of(name) * NS_PER_S < window.end_ns and window.start_ns < end_ns_of(name)


def _manifest_key(manifests: Manifests, name: str) -> str:
    return f"{manifests_prefix(manifests.tenant, manifests.type)}{name}.json"


def _reason(error: Exception, key: str) -> str:
    """Return why a file cannot be read, without its name."""
    if isinstance(error, ObjectMissing):
        return "its manifest names it, and it is not there"
    if isinstance(error, DamagedObject):
        return "it is damaged: its content does not match its name"
    return _without(str(error), key)


def _without(reason: str, key: str) -> str:
    """Return a reason without the name of its file, which stands before it."""
    before, separator, after = reason.partition(f"{key.rpartition('/')[2]}: ")
    if not separator:  # a copy has another name
        before, separator, after = reason.partition(".copy: ")
    return after if separator and " " not in before.removeprefix("cannot read ") else reason
