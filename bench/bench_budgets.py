"""What one process can make a window take: memory of the sampler, encoding, and the object.

No kernel and no process: 499 samples a second of stacks of 254 frames go through the sampler's own
code, as long as `--seconds` says. Each kind runs in a process of its own. Return addresses are made
up outside of all mappings; at random in 64 MB of anonymous memory; or of 2,000, so that there are
few locations and each stack is another one. In the last kind each sample has a new thread name.

`python bench/bench_budgets.py [--seconds 45]`
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
from serving import Row, rss_mb, show

from bpf.samples import Drain, RawSample
from profiler.agent.cost import return_large_blocks
from profiler.agent.frames import FrameNumbers, Locators, Numbering
from profiler.agent.window import Clocks, OpenWindow
from storage.formats import pprof
from storage.profile import Accounting, Window
from symbolizer.location import AddressLocation, FileOffset
from symbolizer.maps import Mapping, MappingTable

PER_SECOND, DEPTH = 499, 254
BASE, SIZE = 0x7F0000000000, 64 << 20
NO_WORDS = np.zeros(0, np.uint64)
Stacks = Callable[[np.random.Generator], np.ndarray]
KINDS: dict[str, Stacks] = {
    "outside": lambda random: random.integers(1 << 40, (1 << 40) + SIZE, (PER_SECOND, DEPTH)),
    "anonymous": lambda random: random.integers(BASE, BASE + SIZE, (PER_SECOND, DEPTH)),
    "few": lambda random: BASE + random.integers(0, 2_000, (PER_SECOND, DEPTH)),
    "threads": lambda _: np.full((PER_SECOND, 2), BASE),
}


def sample(words: np.ndarray, second: int) -> RawSample:
    now_ns = second * 1_000_000_000
    return RawSample(
        *(7, 7, 1, 1, 1, b"hostile", b"hostile", now_ns, now_ns, 1, "root", words, NO_WORDS)
    )


def measure(kind: str, seconds: int) -> list[Row]:
    return_large_blocks()
    table = MappingTable.of([Mapping(BASE, BASE + SIZE, 0, b"//anon")])
    window = OpenWindow(1, lambda: Clocks(0, 0, 0, 0, 0))
    frames = FrameNumbers(
        Numbering(window.builder.location, window.builder.knows, window.bounded.rest),
        Locators(
            lambda _generation, _table, words: [
                AddressLocation("[jit]", FileOffset(word)) for word in words.tolist()
            ],
            lambda _words: [],
            lambda _generation, _frame: None,
            lambda _mappings: True,
        ),
        window.bounded.locations,
    )
    random = np.random.default_rng(1)
    before_mb, begun_s = rss_mb(os.getpid()), time.process_time()
    longest_s = 0.0
    for second in range(seconds):
        words = KINDS[kind](random).astype(np.uint64)
        samples = [sample(each, second) for each in words]
        second_s = time.process_time()
        window.count(Drain(samples, PER_SECOND, 0, 0, {}))
        stacks = frames.user(table, samples)
        for number, (each, stack) in enumerate(zip(samples, stacks, strict=True)):
            thread = f"t{second}-{number}" if kind == "threads" else "t"
            labels = (("comm", "hostile"), ("pid", "7"), ("service", "x"), ("thread", thread))
            window.add(each, stack[::-1], labels)
        longest_s = max(longest_s, time.process_time() - second_s)
    spent_s, begun_s = time.process_time() - begun_s, time.process_time()
    profile = window.builder.build(Window(0, 1), Accounting())
    content = pprof.encode(profile)
    encoding_s = time.process_time() - begun_s
    assert profile.total_samples == seconds * PER_SECOND
    assert pprof.decode(content).total_samples == profile.total_samples
    return [
        (f"{kind}: growth with encoding", rss_mb(os.getpid()) - before_mb, "MB", 10.0),
        (f"{kind}: CPU", 100 * spent_s / seconds, "% of one", None),
        (f"{kind}: longest turn", longest_s, "s", None),
        (f"{kind}: encoding", encoding_s, "s", None),
        (f"{kind}: object", len(content) / 1e6, "MB", None),
        (f"{kind}: locations", len(profile.locations), "", None),
        (f"{kind}: rows", len(profile.row_stacks), "", None),
    ]


def rows(seconds: int) -> Iterator[Row]:
    context = multiprocessing.get_context("spawn")
    for kind in KINDS:
        with context.Pool(1) as pool:
            yield from pool.apply(measure, (kind, seconds))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=45)
    return 1 if show(rows(parser.parse_args().seconds)) else 0


if __name__ == "__main__":
    sys.exit(main())
