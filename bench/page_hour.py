"""An hour of a fleet as a profile: 200,000 stacks and 3.6 million boxes, from a fixed seed.

Five programs in four languages (C++, Python, Go, Java, C++) and the kernel below all of them. Each
has some thousands of functions in layers; a function calls up to eight of the next layers, the
first of them most. A stack is a walk from the program's start along such calls; deeper ones end
sooner, and a quarter of them goes on in the kernel. Walks are taken until 200,000 different ones
are seen: a stack's samples are how often it was walked, so a few are hot and most were seen once,
as in real profiles. Names are put together as people put them together: namespaces, classes,
arguments and templates in C++, packages and receivers in Go, files in Python.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from storage.profile import Accounting, Host, Profile, ProfileBuilder, Window, make_labels
from symbolizer.location import (
    AddressLocation,
    FileOffset,
    Frame,
    Kind,
    Location,
    Module,
    NamedLocation,
)

STACKS = 200_000
PERIOD_NS = 1_000_000_000 // 99
MINUTE_NS = 60_000_000_000

_WALKS_AT_ONCE = 100_000
_LAYERS = 52
_CALLEES = 8
_DEEPEST = 72
_KERNEL_LAYERS = 16
_TO_KERNEL = 0.25
_STRAIGHT = 0.49
_STRAIGHTNESS = 0.98
_SLOPE = 1.8
"""Of how often a function calls its first callee, its second, and so on: a power law."""


def _words(text: str) -> list[str]:
    return text.split()


_NOUNS = _words(
    "account address batch block buffer cache cart catalog chunk client column config connection"
    " context cursor document edge encoder event feature field filter frame graph handler header"
    " index invoice iterator key ledger lock message metric node offer order packet page parser"
    " partition payload payment plan posting price product profile query queue record region"
    " request response result route row rule scheduler schema segment session shard signal slot"
    " snapshot span stock stream table task tensor term ticket token trace transaction tree user"
    " value vector view wallet worker"
)
_VERBS = _words(
    "accept add append apply build check collect commit compare compute convert copy create decode"
    " dispatch do encode evaluate execute fetch find flush format get handle insert intersect"
    " invalidate load lookup make map match merge next normalize notify open parse peek poll"
    " prepare process pull push read reduce release render resolve run scan score select send"
    " serialize set shuffle sort split start store sum to transform update validate visit wait"
    " walk write"
)
_SPACES = _words("search index net storage rpc base ranking text sql cluster io metrics auth")


@dataclass(frozen=True, slots=True)
class _Program:
    """What runs: its labels, its binary, and how many functions it and the kernel below have."""

    service: str
    version: str
    module: Module
    kind: Kind
    functions: int
    share: float


def _module(number: int, path: str, kind: Kind = Kind.NATIVE) -> Module:
    return Module(f"{number:040x}", path, kind)


_KERNEL = _module(1, "[kernel.kallsyms]", Kind.KERNEL)
_POSTGRES = _module(6, "/usr/lib/postgresql/16/bin/postgres")
_GATEWAY = _module(4, "/usr/local/bin/gateway", Kind.GO)
_PROGRAMS = (
    _Program("search", "2026.5.1", _module(2, "/srv/search/bin/searchd"), Kind.NATIVE, 9000, 0.4),
    _Program("checkout", "1.42.0", _module(3, "[python]"), Kind.PYTHON, 3000, 0.25),
    _Program("gateway", "v3.7.2", _GATEWAY, Kind.GO, 3500, 0.2),
    _Program("ledger", "7.0.9", _module(5, "[jit]"), Kind.JIT, 3000, 0.1),
    _Program("postgres", "16.4", _POSTGRES, Kind.NATIVE, 1500, 0.05),
)
_KERNEL_FUNCTIONS = 1200


def minutes(start_ns: int, seed: int = 1) -> Iterator[Profile]:
    """Return the fleet's hour as sixty profiles of a minute, together STACKS different stacks."""
    random = np.random.default_rng(seed)
    names = _Names(random)
    graphs = [_calls(random, program.functions, _LAYERS) for program in _PROGRAMS]
    below = _calls(random, _KERNEL_FUNCTIONS, _KERNEL_LAYERS)
    rows, samples = _walk(random, graphs, below)
    tables = [
        [names.of(program, i, graph.layer[i]) for i in range(program.functions)]
        for program, graph in zip(_PROGRAMS, graphs, strict=True)
    ]
    kernel = [names.of_kernel(i) for i in range(_KERNEL_FUNCTIONS)]
    firsts = np.cumsum([0, *(len(table) for table in tables)])
    everything = [*(each for table in tables for each in table), *kernel]
    which = random.integers(0, 60, len(rows))
    for minute in range(60):
        mine = np.flatnonzero(which == minute)
        window = Window(start_ns + minute * MINUTE_NS, start_ns + (minute + 1) * MINUTE_NS)
        yield _build(everything, firsts, rows[mine], samples[mine], window)


