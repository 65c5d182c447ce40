"""`everflame ls`: the hosts of a store, with their windows, sizes, services and versions.

Without a window or a selector it reads keys, and only the latest object of each host: that one has
the host's name and the services that run now. With one it reads all samples in the window.

An object that is compacted counts once, whether it is still there or not. Sizes are those of the
objects that are there and of the files of compacted hours, of which each host has the share of its
objects.
"""

import argparse
import itertools
import secrets
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import orjson

from profiler.commands import arguments
from profiler.commands.pin import as_record, pins_in, window_text
from profiler.commands.selection import Selection, selected, why_empty
from profiler.text import counted, in_columns, quantity
from profiler.times import rfc3339
from storage.hashing import Hasher
from storage.objects.keys import DamagedObject, ObjectKey, ObjectMissing, StoredObject, StoreError
from storage.objects.pins import Pin
from storage.profile import ALWAYS, Labels, ProfileError
from storage.query.compacted import Compacted
from storage.query.coverage import Skipped
from storage.query.decoding import decode_object
from storage.query.listing import CompactedContents
from storage.query.query import Query

_FETCHES = 4
_SHOWN_SERVICES = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  everflame ls\n"
        "  everflame ls --from now-1h -q '{service=~\"api.*\"}' --json\n\n"
        "Without --from, --until and -q it reads only the latest object of each host."
    )
    arguments.add_json(parser)
    arguments.add_store(parser)
    arguments.add_window(parser)
    arguments.add_query(parser)


def run(options: argparse.Namespace) -> int:
    """Print the hosts; return 2 if there are none."""
    selection = selected(options)
    listing = list_hosts(selection)
    if options.json:
        sys.stdout.buffer.write(listing.as_json() + b"\n")
    elif listing.hosts:
        print(_table(listing))
    for key, reason in listing.skipped:
        print(f"everflame: skipped {key}: {reason}", file=sys.stderr)
    if not listing.hosts:
        print(f"everflame: {_explain(selection)}", file=sys.stderr)
        return 2
    return 0


def _explain(selection: Selection) -> str:
    """Say why no host is listed."""
    if selection.window == ALWAYS and not selection.selector.matchers:
        return f"nothing in the store {selection.store}{why_empty(selection.store.store)}"
    return selection.why_nothing()


@dataclass(slots=True)
class HostListing:
    """One host; its name is its id where no object of it could be read."""

    host_id: str
    name: str = ""
    objects: int = 0
    compacted: int = 0
    """How many of them are compacted."""
    bytes: int = 0
    start_ns: int = ALWAYS.end_ns
    end_ns: int = 0
    services: dict[tuple[str, str], int] = field(default_factory=dict)
    """Samples by (service, version)."""


@dataclass(frozen=True, slots=True)
class Listing:
    hosts: list[HostListing]
    is_latest_only: bool
    """The services are those of each host's latest object."""
    skipped: list[Skipped]
    compacted_bytes: int = 0
    """The size of the files of compacted hours."""
    pins: tuple[Pin, ...] = ()
    """Those that hold something of the window."""

    @property
    def objects(self) -> int:
        return sum(host.objects for host in self.hosts)

    @property
    def compacted(self) -> int:
        return sum(host.compacted for host in self.hosts)

    def as_json(self) -> bytes:
        return orjson.dumps(
            {
                "schema": 1,
                "objects": self.objects,
                "bytes": sum(host.bytes for host in self.hosts),
                "compacted": {"objects": self.compacted, "bytes": self.compacted_bytes},
                "pins": [as_record(pin) for pin in self.pins],
                "services_of": "latest" if self.is_latest_only else "window",
                "hosts": [
                    {
                        "host": host.name,
                        "host_id": host.host_id,
                        "objects": host.objects,
                        "compacted": host.compacted,
                        "bytes": host.bytes,
                        "from_ms": host.start_ns // 1_000_000,
                        "until_ms": host.end_ns // 1_000_000,
                        "services": [
                            {"service": service, "version": version, "samples": samples}
                            for (service, version), samples in _largest(host.services)
                        ],
                    }
                    for host in self.hosts
                ],
                "skipped": [{"key": key, "reason": reason} for key, reason in self.skipped],
            }
        )


