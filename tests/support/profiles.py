"""Profiles for tests: a small one that has everything, strategies, and large synthetic ones."""

import dataclasses
import random
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from hypothesis import strategies as st

from storage.profile import (
    Accounting,
    Host,
    NameRank,
    Profile,
    ProfileBuilder,
    Window,
    adopt_module,
    make_labels,
    named_second,
)
from symbolizer.location import (
    AddressLocation,
    ElfAddress,
    FileOffset,
    Frame,
    Kind,
    Location,
    Module,
    NamedLocation,
    Segment,
)
from symbolizer.text import readable

PERIOD_NS = 1_000_000_000 // 99
WINDOW = Window(1_780_000_000_000_000_000, 1_780_000_060_000_000_000)

LIBC = Module(
    "0123abcd",
    "/usr/lib/x86_64-linux-gnu/libc.so.6",
    Kind.NATIVE,
    (Segment(ElfAddress(0x26000), FileOffset(0x26000), 0x155000),),
)
API = Module(
    "feed",
    "/srv/api",
    Kind.NATIVE,
    (Segment(ElfAddress(0x401040), FileOffset(0x1040), 0x2000),),
)
KERNEL = Module(
    "4b4b",
    "[kernel.kallsyms]",
    Kind.KERNEL,
    (Segment(ElfAddress(0xFFFFFFFF81000000), FileOffset(0), 0x1000000),),
)
MODULES = (LIBC, API, KERNEL)

HOSTILE_NAMES = (
    b"a;b",
    b"two\nlines",
    b"<script>alert(1)</script>",
    b"\x1b[31mred",
    b"\xff\xfe not UTF-8",
    "right-to-left \u202e gnp.exe".encode(),
    b"\\x3b",
    b"\\",
    b"kernel_[k]",
    b"\"quoted\" & 'single' ]]> -->",
    "漢字 wide 🔥".encode(),
    b"",
)


def native(module: Module, address: int) -> AddressLocation:
    return AddressLocation(module.build_id, FileOffset(address))


def named(function: str, kind: Kind = Kind.PYTHON, file: str = "app.py") -> NamedLocation:
    return NamedLocation(function, f"[{kind}]", kind, file, 10, 12)


def build(
    stacks: list[tuple[dict[str, str], list[Location], int]],
    names: dict[Location, tuple[Frame, ...]] | None = None,
    modules: tuple[Module, ...] = MODULES,
    accounting: Accounting | None = None,
    window: Window = WINDOW,
) -> Profile:
    """Fold (labels, root first stack, samples) into a profile whose accounting holds."""
    builder = ProfileBuilder(PERIOD_NS)
    builder.modules.update({module.build_id: module for module in modules})
    for labels, root_first, samples in stacks:
        numbers = [builder.location(each, (names or {}).get(each, ())) for each in root_first]
        builder.add(make_labels(labels), numbers, samples)
    stored = sum(samples for _, _, samples in stacks)
    if accounting is None:
        accounting = Accounting(
            hosts=(Host("web-1", "00112233445566aa"),),
            cpus=2,
            nonidle_ns=stored * PERIOD_NS,
            profiled_ns=window.end_ns - window.start_ns,
            ticks=stored + 7,
            idle=5,
            stored=stored,
            lost={"map_full": 2},
            stops={"complete": stored},
            misses={"no symbol table": 1},
            services={make_labels({"service": "api", "version": "1.5"}): 60_000_000_000},
            agent_cpu_ns=80_000_000,
            agent_rss_bytes=40_000_000,
        )
    return builder.build(window, accounting)


MAIN = native(API, 0x1100)
WORK = native(API, 0x1200)
MEMCPY = native(LIBC, 0x26500)
STRIPPED = native(LIBC, 0x30000)
READ = native(KERNEL, 0x500)
HANDLER = named("handler")
SQUARE = named("square", Kind.JIT, "")
NAMES: dict[Location, tuple[Frame, ...]] = {
    MAIN: (Frame("main", "api", Kind.NATIVE, "api.c", 40),),
    WORK: (
        Frame("clamp", "api", Kind.INLINED, "clamp.h", 7),
        Frame("work", "api", Kind.NATIVE, "api.c", 22),
    ),
    MEMCPY: (Frame("memcpy", "libc.so.6", Kind.NATIVE),),
    READ: (Frame("vfs_read", "[kernel.kallsyms]", Kind.KERNEL),),
}
API_LABELS = {"service": "api", "comm": "api", "pid": "77"}


