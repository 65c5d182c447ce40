"""Compacted: which files hold what was compacted, and whether they say the same.

The coarsest files are read that answer a question (`plan_samples`, `plan_heads`): those of a day
for its whole hours, then those of an hour, of ten minutes where an edge of a window is aligned to
them or a part lies inside of it, and else detail. An hour's rollup is read only if it was made of
exactly the parts that the hour has now. Parts whose objects all start before or after a window are
left out, and files of detail that have rows of other hosts only (`SamplesPlan.of_hosts`).
"""

import itertools
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec

from storage.blocks.manifest import DAY_S, HOUR_S, DayManifest, File, HourManifest, Part, start_s_of
from storage.blocks.scans import LocalFile
from storage.blocks.schema import DETAIL, DICTIONARY, HEADS, HEADS_10M, ROLLUPS, STACK_TREE
from storage.blocks.slices import Slice, Spans, join_spans, seconds_of
from storage.columns import Columns, Times, count_objects
from storage.hashing import Hashes
from storage.objects.keys import NS_PER_S
from storage.objects.tenant import HOUR_NS
from storage.profile import ProfileError, Window
from storage.query.coverage import Skipped

_PART_SUMS = ("objects", "samples", "value")
_TEN_MINUTES, _HOURS, _DAYS = ROLLUPS.values()
_BUCKETS_S = {table: seconds for seconds, table in ROLLUPS.items()}
_SAMPLES = frozenset({DETAIL, *_BUCKETS_S})
_ROWS_OF_DETAIL = 6
"""What a row of ten minutes stands for in a fleet; one of an hour stands for three of these."""
_STEPS = (
    "its samples are kept in steps of {} minutes: those count that begin in the window"
    " (choose one that begins and ends with a step)"
)


@dataclass(frozen=True, slots=True)
class CompactedHour:
    """The compacted objects of an hour that start in a window, which lies inside of the hour."""

    manifest: HourManifest
    window: Window
    day: DayManifest | None = None
    """The rollup of the day, if it holds just the parts that the hour has now."""

    @property
    def name(self) -> str:
        return self.manifest.hour

    @property
    def start_ns(self) -> int:
        """When the whole hour starts."""
        return start_s_of(self.manifest.hour) * NS_PER_S

    @property
    def is_whole(self) -> bool:
        return self.window.end_ns - self.window.start_ns == HOUR_NS

    @property
    def key(self) -> str:
        """Name what it is made of: as long as it is the same, so is what is read."""
        parts = ",".join(self.manifest.part_ids)
        return f"{self.manifest.type} {self.manifest.hour} {parts} {self.window}"

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.manifest.parts

    @property
    def parts_inside(self) -> tuple[Part, ...]:
        """Return the parts whose objects may start in the window."""
        start_s, end_s = seconds_of(self.window)
        return tuple(part for part in self.parts if part.has_starts_in(start_s, end_s))

    @classmethod
    def of(cls, manifest: HourManifest, day: DayManifest | None = None) -> "CompactedHour":
        start_ns = start_s_of(manifest.hour) * NS_PER_S
        return cls(manifest, Window(start_ns, start_ns + HOUR_NS), day)

    def cut(self, window: Window) -> "CompactedHour | None":
        """Return what of it is in another window as well; None if that is nothing."""
        both = _both(self.window, window)
        return replace(self, window=both) if both is not None else None


