"""Rounds of compactors that are killed, several at once, and a count of the store after each.

    python -m tests.support.compaction_rounds --store PATH|s3://BUCKET/PREFIX --rounds 500 --seed 1

Each round puts a few objects, forks two to four compactors and kills each at a random moment, or
before a random change of the store. Then all samples must be there, each once. Compactors collect
garbage meanwhile, with a grace of seconds. Every tenth round nobody is killed, and at the end all
must be compacted and no file be left that no manifest names.

Processes are forked from one that has imported everything: a round takes a second. With
--every-change 1 a compactor of a small store is killed before each of its changes in turn, with 2
before every second one.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage.blocks.compactor import Compactor
from storage.blocks.retention import Keep
from storage.blocks.rounds import Rounds
from storage.objects.keys import ObjectStore
from storage.objects.open import open_store
from storage.objects.tenant import TenantStore
from tests.support.compaction import (
    DAY_S,
    DAY_START_S,
    HOUR_S,
    Clock,
    Expected,
    Inline,
    files_in,
    hour_manifests,
    named_files,
    profile,
    read_store,
    tombstone,
)
from tests.support.deadly_stores import open_deadly

GRACE_S = 8.0
"""S3 has times to the second, so ages may seem to be a second more or less. What takes half as long
is dropped, and a busy machine may take two seconds for a day."""
_FINISHED_WITHIN_S = 60.0
_LONGEST_GRACE_S = 64.0
HOURS = (3, 4, 24, 25)
"""Since the start of a day, which is over. The last hour goes on, and so does its day."""
NOW_S = DAY_START_S + 25 * HOUR_S + 1800
_LONGEST_LIFE_S, _FOREVER_S = 0.6, 60.0


class Place:
    """A store, by its URL: each process opens its own."""

    def __init__(self, url: str, endpoint: str, folder: Path) -> None:
        self.url = url
        self.endpoint = endpoint
        self.folder = folder

    def open(self) -> ObjectStore:
        return open_store(self.url, self.endpoint or None)

    def rounds(self, store: ObjectStore, now_s: float = NOW_S, grace_s: float = GRACE_S) -> Rounds:
        tenant = TenantStore(store)

        def make(type_: str) -> Compactor:
            return Compactor(
                tenant,
                self.folder,
                Inline(),
                type_=type_,
                now_ns=Clock(now_s),
                grace_s=grace_s,
                memory_bytes=128 << 20,
            )

        years_s = 100.0 * 365 * DAY_S
        keep = Keep(years_s, years_s, years_s, years_s, years_s)
        return Rounds(tenant, self.folder, make, keep, hours_at_once=1)


def forked(act: Callable[[], Any]) -> int:
    """Have a child process act; return its pid. It exits with 0 if all was well."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        act()
        status = 0
    except BaseException:  # noqa: BLE001 - whatever it is, the parent must see it
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int) -> int:
    """Return how a child ended: its status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(act: Callable[[], Any]) -> Any:
    """Return what `act` returns in a child process: this one stays as small as it is."""
    reading, writing = os.pipe()

    def send() -> None:
        os.write(writing, json.dumps(act()).encode())

    pid = forked(send)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    if ended(pid) != 0:
        raise SystemExit("a check failed, see above")
    return json.loads(content)


class Trial:
    """Puts, compacts, kills and counts."""

    def __init__(self, place: Place, seed: int) -> None:
        self.place = place
        self.random = random.Random(seed)
        self.sums: dict[str, tuple[int, int]] = {}
        self.killed = 0
        self.hours = HOURS
        self._number = 0

    def put(self, count: int) -> None:
        """Put some new objects, each of another host, minute or content."""
        numbers = range(self._number, self._number + count)
        self._number += count
        hours = [self.random.choice(self.hours) for _ in numbers]

        def put() -> Any:
            expected = Expected(self.place.open())
            for number, hour in zip(numbers, hours, strict=True):
                start_s = DAY_START_S + hour * HOUR_S + number % 60 * 60
                made = profile(start_s, 1 + number % 5, number)
                expected.put(tombstone(start_s, 9, number + 1) if number % 11 == 0 else made)
            return expected.sums

        self.sums.update({key: tuple(value) for key, value in in_child(put).items()})

    def check(self) -> None:
        """Fail unless every sample is there, once."""

        def check() -> None:
            expected = Expected(self.place.open())
            expected.sums = self.sums
            found = read_store(expected)
            assert found == expected.total, f"found {found}, expected {expected.total}"

        in_child(check)

    def race(self, compactors: int, *, is_killed: bool = True) -> None:
        """Run compactors at once; kill each at a random moment or change."""
        plans = [self._plan(is_killed=is_killed) for _ in range(compactors)]
        begun_s = time.monotonic()
        running: dict[int, float] = {}
        for dies_at, life_s in plans:

            def compact(dies_at: int = dies_at) -> None:
                place = self.place
                place.rounds(open_deadly(place.url, place.endpoint, dies_at)).run_once()

            running[forked(compact)] = begun_s + life_s
        while running:
            for pid, until_s in list(running.items()):
                if time.monotonic() > until_s:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    del running[pid]
                    self.note(os.waitstatus_to_exitcode(status))
            time.sleep(0.005)

    def _plan(self, *, is_killed: bool) -> tuple[int, float]:
        """Return the change at which a compactor dies, 0 for none, and after how long it does."""
        if not is_killed:
            return 0, _FOREVER_S
        if self.random.random() < 0.6:
            return self.random.randint(1, 80), _FOREVER_S
        return 0, self.random.uniform(0.02, _LONGEST_LIFE_S)

    def note(self, status: int) -> None:
        if status == -signal.SIGKILL:
            self.killed += 1
        elif status != 0:
            raise SystemExit(f"a compactor failed with status {status}, see above")

    def finish(self) -> None:
        """Compact all that is left, and collect the garbage; then nothing else may be there."""

        def finish() -> None:
            store = self.place.open()
            until_s = time.monotonic() + _FINISHED_WITHIN_S
            report = self.place.rounds(store).run_once()
            while report["hourly"] or report["daily"] or report["conflicts"]:
                assert not report.problems, report.problems
                assert time.monotonic() < until_s, report
                report = self.place.rounds(store).run_once()
            deleted: list[int] = []
            grace_s = GRACE_S
            time.sleep(grace_s + 2.5)
            while files_in(store) != named_files(store):
                deleted.append(self.place.rounds(store, grace_s=grace_s).run_once()["garbage"])
                if deleted[-1]:
                    continue
                # Each deletes for half the grace at most, and beside other work the listing alone
                # may take that long.
                grace_s *= 2
                assert grace_s <= _LONGEST_GRACE_S, "garbage is not deleted"
                time.sleep(grace_s)
            print(f"files deleted at the end, by round: {deleted}", file=sys.stderr)
            report = self.place.rounds(store, grace_s=_LONGEST_GRACE_S).run_once()
            assert report["objects"] == report["parts"] == report["merged"] == 0, report
            files, named = files_in(store), named_files(store)
            assert files == named, (len(files), len(named), sorted(files ^ named)[:5], deleted)
            objects = sum(
                part["objects"] for each in hour_manifests(store).values() for part in each["parts"]
            )
            assert objects == len(self.sums), (objects, len(self.sums))

        in_child(finish)
        self.check()


def kill_at_each_change(place: Place, seed: int, step: int) -> int:
    """Kill a compactor before each of its changes in turn, or every so many; return how often."""
    trial = Trial(place, seed)
    trial.hours = HOURS[:1]
    status = -signal.SIGKILL
    while status == -signal.SIGKILL:
        trial.put(2)

        def compact(number: int = 1 + step * trial.killed) -> None:
            store = open_deadly(place.url, place.endpoint, number)
            # Without deletions: killed ones leave more garbage than the next ones would delete.
            place.rounds(store, grace_s=3600.0).run_once()

        status = ended(forked(compact))
        trial.note(status)
        trial.check()
    trial.finish()
    return trial.killed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.compaction_rounds")
    parser.add_argument("--store", required=True)
    parser.add_argument("--s3-endpoint", default="")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.0, help="begin no round after this time")
    parser.add_argument("--every-change", type=int, default=0, metavar="STEP")
    options = parser.parse_args()
    place = Place(options.store, options.s3_endpoint, options.folder)
    begun_s = time.monotonic()
    if options.every_change:
        killed = kill_at_each_change(place, options.seed, options.every_change)
        print(f"killed before {killed} changes in {time.monotonic() - begun_s:.0f} s: all exact")
        return 0
    trial = Trial(place, options.seed)
    done = 0
    for number in range(1, options.rounds + 1):
        if 0 < options.seconds < time.monotonic() - begun_s:
            break
        trial.put(trial.random.randint(1, 6))
        trial.race(trial.random.randint(2, 4), is_killed=number % 10 != 0)
        trial.check()
        done = number
        if number % 50 == 0:
            took_s = time.monotonic() - begun_s
            said = f"{number} rounds, {trial.killed} killed, {took_s:.0f} s"
            print(said, file=sys.stderr, flush=True)
    trial.finish()
    print(
        f"{done} rounds, {trial.killed} compactors killed,"
        f" {len(trial.sums)} objects in {time.monotonic() - begun_s:.0f} s: all exact"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
