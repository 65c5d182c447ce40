"""Uploader: a process that carries profiles from the spool to the store, and nothing else.

The only process with credentials and network; the sampler next to it knows the spool alone. It
sends the oldest profile first, and removes it once the store has said that it has it. A store that
is away is asked again after pauses that grow to a minute (full jitter), with one request at a time;
one that is back gets several at once. A profile that alone is refused lets others pass.

The agent starts it and ends it by SIGTERM; it also ends when the agent dies. Its state stands in
`uploader.json` in the spool, replaced as a whole.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import itertools
import logging
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import orjson

from profiler.agent import metrics
from profiler.agent.cost import rss_bytes
from profiler.agent.signals import Signals
from profiler.agent.status import UPLOADER_STATE
from profiler.exposition import AddressError
from storage.objects.directory import DirectoryStore, make_folder
from storage.objects.keys import (
    DEFAULT_TENANT,
    NS_PER_S,
    ObjectKey,
    ObjectStore,
    StoreError,
    StoreRefused,
    StoreUnavailable,
)
from storage.objects.open import open_store
from storage.objects.tenant import TenantStore
from storage.objects.tenant_key import make_tenant_key
from storage.spool import upload_queue
from storage.spool.upload_queue import SpooledProfile, UploadQueue

PARALLEL_PUTS = 4
_BATCH = 256
"""Names read from the spool at a time: memory does not depend on how many are waiting."""
_CLAIM_LIMIT = 16
"""Profiles that may be half-way to a store that is away; the spool cannot drop these."""
_POLL_S = 1.0
_STATE_INTERVAL_S = 10.0
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_FINAL_PAUSE_S = 1.0
_RETENTION_INTERVAL_S = 60.0
_RETENTION_SHARE = 1 / 200
"""Of the time, for listing a store of very many objects."""
_PR_SET_PDEATHSIG = 1
_EXPECTED = (StoreError, OSError, ValueError, RecursionError, MemoryError)
"""What foreign answers and folders raise, in libraries, too."""
_EXHAUSTED = {
    RecursionError: "the store's answer is nested too deeply",
    MemoryError: "there is no memory left to read the store's answer",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UploaderOptions:
    """What an uploader does; 0 for a limit of what is kept keeps everything."""

    spool: Path
    store: str
    endpoint: str | None = None
    tenant: str = DEFAULT_TENANT
    """Whose profiles are deleted when they are old; what is sent says itself whose it is."""
    jitter_s: float = 0.0
    """Profiles are sent up to so long after their window: a fleet's windows end together."""
    keep_s: int = 0
    keep_bytes: int = 0
    keep_compacted_s: int = 0
    """`keep_s` of what is compacted, whose compactor may have been told another time."""
    grace_s: float = 10.0
    """After SIGTERM it goes on for so long at most."""
    parent: int = 0
    """The process that it must not outlive, 0 for none."""
    answer_s: float = 300.0
    """A request that takes longer is given up with this process: its thread cannot be ended."""
    metrics_listen: str = ""
    """Where to serve the agent's metrics: the network is here."""
    run_folder: Path = Path()
    """Where the agent answers what it is asked for them."""


@dataclass(slots=True)
class UploaderState:
    """What `uploader.json` says; counts are since the start of the process."""

    pid: int = 0
    started_ns: int = 0
    store: str = ""
    uploaded: int = 0
    uploaded_bytes: int = 0
    duplicates: int = 0
    """Profiles that the store had already: the answer to an earlier attempt was lost."""
    failed: int = 0
    """Attempts the store did not take; the profile waits for the next one."""
    damaged: int = 0
    """Files that were not what their names say, quarantined."""
    expired: int = 0
    """Profiles removed by retention."""
    expired_bytes: int = 0
    """Their size, and that of what else was removed."""
    last_upload_ns: int = 0
    last_error: str = ""
    """Why the store takes nothing now; empty as long as it does."""
    last_error_ns: int = 0
    pending: int = 0
    pending_bytes: int = 0
    cpu_ns: int = 0
    rss_bytes: int = 0
    written_ns: int = 0


class Clock(Protocol):
    """Time, and the request to end, which comes from outside as time does."""

    def now_ns(self) -> int:
        """Return the time of day, UTC."""

    def monotonic_s(self) -> float:
        """Return a time that never steps."""

    def wait(self, seconds: float) -> bool:
        """Wait, at most until the request to end comes; return whether it has come."""