def _build(
    everything: list[tuple[Location, Frame]],
    firsts: np.ndarray,
    rows: np.ndarray,
    samples: np.ndarray,
    window: Window,
) -> Profile:
    builder = ProfileBuilder(PERIOD_NS)
    modules = [_KERNEL, *(program.module for program in _PROGRAMS)]
    builder.modules.update({each.build_id: each for each in modules if each.path[0] != "["})
    builder.modules[_KERNEL.build_id] = _KERNEL
    used = np.unique(rows[rows >= 0])
    numbers = np.zeros(len(everything), dtype=np.int64)
    for place in used.tolist():
        location, frame = everything[place]
        names = (frame,) if isinstance(location, AddressLocation) else ()
        numbers[place] = builder.location(location, names)
    owners = np.searchsorted(firsts, rows[:, 0], side="right") - 1
    for row, owner, count in zip(rows, owners.tolist(), samples.tolist(), strict=True):
        program = _PROGRAMS[owner]
        labels = {
            "service": program.service,
            "version": program.version,
            "comm": program.service,
            "pid": str(1000 + owner),
        }
        builder.add(make_labels(labels), numbers[row[row >= 0]], count)
    stored = int(samples.sum())
    accounting = Accounting(
        hosts=(Host("web-1", "00112233445566aa"),),
        cpus=64,
        ticks=stored,
        stored=stored,
        profiled_ns=MINUTE_NS,
        nonidle_ns=stored * PERIOD_NS,
        stops={"chain_end": stored},
    )
    return builder.build(window, accounting)


@dataclass(frozen=True, slots=True)
class _Calls:
    """Who calls whom: `callees[f]` are the functions that f calls, the likeliest first."""

    layer: np.ndarray
    callees: np.ndarray
    is_straight: np.ndarray
    """It nearly always calls the first of them, as most functions of frameworks do."""
    starts: int
    """So many of the first functions are where threads begin."""


def _calls(random: np.random.Generator, functions: int, layers: int) -> _Calls:
    # Few functions near the start, most in the middle: main, frameworks, then everything else.
    weights = np.minimum(np.arange(1, layers + 1) ** 1.5, 4.0 * layers)
    bounds = np.ceil(np.cumsum(weights) / weights.sum() * functions).astype(np.int64)
    layer = np.searchsorted(bounds, np.arange(functions), side="right")
    first = np.concatenate([[0], bounds])
    # Most calls go one layer down, some two or three.
    to = np.minimum(
        layer[:, None] + random.choice((1, 2, 3), (functions, _CALLEES), p=(0.8, 0.15, 0.05)),
        layers - 1,
    )
    low, high = first[to], np.maximum(first[to + 1], first[to] + 1)
    callees = low + (random.random((functions, _CALLEES)) * (high - low)).astype(np.int64)
    is_straight = random.random(functions) < _STRAIGHT
    return _Calls(layer, np.minimum(callees, functions - 1), is_straight, int(bounds[0]))


def _walk(
    random: np.random.Generator, graphs: list[_Calls], below: _Calls
) -> tuple[np.ndarray, np.ndarray]:
    """Return different walks as rows of function numbers, -1 past their end, and their counts."""
    seen: dict[bytes, int] = {}
    counts: list[int] = []
    firsts = np.cumsum([0, *(len(graph.layer) for graph in graphs)])
    shares = [program.share for program in _PROGRAMS]
    while len(counts) < STACKS:
        rows = np.full((_WALKS_AT_ONCE, _DEEPEST + _KERNEL_LAYERS), -1, dtype=np.int32)
        owners = random.choice(len(graphs), _WALKS_AT_ONCE, p=shares)
        for owner, graph in enumerate(graphs):
            mine = np.flatnonzero(owners == owner)
            rows[mine, :_DEEPEST] = _walks_in(random, graph, len(mine), _DEEPEST, firsts[owner])
        depth = (rows >= 0).sum(axis=1)
        inner = np.flatnonzero(random.random(_WALKS_AT_ONCE) < _TO_KERNEL)
        tails = _walks_in(random, below, len(inner), _KERNEL_LAYERS, firsts[-1])
        for i in range(_KERNEL_LAYERS):
            rows[inner, depth[inner] + i] = tails[:, i]
        for row in rows:
            key = row.tobytes()
            number = seen.setdefault(key, len(counts))
            if number < len(counts):
                counts[number] += 1
            elif len(counts) < STACKS:
                counts.append(1)
            else:
                break
    width = _DEEPEST + _KERNEL_LAYERS
    content = b"".join(list(seen)[:STACKS])
    return np.frombuffer(content, np.int32).reshape(-1, width), np.array(counts, dtype=np.int64)


