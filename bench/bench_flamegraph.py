"""What it takes to merge, encode, draw and cut a large profile.

Workload: 200,000 distinct stacks of 30 frames that share their upper parts, 20 processes, made
from a fixed seed; and a host-minute, 4,186 stacks over 12,000 locations. Every step is checked
once for the right answer before it is timed.

Run: `python bench/bench_flamegraph.py --fast` (pyperf's options; `-o FILE` keeps the figures).
"""

import random
import sys

import pyperf

from profiler import export, flamegraph
from storage import pprof
from storage.profile import Accounting, Profile, ProfileBuilder, Window, merge
from symbolizer.location import AddressLocation, FileOffset, Frame, Kind, Module

LIBRARY = Module("0123abcd", "/usr/lib/libc.so.6")
SCREEN_PX = 1200


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


def main() -> None:
    large, minute = synthesize(200_000, 30, 20_000), synthesize(4_186, 30, 12_000)
    graph = flamegraph.build(large)
    pruned = graph.prune(SCREEN_PX)
    encoded = pprof.encode(minute)

    assert graph.total[0] == pruned.total[0] == large.total_value
    assert flamegraph.top_functions(large)[0].total <= large.total_value
    assert merge([large, minute]).total_samples == large.total_samples + minute.total_samples
    assert pprof.decode(encoded) == minute

    runner = pyperf.Runner(values=3, processes=3, warmups=1)
    if not runner.parse_args().worker:
        print(f"{len(graph):,} nodes, {len(pruned):,} drawn; {len(encoded):,} bytes a host-minute",
              file=sys.stderr)  # fmt: skip
    runner.bench_func("build 200,000 stacks", flamegraph.build, large)
    runner.bench_func("build 200,000 stacks by comm", flamegraph.build, large, ("comm",))
    runner.bench_func("prune to 1,200 px", graph.prune, SCREEN_PX)
    runner.bench_func("ids of all nodes", graph.ids)
    runner.bench_func("table of functions", flamegraph.top_functions, large)
    runner.bench_func("merge 200,000 + 4,186 stacks", merge, [large, minute])
    runner.bench_func("pprof encode a host-minute", pprof.encode, minute)
    runner.bench_func("pprof decode a host-minute", pprof.decode, encoded)
    for ending in (".folded", ".speedscope.json", ".svg"):
        runner.bench_func(f"{ending} of a host-minute", export.encode, minute, ending)


if __name__ == "__main__":
    main()