def sample_profile() -> Profile:
    """Every kind of frame, an inlined call, recursion, an address without a name, two processes."""
    return build(
        [
            (API_LABELS, [MAIN, WORK], 5),
            (API_LABELS, [MAIN, WORK, WORK, MEMCPY], 3),
            (API_LABELS, [MAIN, READ], 2),
            (API_LABELS, [MAIN, STRIPPED], 1),
            ({"service": "jobs", "comm": "python3", "pid": "78"}, [HANDLER, SQUARE], 4),
            ({"service": "jobs", "comm": "python3", "pid": "78"}, [HANDLER, HANDLER], 1),
        ],
        NAMES,
    )


def hostile_profile() -> Profile:
    """Every hostile name as function, file and label, as they look after `readable`."""
    stacks: list[tuple[dict[str, str], list[Location], int]] = []
    for i, raw in enumerate(HOSTILE_NAMES):
        name = readable(raw)
        place = NamedLocation(name, name, Kind.PYTHON, name, 1, i)
        stacks.append(({"comm": name}, [HANDLER, place], i + 1))
    return build(stacks)


def synthetic(stacks: int, depth: int, functions: int = 20_000, seed: int = 1) -> Profile:
    """Make `stacks` distinct stacks that share their upper parts, as those of servers do."""
    random_ = random.Random(seed)
    builder = ProfileBuilder(PERIOD_NS)
    builder.modules.update({module.build_id: module for module in MODULES})
    numbers = [
        builder.location(
            native(LIBC, 0x26000 + 16 * i),
            (Frame(f"function_{i % functions}", "libc.so.6", Kind.NATIVE),),
        )
        for i in range(functions)
    ]
    stack: list[int] = []
    stored = 0
    for i in range(stacks):
        keep = min(len(stack), random_.randint(0, depth))
        stack = stack[:keep]
        while len(stack) < depth:
            stack.append(numbers[int(functions * random_.random() ** 3)])
        samples = random_.randint(1, 9)
        stored += samples
        builder.add((("comm", f"worker-{i % 20}"),), stack, samples)
    return builder.build(WINDOW, Accounting(ticks=stored, stored=stored, hosts=(Host("h", "1"),)))


texts = st.binary(max_size=12).map(readable)
counts = st.integers(0, 2**40)
labels = st.dictionaries(
    st.sampled_from(["service", "comm", "pid", "tid", "empty"]),
    st.one_of(texts, st.integers(0, 99999).map(str), st.just("007")),
    max_size=3,
)


def segments() -> st.SearchStrategy[tuple[Segment, ...]]:
    """Up to two segments that do not overlap, congruent modulo the page as the gABI asks."""
    return st.builds(
        lambda base, low, sizes: tuple(
            Segment(ElfAddress(base + (i << 20) + low), FileOffset((i << 20) + low), size)
            for i, size in enumerate(sizes)
        ),
        st.sampled_from([0, 0x400000, 0xFFFFFFFF80000000]),
        st.integers(0, 4095),
        st.lists(st.integers(1, 1 << 19), max_size=2),
    )


def modules() -> st.SearchStrategy[tuple[Module, ...]]:
    kinds = st.sampled_from([Kind.NATIVE, Kind.KERNEL, Kind.GO])
    ids = st.sampled_from(["aa", "bb", "hash-cc", "[exited]", "[jit]"])
    module = st.builds(Module, ids, texts.filter(bool), kinds, segments())
    return st.lists(module, max_size=4, unique_by=lambda each: each.build_id).map(tuple)