class _Outcome(StrEnum):
    UPLOADED = "uploaded"
    DUPLICATE = "duplicate"
    DAMAGED = "damaged"
    GONE = "gone"
    """The sampler has dropped it, or another uploader was faster."""


class Uploader:
    """Sends until it is asked to end. `open_store` is called again after a refusal."""

    def __init__(
        self,
        options: UploaderOptions,
        open_store: Callable[[], ObjectStore],
        clock: Clock,
        chance: random.Random,
    ) -> None:
        self._options = options
        self._open_store = open_store
        self._store: ObjectStore | None = None
        self._clock = clock
        self._chance = chance
        self._queue = UploadQueue(options.spool)
        self._pool = concurrent.futures.ThreadPoolExecutor(PARALLEL_PUTS)
        self._keyed: set[str] = set()
        """Tenants that have a key."""
        self._key_error = ""
        self._attempts: Counter[ObjectKey] = Counter()
        self._failures = 0
        self._is_refused = False
        self._end_s: float | None = None
        self._next_retention_s = clock.monotonic_s()
        self._written_s = float("-inf")
        self._written_counts: tuple[int, ...] = ()
        self.state = UploaderState(pid=os.getpid(), started_ns=clock.now_ns(), store=options.store)

    def run(self) -> bool:
        """Send until asked to end, then what is left; False when a request is still under way."""
        _log.info("started store=%s spool=%s", self._options.store, self._options.spool)
        is_complete = True
        while is_complete:
            pause_s = self._round()
            if pause_s is None:
                is_complete = False
            elif self._is_ending():
                left_s = self._left_s()
                if left_s <= 0 or self._is_refused or not self._queue.pending(1):
                    break
                self._clock.wait(min(pause_s, left_s, _FINAL_PAUSE_S))
            else:
                self._clock.wait(pause_s)
        self._write_state(is_last=True)
        _log.info("ended uploaded=%d pending=%d", self.state.uploaded, self.state.pending)
        self._pool.shutdown(wait=is_complete, cancel_futures=True)
        return is_complete

    def _round(self) -> float | None:
        """Send what is due and return the pause until the next round; None to stop waiting."""
        self._retain()
        batch = self._due()
        for group in self._groups(batch):
            try:
                store = self._store = self._store or self._open_store()
            except _EXPECTED as error:
                self._note_failure(error)
                break
            if not self._send_all(store, group):
                return None
            self._write_state()
            if self._failures or (self._is_ending() and self._left_s() <= 0):
                break
        self._write_state()
        if self._failures:
            return self._pause_s()
        return 0.0 if len(batch) >= _BATCH else _POLL_S

    def _due(self) -> list[SpooledProfile]:
        batch = self._queue.pending(_BATCH)
        claimed = [each for each in batch if each.is_claimed]
        if len(claimed) >= _CLAIM_LIMIT:
            batch = claimed
        if self._options.jitter_s and not self._is_ending():
            batch = [each for each in batch if each.is_claimed or self._has_waited(each)]
        # What failed before comes after what did not: it may be to blame itself.
        return sorted(batch, key=lambda each: self._attempts[each.key])

    def _has_waited(self, profile: SpooledProfile) -> bool:
        """Return whether its share of the jitter has passed, which its hash decides once.

        A file from the future is due: the clock was set back.
        """
        share = int(profile.key.content16, 16) / 16 ** len(profile.key.content16)
        with contextlib.suppress(FileNotFoundError):
            age_s = (self._clock.now_ns() - profile.path.stat().st_mtime_ns) / NS_PER_S
            return not 0 <= age_s < share * self._options.jitter_s
        return False

    def _groups(self, batch: list[SpooledProfile]) -> Iterator[list[SpooledProfile]]:
        """Cut a batch into what is sent at once: one profile as long as the store is away."""
        waiting = iter(batch)
        while group := list(itertools.islice(waiting, 1 if self._failures else PARALLEL_PUTS)):
            yield group

    def _send_all(self, store: ObjectStore, group: Sequence[SpooledProfile]) -> bool:
        """Send profiles at once; False when time is up and a request still under way.

        Time is up some seconds after the request to end, and when the store has not answered for
        minutes: one that sends a byte now and then is never late for the library.
        """
        until_s = time.monotonic() + self._options.answer_s
        futures = {self._pool.submit(self._send, store, each): each for each in group}
        waiting = set(futures)
        while waiting:
            _, waiting = concurrent.futures.wait(waiting, timeout=_POLL_S / 4)
            if waiting and self._is_ending() and self._left_s() <= 0:
                return False
            if waiting and time.monotonic() >= until_s:
                limit = f"{self._options.answer_s:g} s"
                self._note_failure(StoreUnavailable(f"the store did not answer within {limit}"))
                return False
        failures: list[Exception] = []
        for future, profile in futures.items():
            try:
                outcome, size_bytes = future.result()
            except Exception as error:  # noqa: BLE001 - what breaks one profile stops no other
                failures.append(error)
                self._attempts[profile.key] += 1
            else:
                del self._attempts[profile.key]
                self._count(outcome, size_bytes)
        self.state.failed += len(failures)
        if failures:
            self._note_failure(failures[0])
        return True

    def _send(self, store: ObjectStore, profile: SpooledProfile) -> tuple[_Outcome, int]:
        """Send one profile and return its size; runs in a thread, so it changes only `_keyed`."""
        claimed = self._queue.claim(profile)
        if claimed is None:
            return _Outcome.GONE, 0
        try:
            content = self._queue.read(claimed)
        except FileNotFoundError:
            return _Outcome.GONE, 0
        except OSError:
            content = None  # the disk cannot read it, and will not the next time
        if content is None:
            _log.warning("quarantined damaged file=%s", claimed.path.name)
            self._queue.quarantine(claimed)
            return _Outcome.DAMAGED, 0
        self._ensure_key(store, claimed.key.tenant)
        is_new = store.put(claimed.key.text, content)
        self._queue.remove(claimed)
        return _Outcome.UPLOADED if is_new else _Outcome.DUPLICATE, len(content)

    def _ensure_key(self, store: ObjectStore, tenant: str) -> None:
        """Make the tenant's key before its first profile, so that readers find it.

        If only profiles may be written, they still are: readers then use a guessable key.
        """
        if tenant in self._keyed:
            return
        try:
            make_tenant_key(store, tenant)
        except StoreRefused as error:
            if str(error) != self._key_error:
                _log.warning("failed to make the tenant's key error=%s", error)
            self._key_error = str(error)
        else:
            self._keyed.add(tenant)

    def _count(self, outcome: _Outcome, size_bytes: int) -> None:
        if outcome is _Outcome.DAMAGED:
            self.state.damaged += 1
        elif outcome is _Outcome.DUPLICATE:
            self.state.duplicates += 1
            self._note_success()
        elif outcome is _Outcome.UPLOADED:
            self.state.uploaded += 1
            self.state.uploaded_bytes += size_bytes
            self._note_success()

    def _note_success(self) -> None:
        if self._failures:
            _log.info("store is back store=%s", self._options.store)
        self._failures = 0
        self._is_refused = False
        self.state.last_error = ""
        self.state.last_upload_ns = self._clock.now_ns()

    def _note_failure(self, error: Exception) -> None:
        reason = _EXHAUSTED.get(type(error), str(error))
        if type(error) not in _EXHAUSTED and not isinstance(error, StoreError | OSError):
            reason = f"{type(error).__name__}: {error}"  # only its type says what went wrong
        if reason != self.state.last_error:
            _log.warning("failed to upload error=%s", reason)
        self._failures += 1
        self.state.last_error = reason
        self.state.last_error_ns = self._clock.now_ns()
        self._is_refused = isinstance(error, StoreRefused)
        if self._is_refused:
            self._store = None  # opened anew it reads the credentials anew

    def _pause_s(self) -> float:
        """Return how long to leave the store alone: full jitter, or slowly where it has refused."""
        if self._is_refused:
            return self._chance.uniform(_LONGEST_PAUSE_S / 2, _LONGEST_PAUSE_S)
        limit_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self._failures, 10))
        return self._chance.uniform(0, limit_s)

    def _is_ending(self) -> bool:
        if self._end_s is None and self._clock.wait(0):
            self._end_s = self._clock.monotonic_s() + self._options.grace_s
        return self._end_s is not None

    def _left_s(self) -> float:
        return float("inf") if self._end_s is None else self._end_s - self._clock.monotonic_s()

    def _retain(self) -> None:
        options, start_s = self._options, self._clock.monotonic_s()
        if start_s < self._next_retention_s or not (options.keep_s or options.keep_bytes):
            return
        try:
            store = self._store = self._store or self._open_store()
            if isinstance(store, DirectoryStore):
                now_s = self._clock.now_ns() // NS_PER_S
                for removed in TenantStore(store, self._options.tenant).expire(
                    now_s, options.keep_s, options.keep_bytes, options.keep_compacted_s
                ):
                    self.state.expired += ObjectKey.parse(removed.key) is not None
                    self.state.expired_bytes += removed.size_bytes
        except _EXPECTED as error:
            _log.warning("failed to remove old profiles error=%s", error)
        took_s = self._clock.monotonic_s() - start_s
        pause_s = max(_RETENTION_INTERVAL_S, took_s / _RETENTION_SHARE)
        self._next_retention_s = start_s + pause_s

    def _write_state(self, *, is_last: bool = False) -> None:
        """Write the state if it is time for it; a full disk does not end the process."""
        state, now_s = self.state, self._clock.monotonic_s()
        counts = (state.uploaded, state.duplicates, state.failed, state.damaged, state.expired)
        interval_s = _STATE_INTERVAL_S if counts == self._written_counts else _POLL_S
        if now_s - self._written_s < interval_s and not is_last:
            return
        self._written_s, self._written_counts = now_s, counts
        state.pending, state.pending_bytes = upload_queue.usage(self._options.spool)
        state.cpu_ns = time.process_time_ns()
        state.rss_bytes = rss_bytes()
        state.written_ns = self._clock.now_ns()
        path = self._options.spool / UPLOADER_STATE
        partial = path.with_suffix(".partial")
        try:
            partial.write_bytes(orjson.dumps({"schema": 1, **asdict(state)}))
            partial.replace(path)
        except OSError as error:
            _log.warning("failed to write file=%s error=%s", path, error.strerror)


