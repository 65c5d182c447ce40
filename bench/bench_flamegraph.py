"""What it takes to merge, encode, draw, cut and compare a large profile.

Workload: 200,000 distinct stacks of 30 frames that share their upper parts, 20 processes, made
from a fixed seed; and a host-minute, 4,186 stacks over 12,000 locations. Compared are two profiles
that each have nine tenths of those stacks, as two hours have most of theirs in common. Every step
is checked once for the right answer before it is timed.

Drawn twice, from lists and from a tree of the same stacks: 500,000 stacks of a random call tree, of
some 30 frames, of 20 processes, of 12,000 functions.

Run: `python bench/bench_flamegraph.py --fast` (pyperf's options; `-o FILE` keeps the figures).
"""

import functools
import random
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyperf

from bench import call_trees
from profiler.comparison import comparison
from profiler.comparison.verdict import Change, NoiseSource
from profiler.flamegraph import flamegraph
from profiler.flamegraph.differential import Pair, UnionGraph, UnionPaths
from profiler.flamegraph.flamegraph import FlameGraph, Screen
from profiler.flamegraph.paths import Paths
from profiler.flamegraph.views import View
from profiler.formats import export
from storage.columns import Columns
from storage.formats import pprof
from storage.grouping import distinct
from storage.merging import merge_columns
from storage.profile import Accounting, Profile, ProfileBuilder, Window
from storage.stack_tree import StackLists, StackTree
from symbolizer.location import AddressLocation, FileOffset, Frame, Kind, Module

LIBRARY = Module("0123abcd", "/usr/lib/libc.so.6")
SCREEN_PX = 1200
DAY_STACKS = 500_000
DAY_ZONES = call_trees.Zones(own=8_700, libraries=2_500, kernel=800)


