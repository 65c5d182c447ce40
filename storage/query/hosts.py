"""Hosts: which hosts stored a profile lately, and their names, read from one object of each.

The key of an object names its host by an id, so hosts are found by listing. Only the newest object
of each host is read, and of that one only the accounting, which has the name. A compacted hour has
a table of its objects, with the names of their hosts.

A large fleet takes longer than a reader waits. A search therefore ends after a given time with what
it has, says what is left, and the next one continues from there.
"""

import contextlib
import time
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.formats.pprof_head import read_head
from storage.objects.keys import (
    CPU,
    DamagedObject,
    ObjectKey,
    ObjectMissing,
    ObjectStore,
    StoreError,
    content16,
)
from storage.objects.tenant import TenantStore
from storage.profile import ProfileError, Window
from storage.query.blocks import Blocks
from storage.query.compacted import Compacted
from storage.query.listing import HOUR_NS

if TYPE_CHECKING:
    from storage.blocks.hosts import HostObjects

_FETCHES = 8


@dataclass(frozen=True, slots=True)
class FoundHosts:
    """The hosts that were found in time."""

    names: list[str]
    """Sorted. A host whose name was not read, or cannot be, is there by its id."""
    hosts: tuple[int, int]
    """Of how many hosts the name was looked up, and how many were found."""
    hours: tuple[int, int]
    """How many hours of the store were listed and read, and how many there are."""

    @property
    def is_complete(self) -> bool:
        return self.hosts[0] == self.hosts[1] and self.hours[0] == self.hours[1]


class HostSearch:
    """Finds the hosts that have an object from a time on. For one thread at a time."""

    def __init__(
        self, store: TenantStore, type_: str = CPU, *, blocks: Blocks | None = None
    ) -> None:
        self._store = store
        self._type = type_
        self._blocks = blocks
        self._compacted: dict[str, list[HostObjects]] = {}
        """Of the compacted hours that were last asked for, by their keys."""
        self._reading: dict[str, Future[None]] = {}
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
        compacted = self._list_compacted(start_ns, end_ns)
        late = self._read_compacted(compacted, deadline_s)
        unlisted = {
            hour.start_ns // HOUR_NS
            for hour in compacted
            if self._blocks and hour.key in self._compacted and self._blocks.is_settled(hour)
        }
        listed, hours = self._list(start_ns, end_ns, unlisted, deadline_s)
        hosts = {
            host.host_id: host
            for hour in compacted
            for host in self._compacted.get(hour.key, ())
            if host.latest_start_ns >= start_ns
        }
        for host in hosts.values():
            number = host.latest_start_ns // HOUR_NS
            if self._names.get(host.host_id, (-1,))[0] < number:
                self._names[host.host_id] = (number, host.names)
        ids = self._newest.keys() | hosts.keys()
        unnamed = self._read_names(ids, deadline_s)
        names = {name for id_ in ids for name in self._names.get(id_, (0, (id_,)))[1]}
        return FoundHosts(
            sorted(names), (len(ids) - unnamed, len(ids)), (min(listed, hours - late), hours)
        )

    def _list_compacted(self, start_ns: int, end_ns: int) -> list[Compacted]:
        """Return the compacted hours, in order."""
        if self._blocks is None:
            return []
        first, last = start_ns // HOUR_NS, (end_ns - 1) // HOUR_NS
        return self._blocks.hours(Window(first * HOUR_NS, (last + 1) * HOUR_NS), self._type).hours

    def _read_compacted(self, hours: list[Compacted], deadline_s: float) -> int:
        """Read the hosts of compacted hours that are not known; return how many are left."""
        keys = {hour.key for hour in hours}
        for key in self._compacted.keys() - keys:
            del self._compacted[key]
        self._reading = {key: each for key, each in self._reading.items() if not each.done()}
        unknown = [hour for hour in hours if hour.key not in self._compacted]
        if not unknown:
            return 0
        pool = ThreadPoolExecutor(2, "hosts")
        try:
            for hour in reversed(unknown):
                if hour.key not in self._reading:
                    self._reading[hour.key] = pool.submit(self._read_hour, hour)
            reading = [self._reading[hour.key] for hour in unknown]
            wait(reading, max(0.0, deadline_s - time.monotonic()))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return sum(hour.key not in self._compacted for hour in unknown)

    def _read_hour(self, hour: Compacted) -> None:
        """Note the hosts of a compacted hour; in a thread, as `_read` does names."""
        assert self._blocks is not None
        with contextlib.suppress(StoreError):  # the store may be back the next time
            try:
                self._compacted[hour.key] = self._blocks.hosts(hour, is_coarse=True)
            except (ProfileError, ObjectMissing, DamagedObject):
                self._compacted[hour.key] = []

    def _list(
        self, start_ns: int, end_ns: int, unlisted: Collection[int], deadline_s: float
    ) -> tuple[int, int]:
        """Note the newest object of each host; return how many hours of how many were listed."""
        every = range((end_ns - 1) // HOUR_NS, start_ns // HOUR_NS - 1, -1)
        hours = tuple(hour for hour in every if hour not in unlisted)
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
        return sweep.listed + len(every) - len(hours), len(every)

    def _read_names(self, ids: Collection[str], deadline_s: float) -> int:
        """Read the names that are not known for the hour; return of how many hosts not in time.

        What is known of other hosts than `ids` is forgotten.
        """
        for known in (self._names, self._unreadable):
            for host_id in known.keys() - set(ids):
                del known[host_id]
        unknown = [
            key
            for host_id, key in self._newest.items()
            if self._names.get(host_id, (-1,))[0] < key.start_ns // HOUR_NS
            and self._unreadable.get(host_id) != key
        ]
        if not unknown:
            return 0
        pool = ThreadPoolExecutor(_FETCHES, "hosts")
        try:
            reading = [pool.submit(self._read, key) for key in unknown]
            _, late = wait(reading, max(0.0, deadline_s - time.monotonic()))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return len(late)

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
