"""Measure symbol look-ups, loading the largest library, and reading the kernel's symbols.

    python bench/bench_symbolize.py [--library PATH] [pyperf options]

The library is libLLVM-14 by default (34,323 named functions, 61,148 known only by their FDE range,
110 MB; the package libllvm14). `names` is what a reader does for 10,000 addresses in functions of a
table that it has loaded: it finds them and reads and demangles the names of all their functions.
`find` is the look-up alone. Loading is timed without a table on disk (cold) and from it; memory is
the growth of a fresh process.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyperf

from symbolizer.identify import FileReader
from symbolizer.symbolizer import Symbolizer
from symbolizer.symbols.kernel import RunningKernel
from symbolizer.symbols.table import SymbolCache
from symbolizer.symbols.variants import CodeFile
from symbolizer.unwind.table import UnwindCache

LIBRARY = "/usr/lib/x86_64-linux-gnu/libLLVM-14.so.1"
LOOK_UPS = 10_000


def map_library(path: Path) -> dict[str, Any]:
    """Return what a reader needs to open a file, without a process that has it."""
    status = path.stat()
    return {
        "pids": [],
        "start": 1 << 40,
        "end": (1 << 40) + status.st_size,
        "offset": 0,
        "path": os.fsdecode(path),
        "device": [os.major(status.st_dev), os.minor(status.st_dev)],
        "inode": status.st_ino,
        "build_id": "",
    }


class Library:
    """The library, identified once."""

    def __init__(self, path: Path, tables: Path) -> None:
        self.path = path
        identity = FileReader(UnwindCache(tables)).identify(map_library(path))
        ((_, self.offset, self.size),) = identity["segments"]
        self.file = CodeFile(
            content=identity["content_key"],
            code=identity["code_key"],
            owner=identity["owner"],
            has_symbols=identity["has_symbols"],
        )

    def load(self, cache: Path) -> Symbolizer:
        """Return a symbolizer that has loaded the table, by naming one address."""
        symbolizer = Symbolizer(cache)
        middle = [self.offset + self.size // 2]
        assert symbolizer.names(self.file, middle, map_library(self.path)).named
        return symbolizer

    def load_cold(self, cache: Path) -> None:
        shutil.rmtree(cache, ignore_errors=True)
        self.load(cache).close()

    def load_warm(self, cache: Path) -> None:
        self.load(cache).close()

    def choose_offsets(self, symbolizer: Symbolizer) -> list[int]:
        """Return offsets spread over the file that have frames."""
        chance = np.random.default_rng(1)
        offsets: list[int] = []
        while len(offsets) < LOOK_UPS:
            drawn = chance.integers(self.offset, self.offset + self.size, 40_000).tolist()
            places = symbolizer.names(self.file, drawn).places
            offsets += [at for at, place in zip(drawn, places, strict=True) if place.calls]
        return offsets[:LOOK_UPS]


def measure_growth(path: Path, cache: Path, tables: Path) -> tuple[int, int]:
    """Return by how many KiB a fresh process grows with the table, and its peak growth."""
    code = (
        "import sys, gc; sys.path[:0] = sys.argv[1:3]; import bench_symbolize as b, pathlib\n"
        "def status(key):\n"
        "    text = pathlib.Path('/proc/self/status').read_text()\n"
        "    return int(text.partition(key + ':')[2].split()[0])\n"
        "library = b.Library(*map(pathlib.Path, (sys.argv[3], sys.argv[5])))\n"
        "gc.collect(); pathlib.Path('/proc/self/clear_refs').write_text('5')\n"
        "before = status('VmRSS')\n"
        "s = library.load(pathlib.Path(sys.argv[4]))\n"
        "gc.collect(); print(status('VmRSS') - before, status('VmHWM') - before)\n"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", code, here, here.parent, path, cache, tables]
    output = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    held, peak = map(int, output.split())
    return held, peak


def read_kernel() -> None:
    kernel, _ = RunningKernel(lambda *_: None, time.monotonic_ns).find(np.zeros(0, np.uint64))
    assert not kernel.is_hidden, "kallsyms shows no addresses"


def add_library(command: list[str], args: object) -> None:
    command.extend(["--library", args.library])  # type: ignore[attr-defined]  # argparse's


def main() -> None:
    runner = pyperf.Runner(add_cmdline_args=add_library, processes=3, values=5)
    runner.argparser.add_argument("--library", default=LIBRARY)
    args = runner.parse_args()
    path = Path(os.path.realpath(args.library))
    with tempfile.TemporaryDirectory() as folder:
        cache, cold, tables = (Path(folder) / name for name in ("cache", "cold", "tables"))
        library = Library(path, tables)
        symbolizer = library.load(cache)
        offsets = library.choose_offsets(symbolizer)
        table = SymbolCache(cache, 1 << 30).load(library.file.content)
        assert table is not None
        words = np.array(offsets, dtype=np.uint64)
        runner.bench_func("names, 10,000", symbolizer.names, library.file, offsets)
        runner.bench_func("find, 10,000", table.find, words)
        runner.bench_func("load the library cold", library.load_cold, cold)
        runner.bench_func("load the library from the cache", library.load_warm, cache)
        if os.geteuid() == 0:
            runner.bench_func("read the kernel's symbols", read_kernel)
        if not args.worker:
            for label, place in (("cold", Path(folder) / "growth"), ("from the cache", cache)):
                held, peak = measure_growth(path, place, tables)
                print(f"memory for the library {label}: +{held} KiB, peak +{peak} KiB")
        table.close()
        symbolizer.close()


if __name__ == "__main__":
    main()
