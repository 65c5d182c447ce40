"""Announcements: deployments that a pipeline announced, small JSON objects beside the profiles.

    v1/{tenant}/deployments/{month}/{service16}-{at_ms}-{content16}.json
    {"schema":1,"service":"api","version":"1.6","at_ns":1780000000000000000}

`month` is that of the time (UTC, `2026-01`), `service16` the start of the SHA-256 of the service,
`at_ms` has 13 digits, so that listing is enough to find those of a window. Everybody with write
access to the store can write anything there: an object whose key or content is not that of an
announcement is skipped and reported.
"""

import hashlib
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import orjson

from profiler.processes.facts import MAX_VERSION
from storage.objects.keys import StoredObject, StoreError, content16
from storage.objects.tenant import TenantStore
from storage.profile import Window
from storage.query.coverage import Skipped
from storage.query.threads import map_ahead
from symbolizer.text import readable

_NS_PER_MS = 1_000_000
_LATEST_NS = 2**63 - 1
_SIZE_LIMIT_BYTES = 16 << 10
"""The longest service and version, escaped, are smaller."""
_LIMIT = 10_000
"""How many announcements of a window are read: the last ones in the order of keys, which begin with
the month. Others are skipped, and that is reported."""
_SKIPPED_LIMIT = 1_000
_FETCHES = 4
_KEY = re.compile(
    r"\d{4}-\d\d/(?P<service16>[0-9a-f]{16})-(?P<at_ms>\d{13})-(?P<content16>[0-9a-f]{16})\.json",
    re.ASCII,
)


class Announcement(NamedTuple):
    service: str
    version: str
    at_ns: int


class Announced(NamedTuple):
    """The announcements of a window, earliest first, and the objects that were skipped."""

    announcements: list[Announcement]
    skipped: list[Skipped]


class _NoAnnouncementError(ValueError):
    """An object that is not an announcement. The message says why."""


def announce(store: TenantStore, service: str, version: str, at_ns: int) -> Announcement:
    """Write an announcement and return it as it is read back. Repeating it is harmless.

    Names are made safe and cut like the labels of samples.

    Raises:
        ValueError: a name is empty, or the time is out of range.
    """
    announcement = _checked(service, version, at_ns)
    content = orjson.dumps({"schema": 1, **announcement._asdict()})
    store.store.put(_prefix(store) + _name(announcement, content), content)
    return announcement


def list_announcements(
    store: TenantStore,
    window: Window,
    check: Callable[[], None] = lambda: None,
    service: str = "",
) -> Announced:
    """Return the announcements for times inside a window. An exception of `check` ends it.

    With `service` only its own are read: the keys say whose they are.

    Raises:
        StoreError: the store cannot be listed. An object that cannot be read is skipped.
    """
    skips = _Skips()
    latest = _latest(store, window, skips, check, _service16(service) if service else "")

    def read(stored: StoredObject) -> Announcement | Skipped:
        try:
            return _read(store, stored)
        except (_NoAnnouncementError, StoreError) as error:
            return Skipped(stored.key, str(error))

    found: list[Announcement] = []
    with ThreadPoolExecutor(_FETCHES, "announcements") as pool:
        for each in map_ahead(pool, read, latest):
            check()
            if isinstance(each, Skipped):
                skips.add(*each)
            elif window.start_ns <= each.at_ns < window.end_ns:
                found.append(each)
    return Announced(sorted(found, key=lambda each: (each.at_ns, each)), skips.all())


class _Skips:
    """The skipped objects: the first ones by name, the others as a number."""

    def __init__(self) -> None:
        self._named: list[Skipped] = []
        self._others = 0

    def add(self, key: str, reason: str) -> None:
        if len(self._named) < _SKIPPED_LIMIT:
            self._named.append(Skipped(readable(key.encode()), reason))
        else:
            self._others += 1

    def all(self) -> list[Skipped]:
        if not self._others:
            return self._named
        return [*self._named, Skipped("others", f"{self._others:,} more are not announcements")]