@dataclass(frozen=True, slots=True)
class CompactedDay:
    """Hours of a day whose own manifests have expired, as far as they start in a window."""

    manifest: DayManifest
    window: Window
    hours: frozenset[str]
    """Which hours of the day (`09`)."""

    @property
    def name(self) -> str:
        return self.manifest.day

    @property
    def start_ns(self) -> int:
        """When the whole day starts."""
        return start_s_of(self.manifest.day) * NS_PER_S

    @property
    def is_whole(self) -> bool:
        return self.window.end_ns - self.window.start_ns == DAY_S * NS_PER_S

    @property
    def key(self) -> str:
        """Name what it is made of: as long as it is the same, so is what is read."""
        made_of = (f"{hour}:{','.join(self.manifest.hours[hour])}" for hour in sorted(self.hours))
        return f"{self.manifest.type} {self.manifest.day} {' '.join(made_of)} {self.window}"

    @property
    def parts(self) -> tuple[Part, ...]:
        """None is left."""
        return ()

    @property
    def parts_inside(self) -> tuple[Part, ...]:
        return ()

    @classmethod
    def of(cls, manifest: DayManifest, hours: frozenset[str]) -> "CompactedDay":
        start_ns = start_s_of(manifest.day) * NS_PER_S
        return cls(manifest, Window(start_ns, start_ns + DAY_S * NS_PER_S), hours)

    @property
    def held(self) -> tuple[Window, ...]:
        """Return the windows of its hours, in order."""
        windows = []
        for hour in sorted(self.hours):
            start_ns = self.start_ns + int(hour) * HOUR_NS
            both = _both(self.window, Window(start_ns, start_ns + HOUR_NS))
            windows += [both] if both is not None else []
        return tuple(windows)

    def cut(self, window: Window) -> "CompactedDay | None":
        """Return what of it is in another window as well; None if that is nothing."""
        both = _both(self.window, window)
        found = replace(self, window=both) if both is not None else None
        return found if found is not None and found.held else None


Compacted = CompactedHour | CompactedDay


class CompactedHours(NamedTuple):
    """What is compacted of a window, in order, and the manifests that could not be read."""

    hours: list[Compacted]
    skipped: tuple[Skipped, ...]


class Chosen(NamedTuple):
    """Files, and the seconds whose rows count."""

    files: tuple[File, ...]
    spans: Spans
    part: str = ""
    """The id of the part that they are all of; empty if they are of several, or of none."""


class SamplesPlan(NamedTuple):
    """What samples are read from, each of them once."""

    samples: list[Chosen]
    dictionary: list[File]
    """What the ids of these samples mean. The largest files of each table come first."""
    notes: list[Skipped]
    """Why an edge of the window is not where it was asked for."""
    missing: list[str]
    """The hours and days whose samples have expired."""

    @property
    def has_rollups(self) -> bool:
        return any(file.table in _BUCKETS_S for each in self.samples for file in each.files)

    @property
    def files(self) -> tuple[File, ...]:
        """Return all files, each once."""
        named = (*(file for each in self.samples for file in each.files), *self.dictionary)
        return tuple(dict.fromkeys(named))

    def of_all(self) -> "SamplesPlan":
        """Return the plan with files of the same seconds together: fewer queries read them."""
        files: dict[Spans, tuple[File, ...]] = {}
        for each in self.samples:
            files[each.spans] = (*files.get(each.spans, ()), *each.files)
        return self._replace(samples=[Chosen(some, spans) for spans, some in files.items()])

    def of_hosts(self, hosts: Hashes, absent: Collection[str]) -> "SamplesPlan":
        """Return the plan without files that have no rows of some hosts, by their ids.

        `absent` are the ids of parts that have none. A manifest that names wrong ranges is found
        out: what is known of the objects, which is in other files, then has samples that are not in
        these (`storage.query.blocks`).
        """
        kept: list[Chosen] = []
        gone: set[File] = set()
        for each in self.samples:
            files = tuple(
                file for file in each.files if file.table != DETAIL or file.may_have(hosts)
            )
            if each.part not in absent and any(file.table in _SAMPLES for file in files):
                kept.append(each._replace(files=files))
            else:
                gone.update(files)
        dictionary = [file for file in self.dictionary if file not in gone]
        return self._replace(samples=kept, dictionary=dictionary)


def slices_of(chosen: Sequence[Chosen], local: Mapping[File, LocalFile]) -> list[Slice]:
    return [Slice(tuple(local[file] for file in each.files), each.spans) for each in chosen]


def _both(one: Window, other: Window) -> Window | None:
    start_ns, end_ns = max(one.start_ns, other.start_ns), min(one.end_ns, other.end_ns)
    return Window(start_ns, end_ns) if start_ns < end_ns else None


def files_of(hour: Compacted, *tables: str) -> list[File]:
    """Return the files of an hour's parts that hold some tables."""
    return [file for part in hour.parts for file in part.files if file.table in tables]


