"""Manifests: which files hold the compacted profiles of an hour or a day.

A **part** is what one compaction made of some level-0 objects of an hour: a few Parquet files, each
of one table (`storage.blocks.tables`). Files never change. What counts is what a manifest names: an
object of JSON per tenant, type and hour, replaced only if nobody else has replaced it meanwhile
(If-Match). So a part appears whole or not at all, and what no manifest names is garbage.

    v1/{tenant}/blocks/{type}/{YYYY-MM-DD}/{HH}-{table}-{content16}.parquet      HH is dd of a day
    v1/{tenant}/manifests/{type}/{YYYY-MM-DDTHH}.json
    v1/{tenant}/manifests/{type}/{YYYY-MM-DD}.json

An hour's data are those of the parts that its manifest names, and every level-0 object whose
content16 is in none of their `objects` tables. No two parts of a manifest have an object in common.

Rollups repeat the parts' samples in longer buckets. One is valid only for exactly the parts that it
names: `HourManifest.has_hourly`, `DayManifest.holds`.

Fields that this version does not know are ignored, and lost when it replaces the manifest: a field
that must not be lost needs a higher schema, which older versions refuse.
"""

import calendar
import contextlib
import functools
import importlib.metadata
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, NamedTuple, TypeVar

import msgspec
import numpy as np

from storage.hashing import Hashes
from storage.objects.keys import (
    NS_PER_S,
    ObjectKey,
    ObjectMissing,
    ObjectStore,
    ObjectTooLarge,
    StoredObject,
    hour_of,
    is_type,
)
from storage.objects.tenant import TenantStore
from storage.profile import ProfileError, SchemaError
from symbolizer.digest import sha256

SCHEMA = 1
HOUR_S, DAY_S = 3600, 86400
WHOLE_DAY = "dd"
"""In the place of the hour in the keys of a day's files."""

_REMEMBERED = 4096
"""Manifests kept in memory: half a year of hours."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 1.0
"""Before a change is tried again that somebody else was faster with, by chance up to twice that."""
_CHANGE_ATTEMPTS = 50

_READ_AHEAD = 8
"""Manifests that are read at a time, unless there are only a few."""
_FEW_MANIFESTS = 2

_Count = Annotated[int, msgspec.Meta(ge=0)]
_HostId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]


class File(msgspec.Struct, frozen=True, omit_defaults=True):
    table: str
    key: str
    bytes: _Count
    rows: _Count
    hosts: tuple[_HostId, _HostId] | None = None
    """The least and the largest host id of its rows, in hex: numbers of JSON are not that exact.
    None, as of older versions' files: it may have rows of any host."""

    def may_have(self, hosts: Hashes) -> bool:
        """Return whether it may have rows of some hosts, by their ids."""
        if self.hosts is None:
            return True
        first, last = (np.uint64(int(each, 16)) for each in self.hosts)
        return bool(((hosts >= first) & (hosts <= last)).any())


class Part(msgspec.Struct, frozen=True):
    """Some objects of an hour. `start_s` and `end_s` enclose their windows by their keys."""

    id: str
    """A hash of what it was made of: of equal objects equal parts are made."""
    objects: _Count
    samples: int
    value: int
    start_s: _Count
    end_s: _Count
    files: tuple[File, ...]
    made_ns: _Count = 0
    """When the youngest of its objects was compacted."""

    def has_starts_in(self, start_s: int, end_s: int) -> bool:
        """Return whether objects of it may start in some seconds."""
        return self.start_s < end_s and start_s < self.end_s

    @property
    def size_bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def files_of(self, table: str) -> tuple[File, ...]:
        return tuple(file for file in self.files if file.table == table)


class Rollup(msgspec.Struct, frozen=True):
    """The samples of some parts in longer buckets, their heads, and what these need."""

    parts: tuple[str, ...]
    files: tuple[File, ...]

    def files_of(self, *tables: str) -> tuple[File, ...]:
        return tuple(file for file in self.files if file.table in tables)


class Unreadable(msgspec.Struct, frozen=True):
    """A level-0 object that is in no part because it cannot be read, and why."""

    key: str
    reason: str
    producer: str = ""
    """What could not read it; another version tries again."""
    tried_ns: _Count = 0