def list_hosts(selection: Selection) -> Listing:
    """Return the hosts that have objects in the window, by name."""
    hosts = _Hosts()
    query = selection.query()
    compacted = query.blocks.hours(selection.window)
    skipped = list(compacted.skipped)
    compacted_bytes = 0
    for hour in compacted.hours:
        try:
            compacted_bytes += hosts.add_hour(query, hour)
        except (ProfileError, ObjectMissing, DamagedObject) as error:
            skipped.append(Skipped(hour.name, str(error)))
    contents = CompactedContents(query.blocks, compacted.hours)
    for key, stored in selection.objects():
        hosts.add(key, stored, is_compacted=contents.has(key))
    is_latest_only = selection.window == ALWAYS and not selection.selector.matchers
    skipped += _read_latest(selection, hosts)
    skipped += hosts.read_latest_compacted(query)
    if hosts.by_id and not is_latest_only:
        skipped = _read_window(selection, hosts.by_id)
    every = hosts.by_id.values()
    chosen = [host for host in every if host.services or not selection.selector.matchers]
    chosen.sort(key=lambda host: (host.name, host.host_id))
    pins = tuple(pins_in(selection.store, selection.window))
    return Listing(chosen, is_latest_only, skipped, compacted_bytes, pins)


class _Hosts:
    """The hosts that were found, and the latest object of each."""

    def __init__(self) -> None:
        self.by_id: dict[str, HostListing] = {}
        self.latest: dict[str, tuple[ObjectKey, StoredObject]] = {}
        self._latest_compacted: dict[str, tuple[int, Compacted, int]] = {}
        """By host: when the latest compacted object starts, its hour, and its id there."""

    def _of(self, host_id: str) -> HostListing:
        return self.by_id.setdefault(host_id, HostListing(host_id, host_id))

    def add(self, key: ObjectKey, stored: StoredObject, *, is_compacted: bool) -> None:
        host = self._of(key.host_id)
        host.bytes += stored.size_bytes
        if is_compacted:
            return
        host.objects += 1
        host.start_ns = min(host.start_ns, key.start_ns)
        host.end_ns = max(host.end_ns, key.end_ns)
        if self._latest_compacted.get(key.host_id, (-1,))[0] <= key.start_ns:
            self._latest_compacted.pop(key.host_id, None)
            self.latest[key.host_id] = (key, stored)

    def add_hour(self, query: Query, hour: Compacted) -> int:
        """Add the compacted objects of an hour; return the size of its files.

        Raises:
            ProfileError, StoreError: they cannot be read.
        """
        found = query.blocks.hosts(hour)
        size_bytes = sum(file.bytes for file in hour.manifest.files)
        every = sum(part.objects for part in hour.parts)
        counted_bytes = 0
        numbers = itertools.accumulate(each.objects for each in found)
        for each, number in zip(found, numbers, strict=True):
            share_bytes = size_bytes * number // max(1, every) - counted_bytes
            counted_bytes += share_bytes
            host = self._of(each.host_id)
            host.name = ", ".join(each.names)
            host.objects += each.objects
            host.compacted += each.objects
            host.bytes += share_bytes
            host.start_ns = min(host.start_ns, each.window.start_ns)
            host.end_ns = max(host.end_ns, each.window.end_ns)
            known = self._latest_compacted.get(each.host_id)
            if known is None or known[0] <= each.latest_start_ns:
                latest = (each.latest_start_ns, hour, each.latest_id)
                self._latest_compacted[each.host_id] = latest
        return counted_bytes

    def read_latest_compacted(self, query: Query) -> list[Skipped]:
        """Read the services of the hosts whose latest object is compacted."""
        skipped = []
        by_hour: dict[str, tuple[Compacted, dict[int, HostListing]]] = {}
        for host_id, (_, hour, object_id) in self._latest_compacted.items():
            by_hour.setdefault(hour.key, (hour, {}))[1][object_id] = self.by_id[host_id]
        for hour, hosts in by_hour.values():
            try:
                services = query.blocks.services(hour, hosts)
            except (ProfileError, ObjectMissing, DamagedObject) as error:
                skipped.append(Skipped(hour.name, str(error)))
                continue
            for object_id, sampled in services.items():
                for labels, samples in sampled:
                    _count(hosts[object_id], labels, samples)
        return skipped