class _SystemClock:
    """The machine's clocks; SIGTERM and the parent's death ask to end."""

    def __init__(self, signals: Signals, parent: int) -> None:
        self._signals = signals
        self._parent = parent
        self._is_ending = False

    def now_ns(self) -> int:
        return time.time_ns()

    def monotonic_s(self) -> float:
        return time.monotonic()

    def wait(self, seconds: float) -> bool:
        was_ending, until_s = self._is_ending, time.monotonic() + seconds
        while True:
            met = self._signals.wait(until_s)  # SIGINT is the agent's to deal with
            if met is signal.SIGTERM or (self._parent and os.getppid() != self._parent):
                self._is_ending = True
            if met is None or (self._is_ending and not was_ending):
                return self._is_ending


def main() -> int:
    """Run an uploader as a process of its own."""
    options = _parse_options()
    logging.basicConfig(level=logging.INFO, format="everflame uploader: %(message)s")
    for chatty in ("boto3", "botocore", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)  # its errors are logged once, by us
    with Signals() as signals:
        # The agent may have asked to end before, when nothing handled it yet.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if options.parent:
            # The parent may have died before this line: the clock looks for itself.
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        make_folder(options.spool)
        if options.metrics_listen:
            _serve_metrics(options)
        is_complete = Uploader(
            options,
            lambda: open_store(options.store, options.endpoint),
            _SystemClock(signals, options.parent),
            random.Random(),  # noqa: S311 - spreads requests, keeps no secret
        ).run()
    if not is_complete:
        logging.shutdown()
        os._exit(0)  # a thread hangs in a request: it would be waited for
    return 0


def _serve_metrics(options: UploaderOptions) -> None:
    try:
        metrics.serve(options.metrics_listen, options.run_folder)
    except (metrics.MetricsError, AddressError) as error:
        _log.warning("%s", error)  # profiles matter more than the page about them


def _parse_options() -> UploaderOptions:
    parser = argparse.ArgumentParser(prog="python -m profiler.agent.uploader")
    parser.add_argument("--spool", type=Path, required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--endpoint")
    parser.add_argument("--tenant", default=DEFAULT_TENANT)
    parser.add_argument("--jitter-s", type=float, default=0.0)
    parser.add_argument("--keep-s", type=int, default=0)
    parser.add_argument("--keep-bytes", type=int, default=0)
    parser.add_argument("--keep-compacted-s", type=int, default=0)
    parser.add_argument("--grace-s", type=float, default=10.0)
    parser.add_argument("--parent", type=int, default=0)
    parser.add_argument("--metrics-listen", default="")
    parser.add_argument("--run-folder", type=Path, default=Path())
    return UploaderOptions(**vars(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