class HourManifest(msgspec.Struct, frozen=True):
    """What is known of an hour, named `2026-11-30T09`."""

    type: str
    hour: str
    unit: str = ""
    schema: int = SCHEMA
    producer: str = ""
    listed_ns: _Count = 0
    """When the level-0 objects of the hour were last listed completely, by a compactor's clock."""
    parts: tuple[Part, ...] = ()
    hourly: Rollup | None = None
    unreadable: tuple[Unreadable, ...] = ()

    @property
    def part_ids(self) -> tuple[str, ...]:
        return tuple(sorted(part.id for part in self.parts))

    @property
    def has_hourly(self) -> bool:
        """Return whether `hourly` is there and made of exactly these parts."""
        return self.hourly is not None and tuple(sorted(self.hourly.parts)) == self.part_ids

    @property
    def files(self) -> tuple[File, ...]:
        """Return all files that it names."""
        own = [file for part in self.parts for file in part.files]
        return (*own, *(self.hourly.files if self.hourly else ()))


class DayManifest(msgspec.Struct, frozen=True):
    """The rollups of a day, named `2026-11-30`, as far as its hours are over, and what they need.

    An hour counts in it only while its manifest names the same parts (`holds`), or once it has
    expired. Until the day is made anew, a changed hour is read from its own files; then
    `samples_1d`, which cannot do without it, is not valid.
    """

    type: str
    day: str
    unit: str = ""
    schema: int = SCHEMA
    producer: str = ""
    hours: dict[str, tuple[str, ...]] = {}
    """The ids of the parts that it is made of, sorted, by hour (`09`)."""
    samples: int = 0
    value: int = 0
    files: tuple[File, ...] = ()

    def files_of(self, *tables: str) -> tuple[File, ...]:
        return tuple(file for file in self.files if file.table in tables)

    def holds(self, hour: HourManifest) -> bool:
        """Return whether it has the samples of exactly the parts of an hour."""
        return self.hours.get(hour.hour[-2:]) == hour.part_ids


Manifest = TypeVar("Manifest", HourManifest, DayManifest)
_HOUR = re.compile(r"\d{4}-\d\d-\d\dT\d\d", re.ASCII)
_DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)


class _Head(msgspec.Struct):
    schema: int = 0


class Listed(NamedTuple):
    """The manifests of some time, by name, and what is wrong with those that cannot be read."""

    hours: dict[str, HourManifest]
    days: dict[str, DayManifest]
    problems: dict[str, ProfileError]
    modified_ns: dict[str, int]
    """When each was last replaced, by the store's clock."""

    def add(self, more: "Listed") -> None:
        """Take in the manifests of some other time."""
        self.hours.update(more.hours)
        self.days.update(more.days)
        self.problems.update(more.problems)
        self.modified_ns.update(more.modified_ns)


