"""A fleet of hosts, and what their agents would store: level-0 objects of a minute, from a seed.

Five services in C++, JavaScript's runtime, Go, Python and C, with the names that these programs
have on this machine, run on four kinds of hosts, two of them on each, beside the kernel's threads.
Two services are deployed in the day, host by host: their code then has another build id, or other
lines. A service has 500,000 different stacks a day of some 30 frames, in a call tree; how often one
is seen falls with its rank as a power law (Zipf and Mandelbrot), so that 215,000 have 99 % of the
samples. A host has some 1,500 of them in a minute, in 3,500 places of the code. Load swings over
the day and differs by host.

Labels are those of an agent: service, version, comm, pid and thread; the host is in the accounting,
which adds up. Now and then ticks are lost, a window is missing, or is a tombstone.

Every window follows from the seed, the host and the minute alone, so several processes make them.
`Fleet.draw` returns one as arrays, `encode` as an object, `columns` as its reader would; stacks
have one number in the whole fleet, and `dictionary` knows them all. So data of 10,000 hosts can be
made without a single object.

Run: `python bench/fleet.py --store FOLDER|s3://BUCKET [--hosts 1000] [--minutes 60]`.
"""

import argparse
import ctypes
import functools
import hashlib
import math
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from object_writer import PERIOD_NS, Shape
from programs import FIVE, Layout, Program, Programs

from storage.columns import Columns, object_of, presence_of, times_of
from storage.formats import pprof
from storage.grouping import distinct, ranges
from storage.hashing import Hasher
from storage.objects.directory import DirectoryStore
from storage.objects.keys import DEFAULT_TENANT, NS_PER_S, ObjectKey, ObjectStore, content16
from storage.objects.open import open_store
from storage.objects.tenant_key import make_tenant_key
from storage.profile import (
    Accounting,
    Host,
    Integers,
    Labels,
    Loss,
    NameRank,
    ProfileBuilder,
    Window,
    make_labels,
)
from storage.stack_tree import StackLists, lists_of

DAY_NS = 1_780_000_000_000_000_000 // (86_400 * NS_PER_S) * (86_400 * NS_PER_S)
MINUTE_NS = 60 * NS_PER_S
STACKS = 500_000
HOUR = 9
"""The hour that is made by default: `search` is deployed in it."""

CPUS = 4
_TICKS = CPUS * 99 * 60
_SAMPLES = 3_000
"""Of a host in a minute on average: 0.5 busy CPUs, some 1,500 different stacks."""
_SWING, _HOST_SD = 0.4, 0.2
_SLOPE, _FLATTENED = 1.3, 8.0
"""Of rank r a stack has (r + 8) ** -1.3 of the samples."""
_HOTTEST = 300
"""Of a service: their frames are in the tables of each of its objects."""
_ROLLOUT = 20
"""Minutes from the first host of a deployment to the last."""
_MISSING, _TOMBSTONES, _LOSSES = 1 / 5_000, 1 / 5_000, 1 / 100
_LABELS = ("service", "version", "comm", "pid", "thread")

_Running = tuple[tuple[int, int], ...]
"""Services and their versions, as indices."""


class Drawn(NamedTuple):
    """A window of a host: rows of (label set, stack, samples), and what it says of itself.

    `sets` are indices into `Fleet.label_sets`; `stacks` are the fleet's numbers. Rows are sorted by
    both, and each pair is in one of them. A tombstone has none.
    """

    host: int
    window: Window
    running: _Running
    sets: Integers
    stacks: Integers
    samples: Integers
    accounting: Accounting