def _walks_in(
    random: np.random.Generator, graph: _Calls, count: int, deepest: int, first: int
) -> np.ndarray:
    rows = np.full((count, deepest), -1, dtype=np.int64)
    weights = 1 / np.arange(1, _CALLEES + 1) ** _SLOPE
    cumulative = np.cumsum(weights) / weights.sum()
    last = graph.layer[-1]
    at = random.integers(0, graph.starts, count)
    alive = np.arange(count)
    for i in range(deepest):
        rows[alive, i] = at + first
        layer = graph.layer[at]
        ends = random.random(len(alive)) < 0.2 * (layer / last) ** 3 + (layer == last)
        alive, at = alive[~ends], at[~ends]
        is_first = graph.is_straight[at] & (random.random(len(alive)) < _STRAIGHTNESS)
        choice = np.searchsorted(cumulative, random.random(len(alive)) * ~is_first)
        at = graph.callees[at, np.minimum(choice, _CALLEES - 1)]
    return rows


class _Names:
    """Makes a place and a name for each function of a program, which no other function has."""

    def __init__(self, random: np.random.Generator) -> None:
        self._random = random
        self._used: set[str] = set()

    def of(self, program: _Program, number: int, layer: int) -> tuple[Location, Frame]:
        name, kind = program.module.name, program.kind
        if layer == 0:
            usual = {Kind.GO: "runtime.goexit", Kind.PYTHON: "<module>"}.get(kind, "_start")
            function = usual if number == 0 else f"{usual}_{number}"
        elif kind is Kind.NATIVE:
            function = self._unused(self._cpp if program.service == "search" else self._c)
        else:
            of_kind = {Kind.PYTHON: self._snake, Kind.GO: self._go, Kind.JIT: self._java}
            function = self._unused(of_kind[kind])
        ending = {Kind.PYTHON: "py", Kind.GO: "go", Kind.JIT: "java"}.get(kind, "cc")
        file = f"src/{self._pick(_SPACES)}/{self._pick(_NOUNS)}.{ending}"
        line = 10 + number % 900
        frame = Frame(function, name, kind, file, line)
        if kind in {Kind.PYTHON, Kind.JIT}:
            return NamedLocation(function, name, kind, file, line - 7, line), frame
        return AddressLocation(program.module.build_id, FileOffset(0x1000 + 64 * number)), frame

    def of_kernel(self, number: int) -> tuple[Location, Frame]:
        usual = ("entry_SYSCALL_64_after_hwframe", "do_syscall_64", "asm_exc_page_fault")
        function = usual[number] if number < len(usual) else self._unused(self._c)
        place = AddressLocation(_KERNEL.build_id, FileOffset(0x1000 + 64 * number))
        return place, Frame(function, _KERNEL.name, Kind.KERNEL)

    def _unused(self, make: Callable[[], str]) -> str:
        while True:
            name = make()
            if name not in self._used:
                self._used.add(name)
                return name

    def _pick(self, words: list[str]) -> str:
        return words[int(self._random.integers(len(words)))]

    def _snake(self) -> str:
        name = f"{self._pick(_VERBS)}_{self._pick(_NOUNS)}"
        more = self._random.integers(3)
        if more == 0:
            return f"{self._camel(2)}.{name}"
        return f"_{name}" if more == 1 else f"{name}_{self._pick(_NOUNS)}"

    def _camel(self, words: int) -> str:
        return "".join(self._pick(_NOUNS).capitalize() for _ in range(words))

    def _c(self) -> str:
        ending = self._pick(["", "_locked", "_slow", "_one"])
        return f"{self._pick(_SPACES)}_{self._pick(_VERBS)}_{self._pick(_NOUNS)}{ending}"

    def _cpp(self) -> str:
        scope = f"{self._pick(_SPACES)}::{self._camel(2)}"
        if self._random.random() < 0.3:
            scope += f"<std::shared_ptr<{self._pick(_SPACES)}::{self._camel(1)}> >"
        arguments = ", ".join(
            self._pick(["unsigned long", "std::string const&", f"{self._camel(1)} const*", "int"])
            for _ in range(int(self._random.integers(3)))
        )
        return f"{scope}::{self._pick(_VERBS)}{self._camel(1)}({arguments})"

    def _go(self) -> str:
        package = f"github.com/example/gateway/internal/{self._pick(_NOUNS)}"
        verb = f"{self._pick(_VERBS).capitalize()}{self._camel(1)}"
        return (
            f"{package}.(*{self._camel(2)}).{verb}"
            if self._random.random() < 0.6
            else f"{package}.{verb}"
        )

    def _java(self) -> str:
        package = f"com.example.ledger.{self._pick(_SPACES)}"
        return f"{package}.{self._camel(2)}.{self._pick(_VERBS)}{self._camel(1)}"