class Manifests:
    """The manifests of one tenant and type. Safe to use from several threads.

    Those that were read are remembered with their tags, so a listing shows which to read again.
    """

    def __init__(self, store: ObjectStore, tenant: str, type_: str) -> None:
        self.store = store
        self.tenant = tenant
        self.type = type_
        self._prefix = manifests_prefix(tenant, type_)
        self._known: dict[str, tuple[str, HourManifest | DayManifest]] = {}
        self._lock = threading.Lock()

    def hour(self, hour: str) -> HourManifest:
        """Return an hour's manifest; one without parts if there is none.

        Raises:
            SchemaError: a later version wrote it.
            ProfileError: it is damaged.
        """
        return self._load(hour, HourManifest)[0] or HourManifest(self.type, hour)

    def day(self, day: str) -> DayManifest | None:
        """Return a day's manifest; None if there is none. Raises what `hour` does."""
        return self._load(day, DayManifest)[0]

    def list(self, first: str = "", last: str = "9999", *, with_day: bool = False) -> Listed:
        """Return the manifests from hour or day `first` to `last`, both included.

        A day sorts before its hours; `with_day` returns that of an hour `first` as well. Only
        those that have changed since this object last read them are read, several at a time.
        """
        found = Listed({}, {}, {}, {})
        earliest = first[:10] if with_day else first
        stem = self._prefix + _common_start(earliest, last)
        listed = []
        for stored in self.store.list(stem, start_after=f"{self._prefix}{earliest}"):
            name = stored.key[len(self._prefix) :].removesuffix(".json")
            if name[: len(last)] > last:
                break
            if name >= first or name == earliest:
                listed.append((name, stored))
        self._read_ahead([each for each in listed if is_known(each[0])])
        for name, stored in listed:
            if not is_known(name):
                found.problems[name] = SchemaError(
                    f"{stored.key}: this version does not know what it is"
                )
                continue
            found.modified_ns[name] = stored.modified_ns
            try:
                if _HOUR.fullmatch(name):
                    hour = self._load(name, HourManifest, stored.tag)[0]
                    if hour is not None:
                        found.hours[name] = hour
                else:
                    day = self._load(name, DayManifest, stored.tag)[0]
                    if day is not None:
                        found.days[name] = day
            except ProfileError as error:
                found.problems[name] = error
        return found

    def _read_ahead(self, listed: Sequence[tuple[str, StoredObject]]) -> None:
        """Read manifests that are not known, several at a time: a request mostly waits."""
        unread = [name for name, stored in listed if self._known.get(name, ("",))[0] != stored.tag]
        if len(unread) < _FEW_MANIFESTS:
            return

        def read(name: str) -> None:
            # What is wrong with one is told when it is asked for.
            with contextlib.suppress(ProfileError):
                if _HOUR.fullmatch(name):
                    self._load(name, HourManifest)
                else:
                    self._load(name, DayManifest)

        with ThreadPoolExecutor(min(_READ_AHEAD, len(unread))) as pool:
            for _ in pool.map(read, unread):
                pass

    def change_hour(
        self, hour: str, edit: Callable[[HourManifest], HourManifest | None]
    ) -> HourManifest:
        """Replace an hour's manifest by what `edit` makes of it; return what is stored then.

        `edit` is called again with the new manifest whenever somebody else was first. None, or the
        same manifest, changes nothing. It may find its own change there already: a request whose
        answer was lost is sent again, and that one looks as if somebody else had been first.

        Raises:
            StoreError: the manifest cannot be read or written; whether it was is not known.
            SchemaError: a later version wrote it.
            ProfileError: it is damaged.
        """
        return self._change(hour, HourManifest(self.type, hour), edit)

    def change_day(
        self, day: str, edit: Callable[[DayManifest], DayManifest | None]
    ) -> DayManifest:
        """Replace a day's manifest as `change_hour` does an hour's."""
        return self._change(day, DayManifest(self.type, day), edit)

    def delete(self, name: str) -> None:
        """Remove the manifest of an hour or a day that has expired."""
        self.store.delete(self._key(name))
        with self._lock:
            self._known.pop(name, None)

    def _change(
        self, name: str, empty: Manifest, edit: Callable[[Manifest], Manifest | None]
    ) -> Manifest:
        pause_s = _FIRST_PAUSE_S
        for _ in range(_CHANGE_ATTEMPTS):
            found, tag = self._load(name, type(empty), None)
            before = found or empty
            after = edit(before)
            if after is None or after == before:
                return before
            after = msgspec.structs.replace(after, producer=producer())
            tag = self.store.replace(self._key(name), msgspec.json.encode(after), tag)
            if tag is not None:
                self._remember(name, tag, after)
                return after
            time.sleep(pause_s * (1 + random.random()))  # noqa: S311 - so that two do not meet again
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        raise ConflictError(
            f"cannot change {self._key(name)!r}: others were first {_CHANGE_ATTEMPTS} times"
            " (run fewer compactors)"
        )

    def _load(
        self, name: str, type_: type[Manifest], tag: str | None = None
    ) -> tuple[Manifest | None, str | None]:
        """Return a manifest and its tag; the remembered one if its tag is still the one given."""
        if tag:
            known_tag, known = self._known.get(name, ("", None))
            if known_tag == tag and isinstance(known, type_):
                return known, tag
        key = self._key(name)
        try:
            content, tag = self.store.get_tagged(key)
        except ObjectMissing:
            return None, None
        except ObjectTooLarge as error:
            raise ProfileError(str(error)) from error
        found = decode(key, content, type_)
        if (found.type, getattr(found, "hour", name), getattr(found, "day", name)) != (
            self.type, name, name,
        ):  # fmt: skip
            raise ProfileError(f"{key}: it is damaged: it is the manifest of something else")
        inside = blocks_prefix(self.tenant, self.type, name[:10])
        if not all(file.key.startswith(inside) and _is_block(file.key) for file in found.files):
            raise ProfileError(f"{key}: it is damaged: it names files that are not its own")
        self._remember(name, tag, found)
        return found, tag

    def _remember(self, name: str, tag: str, manifest: HourManifest | DayManifest) -> None:
        with self._lock:
            self._known.pop(name, None)
            while len(self._known) >= _REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[name] = tag, manifest

    def _key(self, name: str) -> str:
        return f"{self._prefix}{name}.json"


