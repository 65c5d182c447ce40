"""`everflame verify`: check of profiles that ticks = stored + idle + filtered + lost.

The samples must also add up to the number that the accounting calls stored: a file cannot claim
more samples than it contains. Of a store every object is read, never the cache, and gaps between
the windows of a host are reported. A gap is not a failure: the host may have been off.
"""

import argparse
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import orjson

from profiler.commands import arguments
from profiler.commands.files import FILE_HELP, add_reading_options, read_file, reading_options
from profiler.commands.selection import selected
from profiler.formats.reading import ReadOptions
from profiler.text import accounted, counted
from profiler.times import rfc3339
from storage.hashing import Hasher
from storage.objects.keys import ObjectKey, ObjectStore, StoredObject, StoreError
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
        "The exit status is 1 if ticks differ from stored + idle + filtered + lost, or if a\n"
        "profile cannot be read, and 2 if there is no profile in the time range."
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
    if found.objects or found.unreadable:
        return _report(found, as_json=options.json)
    if options.json:
        sys.stdout.buffer.write(found.as_json() + b"\n")
    print(f"everflame: {selection.why_nothing()}", file=sys.stderr)
    return 2


class Gap(NamedTuple):
    """Time between two windows of a host that no window covers."""

    host: str
    window: Window


class _Checked(NamedTuple):
    """What was read of one profile: its accounting and the samples of its rows, or why not."""

    key: str
    accounting: Accounting
    samples: int
    problem: str = ""


@dataclass(slots=True)
class Verification:
    """What was found; the sums are over all readable objects."""

    objects: int = 0
    sums: Accounting = field(default_factory=Accounting)
    mismatches: list[dict[str, int | str]] = field(default_factory=list)
    unreadable: list[dict[str, str]] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        return not self.mismatches and not self.unreadable

    def add(self, checked: _Checked) -> None:
        if checked.problem:
            self.unreadable.append({"key": checked.key, "reason": checked.problem})
            return
        self.objects += 1
        counts = checked.accounting
        self.sums = self.sums.merge(counts)
        accounted = counts.ticks - counts.mismatch - counts.stored + checked.samples
        if counts.ticks != accounted or counts.stored != checked.samples:
            self.mismatches.append({"key": checked.key, "ticks": counts.ticks, "sum": accounted})

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
    for.
    """
    found = Verification()
    windows: dict[str, list[Window]] = {}
    names: dict[str, str] = {}
    next_s = time.monotonic() + _PROGRESS_S
    listed = _listed(store, window, windows)
    for number, (key, checked) in enumerate(_check_all(store.store, listed), start=1):
        found.add(checked)
        if key is not None and len(checked.accounting.hosts) == 1:
            names[key.host_id] = checked.accounting.hosts[0].name
        if time.monotonic() >= next_s:
            tell(number)
            next_s = time.monotonic() + _PROGRESS_S
    for host_id, theirs in windows.items():
        name = names.get(host_id) or host_id
        found.gaps += [Gap(name, missing) for missing in find_gaps(theirs)]
    found.gaps.sort()
    return found


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


def _listed(
    store: TenantStore, window: Window, windows: dict[str, list[Window]]
) -> Iterator[tuple[str, ObjectKey | None]]:
    """Return what is listed, noting the windows of each host."""
    pairs: Iterable[tuple[ObjectKey | None, StoredObject]] = store.list_window(window)
    if window == ALWAYS:
        pairs = store.list_all()
    for key, stored in pairs:
        if key is None:
            yield stored.key, None
        elif window.start_ns <= key.start_ns < window.end_ns:
            windows.setdefault(key.host_id, []).append(Window(key.start_ns, key.end_ns))
            yield stored.key, key


def _check_all(
    store: ObjectStore, listed: Iterator[tuple[str, ObjectKey | None]]
) -> Iterator[tuple[ObjectKey | None, _Checked]]:
    hasher = Hasher(secrets.token_bytes(32))

    def check(pair: tuple[str, ObjectKey | None]) -> tuple[ObjectKey | None, _Checked]:
        text, key = pair
        if key is None:
            return key, _Checked(text, Accounting(), 0, "its name is not that of a profile")
        try:
            columns = decode_object(key, store.get(text), hasher)
        except (ProfileError, StoreError) as error:
            return key, _Checked(text, Accounting(), 0, str(error))
        return key, _Checked(text, columns.accounting, int(columns.counts[:, 0].sum()))

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
        print(f"MISMATCH {mismatch['key']}: {mismatch['ticks']:,} ticks, sum {mismatch['sum']:,}")
    for problem in found.unreadable:
        print(f"UNREADABLE {problem['key']}: {problem['reason']}")
    for host, window in found.gaps:
        print(f"GAP {host}: nothing from {rfc3339(window.start_ns)} until {rfc3339(window.end_ns)}")
    print(f"{counted(found.objects, 'profile')}: {_result(found)}")
    return 0 if found.is_ok else 1
