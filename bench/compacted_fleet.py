"""Days of a fleet as compaction leaves them, without the objects that they would be made of.

A day of 1,000 hosts is 1.4 million objects, and to make and compact them takes hours. Here each
hour is written at once as the part that compaction would have made of it, by the store's own writer
(`storage.blocks.work`), and `everflame compact` then does all the rest: rollups of hours and days,
and what else it keeps. The service reads the result as any other store.

- An hour of the last day is made of one object per host and ten minutes. How often each stack of a
  service was seen in the fleet follows the power law of fleet.py, for ten minutes at a time. The
  hottest stacks are spread over all hosts by their load; each other one over one host for every
  FEW samples, so that there are a tenth as many rows by host as in a real hour. Rollups, which are
  without hosts, have the real size.
- Hours of earlier days have the same with all samples of an hour at its start, but for the hour
  before the last day.
- The last minutes of the last hour (`--detail-minutes`) are windows of a minute as fleet.py draws
  them, each row by row: what one host did is asked of these.

Layouts: `one` service with 500,000 stacks on all hosts, or `fifty` of 6,000, two on each host.

Hours that are there already are left alone, so that an interrupted run goes on.

Run: `python bench/compacted_fleet.py --store FOLDER|s3://BUCKET/PREFIX [--layout one|fifty]
[--hosts 1000] [--days 1] [--detail-minutes 60]`.
"""

import argparse
import functools
import hashlib
import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import fleet
import numpy as np
from msgspec.structs import replace as replace_struct
from object_writer import PERIOD_NS
from programs import LAYOUTS, Layout

from storage.blocks import work
from storage.blocks.block import DROPPED_LABELS, Block, BlockObject, LabelIds, ObjectTimes, Samples
from storage.blocks.manifest import HourManifest, Manifests, Part, start_s_of
from storage.grouping import add_groups, group_keys
from storage.hashing import Hasher, Hashes
from storage.objects.keys import CPU, DEFAULT_TENANT, NS_PER_S, ObjectKey, hour_of
from storage.objects.open import open_store
from storage.objects.tenant_key import make_tenant_key, read_tenant_key
from storage.profile import Accounting, Integers, Labels, Window, make_labels
from storage.query.workers import Place

HOUR_S, BUCKET_S, DAY_S = 3600, 600, 86_400
FEW = 50
"""Samples of a stack in one bucket that one host has, unless it is among the HOT."""
HOT = 150
"""Stacks of a service that all of its hosts have in each bucket."""
STACKS = {"one": 500_000, "fifty": 6_000, "five": 500_000}
"""Of a service, by layout."""
_DETAIL_MINUTES_AT_ONCE = 5
_AGENT_CPU_NS_A_MINUTE, _AGENT_RSS_BYTES = 900_000_000, 50 << 20
_LISTED_AFTER_S = 7200
"""An hour was last listed so long after its end: nothing at level 0 is looked for."""


class Rows(NamedTuple):
    """Samples of some objects: the number of the object, and its host, label set and stack."""

    objects: Integers
    sets: Integers
    stacks: Integers
    samples: Integers


class Running(NamedTuple):
    """A service on the hosts that run it: with which weights, and the mean of all samples."""

    service: int
    version: int
    hosts: Integers
    weights: "np.ndarray"
    mean: float


