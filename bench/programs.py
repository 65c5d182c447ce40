"""What a fleet runs: services in versions, their code, and all stacks that they have in a day.

Stacks have numbers: those of a service in a version are a block, in the order of its call tree. Two
versions share the tree; the code of the second has another build id, or other lines.
"""

import hashlib
import os
from dataclasses import replace
from typing import NamedTuple

import binaries
import numpy as np
from binaries import Binary
from call_trees import SITES, CallTree, Zones, grow
from code_tables import Code, root_first

from storage.columns import Columns
from storage.grouping import ranges
from storage.hashing import Hasher
from storage.profile import Indices, Integers, Labels, Window, make_labels
from symbolizer.location import Module

NEVER = 1440


class Service(NamedTuple):
    """What runs: its labels, its processes on a host, the minute of the day it is deployed at."""

    name: str
    versions: tuple[str, ...]
    comm: str
    threads: tuple[str, ...]
    processes: int
    share: float
    """Of the load of its hosts, beside that of other services."""
    deployed: int = NEVER
    like: str = ""
    """The service whose program it runs a build of; by default its own."""

    @property
    def program(self) -> str:
        return self.like or self.name

    def labels(self, version: int) -> Labels:
        return make_labels({"service": self.name, "version": self.versions[version]})


SERVICES = (
    Service("search", ("2026.11.3", "2026.11.4"), "searchd",
            ("searchd", "index-reader", "scorer", "merge", "rpc-in", "rpc-out"), 2, 1.2, 560),
    Service("checkout", ("1.42.0", "1.43.0"), "gunicorn", ("gunicorn", "worker", "db-pool"), 8,
            0.8, 840),
    Service("gateway", ("v3.7.2",), "node", ("node", "libuv-worker", "V8Worker"), 2, 0.8),
    Service("billing", ("7.0.9",), "billing", ("billing",), 1, 0.8),
    Service("orders-db", ("15.12",), "postgres", ("postgres",), 12, 1.1),
    Service("[kernel]", (os.uname().release,), "kworker",
            ("kworker/u8:2-events_unbound", "kswapd0", "ksoftirqd/1", "jbd2/nvme0n1p1-8"), 1,
            0.03),
)  # fmt: skip


class Layout(NamedTuple):
    """What a fleet runs, the kernel's threads last, and which of these each kind of host runs."""

    services: tuple[Service, ...]
    kinds: tuple[tuple[int, ...], ...]
    functions: int = 2_000
    """Of a service's own code."""


FIVE = Layout(SERVICES, ((0, 2, 5), (1, 2, 5), (3, 4, 5), (0, 1, 5)))
ONE = Layout(
    (SERVICES[0]._replace(versions=("2026.11.4",), deployed=NEVER), SERVICES[-1]), ((0, 1),)
)


def _many(count: int) -> Layout:
    """Return services like those of FIVE, two on a host: few on many hosts, most on few."""
    services = []
    for i in range(count):
        like = SERVICES[i % (len(SERVICES) - 1)]
        build = f"{i // (len(SERVICES) - 1):02}"
        deployed = like.deployed if build == "00" else NEVER
        versions = like.versions if build == "00" else like.versions[-1:]
        name = f"{like.name}-{build}"
        services.append(
            like._replace(name=name, versions=versions, deployed=deployed, like=like.name)
        )
    kinds = []
    for i in range(2 * count):
        first, second = int(count * (i / (2 * count)) ** 2), (7 * i + 3) % count
        kinds.append((first, second if second != first else (second + 1) % count, count))
    return Layout((*services, SERVICES[-1]), tuple(kinds), functions=600)


FIFTY = _many(50)
LAYOUTS = {"five": FIVE, "one": ONE, "fifty": FIFTY}

_LIBRARY_FUNCTIONS, _KERNEL_FUNCTIONS = 700, 1_200
_KERNEL_STACKS = 20
"""The kernel's threads have so many times fewer stacks than a service."""
_MOVED_LINES = 5
_CHUNK_STACKS = 100_000