kinds = st.sampled_from([kind for kind in Kind if kind not in {Kind.LABEL, Kind.REST}])
frames = st.builds(Frame, texts.filter(bool), texts, kinds, texts, st.integers(0, 2**31))
locations = st.one_of(
    st.builds(
        AddressLocation,
        st.sampled_from(["aa", "bb", "hash-cc", "[exited]", "[jit]", "not listed"]),
        st.integers(0, 1 << 22).map(FileOffset),
    ),
    st.builds(
        NamedLocation, texts, texts, kinds, texts, st.integers(0, 2**31), st.integers(0, 2**31)
    ),
)
accountings = st.builds(
    Accounting,
    hosts=st.lists(st.builds(Host, texts, texts), max_size=3, unique=True).map(sorted).map(tuple),
    cpus=counts,
    nonidle_ns=counts,
    profiled_ns=counts,
    ticks=counts,
    idle=counts,
    filtered=counts,
    stored=counts,
    lost=st.dictionaries(texts, counts, max_size=2),
    stops=st.dictionaries(texts, counts, max_size=2),
    uncounted=counts,
    misses=st.dictionaries(texts, counts, max_size=2),
    services=st.dictionaries(labels.map(make_labels), counts, max_size=2),
    agent_cpu_ns=counts,
    agent_rss_bytes=counts,
)
windows = st.tuples(counts, counts).map(lambda pair: Window(min(pair), max(pair)))


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Any profile: named or not, with inlined calls, odd labels and an accounting of any shape."""
    names = draw(st.dictionaries(locations, st.lists(frames, max_size=3).map(tuple), max_size=6))
    places = sorted(names, key=repr)
    stack = st.lists(st.sampled_from(places), max_size=5) if places else st.just([])
    rows = draw(st.lists(st.tuples(labels, stack, st.integers(1, 1000)), max_size=6))
    accounting, window = draw(accountings), draw(windows)
    return build(rows, names, draw(modules()), accounting, window)


def named_locations(profile: Profile) -> dict[Location, tuple[Frame, ...]]:
    """Return how each location is shown, which equality of profiles leaves out."""
    return {place: profile.frames(i) for i, place in enumerate(profile.locations)}


def merge(profiles: Iterable[Profile]) -> Profile:
    """Add profiles up row by row: the slow and obvious way that merging arrays is held to."""
    profiles = list(profiles)
    first = profiles[0]
    builder = ProfileBuilder(min(p.period_ns for p in profiles), first.type, first.unit)
    window, accounting = first.window, Accounting()
    names = _best_names(profiles)
    for profile in profiles:
        for row in profile.rows():
            numbers = [builder.location(each, names[each]) for each in row.stack]
            builder.add(row.labels, numbers, row.samples, row.value)
            for place in row.stack:
                if isinstance(place, AddressLocation) and place.build_id in profile.modules:
                    adopt_module(builder.modules, profile.modules[place.build_id])
        window = window.union(profile.window)
        accounting = accounting.merge(profile.accounting)
    return builder.build(window, accounting)


def _best_names(profiles: Iterable[Profile]) -> dict[Location, tuple[Frame, ...]]:
    """Return the names of each location on a stack, as `NameRank` says which."""
    best: dict[Location, tuple[NameRank, int, tuple[Frame, ...]]] = {}
    for profile in profiles:
        used = {place for row in profile.rows() for place in row.stack}
        for place, names in zip(profile.locations, profile.names, strict=True):
            rank, named_s = NameRank.of(names), named_second(profile.window)
            if place in used and (rank, named_s) > best.get(place, (NameRank.NONE, -1))[:2]:
                best[place] = rank, named_s, names
    return {place: names for place, (_, _, names) in best.items()}


def having(profile: Profile, keep: Callable[[Mapping[str, str]], bool]) -> Profile:
    """Return the rows whose labels are to be kept; the accounting stays that of all rows."""
    kept = np.array([keep(dict(labels)) for labels in profile.label_sets], dtype=bool)
    chosen = kept[profile.row_labels]
    columns = ("row_labels", "row_stacks", "row_samples", "row_values")
    rows = {name: getattr(profile, name)[chosen] for name in columns}
    return merge([dataclasses.replace(profile, **rows)])


def with_values(profile: Profile, values: list[int]) -> Profile:
    """Replace the values of the rows, in their order."""
    return dataclasses.replace(profile, row_values=np.array(values, dtype=np.int64))


def samples_only(profile: Profile) -> Profile:
    """Take away the clock: what is left is what folded text knows."""
    return dataclasses.replace(
        profile, type="samples", unit="count", period_ns=1, row_values=profile.row_samples
    )
