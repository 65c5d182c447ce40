"""Decoding: fetch objects and decode them into arrays, in workers where there are any.

Objects are decoded in chunks, and those of a chunk are merged where they are decoded. An object
that cannot be read becomes a part without a value that names the reason.

When a worker is killed or has no memory left, each object of its chunk is decoded again in a
process of its own. An object for which that happens a second time is skipped, and so is one that
takes a worker too long. What exceeds `storage.formats.limits` is skipped before it costs as much.
"""

import contextlib
import functools
import itertools
import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from storage.columns import Columns
from storage.formats import pprof_arrays
from storage.formats.limits import OBJECT_COUNT_LIMIT, OutOfMemoryError
from storage.hashing import Hasher
from storage.merging import merge_columns
from storage.objects.keys import (
    LARGEST_OBJECT_BYTES,
    NS_PER_S,
    ObjectKey,
    ObjectStore,
    ObjectTooLarge,
    StoredObject,
    StoreError,
    content16,
)
from storage.profile import ProfileError
from storage.query.cache import pack, unpack
from storage.query.coverage import ListedObject, Part, failed_part
from storage.query.self_samples import ObjectSelfSamples, join_self_samples
from storage.query.threads import Turns, map_ahead, never_interrupt
from storage.query.workers import NoWorkersError, Workers

FETCHES = 4
"""Objects fetched at a time; so many are also decoded one by one, or wait as chunks."""
_CHUNK = 10
"""Objects that one worker decodes and merges: ten minutes at once are then merged only there."""
_CHUNK_BYTES = 16 << 20
"""A chunk of so many bytes is complete: several are in memory at once."""
_CPU_LIMIT_S = 20.0
"""CPU time of a worker for an object. The largest one within the limits takes half of it."""
_FAILURES_REMEMBERED = 10_000
_KILLER_RETRY_S = 600.0
"""An object that took too much is not tried again for so long: of memory, others may have left
none."""
_TOO_SLOW_REASON = f"decoding it takes more than {_CPU_LIMIT_S:g} s of CPU time"
_TOO_LARGE_REASON = "decoding it takes more memory than a worker may have"
_KILLER_REASON = "two workers were killed while they decoded it: it may take too much memory"

_log = logging.getLogger(__name__)


def _report_nothing(_decoded: int) -> None:
    """Do nothing, where nobody watches."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a caller wants to be asked and told while objects are read."""

    check: Callable[[], None] = never_interrupt
    """Called between objects; what it raises ends the reading."""
    report: Callable[[int], None] = _report_nothing
    """Called with the number of objects of each decoded chunk, with 0 at the end of each reading.
    Several threads call it."""


class Failure(NamedTuple):
    """An object that cannot be decoded, and when it may be tried again."""

    key: str
    reason: str
    retry_s: float = math.inf

    def part(self) -> Part[Columns]:
        return failed_part(self.key, self.reason, is_lasting=self.retry_s == math.inf)


class Decoded(NamedTuple):
    """Objects decoded and merged where they add up, and those that cannot be decoded."""

    parts: list[Part[Columns]]
    failures: list[Failure]


class DecodeCounts(NamedTuple):
    """What happened to workers since the query was made."""

    pools_lost: int = 0
    """Pools of which a worker was killed."""
    pools_started: int = 0
    objects_decoded_again: int = 0
    """Objects that were in the hands of a lost pool."""
    objects_skipped: int = 0
    """Objects during which two workers were killed."""


class _TooSlowError(ProfileError):
    """An object has taken all the CPU time that a worker has for it."""


_Fetched = list[tuple[ObjectKey, bytes]]
_hasher_of = functools.lru_cache(maxsize=1)(Hasher)