def files_inside(hour: Compacted, *tables: str) -> list[File]:
    """Return what `files_of` does, of the parts whose objects may start in the window."""
    return [file for part in hour.parts_inside for file in part.files if file.table in tables]


def _of(files: Iterable[File], *tables: str) -> tuple[File, ...]:
    return tuple(file for file in files if file.table in tables)


def without_day(hour: Compacted) -> Compacted:
    """Return an hour as if its day had no rollup; what only the day has, as if that had no tree.

    Its stacks are there as lists as well. The same object if that makes no difference.
    """
    if isinstance(hour, CompactedHour):
        return hour if hour.day is None else replace(hour, day=None)
    day = hour.manifest
    files = tuple(file for file in day.files if file.table != STACK_TREE)
    if len(files) == len(day.files) or not any(file.table == "stacks" for file in files):
        return hour
    return replace(hour, manifest=msgspec.structs.replace(day, files=files))


def each_without_day(hours: Sequence[Compacted]) -> list[Compacted]:
    """Return hours to be read one by one from their own files; none if that is nothing else.

    Those of their day may be what cannot be read, or its tree.
    """
    alone = [without_day(hour) for hour in hours]
    is_other = len(hours) > 1 or any(map(operator.is_not, alone, hours))
    return alone if is_other else []


def has_detail(hour: Compacted) -> bool:
    """Return whether the samples of an hour are kept with all of their labels."""
    return bool(hour.parts) and all(part.files_of(DETAIL) for part in hour.parts)


def rows_of_detail(hour: Compacted) -> int:
    """Return how many rows the detail of an hour has; about how many, once that has expired."""
    detail = files_of(hour, DETAIL)
    if detail or not hour.parts:
        return sum(file.rows for file in detail)
    finest = files_of(hour, _TEN_MINUTES)
    if finest:
        return _ROWS_OF_DETAIL * sum(file.rows for file in finest)
    hourly = hour.manifest.hourly if isinstance(hour, CompactedHour) else None
    files = _of(hourly.files, _HOURS) if hourly is not None else ()
    return 3 * _ROWS_OF_DETAIL * sum(file.rows for file in files)


def plan_samples(hours: Sequence[Compacted], *, rolls_up: bool) -> SamplesPlan:
    """Choose the files with the samples of successive hours, as detailed as they are kept.

    Or, if they are to be rolled up, the longest buckets that lie in the window.
    """
    plan = SamplesPlan([], [], [], [])
    for _, group in itertools.groupby(hours, lambda hour: hour.name[:10]):
        theirs = list(group)
        held = [hour for hour in theirs if _is_held(hour, rolls_up=rolls_up)]
        if held and not _plan_day(plan, held):
            held = [hour for hour in held if isinstance(hour, CompactedDay)]
        for hour in theirs:
            if isinstance(hour, CompactedHour) and hour not in held:
                _plan_hour(plan, hour, rolls_up=rolls_up)
    files = dict.fromkeys(plan.dictionary)
    return plan._replace(dictionary=sorted(files, key=lambda file: -file.rows))


def _is_held(hour: Compacted, *, rolls_up: bool) -> bool:
    """Return whether samples are to be read from the files of the day."""
    if isinstance(hour, CompactedDay):
        return True
    return rolls_up and hour.is_whole and hour.day is not None


def _plan_day(plan: SamplesPlan, held: Sequence[Compacted]) -> bool:
    """Plan to read hours from the rollup of their day; return False if it cannot tell them apart.

    Hours that only the day has are planned in any case, or missing.
    """
    first = held[0]
    day = first.manifest if isinstance(first, CompactedDay) else first.day
    assert day is not None
    windows = [
        window
        for hour in held
        for window in (hour.held if isinstance(hour, CompactedDay) else (hour.window,))
    ]
    spans = join_spans(seconds_of(window) for window in windows)
    start_s = start_s_of(day.day)
    by_hour, by_day = _of(day.files, _HOURS), _of(day.files, _DAYS)
    alone = [hour for hour in held if isinstance(hour, CompactedDay)]
    is_all = sum(end - start for start, end in spans) == HOUR_S * len(day.hours)
    if by_day and is_all:
        plan.samples.append(Chosen(by_day, ((start_s, start_s + 1),)))
    elif by_hour:
        plan.samples.append(Chosen(by_hour, spans))
        plan.notes.extend(_note(hour, HOUR_S) for hour in alone if not is_aligned(hour, HOUR_S))
    else:
        for hour in alone:
            if not by_day or hour.hours != day.hours.keys():
                plan.missing.append(day.day)
                continue
            plan.samples.append(Chosen(by_day, (seconds_of(hour.window),)))
            plan.notes.append(_note(hour, DAY_S))
        if alone:
            plan.dictionary.extend(_dictionary_of(day.files))
        return False
    plan.dictionary.extend(_dictionary_of(day.files))
    return True