class Program(NamedTuple):
    """Where a service's stacks are.

    `numbers` is the first number of the stacks of each version. In the tables of the call trees,
    which all versions share, `by_rank` are the rows of the stacks, the hottest first.
    """

    first: int
    by_rank: Integers
    numbers: tuple[int, ...]
    modules: tuple[list[Module], ...]

    def numbers_of(self, rows: Integers, version: int) -> Integers:
        return rows + (self.numbers[version] - self.first)


class Programs:
    """The programs of all services.

    Attributes:
        code: what the words of stacks refer to.
        of: a program for each of the layout's services.
        stacks: how many numbers of stacks there are.
        threads: by row of the tables of the call trees, in which of its service's threads it is.
    """

    def __init__(self, random: np.random.Generator, stacks: int, layout: Layout = FIVE) -> None:
        """Read the binaries and grow so many stacks a service, 60 MB for 500,000."""
        self.code = Code()
        self.of: list[Program] = []
        self._layout = layout
        trees, self._places = self._make(random, stacks)
        depths = np.concatenate([np.diff(each.offsets) for each in trees])
        self._offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(depths)])
        self._words = np.concatenate([each.words for each in trees])
        self.threads = np.concatenate([each.threads for each in trees])
        blocks = [
            (number, number - program.first, version)
            for program in self.of
            for version, number in enumerate(program.numbers)
        ]
        self._block_starts, self._block_shifts, self._block_versions = np.array(blocks).T
        self.stacks = self.of[-1].numbers[0] + len(self.of[-1].by_rank)

    def is_kernel(self, numbers: Integers) -> np.ndarray:
        """Return whether stacks are those of the kernel's threads."""
        return numbers >= self.of[-1].numbers[0]

    def stacks_of(self, numbers: Integers) -> tuple[Integers, Indices]:
        """Return offsets and words of stacks: places of the code, leaf first."""
        block = np.searchsorted(self._block_starts, numbers, side="right") - 1
        rows, version = numbers - self._block_shifts[block], self._block_versions[block]
        starts = self._offsets[rows]
        lengths = self._offsets[rows + 1] - starts
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        words = self._words.take(ranges(starts, lengths))
        found = self._places[0].take(words)
        if version.any():
            later = np.flatnonzero(np.repeat(version, lengths))
            found[later] = self._places[1].take(words[later])
        return offsets, found

    def dictionary(self, hasher: Hasher, window: Window) -> Columns:
        """Return all stacks, without rows: that of number n is stack n."""
        chunks = np.array_split(np.arange(self.stacks), max(1, self.stacks // _CHUNK_STACKS))
        is_used = np.zeros(len(self.code) * SITES, dtype=bool)
        for chunk in chunks:
            is_used[self.stacks_of(chunk)[1]] = True
        numbers = (np.cumsum(is_used) - 1).astype(np.int32)
        words, lengths = [], []
        for chunk in chunks:
            offsets, leaf_first = self.stacks_of(chunk)
            words.append(numbers.take(root_first(offsets, leaf_first)))
            lengths.append(np.diff(offsets))
        ends = np.cumsum(np.concatenate(lengths))
        offsets = np.concatenate([np.zeros(1, np.int64), ends])
        places = np.flatnonzero(is_used)
        return self.code.columns(places, offsets, np.concatenate(words), hasher, window)

    def _make(
        self, random: np.random.Generator, stacks: int
    ) -> tuple[list[CallTree], list[Indices]]:
        """Grow each service's stacks; return by version which place of the code each word is."""
        libraries = [
            found
            for patterns in binaries.SHARED
            if (path := binaries.find_file(patterns))
            and (found := binaries.read_native(path, _LIBRARY_FUNCTIONS, random))
        ]
        kernel = binaries.read_kernel(_KERNEL_FUNCTIONS, random)
        shared = [self.code.add(each) for each in (*libraries, kernel)]
        none = np.zeros(0, np.int64)
        in_libraries = np.concatenate([none, *shared[:-1]])
        places: tuple[list[Indices], list[Indices]] = ([], [])
        trees: list[CallTree] = []
        first = number = first_place = 0
        own_of: dict[str, Binary | None] = {}
        named: dict[str, Integers] = {}
        for service in self._layout.services:
            if service.program not in own_of:
                own_of[service.program] = _own_binary(
                    service.program, self._layout.functions, random
                )
            own = _built_for(service, own_of[service.program])
            versions = len(service.versions)
            modules = [[each.module for each in (*libraries, kernel)]] * 2
            if own is None:
                zones, count = Zones(0, 0, len(shared[-1])), max(1, stacks // _KERNEL_STACKS)
                functions = [shared[-1]] * 2
            else:
                zones = Zones(len(own.functions), len(in_libraries), len(shared[-1]))
                count = stacks // versions
                # Named code is the same in whatever runs it.
                if own.is_named and service.program in named:
                    owned = [named[service.program]] * 2
                else:
                    owned = [self.code.add(own)] * 2
                    named[service.program] = owned[0]
                modules = [[own.module, *modules[0]]] * 2
                if versions > 1:
                    owned[1], modules[1] = self._deploy(own, owned[0], modules[0])
                functions = [np.concatenate([each, in_libraries, shared[-1]]) for each in owned]
            tree = grow(random, zones, count, len(service.threads))
            by_rank = first + tree.by_rank
            numbers = tuple(number + i * count for i in range(versions))
            self.of.append(Program(first, by_rank, numbers, tuple(modules[:versions])))
            for theirs, mine in zip(places, functions, strict=True):
                sites = mine[:, None] * SITES + np.arange(SITES)
                theirs.append(sites.reshape(-1).astype(np.int32))
            trees.append(replace(tree, words=tree.words + np.int32(first_place)))
            first += count
            number += versions * count
            first_place += zones.total * SITES
        return trees, [np.concatenate(each) for each in places]

    def _deploy(
        self, own: Binary, functions: Integers, modules: list[Module]
    ) -> tuple[Integers, list[Module]]:
        """Return a service's functions in its next version, and its modules."""
        if not own.is_named:
            build_id = hashlib.sha1(own.module.build_id.encode(), usedforsecurity=False).hexdigest()
            module = replace(own.module, build_id=build_id)
            return self.code.add(Binary(module, own.functions)), [module, *modules[1:]]
        known = set(own.functions)
        moved = [each._replace(line=each.line + _MOVED_LINES) for each in own.functions]
        has_moved = [each not in known and each.line % 3 == 0 for each in moved]
        changed = [each for each, is_moved in zip(moved, has_moved, strict=True) if is_moved]
        later = functions.copy()
        later[np.flatnonzero(has_moved)] = self.code.add(Binary(own.module, changed))
        return later, modules


def _own_binary(program: str, functions: int, random: np.random.Generator) -> Binary | None:
    """Return the program that a service runs; None for the kernel's threads."""
    if program == "[kernel]":
        return None
    if program == "checkout":
        return binaries.read_python(functions, random)
    path = binaries.find_file(binaries.PROGRAMS[program]) or binaries.interpreter()
    found = binaries.read_native(path, functions, random)
    if found is None:
        raise RuntimeError(f"cannot read the functions of {path}")
    return found


def _built_for(service: Service, found: Binary | None) -> Binary | None:
    """Return a program as a service has it: in a file of its own, whatever it was made from."""
    if found is None or found.is_named:
        return found
    path = f"/srv/{service.name}/bin/{found.module.name}"
    module = replace(found.module, path=path)
    if service.like:
        text = f"{service.name} {module.build_id}"
        build_id = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        module = replace(module, build_id=build_id)
    return Binary(module, found.functions)