class Decoder:
    """Fetches and decodes objects. Safe to use from several threads.

    `key` returns the tenant's key, and is called when the first object is decoded.
    """

    def __init__(
        self, store: ObjectStore, key: Callable[[], bytes], workers: Workers | None
    ) -> None:
        self._store = store
        self.key = key
        self._workers = workers
        self._failures: dict[StoredObject, tuple[Failure, float]] = {}
        self._alone = Turns()
        self._lock = threading.Lock()
        self._again = self._skipped = 0
        self._fetcher = ThreadPoolExecutor(FETCHES, "fetch")

    @functools.cached_property
    def hasher(self) -> Hasher:
        return Hasher(self.key())

    @property
    def counts(self) -> DecodeCounts:
        if self._workers is None:
            return DecodeCounts()
        return DecodeCounts(*self._workers.counts, self._again, self._skipped)

    def decode(self, objects: Sequence[ListedObject], progress: Progress) -> list[Part[Columns]]:
        """Fetch and decode objects. Those of a chunk are merged, as far as they add up."""
        read: list[Part[Columns]] = []
        waiting: deque[Callable[[], Decoded]] = deque()
        stored_of = {key.text: stored for key, stored in objects}

        def take() -> None:
            progress.check()
            decoded, failures = waiting.popleft()()
            progress.report(sum(len(each.keys) for each in decoded) + len(failures))
            read.extend(decoded)
            for failure in failures:
                if len(self._failures) < _FAILURES_REMEMBERED:
                    until_s = time.monotonic() + failure.retry_s
                    self._failures[stored_of[failure.key]] = failure, until_s
                read.append(failure.part())

        chunk: _Fetched = []
        for (key, _), fetched in zip(
            objects, map_ahead(self._fetcher, self._fetch, objects), strict=True
        ):
            if isinstance(fetched, bytes):
                chunk.append((key, fetched))
            else:
                read.append(fetched)
            size_bytes = sum(len(content) for _, content in chunk)
            if len(chunk) == _CHUNK or size_bytes >= _CHUNK_BYTES:
                waiting.append(self._start(chunk, progress))
                chunk = []
            if len(waiting) > FETCHES:
                take()
        if chunk:
            waiting.append(self._start(chunk, progress))
        while waiting:
            take()
        return read

    def _fetch(self, listed: ListedObject) -> bytes | Part[Columns]:
        stored = listed.stored
        if stored.size_bytes > LARGEST_OBJECT_BYTES:
            return failed_part(stored.key, str(ObjectTooLarge(stored.key)))
        failure, until_s = self._failures.get(stored, (None, 0.0))
        if failure is not None and time.monotonic() < until_s:
            return failure.part()
        try:
            return self._store.get(stored.key)
        except StoreError as error:
            return failed_part(stored.key, str(error), is_lasting=False)

    def _start(self, fetched: _Fetched, progress: Progress) -> Callable[[], Decoded]:
        """Have a worker decode, if there is one; return a function that waits for the result."""
        workers = self._workers
        if workers is None:
            return functools.partial(decode_objects, fetched, self.hasher)
        try:
            future = workers.submit(_decode_packed, fetched, self.key())
        except RuntimeError:  # none runs at the moment, or they are shut down
            return functools.partial(decode_objects, fetched, self.hasher)

        def wait() -> Decoded:
            try:
                return _unpack_parts(future.result())
            except (BrokenExecutor, MemoryError):
                return self._decode_alone(workers, fetched, progress)
            except (CancelledError, TypeError):
                # Also when sums are beyond what can be packed.
                return decode_objects(fetched, self.hasher)

        return wait

    def _decode_alone(self, workers: Workers, fetched: _Fetched, progress: Progress) -> Decoded:
        """Decode again what a worker could not, one by one, to find what took its memory.

        One thread at a time does so, as each may take much memory.
        """
        with self._lock:
            self._again += len(fetched)
        decoded = Decoded([], [])
        with self._alone.of("", progress.check), workers.lone_worker() as worker:
            for key, content in fetched:
                progress.check()
                try:
                    packed = worker.run(_decode_packed, [(key, content)], self.key())
                    parts, failures = _unpack_parts(packed)
                except BrokenExecutor:
                    _log.warning("skipped an object: two workers were killed key=%s", key.text)
                    with self._lock:
                        self._skipped += 1
                    parts, failures = [], [Failure(key.text, _KILLER_REASON, _KILLER_RETRY_S)]
                except MemoryError:
                    parts, failures = [], [Failure(key.text, _TOO_LARGE_REASON, _KILLER_RETRY_S)]
                except NoWorkersError as error:
                    parts, failures = [], [Failure(key.text, str(error), 0.0)]
                except TypeError:
                    parts, failures = decode_objects([(key, content)], self.hasher)
                decoded.parts.extend(parts)
                decoded.failures.extend(failures)
        return decoded


_Packed = tuple[list[tuple[tuple[str, ...], bytes, bytes]], list[Failure]]


def _decode_packed(fetched: _Fetched, key: bytes, cpu_limit_s: float = _CPU_LIMIT_S) -> _Packed:
    """Decode in a worker; the result is packed as in the cache.

    Raises:
        MemoryError: the worker has no memory left. What took it may be any of several objects.
    """
    bounded = functools.partial(cpu_limited, cpu_limit_s)
    parts, failures = decode_objects(fetched, _hasher_of(key), bounded, is_worker=True)
    packed = [
        (part.keys, pack(part.value), pack(part.self_samples))
        for part in parts
        if part.value is not None and part.self_samples is not None
    ]
    return packed, failures