def _dictionary_of(files: Iterable[File]) -> tuple[File, ...]:
    """Return what says what ids of a day mean: of its stacks the tree, if it has one."""
    has_tree = any(file.table == STACK_TREE for file in files)
    tables = {*DICTIONARY, STACK_TREE} - ({"stacks"} if has_tree else set())
    return _of(files, *tables)


def _plan_hour(plan: SamplesPlan, hour: CompactedHour, *, rolls_up: bool) -> None:
    """Plan to read an hour from its own files."""
    manifest, hourly = hour.manifest, hour.manifest.hourly
    start_s, end_s = span = seconds_of(hour.window)
    plan.dictionary.extend(files_inside(hour, *DICTIONARY))
    if rolls_up and hour.is_whole and hourly is not None and manifest.has_hourly:
        files = (*_of(hourly.files, _HOURS), *files_of(hour, "stacks"))
        plan.samples.append(Chosen(files, (span,)))
        return
    found: list[Chosen] = []
    left: set[str] = set()
    longest_s = 1
    for part in hour.parts_inside:
        is_inside = start_s <= part.start_s and part.end_s <= end_s
        takes_rollup = rolls_up and (is_inside or is_aligned(hour))
        files = _finest(part, prefers_rollup=takes_rollup)
        bucket_s = max((_BUCKETS_S.get(each.table, 1) for each in files), default=1)
        # All of a part inside counts, also if its first bucket begins before the window.
        first_s = start_s - start_s % bucket_s if is_inside else start_s
        found.append(Chosen(files, ((first_s, end_s),), part.id))
        left |= set() if files else {part.id}
        if not is_inside:
            longest_s = max(longest_s, bucket_s)
    if left:
        # What has expired is in the hourly rollup, which may be older than the last parts.
        rolled_up = set(hourly.parts) if hourly else set()
        if hourly is None or not left <= rolled_up <= set(manifest.part_ids):
            plan.missing.append(hour.name)
            return
        own = (part for part in hour.parts_inside if part.id not in rolled_up)
        rest = (file for part in own for file in _finest(part))
        named = (*_of(hourly.files, _HOURS), *rest, *files_of(hour, "stacks"))
        found = [Chosen(tuple(dict.fromkeys(named)), (span,))]
        plan.dictionary.extend(files_of(hour, *DICTIONARY))  # the rollup is of all parts
        longest_s = HOUR_S
    if not hour.is_whole and longest_s > 1 and not is_aligned(hour, longest_s):
        plan.notes.append(_note(hour, longest_s))
    plan.samples.extend(each for each in found if each.files)


def _finest(part: Part, *, prefers_rollup: bool = False) -> tuple[File, ...]:
    """Return the files with the samples of a part, of ten minutes if preferred."""
    samples, rollup = part.files_of(DETAIL), part.files_of(_TEN_MINUTES)
    if rollup and (prefers_rollup or not samples):
        samples = rollup
    # They may number the stacks of their part, which therefore belong to them.
    return (*samples, *part.files_of("stacks")) if samples else ()


