"""`everflame verify`: check of profiles that ticks = stored + idle + filtered + lost.

The samples must also add up to the number that the accounting calls stored: a file cannot claim
more samples than it contains. Of a store every object is read, never the cache, and every compacted
file that counts (`storage.blocks.checking`); an object that is compacted and still there counts
once. Gaps between the windows of a host are reported. A gap is not a failure: the host may have
been off.
"""

import argparse
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import orjson

from profiler.commands import arguments
from profiler.commands.files import FILE_HELP, add_reading_options, read_file, reading_options
from profiler.commands.pin import as_record, pins_in, window_text
from profiler.commands.selection import selected
from profiler.formats.reading import ReadOptions
from profiler.text import accounted, counted
from profiler.times import rfc3339
from storage.blocks.checking import Checked as CheckedBlocks
from storage.blocks.checking import check_compacted
from storage.blocks.manifest import manifest_types, named_by
from storage.hashing import Hasher
from storage.objects.keys import (
    CPU,
    ObjectKey,
    ObjectMissing,
    ObjectStore,
    StoredObject,
    StoreError,
    hour_of,
)
from storage.objects.pins import Pin
from storage.objects.tenant import TenantStore
from storage.profile import ALWAYS, Accounting, ProfileError, Window
from storage.query.decoding import decode_object
from storage.query.threads import map_ahead

_FETCHES = 4
_AHEAD = 64
"""Objects that are read before the earlier ones are counted."""
_PROGRESS_S = 5.0
_GAP = 0.5
"""Missing time is a gap when it exceeds this part of the host's usual window: its windows then
start more than one and a half lengths apart, and one lost window shows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n  everflame verify cpu.pb.gz\n  everflame verify --store s3://profiles/prod\n\n"
        "Without FILE it reads the store, and also reports gaps between the windows of a host.\n"
        "Of compacted files it also checks that their sums are those of their manifest.\n"
        "The exit status is 1 if ticks differ from stored + idle + filtered + lost, if sums\n"
        "differ, or if a profile or file cannot be read, and 2 if there is no profile in the\n"
        "time range."
    )
    parser.add_argument("files", metavar="FILE", nargs="*", help=FILE_HELP)
    arguments.add_json(parser)
    arguments.add_store(parser)
    arguments.add_window(parser)
    add_reading_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print the result; return 1 if a profile is unsound or cannot be read, 2 if there is none.

    Raises:
        StoreError: the store cannot be listed.
    """
    if options.files:
        arguments.refuse_store(options, "verify")
        return _report(verify(options.files, reading_options(options)), as_json=options.json)
    selection = selected(options)

    def tell(number: int) -> None:
        print(f"everflame: verified {counted(number, 'object')}", file=sys.stderr)

    found = verify_store(selection.store, selection.window, tell=tell)
    if found.objects or not found.is_ok:
        return _report(found, as_json=options.json)
    if options.json:
        sys.stdout.buffer.write(found.as_json() + b"\n")
    print(f"everflame: {selection.why_nothing()}", file=sys.stderr)
    return 2


class Gap(NamedTuple):
    """Time between two windows of a host that no window covers."""

    host: str
    window: Window


class HeldPin(NamedTuple):
    """A pin, and how many objects the store has of its window."""

    pin: Pin
    objects: int


class _Checked(NamedTuple):
    """What was read of one profile: its accounting and the samples of its rows, or why not."""

    key: str
    accounting: Accounting
    samples: int
    problem: str = ""
    is_counted: bool = False
    """It is compacted, too, and was counted there."""


