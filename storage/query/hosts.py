"""Hosts: which hosts stored a profile lately, and their names, read from one object of each.

The key of an object names its host by an id, so hosts are found by listing. Only the newest object
of each host is read, and of that one only the accounting, which has the name.

A large fleet takes longer than a reader waits. A search therefore ends after a given time with what
it has, says what is left, and the next one continues from there.
"""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

from storage.formats.pprof_head import read_head
from storage.objects.keys import CPU, ObjectKey, ObjectStore, StoreError, content16
from storage.objects.tenant import TenantStore
from storage.profile import ProfileError
from storage.query.listing import HOUR_NS

_FETCHES = 8


@dataclass(frozen=True, slots=True)
class FoundHosts:
    """The hosts that were found in time."""

    names: list[str]
    """Sorted. A host whose name was not read, or cannot be, is there by its id."""
    hosts: tuple[int, int]
    """Of how many hosts the name was looked up, and how many were found."""
    hours: tuple[int, int]
    """How many hours of the store were listed, and how many there are to list."""

    @property
    def is_complete(self) -> bool:
        return self.hosts[0] == self.hosts[1] and self.hours[0] == self.hours[1]


class HostSearch:
    """Finds the hosts that have an object from a time on. For one thread at a time."""

    def __init__(self, store: TenantStore, type_: str = CPU) -> None:
        self._store = store
        self._type = type_
        self._newest: dict[str, ObjectKey] = {}
        """Of each host, by id."""
        self._names: dict[str, tuple[int, tuple[str, ...]]] = {}
        """By id: the names, and the hour of the object that they are from."""
        self._unreadable: dict[str, ObjectKey] = {}
        """By id: the object that was read in vain, which may cost a second."""
        self._sweep: _Sweep | None = None

    def find(self, start_ns: int, end_ns: int, within_s: float) -> FoundHosts:
        """Return the hosts with an object that starts at `start_ns` or later.

        The hours up to the one that ends at or after `end_ns` are listed, the latest first.

        Raises:
            StoreError: the store cannot be listed.
        """
        deadline_s = time.monotonic() + within_s
        hours = self._list(start_ns, end_ns, deadline_s)
        named = self._read_names(deadline_s)
        names = {
            name
            for host_id in self._newest
            for name in self._names.get(host_id, (0, (host_id,)))[1]
        }
        return FoundHosts(sorted(names), (named, len(self._newest)), hours)

    def _list(self, start_ns: int, end_ns: int, deadline_s: float) -> tuple[int, int]:
        """Note the newest object of each host; return how many hours of how many were listed."""
        hours = tuple(range((end_ns - 1) // HOUR_NS, start_ns // HOUR_NS - 1, -1))
        sweep = self._sweep
        if sweep is None or sweep.hours != hours:
            sweep = _Sweep(self._store, self._type, hours)
        self._sweep = None  # if the store fails, the next search begins anew
        is_late = False
        for key in sweep.keys:
            known = sweep.newest.get(key.host_id)
            if key.start_ns >= start_ns and (known is None or known.end_ns <= key.end_ns):
                sweep.newest[key.host_id] = key
            is_late = time.monotonic() >= deadline_s
            if is_late:
                self._sweep = sweep
                break
        # Those of earlier searches stay until all hours are listed.
        self._newest = {**(self._newest if is_late else {}), **sweep.newest}
        return sweep.listed, len(hours)

    def _read_names(self, deadline_s: float) -> int:
        """Read the names that are not known for the hour; return of how many hosts they are."""
        for known in (self._names, self._unreadable):
            for host_id in known.keys() - self._newest.keys():
                del known[host_id]
        unknown = [
            key
            for host_id, key in self._newest.items()
            if self._names.get(host_id, (-1,))[0] < key.start_ns // HOUR_NS
            and self._unreadable.get(host_id) != key
        ]
        if not unknown:
            return len(self._newest)
        pool = ThreadPoolExecutor(_FETCHES, "hosts")
        try:
            reading = [pool.submit(self._read, key) for key in unknown]
            _, late = wait(reading, max(0.0, deadline_s - time.monotonic()))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return len(self._newest) - len(late)

    def _read(self, key: ObjectKey) -> None:
        """Note the names in an object; in a thread, so that a late one is known the next time."""
        # A damaged object, or one that was deleted meanwhile: an earlier name stays.
        with contextlib.suppress(StoreError):
            try:
                names = _read_host_names(self._store.store, key)
            except ProfileError:
                self._unreadable[key.host_id] = key
                return
            self._names[key.host_id] = (key.start_ns // HOUR_NS, names)


class _Sweep:
    """One listing of some hours, which may take several searches."""

    def __init__(self, store: TenantStore, type_: str, hours: tuple[int, ...]) -> None:
        self.hours = hours
        self.listed = 0
        self.newest: dict[str, ObjectKey] = {}
        self.keys = self._list(store, type_)

    def _list(self, store: TenantStore, type_: str) -> Iterator[ObjectKey]:
        for hour in self.hours:
            yield from store.list_starts(hour * HOUR_NS, (hour + 1) * HOUR_NS, type_)
            self.listed += 1


def _read_host_names(store: ObjectStore, key: ObjectKey) -> tuple[str, ...]:
    """Return the names of the hosts that an object is of; stacks are not decoded.

    Raises:
        ProfileError: it is damaged or has no accounting.
        StoreError: it cannot be read.
    """
    content = store.get(key.text)
    if content16(content) != key.content16:
        raise ProfileError("its content is not what its key says: it is damaged or cut short")
    ours = read_head(content).ours
    names = tuple(host.name for host in ours.accounting.hosts if host.name) if ours else ()
    return names or (key.host_id,)