def synthesize(stacks: int, depth: int, functions: int) -> Profile:
    """Make stacks that each keep a random part of the one before, as a server's do."""
    random_ = random.Random(1)
    builder = ProfileBuilder(period_ns=1_000_000_000 // 99)
    builder.modules[LIBRARY.build_id] = LIBRARY
    for i in range(functions):
        frame = Frame(f"function_{i}", LIBRARY.name, Kind.NATIVE)
        builder.location(AddressLocation(LIBRARY.build_id, FileOffset(16 * i)), (frame,))
    stack: list[int] = []
    stored = 0
    for i in range(stacks):
        stack = stack[: random_.randint(0, depth)]
        while len(stack) < depth:
            stack.append(int(functions * random_.random() ** 3))
        samples = random_.randint(1, 9)
        stored += samples
        builder.add((("comm", f"worker-{i % 20}"),), stack, samples)
    return builder.build(Window(0, 60_000_000_000), Accounting(ticks=stored, stored=stored))


@functools.cache
def large() -> Profile:
    return synthesize(200_000, 30, 20_000)


@functools.cache
def arrays() -> Columns:
    return Columns.of(large())


@functools.cache
def minute() -> Profile:
    return synthesize(4_186, 30, 12_000)


@functools.cache
def graph() -> FlameGraph:
    return flamegraph.build(arrays())


@functools.cache
def encoded() -> bytes:
    return pprof.encode(minute())


@functools.cache
def sides() -> Pair:
    """Two profiles and what their functions cost; the verdict on these is another's work."""
    random_ = np.random.default_rng(2)
    before, after = (part_of(arrays(), random_) for _ in range(2))
    found = comparison.of_profiles([before], [after])
    unchanged = (
        each._replace(change=Change.UNCHANGED, relative=(0.0, -0.05, 0.05))
        for each in found.functions
    )
    found = replace(found, source=NoiseSource.HISTORY, functions=tuple(unchanged))
    return Pair(found, before=before, after=after)


def part_of(profile: Columns, random_: np.random.Generator) -> Columns:
    return profile.with_rows(np.flatnonzero(random_.random(len(profile.rows)) < 0.9))


def union(pair: Pair) -> UnionGraph:
    """Join two profiles that nothing is known of yet, and draw them."""
    fresh = Pair(pair.found, before=pair.before, after=pair.after)
    return fresh.draw(fresh.view(View()), [], Screen(SCREEN_PX))


@functools.cache
def day(as_tree: bool) -> Columns:
    """Return 500,000 stacks of a random call tree, hot ones with most samples."""
    grown = call_trees.grow(np.random.default_rng(3), DAY_ZONES, DAY_STACKS, roots=60)
    lengths = np.diff(grown.offsets)
    ends = np.repeat(grown.offsets[:-1] + grown.offsets[1:] - 1, lengths)
    places, words = distinct(grown.words[ends - np.arange(len(ends))], int(grown.words.max()) + 1)
    builder = ProfileBuilder(period_ns=1_000_000_000 // 99)
    builder.modules[LIBRARY.build_id] = LIBRARY
    for place in places.tolist():
        frame = Frame(f"function_{place // call_trees.SITES}", LIBRARY.name, Kind.NATIVE)
        builder.location(AddressLocation(LIBRARY.build_id, FileOffset(16 * place)), (frame,))
    for i in range(20):
        builder.add((("comm", f"worker-{i}"),), [0], 1)
    samples = np.empty(DAY_STACKS, dtype=np.int64)
    samples[grown.by_rank] = 1 + DAY_STACKS // np.arange(1, DAY_STACKS + 1)
    stored = int(samples.sum())
    profile = Columns.of(
        replace(
            builder.build(Window(0, 86_400_000_000_000), Accounting(ticks=stored, stored=stored)),
            stack_offsets=grown.offsets,
            stack_locations=words.astype(np.int32),
            row_labels=(grown.threads % 20).astype(np.int32),
            row_stacks=np.arange(DAY_STACKS, dtype=np.int32),
            row_samples=samples,
            row_values=samples * builder.period_ns,
        )
    )
    if not as_tree:
        return profile
    assert isinstance(profile.stacks, StackLists)
    tree = StackTree.of(profile.stacks)
    assert tree is not None
    return replace(profile, stacks=tree)


@functools.cache
def day_paths(as_tree: bool, *by: str) -> Paths:
    return Paths.of(day(as_tree), by)


def draw_day(as_tree: bool, *by: str) -> FlameGraph:
    """Draw a day of which nothing is known yet."""
    return flamegraph.draw(Paths.of(day(as_tree), by), Screen(SCREEN_PX))


def redraw_day(as_tree: bool) -> FlameGraph:
    return flamegraph.draw(day_paths(as_tree), Screen(SCREEN_PX))


def zoom_day(as_tree: bool) -> FlameGraph:
    """Draw what stands on the widest box of depth 5, with the costs of those that lead to it."""
    graph = zoomed_from()
    paths = day_paths(as_tree)
    numbers = {frame: i for i, frame in enumerate(paths.frames)}
    widest = int(np.argmax(np.where(graph.depth == 5, graph.total, 0)))
    path = [numbers[frame] for frame in graph.path(widest)]
    sums = paths.sums_along(path)
    zoomed = flamegraph.draw(paths.below(path), Screen(SCREEN_PX))
    assert zoomed.total[0] == sums[-1][0]
    return zoomed


@functools.cache
def zoomed_from() -> FlameGraph:
    return draw_day(True)


@functools.cache
def days(as_tree: bool) -> Pair:
    random_ = np.random.default_rng(4)
    before, after = (merge_columns([part_of(day(as_tree), random_)]) for _ in range(2))
    return Pair(comparison.of_profiles([before], [after]), before=before, after=after)


def check_day() -> None:
    """Hold trees to lists, and print what both take."""
    lists, tree = (draw_day(as_tree, "comm") for as_tree in (False, True))
    for name in ("frame", "depth", "parent", "end", "total", "self", "samples"):
        assert np.array_equal(getattr(lists, name), getattr(tree, name)), name
    assert day_paths(False).functions() == day_paths(True).functions()
    assert np.array_equal(zoom_day(False).total, zoom_day(True).total)
    assert np.array_equal(union(days(False)).before, union(days(True)).before)
    for as_tree, name in ((False, "lists"), (True, "a tree")):
        stacks = day(as_tree).stacks
        tracemalloc.start()
        draw_day(as_tree, "comm")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(
            f"{len(stacks):,} stacks as {name}: {stacks.size:,} numbers,"
            f" {peak / 1e6:.0f} MB more to draw them by comm",
            file=sys.stderr,
        )


def check() -> None:
    both_sides = union(sides())
    for profile, total in ((sides().before, both_sides.before), (sides().after, both_sides.after)):
        assert total[0] == profile.total_value
    pruned = graph().prune(SCREEN_PX)
    functions = flamegraph.top_functions(arrays())
    both = merge_columns([arrays(), Columns.of(minute())])
    assert graph().total[0] == pruned.total[0] == large().total_value
    assert sum(row.self for row in functions) == large().total_value
    assert both.total_samples == large().total_samples + minute().total_samples
    assert pprof.decode(encoded()) == minute()
    print(f"{len(graph()):,} nodes, {len(pruned):,} drawn", file=sys.stderr)
    print(f"{len(encoded()):,} bytes of pprof for a host-minute", file=sys.stderr)


def main() -> None:
    runner = pyperf.Runner(values=5, processes=2, warmups=1)
    if not runner.parse_args().worker:
        check()
        check_day()
    small = Columns.of(minute())
    # A worker runs one of these; what it needs is made in its warm-up, which is not counted.
    runner.bench_func("arrays of a host-minute", lambda: Columns.of(minute()))
    runner.bench_func("build 200,000 stacks", lambda: flamegraph.build(arrays()))
    runner.bench_func("the same by comm", lambda: flamegraph.build(arrays(), ("comm",)))
    runner.bench_func("prune to 1,200 px", lambda: graph().prune(SCREEN_PX))
    runner.bench_func("ids of all nodes", lambda: graph().ids())
    runner.bench_func("table of functions", lambda: flamegraph.top_functions(arrays()))
    runner.bench_func("merge 200,000 + 4,186 stacks", lambda: merge_columns([arrays(), small]))
    runner.bench_func("pprof encode a host-minute", lambda: pprof.encode(minute()))
    runner.bench_func("pprof decode a host-minute", lambda: pprof.decode(encoded()))
    runner.bench_func("union of two, drawn", lambda: union(sides()))
    runner.bench_func("the same zoomed", zoomed_union)
    for as_tree, name in ((False, "lists"), (True, "a tree")):
        bench = functools.partial(bench_of, runner, f"{DAY_STACKS:,} stacks as {name}", as_tree)
        bench("drawn", draw_day)
        bench("drawn by comm", draw_day, "comm")
        bench("drawn again", redraw_day)
        bench("zoomed", zoom_day)
        bench("table of functions", lambda tree: day_paths(tree).functions())
        bench("search", lambda tree: day_paths(tree).search("function_12"))
        bench("union of two, drawn", lambda tree: union(days(tree)))
    for ending in (".folded", ".speedscope.json", ".svg"):
        runner.bench_func(f"{ending} of a host-minute", functools.partial(export_minute, ending))


def bench_of(
    runner: pyperf.Runner,
    workload: str,
    as_tree: bool,
    name: str,
    work: Callable[..., object],
    *by: str,
) -> None:
    runner.bench_func(f"{workload}: {name}", lambda: work(as_tree, *by))


@functools.cache
def viewed() -> UnionPaths:
    return sides().view(View())


def zoomed_union() -> UnionGraph:
    """Draw what stands on the first frame of the first stack."""
    paths = viewed().paths
    return sides().draw(
        viewed(), [int(paths.shape.boxes_at(paths.shape.first()[:1], 0)[0])], Screen(SCREEN_PX)
    )


def export_minute(ending: str) -> bytes:
    return export.encode(minute(), ending)


if __name__ == "__main__":
    main()
