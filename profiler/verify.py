"""`everflame verify`: prove law 1 for profiles, ticks = stored + idle + filtered + lost.

Also that the rows add up to what the accounting says was stored: a file cannot claim more samples
than it holds.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import orjson

from profiler import export
from storage.profile import Accounting, ProfileError


@dataclass(slots=True)
class Verification:
    """What was found; the sums are over all readable objects."""

    objects: int = 0
    sums: Accounting = field(default_factory=Accounting)
    mismatches: list[dict[str, int | str]] = field(default_factory=list)
    unreadable: list[dict[str, str]] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        return not self.mismatches and not self.unreadable

    def as_json(self) -> bytes:
        """Give the shape of `verify --json`."""
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
                "gaps": [],
            }
        )


def verify(files: Iterable[str]) -> Verification:
    """Check each file; a damaged one is named, and the others are checked all the same."""
    found = Verification()
    for file in files:
        try:
            profile = export.read(file)
        except (ProfileError, OSError) as error:
            found.unreadable.append({"key": file, "reason": str(error)})
            continue
        found.objects += 1
        counts = profile.accounting
        found.sums = found.sums.merge(counts)
        accounted = counts.ticks - counts.mismatch - counts.stored + profile.total_samples
        if counts.ticks != accounted or counts.stored != profile.total_samples:
            found.mismatches.append({"key": file, "ticks": counts.ticks, "sum": accounted})
    return found


def run(files: Iterable[str], *, as_json: bool) -> int:
    """Print what was found; 1 when a profile does not add up or cannot be read."""
    found = verify(files)
    if as_json:
        sys.stdout.buffer.write(found.as_json() + b"\n")
        return 0 if found.is_ok else 1
    counts = found.sums
    print(
        f"{counts.ticks:,} ticks = {counts.stored:,} stored + {counts.idle:,} idle"
        f" + {counts.filtered:,} filtered + {sum(counts.lost.values()):,} lost"
    )
    for cause, number in counts.lost.items():
        print(f"  lost to {cause}: {number:,}")
    for mismatch in found.mismatches:
        print(f"MISMATCH {mismatch['key']}: {mismatch['ticks']} ticks, sum {mismatch['sum']}")
    for problem in found.unreadable:
        print(f"UNREADABLE {problem['key']}: {problem['reason']}")
    print(f"{found.objects} profiles: {'every tick accounted for' if found.is_ok else 'NOT OK'}")
    return 0 if found.is_ok else 1
