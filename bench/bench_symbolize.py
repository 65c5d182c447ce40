"""Measure symbol look-ups, loading the largest library, and reading the kernel's symbols.

    python bench/bench_symbolize.py [--library PATH] [pyperf options]

The library is libLLVM-14 by default (34,323 named functions, 61,148 known only by their FDE range,
110 MB; the package libllvm14). `names` resolves 10,000 different addresses in functions named
before; look-ups per second are 10,000 divided by the time of a round, which is one call. `find` is
the look-up alone. Loading is timed without the disk cache (cold) and from it; memory is the growth
of a fresh process.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyperf

from symbolizer.location import AddressLocation, FileOffset
from symbolizer.maps import Mapping, MappingTable
from symbolizer.symbolizer import Symbolizer
from symbolizer.symbols.kernel import read_kernel_map

LIBRARY = "/usr/lib/x86_64-linux-gnu/libLLVM-14.so.1"
LOOK_UPS = 10_000
# A pid that cannot exist, so that files are found by their path.
NO_PROCESS = 2**22 + 1
BASE = 0x7F0000000000


def map_library(path: Path) -> MappingTable:
    status = path.stat()
    device = (os.major(status.st_dev), os.minor(status.st_dev))
    mapping = Mapping(BASE, BASE + status.st_size, 0, bytes(path), device, status.st_ino)
    return MappingTable.of([mapping])


def load(path: Path, cache: Path | None) -> Symbolizer:
    """Return a symbolizer that has loaded the table, by locating one address."""
    symbolizer = Symbolizer(cache)
    address = np.array([BASE + path.stat().st_size // 2], dtype=np.uint64)
    location = symbolizer.locate(NO_PROCESS, map_library(path), address)[0]
    assert symbolizer.modules[location.build_id].segments, "the library was not read"
    return symbolizer


def load_and_close(path: Path, cache: Path | None) -> None:
    load(path, cache).close()


def choose_places(symbolizer: Symbolizer) -> list[AddressLocation]:
    """Return addresses spread over the file that have frames."""
    (module,) = symbolizer.modules.values()
    segment = module.segments[0]
    chance = np.random.default_rng(1)
    places: list[AddressLocation] = []
    while len(places) < LOOK_UPS:
        offsets = chance.integers(segment.p_offset, segment.p_offset + segment.p_filesz, 40_000)
        drawn = [AddressLocation(module.build_id, FileOffset(o)) for o in offsets.tolist()]
        named = zip(drawn, symbolizer.names(drawn), strict=True)
        places += [place for place, frames in named if frames]
    return places[:LOOK_UPS]


def measure_growth(path: Path, cache: Path | None) -> tuple[int, int]:
    """Return by how many KiB a fresh process grows with the table, and its peak growth."""
    code = (
        "import sys, gc; sys.path[:0] = sys.argv[1:3]; import bench_symbolize as b, pathlib\n"
        "def status(key):\n"
        "    text = pathlib.Path('/proc/self/status').read_text()\n"
        "    return int(text.partition(key + ':')[2].split()[0])\n"
        "pathlib.Path('/proc/self/clear_refs').write_text('5')\n"
        "before = status('VmRSS')\n"
        "s = b.load(pathlib.Path(sys.argv[3]), sys.argv[4] and pathlib.Path(sys.argv[4]) or None)\n"
        "gc.collect(); print(status('VmRSS') - before, status('VmHWM') - before)\n"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", code, here, here.parent, path, str(cache or "")]
    output = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    held, peak = map(int, output.split())
    return held, peak


def read_kernel() -> None:
    assert not read_kernel_map(lambda *_: None).is_hidden, "kallsyms shows no addresses"


def add_library(command: list[str], args: object) -> None:
    command.extend(["--library", args.library])  # type: ignore[attr-defined]  # argparse's


def main() -> None:
    runner = pyperf.Runner(add_cmdline_args=add_library, processes=3, values=5)
    runner.argparser.add_argument("--library", default=LIBRARY)
    args = runner.parse_args()
    path = Path(os.path.realpath(args.library))
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        symbolizer = load(path, cache)
        places = choose_places(symbolizer)
        (build_id,) = symbolizer.modules
        table = symbolizer._modules.table(build_id)  # noqa: SLF001 - timed on its own
        assert table is not None
        offsets = np.array([place.offset for place in places], dtype=np.uint64)
        runner.bench_func("names, 10,000 warm", symbolizer.names, places)
        runner.bench_func("find, 10,000", table.find, offsets)
        runner.bench_func("load the library cold", load_and_close, path, None)
        runner.bench_func("load the library from the cache", load_and_close, path, cache)
        if os.geteuid() == 0:
            runner.bench_func("read the kernel's symbols", read_kernel)
        if not args.worker:
            for label, place in (("cold", None), ("from the cache", cache)):
                held, peak = measure_growth(path, place)
                print(f"memory for the library {label}: +{held} KiB, peak +{peak} KiB")
        symbolizer.close()


if __name__ == "__main__":
    main()