@dataclass(slots=True)
class Verification:
    """What was found; the sums are over all readable objects.

    A mismatch of a compacted file has the manifest's number of samples as `ticks`, or its value if
    only that differs.
    """

    objects: int = 0
    sums: Accounting = field(default_factory=Accounting)
    mismatches: list[dict[str, int | str]] = field(default_factory=list)
    unreadable: list[dict[str, str]] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    pins: list[HeldPin] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        return not self.mismatches and not self.unreadable

    def add(self, checked: _Checked) -> None:
        if checked.problem:
            self.unreadable.append({"key": checked.key, "reason": checked.problem})
            return
        if checked.is_counted:
            return
        self.objects += 1
        counts = checked.accounting
        self.sums = self.sums.merge(counts)
        accounted = counts.ticks - counts.mismatch - counts.stored + checked.samples
        if counts.ticks != accounted or counts.stored != checked.samples:
            self.mismatches.append({"key": checked.key, "ticks": counts.ticks, "sum": accounted})

    def add_blocks(self, checked: CheckedBlocks) -> None:
        """Add what was found in the compacted files of an hour or a day."""
        self.objects += len(checked.objects)
        self.sums = self.sums.merge(checked.accounting)
        self.mismatches += [
            {"key": each.key, "ticks": each.expected, "sum": each.sum}
            for each in checked.mismatches
        ]
        self.unreadable += [{"key": each.key, "reason": each.reason} for each in checked.unreadable]

    def add_pins(self, pins: Sequence[HeldPin]) -> None:
        self.pins += pins
        for pin, _ in pins:
            if pin.problem:
                self.unreadable.append({"key": pin.key, "reason": pin.problem})

    def as_json(self) -> bytes:
        """Return the shape of `verify --json`."""
        lost: Counter[str] = Counter(self.sums.lost)
        return orjson.dumps(
            {
                "schema": 1,
                "ok": self.is_ok,
                "objects": self.objects,
                "ticks": self.sums.ticks,
                "idle": self.sums.idle,
                "filtered": self.sums.filtered,
                "stored": self.sums.stored,
                "lost": lost,
                "mismatches": self.mismatches,
                "unreadable": self.unreadable,
                "gaps": [
                    {
                        "host": host,
                        "from_ms": window.start_ns // 1_000_000,
                        "until_ms": window.end_ns // 1_000_000,
                    }
                    for host, window in self.gaps
                ],
                "pins": [{**as_record(pin), "objects": objects} for pin, objects in self.pins],
            }
        )


def verify(files: Iterable[str], options: ReadOptions | None = None) -> Verification:
    """Check each file; a damaged one is named, and the others are checked all the same."""
    found = Verification()
    for file in files:
        try:
            profile = read_file(file, options)
        except (ProfileError, OSError) as error:
            found.add(_Checked(file, Accounting(), 0, _without_name(str(error), file)))
            continue
        counts = profile.accounting
        # A recording of ours names its host, however short it was.
        is_empty = not (counts.ticks or counts.hosts or profile.total_samples)
        found.add(
            _Checked(
                file,
                counts,
                profile.total_samples,
                "it is empty: it contains no samples" if is_empty else "",
            )
        )
    return found


def _without_name(reason: str, file: str) -> str:
    """Return a reason without the name of its file, which stands before it."""
    return reason.removeprefix(f"{file}: ").replace(f"cannot read {file}: ", "cannot read it: ", 1)


def verify_store(
    store: TenantStore,
    window: Window,
    tell: Callable[[int], None] = lambda _: None,
) -> Verification:
    """Read every object that starts inside the window. `tell` gets their number now and then.

    What lies among the profiles and is none is named as unreadable when the whole store is asked
    for. Compacted files are read first, so that what is compacted meanwhile counts as an object.
    """
    found = Verification()
    hosts = _Hosts(pins_in(store, window))
    progress = _Progress(tell)
    compacted: dict[tuple[str, str], CheckedBlocks] = {}
    quarantined: dict[str, str] = {}
    types = {CPU, *manifest_types(store)} if window == ALWAYS else {CPU}
    with tempfile.TemporaryDirectory(prefix="everflame-verify-") as folder:
        for type_ in sorted(types):
            for blocks in check_compacted(store, type_, window, Path(folder)):
                found.add_blocks(blocks)
                quarantined.update(blocks.quarantined)
                for each in blocks.objects:
                    hosts.add(each.key, each.host)
                progress.add(len(blocks.objects))
                compacted[type_, blocks.name] = blocks
                blocks.objects.clear()

    def is_compacted(key: ObjectKey) -> bool:
        blocks = compacted.get((key.type, hour_of(key.start_s)))
        return blocks is not None and blocks.has(key.content16)

    for key, checked in _check_all(store.store, _listed(store, window), is_compacted):
        found.add(checked)
        if key is not None:
            quarantined.pop(key.text, None)
            names = checked.accounting.hosts
            if not checked.is_counted:
                hosts.add(key, names[0].name if len(names) == 1 else "")
        progress.add(1)
    for text, reason in quarantined.items():
        found.add(_Checked(text, Accounting(), 0, reason))
    found.gaps = hosts.gaps()
    found.add_pins(hosts.pins())
    return found


class _Hosts:
    """The windows of each host, and its name; how many of them some pins hold."""

    def __init__(self, pins: Sequence[Pin]) -> None:
        self._pins = pins
        self._pinned: Counter[str] = Counter()
        self._windows: dict[str, list[Window]] = {}
        self._names: dict[str, str] = {}

    def add(self, key: ObjectKey, name: str) -> None:
        window = Window(key.start_ns, key.end_ns)
        self._windows.setdefault(key.host_id, []).append(window)
        held = (pin for pin in self._pins if pin.type == key.type)
        self._pinned.update(pin.key for pin in held if pin.overlaps(*window))
        if name:
            self._names[key.host_id] = name

    def pins(self) -> list[HeldPin]:
        return [HeldPin(pin, self._pinned[pin.key]) for pin in self._pins]

    def gaps(self) -> list[Gap]:
        return sorted(
            Gap(self._names.get(host_id, host_id), missing)
            for host_id, theirs in self._windows.items()
            for missing in find_gaps(theirs)
        )