class ConflictError(ProfileError):
    """Others changed a manifest again and again before this process could."""


def decode(key: str, content: bytes, type_: type[Manifest]) -> Manifest:
    """Return the manifest that some JSON is.

    Raises:
        SchemaError: a later version wrote it.
        ProfileError: it is none, or a damaged one.
    """
    try:
        schema = msgspec.json.decode(content, type=_Head).schema
        if schema > SCHEMA:
            raise SchemaError(
                f"{key}: a later version of everflame wrote it (schema {schema}, this version knows"
                f" {SCHEMA}): update this one"
            )
        return msgspec.json.decode(content, type=type_)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProfileError(f"{key}: it is damaged: {error}") from error


@functools.cache
def producer() -> str:
    """Return the name and version of this program, as manifests have it."""
    try:
        return f"everflame {importlib.metadata.version('everflame')}"
    except importlib.metadata.PackageNotFoundError:
        return "everflame"


def part_id(made_of: Iterable[str]) -> str:
    """Return the id of a part made of these objects or parts (16 hex digits)."""
    digest: str = sha256("\n".join(sorted(made_of)).encode()).hexdigest()
    return digest[:16]


def manifests_prefix(tenant: str, type_: str) -> str:
    return f"v1/{tenant}/manifests/{type_}/"


def blocks_prefix(tenant: str, type_: str, day: str = "") -> str:
    """Return what the keys of a type's files begin with, those of a day or of all."""
    return f"v1/{tenant}/blocks/{type_}/" + (f"{day}/" if day else "")


def block_key(tenant: str, type_: str, name: str, table: str, content16: str) -> str:
    """Return the key of a file of an hour (`2026-11-30T09`) or a day (`2026-11-30`)."""
    hour = name[11:] or WHOLE_DAY
    return f"{blocks_prefix(tenant, type_, name[:10])}{hour}-{table}-{content16}.parquet"


_BLOCK = re.compile(
    r"v1/[^/]+/blocks/[^/]+/(?P<day>\d{4}-\d\d-\d\d)/(?P<hour>\d\d|dd)-(?P<table>[a-z0-9_]+)"
    r"-(?P<content16>[0-9a-f]{16})\.parquet",
    re.ASCII,
)


def _is_block(key: str) -> bool:
    return _BLOCK.fullmatch(key) is not None


def named_by(key: str) -> str:
    """Return the hour or day whose manifest may name a file; empty if the key is not a file's."""
    match = _BLOCK.fullmatch(key)
    if match is None:
        return ""
    return match["day"] if match["hour"] == WHOLE_DAY else f"{match['day']}T{match['hour']}"


def start_s_of(name: str) -> int:
    """Return when an hour (`2026-11-30T09`) or a day (`2026-11-30`) starts."""
    return calendar.timegm(time.strptime(name, "%Y-%m-%dT%H" if "T" in name else "%Y-%m-%d"))


def end_ns_of(name: str) -> int:
    """Return when an hour or a day ends."""
    return (start_s_of(name) + (HOUR_S if "T" in name else DAY_S)) * NS_PER_S


def content_of(key: str) -> str:
    """Return the content16 in a level-0 object's key; empty if it is not one."""
    parsed = ObjectKey.parse(key)
    return parsed.content16 if parsed else ""


def _common_start(one: str, other: str) -> str:
    length = next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )
    return one[:length]


def is_known(name: str) -> bool:
    """Return whether a manifest's name is an hour's or a day's, as this version writes them."""
    if not _HOUR.fullmatch(name) and not _DAY.fullmatch(name):
        return False
    try:
        return hour_of(start_s_of(name)).startswith(name)
    except ValueError:  # there is no such day
        return False


def manifest_types(store: TenantStore) -> Iterator[str]:
    """Return the types that have manifests, with a short listing each."""
    prefix = f"v1/{store.tenant}/manifests/"
    start_after = ""
    while (stored := next(iter(store.store.list(prefix, start_after)), None)) is not None:
        name = stored.key[len(prefix) :].partition("/")[0]
        if is_type(name):
            yield name
        start_after = f"{prefix}{name}/~"  # after all hours
