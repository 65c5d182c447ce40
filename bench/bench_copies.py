"""How long copies of objects take: cold from a real S3 server on this machine, and warm.

48 objects of 1 MB, fetched by 1 to 32 threads into an empty folder, then again by the same process
and by what another process would find; from a server on this machine, which takes its CPU time,
and from one that answers 30 ms later, as distant buckets do. Asserted: every file is its object's;
warm fetches send no request.

Run: `python bench/bench_copies.py [--objects 48] [--rounds 5]`.
"""

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from storage.objects import copies as copies_module  # noqa: E402
from storage.objects.copies import Copies  # noqa: E402
from storage.objects.keys import content16  # noqa: E402
from storage.objects.s3 import S3Store  # noqa: E402
from tests.support.weed import BUCKET, Weed, using_keys  # noqa: E402

OBJECT_BYTES = 1_000_000
LIMIT_BYTES = 1 << 30
LATENCY_S = 0.03


class DistantStore(S3Store):
    """A bucket that answers after LATENCY_S."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        time.sleep(LATENCY_S)
        return super().get_range(key, start, length)


def fill(store: S3Store, count: int) -> dict[str, bytes]:
    objects = {}
    for number in range(count):
        content = random.Random(number).randbytes(OBJECT_BYTES)
        key = f"v1/default/blocks/cpu/2026-11-30/09-frames-{content16(content)}.parquet"
        store.put(key, content)
        objects[key] = content
    return objects


def took_ms(copies: Copies, objects: dict[str, bytes]) -> float:
    started = time.perf_counter()
    paths = copies.fetch(list(objects))
    took = time.perf_counter() - started
    assert [path.read_bytes() for path in paths] == list(objects.values())
    return took * 1e3


def measure(store: S3Store, objects: dict[str, bytes], folder: Path, rounds: int) -> None:
    """Print the medians of cold and warm fetches, for several numbers of threads."""
    print(f"{len(objects)} objects of {OBJECT_BYTES / 1e6:g} MB; medians of {rounds} rounds, ms")
    print(f"{'threads':>8} {'cold':>8} {'warm':>8} {'new process':>12} {'not noted':>10}")
    for threads in (1, 2, 4, 8, 16, 32):
        copies_module._THREADS = threads  # noqa: SLF001 - what is measured
        times: list[list[float]] = [[], [], [], []]
        for _ in range(rounds):
            shutil.rmtree(folder, ignore_errors=True)
            copies = Copies(store, folder, LIMIT_BYTES)
            times[0].append(took_ms(copies, objects))
            before = store.requests.total()
            times[1].append(took_ms(copies, objects))
            times[2].append(took_ms(Copies(store, folder, LIMIT_BYTES), objects))
            (folder / ".verified").unlink()
            times[3].append(took_ms(Copies(store, folder, LIMIT_BYTES), objects))
            assert store.requests.total() == before
        cold, warm, process, hashed = map(statistics.median, times)
        print(f"{threads:8} {cold:8.1f} {warm:8.1f} {process:12.1f} {hashed:10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, using_keys():
        weed = Weed(Path(name) / "weed")
        weed.start()
        try:
            for kind in (S3Store, DistantStore):
                store = kind(BUCKET, "bench", weed.endpoint)
                objects = fill(store, options.objects)
                print(f"\n{kind.__name__}: ", end="")
                measure(store, objects, Path(name) / "cache", options.rounds)
                print("requests:", dict(store.requests))
        finally:
            weed.stop()


if __name__ == "__main__":
    main()