def plan_heads(hours: Sequence[Compacted], *, is_coarse: bool) -> list[Chosen]:
    """Choose the files with what is known of objects: of each one, or if coarse, by ten minutes.

    With them come the label sets that they refer to. Of hours that only their day has there are
    no files if they have expired.
    """
    found: list[Chosen] = []
    of_days: dict[tuple[File, ...], list[tuple[int, int]]] = {}
    for hour in hours:
        spans = [seconds_of(hour.window)]
        if isinstance(hour, CompactedDay):
            day: DayManifest | None = hour.manifest
            spans = [seconds_of(window) for window in hour.held]
        else:
            day = hour.day if is_coarse and is_aligned(hour) else None
        files = _heads_in(day.files) if day is not None else ()
        if files:
            of_days.setdefault(files, []).extend(spans)
            continue
        if isinstance(hour, CompactedHour):
            files = _hourly_heads(hour) if is_coarse else ()
            own = tuple(files_inside(hour, *HEADS, "label_sets"))
            found.append(Chosen(files or own, tuple(spans)))
    found += [Chosen(files, join_spans(spans)) for files, spans in of_days.items()]
    return found


def check_heads(hours: Sequence[Compacted], heads: Sequence[Chosen]) -> None:
    """Check that it is known of all hours what objects they had.

    Raises:
        ProfileError: it is not.
    """
    files = {file for each in heads for file in each.files}
    days = [hour.manifest for hour in hours if isinstance(hour, CompactedDay)]
    if not all(files.issuperset(_heads_in(day.files)) and _heads_in(day.files) for day in days):
        raise ProfileError("what was known of its objects has expired")


def _hourly_heads(hour: CompactedHour) -> tuple[File, ...]:
    """Return the heads of an hour, if there are some that count for its window."""
    manifest = hour.manifest
    is_usable = manifest.has_hourly and is_aligned(hour)
    return _heads_in(manifest.hourly.files) if is_usable and manifest.hourly else ()


def _heads_in(files: Iterable[File]) -> tuple[File, ...]:
    """Return the heads of ten minutes among files, and their label sets; nothing if one is not."""
    found = _of(files, *HEADS_10M, "label_sets")
    return found if {*HEADS_10M, "label_sets"} == {file.table for file in found} else ()


def _note(hour: Compacted, bucket_s: int) -> Skipped:
    return Skipped(hour.name, _STEPS.format(bucket_s // 60))


def check_named(hours: Sequence[Compacted]) -> None:
    """Check that manifests name what is needed, and nothing twice: it would count twice.

    Raises:
        ProfileError: they do not.
    """
    parts = [part for hour in hours for part in hour.parts]
    for part in parts:
        missing = {*HEADS, "label_sets"} - {file.table for file in part.files}
        if missing:
            raise ProfileError(f"its manifest names no {', '.join(sorted(missing))}")
    named = [[file.key for part in parts for file in part.files]]
    for hour in hours:
        if isinstance(hour, CompactedDay):
            named.append([file.key for file in hour.manifest.files])
        elif hour.manifest.hourly is not None:
            named.append([file.key for file in hour.manifest.hourly.files])
        if isinstance(hour, CompactedHour) and hour.day is not None:
            named.append([file.key for file in hour.day.files])
    if any(len(set(keys)) < len(keys) for keys in named):
        raise ProfileError("its manifest names a file twice")


def check_whole(hours: Sequence[Compacted], value: Columns | Times | None) -> None:
    """Check that whole hours hold what their manifests say, if nothing of them was left out.

    Raises:
        ProfileError: they do not.
    """
    units = {hour.manifest.unit for hour in hours} - {""}
    if value is not None and units and units != {value.unit}:
        raise ProfileError(f"its unit is {value.unit}, its manifest says {', '.join(units)}")
    if not all(hour.is_whole and isinstance(hour, CompactedHour) for hour in hours):
        return
    parts = [part for hour in hours for part in hour.parts]
    expected = tuple(sum(getattr(part, name) for part in parts) for name in _PART_SUMS)
    found = (0, 0, 0)
    if value is not None:
        found = (count_objects(value.objects), *value.time_counts.sum(axis=0).tolist())
    if found != expected:
        raise ProfileError(f"its {', '.join(_PART_SUMS)} are {found}, its manifest says {expected}")


def is_aligned(hour: Compacted, bucket_s: int = 600) -> bool:
    """Return whether what is asked for of an hour begins and ends with a bucket."""
    bucket_ns = bucket_s * NS_PER_S
    return hour.window.start_ns % bucket_ns == 0 and hour.window.end_ns % bucket_ns == 0