def _read_latest(selection: Selection, hosts: _Hosts) -> list[Skipped]:
    """Read the names and services of the hosts whose latest object is not compacted."""
    hasher = Hasher(secrets.token_bytes(32))

    def read(pair: tuple[ObjectKey, StoredObject]) -> Skipped | None:
        key, stored = pair
        try:
            columns = decode_object(key, selection.store.store.get(stored.key), hasher)
        except (ProfileError, StoreError) as error:
            return Skipped(stored.key, str(error))
        host = hosts.by_id[key.host_id]
        if len(columns.accounting.hosts) == 1:
            host.name = columns.accounting.hosts[0].name or host.host_id
        samples = np.zeros(len(columns.label_sets), dtype=np.int64)
        np.add.at(samples, columns.times[:, 1], columns.time_counts[:, 0])
        for labels, count in zip(columns.label_sets, samples.tolist(), strict=True):
            _count(host, labels, count)
        return None

    with ThreadPoolExecutor(_FETCHES, "ls") as pool:
        return [problem for problem in pool.map(read, hosts.latest.values()) if problem is not None]


def _read_window(selection: Selection, hosts: dict[str, HostListing]) -> list[Skipped]:
    by_name: dict[str, list[HostListing]] = {}
    for host in hosts.values():
        host.services = {}
        by_name.setdefault(host.name, []).append(host)
    start_ns = min(host.start_ns for host in hosts.values())
    end_ns = max(host.end_ns for host in hosts.values())
    timeline = selection.query().timeline(
        selection.window._replace(
            start_ns=max(selection.window.start_ns, start_ns),
            end_ns=min(selection.window.end_ns, end_ns),
        ),
        selection.selector,
        step_ns=max(1, end_ns - start_ns),
        by=("host", "service", "version"),
    )
    for series in timeline.series:
        name = dict(series.labels).get("host", "")
        for host in by_name.get(name, [])[:1]:
            _count(host, series.labels, int(series.samples.sum()))
    return list(timeline.coverage.skipped)


def _count(host: HostListing, labels: Labels, samples: int) -> None:
    values = dict(labels)
    key = (values.get("service", ""), values.get("version", ""))
    host.services[key] = host.services.get(key, 0) + samples


def _largest(services: dict[tuple[str, str], int]) -> list[tuple[tuple[str, str], int]]:
    return sorted(services.items(), key=lambda pair: (-pair[1], pair[0]))


def _table(listing: Listing) -> str:
    rows = [("HOST", "OBJECTS", "SIZE", "FROM", "UNTIL")]
    rows += [
        (
            host.name,
            f"{host.objects:,}",
            quantity(host.bytes, "bytes"),
            rfc3339(host.start_ns),
            rfc3339(host.end_ns),
        )
        for host in listing.hosts
    ]
    lines = []
    for line, host in zip(in_columns(rows), [None, *listing.hosts], strict=True):
        lines.append(line)
        if host is None:
            continue
        services = _largest(host.services)
        for (service, version), samples in services[:_SHOWN_SERVICES]:
            name = f"{service or '[no service]'} {version}".rstrip()
            lines.append(f"    {name}  {counted(samples, 'sample')}")
        if len(services) > _SHOWN_SERVICES:
            more = counted(len(services) - _SHOWN_SERVICES, "more service")
            lines.append(f"    and {more}")
    size = quantity(sum(host.bytes for host in listing.hosts), "bytes")
    objects = counted(listing.objects, "object")
    where = "latest object" if listing.is_latest_only else "window"
    if listing.compacted:
        size = (
            f"{listing.compacted:,} of them compacted into"
            f" {quantity(listing.compacted_bytes, 'bytes')}, {size} in all"
        )
    lines.append(f"{objects}, {size}; services are those of each host's {where}")
    lines += [f"pinned: {pin.name}, {pin.type} {window_text(pin)}" for pin in listing.pins]
    return "\n".join(lines)