def _latest(
    store: TenantStore,
    window: Window,
    skips: _Skips,
    check: Callable[[], None],
    service16: str,
) -> Iterable[StoredObject]:
    """Return the objects whose keys have a time in the window, and this service unless empty."""
    latest: deque[StoredObject] = deque(maxlen=_LIMIT)
    listed = 0
    first_ms, last_ms = (at_ns // _NS_PER_MS for at_ns in (window.start_ns, window.end_ns))
    for stored in _list(store, window):
        check()
        match = _KEY.fullmatch(stored.key.removeprefix(_prefix(store)))
        if match is None:
            skips.add(stored.key, "its key is not that of an announcement")
        elif service16 and match["service16"] != service16:
            continue
        elif first_ms <= int(match["at_ms"]) <= last_ms:
            latest.append(stored)
            listed += 1
    if listed > _LIMIT:
        reason = f"only the last {_LIMIT:,} of {listed:,} announcements are read"
        skips.add(_prefix(store), reason)
    return latest


def _list(store: TenantStore, window: Window) -> Iterator[StoredObject]:
    prefix = _prefix(store)
    first, last = _month(window.start_ns), _month(window.end_ns - 1)
    # SeaweedFS skips a folder if `start_after` is its name; with the slash, it lists it.
    for stored in store.store.list(prefix, start_after=f"{prefix}{first}/"):
        if stored.key[len(prefix) : len(prefix) + len(last)] > last:
            return
        yield stored


def _read(store: TenantStore, stored: StoredObject) -> Announcement:
    if stored.size_bytes > _SIZE_LIMIT_BYTES:
        raise _NoAnnouncementError(f"it is longer than {_SIZE_LIMIT_BYTES >> 10} KiB")
    content = store.store.get_range(stored.key, 0, _SIZE_LIMIT_BYTES)
    if f"-{content16(content)}." not in stored.key:
        raise _NoAnnouncementError(
            "its content is not what its key says: it is damaged or cut short"
        )
    try:
        fields = orjson.loads(content)
    except ValueError as error:
        raise _NoAnnouncementError("it is not JSON") from error
    if not isinstance(fields, dict):
        raise _NoAnnouncementError("it is not a JSON object")
    if fields.get("schema") != 1:
        raise _NoAnnouncementError("a later version of this program wrote it")
    values = [fields.get(name) for name in Announcement._fields]
    match values:
        case [str(service), str(version), int(at_ns)] if not isinstance(at_ns, bool):
            try:
                announcement = _checked(service, version, at_ns)
            except ValueError as error:
                raise _NoAnnouncementError(str(error)) from error
        case _:
            raise _NoAnnouncementError("it has no service, version and at_ns")
    if announcement != (service, version, at_ns):
        raise _NoAnnouncementError("a name in it is too long, or not safe to show")
    if stored.key != _prefix(store) + _name(announcement, content):
        raise _NoAnnouncementError("its key is that of another service or time")
    return announcement


def _checked(service: str, version: str, at_ns: int) -> Announcement:
    names = [
        readable(name.strip().encode("utf-8", "surrogateescape")) for name in (service, version)
    ]
    for what, name in zip(("service", "version"), names, strict=True):
        if not name:
            raise ValueError(f"the name of the {what} is empty")
    if not 0 <= at_ns <= _LATEST_NS:
        raise ValueError(f"{at_ns} is not a time between 1970 and 2262")
    return Announcement(names[0], names[1][:MAX_VERSION].strip(), at_ns)


def _prefix(store: TenantStore) -> str:
    return f"v1/{store.tenant}/deployments/"


def _name(announcement: Announcement, content: bytes) -> str:
    service16, at_ms = _service16(announcement.service), announcement.at_ns // _NS_PER_MS
    return f"{_month(announcement.at_ns)}/{service16}-{at_ms:013d}-{content16(content)}.json"


def _service16(service: str) -> str:
    return hashlib.sha256(service.encode()).hexdigest()[:16]


def _month(at_ns: int) -> str:
    return time.strftime("%Y-%m", time.gmtime(min(max(at_ns, 0), _LATEST_NS) // 10**9))