class Fleet:
    """Makes the windows of any host and minute of a day.

    Attributes:
        hosts: their names and ids.
        services: what they run, and `programs` what that has on its stacks.
        stacks: how many numbers of stacks there are; those of two versions differ.
    """

    def __init__(
        self, hosts: int, *, stacks: int = STACKS, seed: int = 1, layout: Layout = FIVE
    ) -> None:
        """Make so many stacks a service, which takes some seconds."""
        self.hosts = [
            Host(f"node-{i:05}", hashlib.sha256(f"node-{i}".encode()).hexdigest()[:16])
            for i in range(hosts)
        ]
        self._seed = seed
        self._kinds = layout.kinds
        self.services = layout.services
        self.programs = Programs(np.random.default_rng(seed), stacks, layout)
        self.stacks = self.programs.stacks
        self._shape_of = functools.cache(self._make_shape)
        self._sets_of = functools.lru_cache(maxsize=4)(self._make_sets)

    def draw(self, host: int, minute: int) -> Drawn | None:
        """Return the window of a host that starts at a minute of the day; None if it has none."""
        random = np.random.default_rng((self._seed, host, minute))
        is_missing, has_losses, is_tombstone = random.random(3) < (_MISSING, _LOSSES, _TOMBSTONES)
        if is_missing:
            return None
        running = self._running(host, minute)
        total = sum(self.services[service].share * part for service, _, part in running)
        keys, first_set = [], 0
        for service, version, part in running:
            described, program = self.services[service], self.programs.of[service]
            mean = self.mean_samples(host, minute) * described.share * part / total
            rows = _draw_rows(random, program, int(random.poisson(mean)))
            process = random.integers(0, described.processes, len(rows))
            threads = len(described.threads)
            sets = first_set + process * threads + self.programs.threads[rows]
            first_set += described.processes * threads
            keys.append(sets * self.stacks + program.numbers_of(rows, version))
        key, samples = np.unique(np.concatenate(keys), return_counts=True)
        sets, stacks = np.divmod(key, self.stacks)
        window = Window(DAY_NS + minute * MINUTE_NS, DAY_NS + (minute + 1) * MINUTE_NS)
        pairs = tuple((service, version) for service, version, _ in running)
        drawn = Drawn(host, window, pairs, sets, stacks, samples, Accounting())
        accounting = self._accounting(random, drawn, running, has_losses=bool(has_losses))
        if is_tombstone:
            none = np.zeros(0, np.int64)
            lost = {**accounting.lost, Loss.SPOOL_FULL.value: accounting.stored}
            accounting = replace(accounting, stored=0, lost=lost, stops={})
            return Drawn(host, window, pairs, none, none, none, accounting)
        return drawn._replace(accounting=accounting)

    def services_of(self, host: int) -> tuple[int, ...]:
        """Return what runs on a host, as indices."""
        return self._kinds[host % len(self._kinds)]

    def mean_samples(self, host: int, minute: int) -> float:
        """Return how many samples a minute of a host has on average."""
        load = 1 + _SWING * math.sin(2 * math.pi * (minute / 1440 - 0.3))
        return _SAMPLES * load * math.exp(_HOST_SD * math.sin(1.0 + 12.9898 * host))

    def label_sets(self, drawn: Drawn) -> list[Labels]:
        """Return the label sets that `sets` of a window refer to, without the host."""
        return self._sets_of(drawn.host, drawn.running)[0]

    def encode(self, drawn: Drawn) -> bytes:
        """Return a window as a level-0 object."""
        if not len(drawn.stacks):
            return pprof.encode(ProfileBuilder(PERIOD_NS).build(drawn.window, drawn.accounting))
        shape = self._shape_of(drawn.running)
        offsets, words = self.programs.stacks_of(drawn.stacks)
        used = shape.used(words)
        accounting = replace(drawn.accounting, misses={"no symbol": shape.misses(used)})
        return shape.encode(
            (offsets, words),
            used,
            drawn.samples,
            (self._sets_of(drawn.host, drawn.running)[1], drawn.sets),
            window=drawn.window,
            accounting=accounting,
        )

    def dictionary(self, hasher: Hasher) -> Columns:
        """Return all stacks of the fleet, without rows: number n of a window is stack n here.

        500,000 stacks a service take 1 GB, and some seconds to make.
        """
        return self.programs.dictionary(hasher, Window(DAY_NS, DAY_NS + 1440 * MINUTE_NS))

    def columns(self, drawn: Drawn, dictionary: Columns) -> Columns:
        """Return a window as `storage.query.decoding.decode_object` does, made from arrays."""
        hashes, first, which = np.unique(
            dictionary.stack_hashes[drawn.stacks], return_index=True, return_inverse=True
        )
        stacks = drawn.stacks[first]
        chosen = choose_stacks(dictionary, stacks)
        ranks = chosen.name_ranks
        is_empty = not len(stacks)
        misses = {"no symbol": int((ranks == NameRank.BOUNDED).sum())}
        accounting = replace(drawn.accounting, misses={} if is_empty else misses)
        sets, set_of = distinct(drawn.sets, len(self.label_sets(drawn)))
        rows = np.stack([set_of, which], axis=1)
        values = np.stack([drawn.samples, drawn.samples * PERIOD_NS], axis=1)
        times, time_counts = times_of(rows, values)
        present_sets, presence = presence_of(accounting)
        columns = replace(
            chosen,
            period_ns=PERIOD_NS,
            window=drawn.window,
            accounting=accounting,
            modules={} if is_empty else self._shape_of(drawn.running).modules,
            label_sets=tuple(self.label_sets(drawn)[i] for i in sets.tolist()),
            named_s=np.where(np.diff(chosen.frame_offsets) > 0, drawn.window.end_ns // NS_PER_S, 0),
            stack_hashes=hashes,
            rows=rows,
            counts=values,
            objects=object_of(drawn.window, accounting),
            times=times,
            time_counts=time_counts,
            present_sets=present_sets,
            presence=presence,
        )
        return columns.with_label("host", self.hosts[drawn.host].name)

    def key(self, drawn: Drawn, content: bytes) -> ObjectKey:
        """Return the key under which the object of a window is stored."""
        start_s = drawn.window.start_ns // NS_PER_S
        host_id = self.hosts[drawn.host].host_id
        return ObjectKey(DEFAULT_TENANT, host_id, start_s, 60, content16(content))

    def _running(self, host: int, minute: int) -> list[tuple[int, int, float]]:
        """Return what runs on a host: services, their versions, and for what part of the minute."""
        running = []
        for service in self.services_of(host):
            at = self.services[service].deployed + _ROLLOUT * host / len(self.hosts)
            before = min(max(at - minute, 0.0), 1.0)
            running += [(service, v, part) for v, part in ((0, before), (1, 1 - before)) if part]
        return running

    def _accounting(
        self,
        random: np.random.Generator,
        drawn: Drawn,
        running: Iterable[tuple[int, int, float]],
        *,
        has_losses: bool,
    ) -> Accounting:
        stored = int(drawn.samples.sum())
        lost = {Loss.MAP_BUSY.value: int(random.integers(1, 20))} if has_losses else {}
        busy = stored + sum(lost.values())
        # Half of the ticks of idle CPUs come.
        idle = max(0, (_TICKS - busy) // 2)
        kernel = int(drawn.samples[self.programs.is_kernel(drawn.stacks)].sum())
        cut = (stored - kernel) // 100
        return Accounting(
            hosts=(self.hosts[drawn.host],),
            cpus=CPUS,
            nonidle_ns=int(busy * PERIOD_NS * random.normal(1, 0.002)),
            profiled_ns=MINUTE_NS,
            ticks=busy + idle,
            idle=idle,
            stored=stored,
            lost=lost,
            stops={"root": stored - kernel - cut, "kernel_thread": kernel, "hole": cut},
            services={
                self.services[service].labels(version): int(part * MINUTE_NS)
                for service, version, part in running
            },
            agent_cpu_ns=int(random.normal(900e6, 50e6)),
            agent_rss_bytes=50 << 20,
        )

    def _make_shape(self, running: _Running) -> Shape:
        hottest, modules, texts = [], {}, {}
        for service, version in running:
            program, described = self.programs.of[service], self.services[service]
            stacks = program.numbers_of(program.by_rank[:_HOTTEST], version)
            hottest.append(self.programs.stacks_of(stacks)[1])
            modules |= dict.fromkeys(program.modules[version])
            names = (described.name, described.versions[version], described.comm)
            texts |= dict.fromkeys([*_LABELS, *names, *described.threads])
        with_code = [each for each in modules if each.build_id]
        return Shape(self.programs.code, np.concatenate(hottest), with_code, list(texts))

    def _make_sets(self, host: int, running: _Running) -> tuple[list[Labels], list[bytes]]:
        sets = []
        for service, version in running:
            described = self.services[service]
            for process in range(described.processes):
                mixed = host * 7919 + service * 613 + process * 37 + version * 11_003
                for thread in described.threads:
                    labels = {
                        **dict(described.labels(version)),
                        "comm": described.comm,
                        "pid": str(300 + mixed % 4_000_000),
                        "thread": thread,
                    }
                    sets.append(make_labels(labels))
        shape = self._shape_of(running)
        return sets, [shape.label_bytes(labels) for labels in sets]


def choose_stacks(dictionary: Columns, stacks: Integers) -> Columns:
    """Return some stacks of a dictionary, and the locations that they need; without rows."""
    chosen = lists_of(dictionary.stacks.take(stacks))
    places, words = distinct(chosen.words, len(dictionary.locations))
    locations = dictionary.locations[places]
    at = np.flatnonzero(locations[:, 2])
    named = dictionary.named[locations[at, 2].astype(np.int64) - 1]
    locations[at, 2] = np.arange(1, len(at) + 1)
    frame_starts = dictionary.frame_offsets[places]
    counts = dictionary.frame_offsets[places + 1] - frame_starts
    return replace(
        dictionary,
        location_hashes=dictionary.location_hashes[places],
        locations=locations,
        named=named,
        frame_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
        frames=dictionary.frames[ranges(frame_starts, counts)],
        name_ranks=dictionary.name_ranks[places],
        named_s=dictionary.named_s[places],
        stack_hashes=dictionary.stack_hashes[stacks],
        stacks=StackLists(chosen.offsets, words.astype(np.int32)),
    )


def rank_shares(ranks: int) -> "np.ndarray":
    """Return which part of a service's samples each of its stacks has, the hottest first."""
    reached = (_FLATTENED + np.arange(ranks + 1)) ** (1 - _SLOPE)
    shares: np.ndarray = (reached[:-1] - reached[1:]) / (reached[0] - reached[-1])
    return shares


def _draw_rows(random: np.random.Generator, program: Program, count: int) -> Integers:
    """Return rows of the tables of call trees, by inverting the distribution of ranks."""
    ranks = len(program.by_rank)
    low, high = (each ** (1 - _SLOPE) for each in (_FLATTENED, _FLATTENED + ranks))
    drawn = (low - random.random(count) * (low - high)) ** (1 / (1 - _SLOPE)) - _FLATTENED
    return program.by_rank[np.clip(drawn.astype(np.int64), 0, ranks - 1)]


class Made(NamedTuple):
    """What was written: objects, their bytes, samples and rows, and the CPU time it took."""

    objects: int = 0
    size_bytes: int = 0
    samples: int = 0
    rows: int = 0
    cpu_s: float = 0.0

    def plus(self, other: "Made") -> "Made":
        return Made(*(one + more for one, more in zip(self, other, strict=True)))


def fill(
    fleet: Fleet,
    url: str,
    minutes: Sequence[int],
    *,
    endpoint: str | None = None,
    processes: int = 0,
) -> Made:
    """Store the windows of all hosts, in several processes, by default one per CPU."""
    make_tenant_key(open_store(url, endpoint), DEFAULT_TENANT)
    processes = min(processes or os.cpu_count() or 1, len(fleet.hosts))
    # They are forked, so that they share the fleet's arrays.
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def work(mine: Sequence[int]) -> None:
        results.put(_fill_hosts(fleet, open_store(url, endpoint), mine, minutes))

    started = [
        context.Process(target=work, args=(range(i, len(fleet.hosts), processes),))
        for i in range(processes)
    ]
    for each in started:
        each.start()
    for each in started:
        each.join()
    if any(each.exitcode for each in started):
        raise RuntimeError("cannot make the fleet: a process has failed")
    return functools.reduce(Made.plus, [results.get() for _ in started], Made())


def _fill_hosts(
    fleet: Fleet, store: ObjectStore, hosts: Iterable[int], minutes: Sequence[int]
) -> Made:
    keep_freed_memory()
    made, started = Made(), time.process_time()
    for host in hosts:
        for minute in minutes:
            drawn = fleet.draw(host, minute)
            if drawn is None:
                continue
            content = fleet.encode(drawn)
            _put(store, fleet.key(drawn, content).text, content)
            samples = int(drawn.samples.sum())
            made = made.plus(Made(1, len(content), samples, len(drawn.samples)))
    return made._replace(cpu_s=time.process_time() - started)


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, as workers do (`storage.query.workers`).

    Else a third of the time goes into pages that are new each time.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        mmap_threshold, trim_threshold = -3, -1
        libc.mallopt(mmap_threshold, 1 << 28)
        libc.mallopt(trim_threshold, 1 << 28)


def _put(store: ObjectStore, key: str, content: bytes) -> None:
    if not isinstance(store, DirectoryStore):
        store.put(key, content)
        return
    # Without fsync, which is not what is measured here.
    path = store.root / key
    try:
        path.write_bytes(content)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", required=True, help="a folder or s3://bucket/prefix")
    parser.add_argument("--s3-endpoint", help="URL of an S3 server other than Amazon's")
    parser.add_argument("--hosts", type=int, default=1_000)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--first-minute", type=int, default=60 * HOUR, help="of the day")
    parser.add_argument("--stacks", type=int, default=STACKS, help="of a service and day")
    parser.add_argument("--processes", type=int, default=0, help="by default one per CPU")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()
    fleet = Fleet(options.hosts, stacks=options.stacks, seed=options.seed)
    ready = time.monotonic()
    minutes = range(options.first_minute, options.first_minute + options.minutes)
    made = fill(
        fleet, options.store, minutes, endpoint=options.s3_endpoint, processes=options.processes
    )
    print(
        f"{made.objects:,} objects, {made.size_bytes / 1e6:,.0f} MB, {made.samples:,} samples,"
        f" {made.rows:,} rows: {time.monotonic() - ready:.1f} s after {ready - started:.1f} s of"
        f" preparation, CPU {made.cpu_s / max(1, made.objects) * 1e3:.2f} ms an object"
    )


if __name__ == "__main__":
    main()