class _Progress:
    """Tells now and then how many objects have been checked."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell
        self._number = 0
        self._next_s = time.monotonic() + _PROGRESS_S

    def add(self, number: int) -> None:
        self._number += number
        if time.monotonic() >= self._next_s:
            self._tell(self._number)
            self._next_s = time.monotonic() + _PROGRESS_S


def find_gaps(windows: Iterable[Window]) -> list[Window]:
    """Return the time between a host's windows that is missing, if it is long (see _GAP)."""
    ordered = sorted(windows)
    if not ordered:
        return []
    lengths = Counter(window.end_ns - window.start_ns for window in ordered)
    usual_ns = max(lengths, key=lambda length: (lengths[length], length))
    gaps, covered_ns = [], ordered[0].end_ns
    for window in ordered:
        if window.start_ns - covered_ns > _GAP * usual_ns:
            gaps.append(Window(covered_ns, window.start_ns))
        covered_ns = max(covered_ns, window.end_ns)
    return gaps


def _listed(store: TenantStore, window: Window) -> Iterator[tuple[str, ObjectKey | None]]:
    """Return what is listed."""
    pairs: Iterable[tuple[ObjectKey | None, StoredObject]] = store.list_window(window)
    if window == ALWAYS:
        pairs = store.list_all()
    for key, stored in pairs:
        if key is None or window.start_ns <= key.start_ns < window.end_ns:
            yield stored.key, key


def _check_all(
    store: ObjectStore,
    listed: Iterator[tuple[str, ObjectKey | None]],
    is_compacted: Callable[[ObjectKey], bool],
) -> Iterator[tuple[ObjectKey | None, _Checked]]:
    hasher = Hasher(secrets.token_bytes(32))

    def check(pair: tuple[str, ObjectKey | None]) -> tuple[ObjectKey | None, _Checked]:
        text, key = pair
        if key is None:
            return key, _Checked(text, Accounting(), 0, "its name is not that of a profile")
        is_counted = is_compacted(key)
        try:
            columns = decode_object(key, store.get(text), hasher)
        except (ProfileError, StoreError) as error:
            # What is compacted may be deleted at any time.
            is_expired = is_counted and isinstance(error, ObjectMissing)
            problem = "" if is_expired else str(error)
            return key, _Checked(text, Accounting(), 0, problem, is_counted)
        samples = int(columns.counts[:, 0].sum())
        return key, _Checked(text, columns.accounting, samples, is_counted=is_counted)

    with ThreadPoolExecutor(_FETCHES, "verify") as pool:
        yield from map_ahead(pool, check, listed, _AHEAD)


def _result(found: Verification) -> str:
    if found.is_ok:
        return accounted(found.sums.uncounted)
    damaged = f"{len(found.unreadable):,} more cannot be read" if found.unreadable else ""
    wrong = f"{len(found.mismatches):,} of them do not add up" if found.mismatches else ""
    return f"NOT OK: {' and '.join(filter(None, (wrong, damaged)))}"


def _report(found: Verification, *, as_json: bool) -> int:
    if as_json:
        sys.stdout.buffer.write(found.as_json() + b"\n")
        return 0 if found.is_ok else 1
    counts = found.sums
    print(
        f"{counted(counts.ticks, 'tick')} = {counts.stored:,} stored + {counts.idle:,} idle"
        f" + {counts.filtered:,} filtered + {sum(counts.lost.values()):,} lost"
    )
    for cause, number in counts.lost.items():
        print(f"  lost to {cause}: {number:,}")
    for mismatch in found.mismatches:
        numbers = f"{mismatch['ticks']:,} ticks, sum {mismatch['sum']:,}"
        if named_by(str(mismatch["key"])):
            numbers = f"{mismatch['ticks']:,} by its manifest, sum {mismatch['sum']:,}"
        print(f"MISMATCH {mismatch['key']}: {numbers}")
    for problem in found.unreadable:
        print(f"UNREADABLE {problem['key']}: {problem['reason']}")
    for host, window in found.gaps:
        print(f"GAP {host}: nothing from {rfc3339(window.start_ns)} until {rfc3339(window.end_ns)}")
    for pin, objects in found.pins:
        print(f"PINNED {pin.name}: {counted(objects, 'profile')} from {window_text(pin)}")
    print(f"{counted(found.objects, 'profile')}: {_result(found)}")
    return 0 if found.is_ok else 1