def _unpack_parts(packed: _Packed) -> Decoded:
    parts, failures = packed
    unpacked = [
        Part(
            keys,
            unpack(Columns, columns)[0],
            packed=columns,
            self_samples=unpack(ObjectSelfSamples, self_samples)[0],
        )
        for keys, columns, self_samples in parts
    ]
    return Decoded(unpacked, failures)


@contextlib.contextmanager
def cpu_limited(seconds: float = _CPU_LIMIT_S) -> Iterator[None]:
    """Bound the CPU time that this process takes for the block, in its main thread.

    Raises:
        _TooSlowError: it has taken more.
    """

    def end(_number: int, _frame: object) -> None:
        raise _TooSlowError(_TOO_SLOW_REASON)

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def decode_objects(
    fetched: _Fetched,
    hasher: Hasher,
    bounded: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    *,
    is_worker: bool = False,
) -> Decoded:
    """Read some objects, each of them `bounded`, and merge those of one type and unit.

    Raises:
        MemoryError: there was no memory left, in a worker.
    """
    alike: dict[tuple[str, str], list[tuple[str, Columns]]] = {}
    failures: list[Failure] = []
    for key, content in fetched:
        try:
            with bounded():
                columns = decode_object(key, content, hasher)
        except (OutOfMemoryError, _TooSlowError) as error:
            if is_worker and isinstance(error, OutOfMemoryError):
                raise MemoryError from None
            failures.append(Failure(key.text, str(error), _KILLER_RETRY_S))
            continue
        except ProfileError as error:
            failures.append(Failure(key.text, str(error)))
            continue
        alike.setdefault((columns.type, columns.unit), []).append((key.text, columns))
    parts = []
    for group in alike.values():
        some = [columns for _, columns in group]
        merged = some[0] if len(some) == 1 else merge_columns(some)
        joined = join_self_samples([ObjectSelfSamples.of(columns, hasher) for columns in some])
        parts.append(Part(tuple(key for key, _ in group), merged, self_samples=joined))
    return Decoded(parts, failures)


def decode_object(key: ObjectKey, content: bytes, hasher: Hasher) -> Columns:
    """Read an object, with the label `host` of its accounting.

    Raises:
        ProfileError: it is damaged, or its content is not the one that its key names.
        SchemaError: a later version of this program wrote it.
    """
    if content16(content) != key.content16:
        raise ProfileError("its content is not what its key says: it is damaged or cut short")
    if key.ending != "pb.gz":
        raise ProfileError(f"this version cannot read .{key.ending}")
    columns = pprof_arrays.decode(content, hasher)
    check_counts(columns)
    window = columns.window
    start_s = window.start_ns // NS_PER_S
    if (start_s, max(1, -(-window.end_ns // NS_PER_S) - start_s)) != (key.start_s, key.length_s):
        raise ProfileError("its window is not the one that its key names")
    if len(columns.accounting.hosts) == 1 and columns.accounting.hosts[0].name:
        columns = columns.with_label("host", columns.accounting.hosts[0].name)
    return columns


def check_counts(columns: Columns) -> None:
    """Refuse counts that no host has in an hour: the sums of a window are 64 bits wide.

    Raises:
        ProfileError: there are such counts.
    """
    counts: list[float] = [columns.period_ns, *columns.counts.sum(axis=0, dtype=np.float64)]
    for each in fields(columns.accounting):
        count = getattr(columns.accounting, each.name)
        if isinstance(count, Mapping):
            counts.append(sum(count.values()))
        elif isinstance(count, int):
            counts.append(count)
    if max(counts) > OBJECT_COUNT_LIMIT:
        raise ProfileError("its counts add up to more than 2^53, which no host has in an hour")


def join_parts(parts: Sequence[Part[Columns]]) -> list[Part[Columns]]:
    """Merge parts into one, if all that have a value measure the same; else return them."""
    columns = [each.value for each in parts if each.value is not None]
    if len(parts) < 2 or len({(each.type, each.unit) for each in columns}) != 1:
        return list(parts)
    keys = tuple(itertools.chain.from_iterable(each.keys for each in parts))
    skipped = tuple(itertools.chain.from_iterable(each.skipped for each in parts))
    is_lasting = all(each.is_lasting for each in parts)
    joined = _join_self_samples_of(parts)
    return [Part(keys, merge_columns(columns), skipped, is_lasting, self_samples=joined)]


def _join_self_samples_of(parts: Sequence[Part[Columns]]) -> ObjectSelfSamples | None:
    """Join the self samples of parts; None unless those of each part are known."""
    wanted = [each.self_samples for each in parts if each.value is not None]
    known = [each for each in wanted if each is not None]
    return join_self_samples(known) if known and len(known) == len(wanted) else None
