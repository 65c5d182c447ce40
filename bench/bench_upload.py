"""What uploading costs: memory with many windows waiting, requests and disk in a day of outage.

1. The uploader as a process of its own empties a spool of 1,000 and of 10,000 windows, into a
   directory and into a bucket of a real S3 server on this machine. Asserted: every window
   arrives once, and 10,000 take at most 5 MB of memory more than 1,000.
2. A day without a store on a simulated clock: a window of 1,000 stacks closes each minute, into a
   spool with room for half a day of them; the real uploader tries. Asserted: at most 1.2 requests
   a second, the bound at every moment (beside it the disk holds the reserve and the uploader's
   state alone), and afterwards every window there, with its stacks or as a tombstone that counts
   it.

Run: `python bench/bench_upload.py [--windows 10000] [--store directory|s3] [--skip-outage]`.
"""

import argparse
import contextlib
import logging
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from profiler.agent.uploader import Uploader, UploaderOptions  # noqa: E402
from storage.formats import pprof  # noqa: E402
from storage.objects.keys import ObjectStore  # noqa: E402
from storage.objects.open import open_store  # noqa: E402
from storage.spool.spool import Spool  # noqa: E402
from storage.spool.upload_queue import usage  # noqa: E402
from tests.agent.test_uploader import AWAY, FakeClock, MemoryStore  # noqa: E402
from tests.support.profiles import synthetic  # noqa: E402
from tests.support.weed import BUCKET, Weed, using_keys  # noqa: E402
from tests.support.windows import minutes, once, window  # noqa: E402

DAY_S = 24 * 3600
OUTAGE_LIMIT_BYTES = 60_000_000
BESIDE_BYTES = 72 * 1024
GROWTH_LIMIT_MB = 5
REQUESTS_PER_S_LIMIT = 1.2


@contextlib.contextmanager
def store_of(kind: str, folder: Path) -> Iterator[tuple[str, str | None]]:
    """Return the URL of an empty store and its endpoint."""
    if kind == "directory":
        yield str(folder / "store"), None
        return
    weed = Weed(folder / "weed")
    weed.start()
    try:
        with using_keys():
            yield f"s3://{BUCKET}/bench", weed.endpoint
    finally:
        weed.stop()


def measure(kind: str, count: int) -> float:
    """Upload `count` waiting windows; return the uploader's peak memory in MB."""
    with (
        tempfile.TemporaryDirectory() as name,
        store_of(kind, Path(name)) as (url, endpoint),
    ):
        spool = Path(name) / "spool"
        fill(spool, count)
        size_mb = usage(spool)[1] / 1e6
        command = [
            sys.executable,
            "-m",
            "profiler.agent.uploader",
            f"--spool={spool}",
            f"--store={url}",
        ]
        command += [f"--endpoint={endpoint}"] if endpoint else []
        start_s = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        while usage(spool)[0]:
            assert process.poll() is None, "the uploader has ended"
            time.sleep(0.1)
        took_s = time.monotonic() - start_s
        # Not ru_maxrss: that begins with the memory of whoever forked it.
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak_mb = int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) / 1024
        process.terminate()
        _, process.returncode, used = os.wait4(process.pid, 0)
        assert process.returncode == 0
        check(open_store(url, endpoint), count)
        print(
            f"{kind:10} {count:6,} windows ({size_mb:4.0f} MB): {took_s:5.1f} s,"
            f" {count / took_s:5.0f} a second, CPU {cpu_s(used) / count * 1e3:.2f} ms each,"
            f" peak {peak_mb:.1f} MB"
        )
        return peak_mb


def cpu_s(used: resource.struct_rusage) -> float:
    return used.ru_utime + used.ru_stime


def fill(folder: Path, count: int) -> None:
    spool = Spool(folder)
    for number in range(count):
        spool.add(window(number))
    assert spool.status().given_up == 0


def check(store: ObjectStore, count: int) -> None:
    found = minutes(pprof.decode(store.get(each.key)) for each in store.list("v1/default/l0/"))
    assert found == once(*range(count)), "windows are missing or doubled"


def outage() -> None:
    stacks = synthetic(1_000, 30, 4_000)
    size_bytes = len(pprof.encode(window(0, stacks=stacks)))
    limit_mb = OUTAGE_LIMIT_BYTES / 1e6
    print(f"a day of outage, {size_bytes / 1e3:.0f} KB a minute into a spool of {limit_mb:.0f} MB")
    with tempfile.TemporaryDirectory() as name:
        folder, peak_bytes, disk_bytes, closed, add_s = Path(name), 0, 0, 0, []
        spool = Spool(folder, OUTAGE_LIMIT_BYTES)
        store = MemoryStore(lambda _: AWAY if clock.elapsed_s < DAY_S else None)

        def close_windows(elapsed_s: float) -> None:
            nonlocal peak_bytes, disk_bytes, closed
            while closed < min(elapsed_s, DAY_S) // 60:
                profile = window(closed, stacks=stacks)
                start_s = time.process_time()
                spool.add(profile)
                add_s.append(time.process_time() - start_s)
                closed += 1
                peak_bytes = max(peak_bytes, usage(folder)[1])
                disk_bytes = max(disk_bytes, on_disk(folder))

        clock = FakeClock(close_windows)
        clock.end_when = lambda: clock.elapsed_s > DAY_S and usage(folder)[0] == 0
        Uploader(UploaderOptions(folder, "memory"), lambda: store, clock, random.Random(1)).run()
        attempts = store.requests - len(store.objects)
        check(store, closed)
        given_up = spool.status().given_up
        catching_up_s = clock.elapsed_s - DAY_S
    # The S3 client may send each request twice.
    print(f"requests: {attempts:,} attempts, {2 * attempts / DAY_S:.4f} requests a second at most")
    print(f"spool: at most {peak_bytes / 1e6:.2f} MB, {disk_bytes / 1e6:.2f} MB with the reserve")
    print(f"given up: the stacks of {given_up:,} windows of {closed:,}")
    print(f"empty {catching_up_s:.0f} s after the store was back; every tick accounted for")
    full, free = sorted(add_s[-100:]), sorted(add_s[:100])
    print(f"adding a window: {free[50] * 1e3:.0f} ms of CPU, {full[50] * 1e3:.0f} ms when full")
    assert 2 * attempts / DAY_S <= REQUESTS_PER_S_LIMIT
    assert peak_bytes <= OUTAGE_LIMIT_BYTES
    assert disk_bytes <= OUTAGE_LIMIT_BYTES + BESIDE_BYTES


def on_disk(folder: Path) -> int:
    """Count the blocks of all files, whoever wrote them."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=10_000)
    parser.add_argument("--store", choices=["directory", "s3"], action="append")
    parser.add_argument("--skip-outage", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # what the spool and the uploader tell of an outage
    for kind in options.store or ["directory", "s3"]:
        few_mb, many_mb = (
            measure(kind, count) for count in (options.windows // 10, options.windows)
        )
        print(f"{kind:10} growth {many_mb - few_mb:+.1f} MB for ten times as many\n")
        assert many_mb - few_mb <= GROWTH_LIMIT_MB, "memory grows with what is waiting"
    if not options.skip_outage:
        outage()
    return 0


if __name__ == "__main__":
    sys.exit(main())
