"""Kill the sampler's and the uploader's halves of the way to the store, again and again.

A program of its own, which has no threads: it forks a child for each run. Every child adds
profiles to one spool and uploads from it until SIGKILL comes: at the n-th step (before or after a
system call on a file, or a put), at a named one, or at a random time. Each next child finds what
the one before has left. The last child is not killed. Prints what was begun, what was closed,
and the kills that met a living process, by half and by place.
"""

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import storage.objects.s3  # noqa: F401 - imported once, before the forks
from profiler.agent.uploader import Uploader, UploaderOptions
from storage.objects.keys import ObjectStore
from storage.objects.open import open_store
from storage.spool.spool import Spool
from tests.support.windows import SIZE_BYTES, window

ADDED = 6
LIMIT_BYTES = 4 * SIZE_BYTES
STEPS = "rename,replace,unlink,link,fsync"


class Clock:
    """Real time; asked to end after so many waits."""

    def __init__(self, waits: int) -> None:
        self._waits = waits

    def now_ns(self) -> int:
        return time.time_ns()

    def monotonic_s(self) -> float:
        return time.monotonic()

    def wait(self, seconds: float) -> bool:
        self._waits -= 1
        time.sleep(min(seconds, 0.005))
        return self._waits < 0


class Runs:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.spool: Path = options.folder / "spool"
        self.ledger: Path = options.folder / "ledger"
        self.places: Path = options.folder / "places"
        self.random = random.Random(options.seed)
        self.kills: Counter[str] = Counter()

    def noted(self, word: str) -> list[int]:
        lines = self.ledger.read_text().splitlines() if self.ledger.exists() else []
        return [int(line.split()[1]) for line in lines if line.startswith(word)]

    def note(self, path: Path, line: str) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, f"{line}\n".encode())
        os.close(fd)

    def add(self, count: int) -> None:
        spool = Spool(self.spool, LIMIT_BYTES)
        first = max(self.noted("begun"), default=-1) + 1
        for number in range(first, first + count):
            self.note(self.ledger, f"begun {number}")
            spool.add(window(number))
            self.note(self.ledger, f"closed {number}")

    def upload(self, waits: int, wrap: Callable[[ObjectStore], ObjectStore] = lambda s: s) -> None:
        options = UploaderOptions(self.spool, self.options.store)
        Uploader(
            options,
            lambda: wrap(open_store(self.options.store, self.options.endpoint)),
            Clock(waits),
            random.Random(1),
        ).run()

    def fork(self, run: Callable[[], None]) -> int:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                run()
                status = 0
            except BaseException:  # noqa: BLE001 - a child of a fork must not go on as the parent
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)
        return pid

    def end(self, pid: int, half: str = "") -> bool:
        """Wait for a child; return whether it was killed; one that had ended before was not.

        `half` says what it was; by default the first word of the place that it has noted last.
        """
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            self.kills[half or self.places.read_text().splitlines()[-1].split()[0]] += 1
            return True
        if status:
            raise SystemExit(f"a child failed with status {status}")
        return False

    def kill_at_step(self, number: int, named: str = "") -> bool:
        """Live until the n-th step, of all or of those named so; False when there are fewer."""
        left, half, uploading_threads = number, "sampler", threading.Lock()

        def step(name: str) -> None:
            nonlocal left
            place = f"{half} {name}"
            with uploading_threads:
                left -= named in {"", place}
                if left == 0:
                    self.note(self.places, place)
                    os.kill(os.getpid(), signal.SIGKILL)

        def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                place = " ".join([name, *_folders(arguments)])
                step(f"before {place}")
                result = function(*arguments, **options)
                step(f"after {place}")
                return result

            return call

        def wrap(store: ObjectStore) -> ObjectStore:
            store.put = watched("put", store.put)  # type: ignore[method-assign] # one more step
            return store

        def run() -> None:
            nonlocal half
            for name in self.options.steps.split(","):
                setattr(os, name, watched(name, getattr(os, name)))
            self.add(ADDED)
            half = "uploader"
            self.upload(0, wrap)

        return self.end(self.fork(run))

    def kill_at_random(self, run_s: float) -> None:
        """Let both halves run side by side, and kill one of them, or both."""
        victims = self.random.choice(["sampler", "uploader", "both"])

        def sample() -> None:
            for _ in range(6):
                self.add(1)

        sampler, uploader = self.fork(sample), self.fork(lambda: self.upload(1_000_000))
        time.sleep(self.random.uniform(0, run_s))
        if victims in {"sampler", "both"}:
            os.kill(sampler, signal.SIGKILL)
        self.end(sampler, "sampler")
        os.kill(uploader, signal.SIGKILL)
        self.end(uploader, "uploader")


def _folders(arguments: tuple[Any, ...]) -> list[str]:
    paths = [each for each in arguments if isinstance(each, Path)]
    names = [path.parent.name for path in paths]
    return [name if name in _NAMED else "store" for name in names]


_NAMED = {"partial", "waiting", "sending", "giving-up", "tombstones", "spool"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", required=True)
    parser.add_argument("--endpoint")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", default=STEPS)
    parser.add_argument("--named", action="append", default=[])
    parser.add_argument("--random", type=int, default=100)
    parser.add_argument("--run-s", type=float, default=0.03)
    runs = Runs(parser.parse_args())
    step = 1
    while runs.kill_at_step(step):
        step += 1
    for name in runs.options.named:
        if not any(runs.kill_at_step(1, name) for _ in range(3)):
            raise SystemExit(f"no run came to the step {name!r}")
    for _ in range(runs.options.random):
        runs.kill_at_random(runs.options.run_s)
    runs.end(runs.fork(lambda: runs.add(1)))
    runs.end(runs.fork(lambda: runs.upload(0)))
    places = Counter(runs.places.read_text().splitlines())
    begun, closed = runs.noted("begun"), runs.noted("closed")
    print(json.dumps({"kills": runs.kills, "begun": begun, "closed": closed, "places": places}))


if __name__ == "__main__":
    main()