class CompactedFleet:
    """Makes the parts of any hour of a fleet."""

    def __init__(self, made: fleet.Fleet, hasher: Hasher, last_day_s: int) -> None:
        self._fleet = made
        self._hasher = hasher
        self._last_day_s = last_day_s
        self._dictionary = made.dictionary(hasher)
        self._labels = LabelIds(hasher)
        self._host_ids = np.array(
            [self._labels.id(make_labels({"host": each.name})) for each in made.hosts],
            dtype=np.uint64,
        )
        self._host_sets: dict[tuple[int, object], Hashes] = {}

    def hour(self, hour: str) -> Block:
        """Return an hour of one object per host and ten minutes."""
        start_s = start_s_of(hour)
        is_last_day = start_s >= self._last_day_s
        is_fine = start_s >= self._last_day_s - HOUR_S
        random = np.random.default_rng((7, start_s))
        buckets = HOUR_S // BUCKET_S
        hosts = len(self._fleet.hosts)
        rows: list[Rows] = []
        lasting = range(buckets if is_fine else 1)
        for bucket in lasting:
            minute = (start_s + bucket * BUCKET_S) % DAY_S // 60
            length_min = HOUR_S // 60 // len(lasting)
            for running in self._running(minute, is_last_day=is_last_day):
                drawn = self._draw(random, running, length_min)
                if not is_fine:  # which of the hour's objects has a row does not matter
                    bucket = random.integers(0, buckets, len(drawn.objects))  # noqa: PLW2901
                rows.append(drawn._replace(objects=drawn.objects + bucket * hosts))
        all_rows = Rows(*map(np.concatenate, zip(*rows, strict=True)))
        starts_s = start_s + BUCKET_S * (np.arange(buckets * hosts) // hosts)
        ts = starts_s if is_fine else np.full(len(starts_s), start_s)
        return self._block(all_rows, np.arange(buckets * hosts) % hosts, starts_s, ts)

    def minutes(self, minutes: Sequence[int]) -> Block:
        """Return minutes of the last day as agents would have stored them, each row."""
        objects, samples, times = [], [], []
        used = np.zeros(self._fleet.stacks, dtype=bool)
        for host in range(len(self._fleet.hosts)):
            for minute in minutes:
                drawn = self._fleet.draw(host, minute)
                if drawn is None:
                    continue
                shift_ns = self._last_day_s * NS_PER_S - fleet.DAY_NS
                window = Window(*(at + shift_ns for at in drawn.window))
                each = self._object(host, window, drawn.accounting)
                objects.append(each)
                used[drawn.stacks] = True
                of_set = self._sets_of(drawn)[drawn.sets]
                ts = np.full(len(of_set), each.key.start_s, np.uint32)
                stacks = self._dictionary.stack_hashes[drawn.stacks]
                number_of_set = np.unique(of_set, return_inverse=True)[1]
                firsts, order = group_keys(number_of_set * self._fleet.stacks + drawn.stacks)
                at = order[firsts]
                counts = add_groups(drawn.samples[order], firsts)
                hosts = np.full(len(at), self._host_ids[host])
                samples.append((ts[: len(at)], hosts, of_set[at], stacks[at], counts))
                firsts, order = group_keys(of_set)
                sums = add_groups(drawn.samples[order], firsts)
                numbers = np.full(len(firsts), each.object_id, np.uint64)
                of_object = np.full(len(firsts), self._host_ids[host])
                times.append((numbers, of_object, of_set[order[firsts]], sums))
        all_samples = list(map(np.concatenate, zip(*samples, strict=True)))
        all_times = list(map(np.concatenate, zip(*times, strict=True)))
        return self._whole(
            objects,
            Samples(*all_samples, all_samples[-1] * PERIOD_NS),
            ObjectTimes(*all_times, all_times[-1] * PERIOD_NS),
            np.flatnonzero(used),
        )

    @functools.lru_cache(maxsize=8)  # noqa: B019 - there is one of these for the whole run
    def _running(self, minute: int, *, is_last_day: bool) -> list[Running]:
        described, found = self._fleet.services, []
        weights: dict[int, list[tuple[int, float]]] = {}
        for host in range(len(self._fleet.hosts)):
            mine = self._fleet.services_of(host)
            total = sum(described[service].share for service in mine)
            mean = self._fleet.mean_samples(host, minute)
            for service in mine:
                part = mean * described[service].share / total
                weights.setdefault(service, []).append((host, part))
        for service, pairs in weights.items():
            hosts, means = np.array(pairs).T
            is_new = is_last_day and minute >= described[service].deployed
            shares = means / means.sum()
            found.append(Running(service, int(is_new), hosts.astype(np.int64), shares, means.sum()))
        return found

    def _draw(self, random: np.random.Generator, running: Running, minutes: int) -> Rows:
        """Draw how often each stack of a service was seen, and on which hosts."""
        program = self._fleet.programs.of[running.service]
        hosts = running.hosts
        shares = fleet.rank_shares(len(program.by_rank))
        counts = random.poisson(running.mean * minutes * shares)
        spread = random.multinomial(counts[:HOT], running.weights)
        hot, on = np.nonzero(spread)
        rare = np.flatnonzero(counts[HOT:]) + HOT
        few = FEW * minutes // (BUCKET_S // 60)
        pieces = np.minimum(-(-counts[rare] // few), len(hosts))
        of_piece = np.repeat(np.arange(len(rare)), pieces)
        nth = np.arange(len(of_piece)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        each, left = counts[rare] // pieces, counts[rare] % pieces
        first = random.integers(0, len(hosts), len(rare))
        ranks = np.concatenate([hot, rare[of_piece]])
        places = np.concatenate([on, (first[of_piece] + nth) % len(hosts)])
        table_rows = program.by_rank[ranks]
        thread = self._fleet.programs.threads[table_rows]
        return Rows(
            objects=hosts[places],
            sets=self._sets(running)[thread],
            stacks=program.numbers_of(table_rows, running.version),
            samples=np.concatenate([spread[hot, on], each[of_piece] + (nth < left[of_piece])]),
        )

    def _sets(self, running: Running) -> Hashes:
        """Return the ids of the label sets of a service's threads."""
        described = self._fleet.services[running.service]
        labels = {**dict(described.labels(running.version)), "comm": described.comm}
        sets = [make_labels({**labels, "thread": thread}) for thread in described.threads]
        return np.array([self._labels.id(each) for each in sets], dtype=np.uint64)

    def _sets_of(self, drawn: fleet.Drawn) -> Hashes:
        """Return the ids of the label sets of a window, as detail has them."""
        known = self._host_sets.get((drawn.host, drawn.running))
        if known is None:
            kept = (
                tuple(pair for pair in labels if pair[0] not in DROPPED_LABELS)
                for labels in self._fleet.label_sets(drawn)
            )
            known = np.array([self._labels.id(each) for each in kept], dtype=np.uint64)
            self._host_sets[drawn.host, drawn.running] = known
        return known

    def _block(self, rows: Rows, host_of: Integers, starts_s: Integers, ts: Integers) -> Block:
        """Return a block of objects of ten minutes; rows have the numbers of their objects."""
        stored = np.bincount(rows.objects, rows.samples, len(host_of)).astype(np.int64)
        objects = [
            self._object(
                host,
                Window(start_s * NS_PER_S, (start_s + BUCKET_S) * NS_PER_S),
                self._accounting(host, start_s, samples),
            )
            for host, start_s, samples in zip(
                host_of.tolist(), starts_s.tolist(), stored.tolist(), strict=True
            )
        ]
        ids = np.array([each.object_id for each in objects], dtype=np.uint64)
        values = rows.samples * PERIOD_NS
        samples = Samples(
            ts=ts.astype(np.uint32)[rows.objects],
            hosts=self._host_ids[host_of[rows.objects]],
            sets=rows.sets,
            stacks=self._dictionary.stack_hashes[rows.stacks],
            samples=rows.samples,
            values=values,
        )
        sets, set_of = np.unique(rows.sets, return_inverse=True)
        key = rows.objects * len(sets) + set_of
        sums = np.bincount(key, rows.samples, len(objects) * len(sets)).astype(np.int64)
        seen = np.flatnonzero(sums)
        of_object = seen // len(sets)
        times = ObjectTimes(
            objects=ids[of_object],
            hosts=self._host_ids[host_of[of_object]],
            sets=sets[seen % len(sets)],
            samples=sums[seen],
            values=sums[seen] * PERIOD_NS,
        )
        used = np.zeros(self._fleet.stacks, dtype=bool)
        used[rows.stacks] = True
        return self._whole(objects, samples, times, np.flatnonzero(used))

    def _whole(
        self, objects: list[BlockObject], samples: Samples, times: ObjectTimes, stacks: Integers
    ) -> Block:
        # Two services that run the same code may have a stack in common.
        firsts = np.unique(self._dictionary.stack_hashes[stacks], return_index=True)[1]
        dictionary = fleet.choose_stacks(self._dictionary, stacks[np.sort(firsts)])
        return Block(
            type=CPU,
            unit="nanoseconds",
            objects=tuple(objects),
            samples=samples,
            times=times,
            dictionary=dictionary,
            labels=self._labels,
            hasher=self._hasher,
        )

    def _object(self, host: int, window: Window, accounting: Accounting) -> BlockObject:
        start_s, end_s = (at // NS_PER_S for at in window)
        host_id = self._fleet.hosts[host].host_id
        content = hashlib.sha256(f"{host_id} {start_s} {end_s}".encode()).hexdigest()[:16]
        key = ObjectKey(DEFAULT_TENANT, host_id, start_s, end_s - start_s, content)
        return BlockObject(key, PERIOD_NS, window, accounting)

    def _accounting(self, host: int, start_s: int, stored: int) -> Accounting:
        length_ns = BUCKET_S * NS_PER_S
        ticks = fleet.CPUS * 99 * BUCKET_S
        minute = start_s % DAY_S // 60
        idle = max(0, (ticks - stored) // 2)
        services: dict[Labels, int] = {}
        for number in self._fleet.services_of(host):
            service = self._fleet.services[number]
            is_new = start_s >= self._last_day_s and minute >= service.deployed
            services[service.labels(int(is_new))] = length_ns
        return Accounting(
            hosts=(self._fleet.hosts[host],),
            cpus=fleet.CPUS,
            nonidle_ns=stored * PERIOD_NS,
            profiled_ns=length_ns,
            ticks=stored + idle,
            idle=idle,
            stored=stored,
            stops={"root": stored - stored // 100, "hole": stored // 100},
            services=services,
            agent_cpu_ns=_AGENT_CPU_NS_A_MINUTE * BUCKET_S // 60,
            agent_rss_bytes=_AGENT_RSS_BYTES,
        )


class Made(NamedTuple):
    """What was written."""

    hours: int
    samples: int
    size_bytes: int


def fill(
    make_fleet: Callable[[], fleet.Fleet],
    url: str,
    *,
    endpoint: str | None = None,
    scratch: Path,
    days: int = 1,
    detail_minutes: int = 60,
    last_day_s: int = fleet.DAY_NS // NS_PER_S,
    processes: int = 0,
) -> Made:
    """Store the parts of all hours of some days, the last of which begins at `last_day_s`.

    The fleet is made if an hour is missing.
    """
    store = open_store(url, endpoint)
    make_tenant_key(store, DEFAULT_TENANT)
    key = read_tenant_key(store, DEFAULT_TENANT)
    manifests = Manifests(store, DEFAULT_TENANT, CPU)
    hours = [hour_of(last_day_s + (i - 24 * (days - 1)) * HOUR_S) for i in range(24 * days)]
    known = manifests.list(hours[0], hours[-1]).hours
    pieces = _pieces([hour for hour in hours if hour not in known], hours[-1], detail_minutes)
    if not pieces:
        return Made(0, 0, 0)
    compacted = CompactedFleet(make_fleet(), Hasher(key), last_day_s)

    def make(piece: _Piece) -> Part:
        hour, minutes = piece
        place = Place(open_store(url, endpoint), DEFAULT_TENANT, key, scratch, CPU, hour)
        block = compacted.minutes(minutes) if minutes else compacted.hour(hour)
        return work._make_part(place, block).part  # noqa: SLF001 - as compaction itself does

    parts: dict[str, list[Part]] = {}
    for (hour, _), part in _in_processes(make, pieces, processes or os.cpu_count() or 1):
        parts.setdefault(hour, []).append(part)
        if sum(each == hour for each, _ in pieces) == len(parts[hour]):
            name_parts(manifests, hour, parts[hour])
            print(f"{hour}: parts: {len(parts[hour])}", flush=True)
    every = [part for some in parts.values() for part in some]
    return Made(
        len(parts), sum(part.samples for part in every), sum(part.size_bytes for part in every)
    )


_Piece = tuple[str, tuple[int, ...]]
"""An hour, and which of its minutes are made one by one: none for an hour of ten minutes."""


def _pieces(missing: Sequence[str], last: str, detail_minutes: int) -> list[_Piece]:
    pieces: list[_Piece] = []
    if last in missing and detail_minutes:
        minutes = range(24 * 60 - detail_minutes, 24 * 60)
        step = _DETAIL_MINUTES_AT_ONCE
        pieces += [(last, tuple(minutes[i : i + step])) for i in range(0, len(minutes), step)]
    whole = [hour for hour in missing if hour != last or not detail_minutes]
    return [*pieces, *((hour, ()) for hour in reversed(whole))]


def _in_processes(
    make: Callable[[_Piece], Part], pieces: Sequence[_Piece], processes: int
) -> Iterator[tuple[_Piece, Part]]:
    """Make pieces in processes that are forked, so that they share the fleet's arrays."""
    context = multiprocessing.get_context("fork")
    waiting, results = context.SimpleQueue(), context.Queue()
    for piece in [*pieces, *[None] * processes]:
        waiting.put(piece)

    def act() -> None:
        fleet.keep_freed_memory()
        while (piece := waiting.get()) is not None:
            results.put((piece, make(piece)))

    started = [context.Process(target=act) for _ in range(processes)]
    for each in started:
        each.start()
    for _ in pieces:
        while True:
            try:
                yield results.get(timeout=1)
                break
            except queue.Empty:
                if any(each.exitcode for each in started):
                    raise RuntimeError("cannot make the fleet: a process has failed") from None
    for each in started:
        each.join()


def name_parts(manifests: Manifests, hour: str, parts: Sequence[Part]) -> None:
    """Name the parts of an hour, as if it had been listed when it was over."""
    listed_ns = (start_s_of(hour) + HOUR_S + _LISTED_AFTER_S) * NS_PER_S

    def add(manifest: HourManifest) -> HourManifest:
        return replace_struct(manifest, unit="nanoseconds", parts=tuple(parts), listed_ns=listed_ns)

    manifests.change_hour(hour, add)


def make_fleet(layout: str, hosts: int, stacks: int = 0) -> fleet.Fleet:
    described: Layout = LAYOUTS[layout]
    return fleet.Fleet(hosts, stacks=stacks or STACKS[layout], layout=described)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", required=True, help="a folder or s3://bucket/prefix")
    parser.add_argument("--s3-endpoint", help="URL of an S3 server other than Amazon's")
    parser.add_argument("--layout", choices=list(LAYOUTS), default="one")
    parser.add_argument("--hosts", type=int, default=1_000)
    parser.add_argument("--days", type=int, default=1)
    parser.add_argument("--detail-minutes", type=int, default=60)
    parser.add_argument("--stacks", type=int, default=0, help="of a service")
    parser.add_argument("--processes", type=int, default=0, help="by default one per CPU")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/everflame-bench"))  # noqa: S108
    options = parser.parse_args()
    started = time.monotonic()
    found = fill(
        lambda: make_fleet(options.layout, options.hosts, options.stacks),
        options.store,
        endpoint=options.s3_endpoint,
        scratch=options.scratch,
        days=options.days,
        detail_minutes=options.detail_minutes,
        processes=options.processes,
    )
    print(
        f"{found.hours} hours, {found.samples:,} samples, {found.size_bytes / 1e6:,.0f} MB:"
        f" {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
