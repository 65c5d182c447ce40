"""The day, so far: rollups of all hours of a day that are over, renewed with each further one.

A renewal takes the day's previous files and those of the new hours, so it reads no hour twice. If
an hour has changed that the day has already, because late objects have come, the samples of the
other hours are taken from the previous files, and all else from all hours' rollups again. A day
that is over, and has folded stacks, takes the samples of all its hours from their rollups once
more: which stacks it keeps does not depend on how often it was renewed then.
What is written replaces nothing that has changed meanwhile: see `storage.blocks.compactor`.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from storage.blocks.compactor import Compactor, awake_s
from storage.blocks.daily import DAILY, HOURLY
from storage.blocks.functions import SERIES
from storage.blocks.manifest import DayManifest, File, HourManifest, Listed, end_ns_of, start_s_of
from storage.blocks.merges import RollupTooLargeError, is_rolled_up
from storage.blocks.rollup import FOLDED_ABOVE
from storage.blocks.schema import DICTIONARY, FUNCTIONS, HEADS_10M, NAMES, STACK_TREE
from storage.blocks.work import DaySource, write_day_files
from storage.objects.keys import DamagedObject, ObjectMissing, ObjectTooLarge
from storage.profile import ProfileError

_TABLES = frozenset({HOURLY, DAILY, *HEADS_10M, *DICTIONARY} - {NAMES})
"""What a day has until some of it expires."""
_FOLDED = frozenset({HOURLY, DAILY, "stacks", STACK_TREE})
"""Tables of a day whose stacks are folded."""

log = logging.getLogger(__name__)

Hours = Mapping[str, HourManifest]
"""By hour of the day (`09`)."""


class _Renewal(NamedTuple):
    """What a day is to be, but for its files, and what these are made of."""

    day: DayManifest
    source: DaySource


def renew_day(compactor: Compactor, day: str, known: Listed | None = None) -> bool:
    """Make or renew the rollups of a day if there is more of it; return whether.

    `known` are the manifests of that day, if they have just been listed.

    Raises:
        RollupTooLargeError: a file would have more bytes than readers take.
        StoreError: the store cannot be reached or refuses, or a file is missing.
        ProfileError: a file is damaged.
    """
    if known is None:
        known = compactor.manifests.list(day, day)
    if any(name.startswith(day) for name in known.problems):
        return False
    before = known.days.get(day) or DayManifest(compactor.type, day)
    # Each late object may have a whole day read again.
    is_again = not compactor.patience_s or compactor.is_time_again(
        day, known.modified_ns.get(day, 0)
    )
    hours = {
        name[-2:]: each for name, each in known.hours.items() if name.startswith(day) and each.parts
    }
    is_over = compactor.now_ns() >= end_ns_of(day)
    renewals = _renewals(before, hours, is_again=is_again, is_over=is_over)
    if not renewals:
        return False
    if compactor.is_dry:
        compactor.report.add(daily=1)
        return True
    begun_s = awake_s()
    made = _make(compactor, renewals)

    def put_in_place(current: DayManifest) -> DayManifest | None:
        is_same = (current.hours, current.files) == (before.hours, before.files)
        return made if is_same and compactor.is_in_time(begun_s) else None

    after = compactor.manifests.change_day(day, put_in_place)
    is_made = after.files == made.files
    compactor.report.add(daily=is_made, conflicts=not is_made)
    if is_made:
        compactor.tell(f"{day}: hours rolled up: {len(made.hours)}")
    return is_made


def can_make_again(before: DayManifest, hours: Hours) -> bool:
    """Return whether all that a day holds can be made of its hours' rollups.

    An hour that has changed, and has no rollups yet, does not count in it anyway.
    """
    found = {hour: hours.get(hour) for hour in before.hours}
    return all(
        each is not None and (is_rolled_up(each) or not before.holds(each))
        for each in found.values()
    )


def _renewals(
    before: DayManifest, hours: Hours, *, is_again: bool, is_over: bool
) -> list[_Renewal]:
    """Return how a day can be renewed, the cheapest way first; nothing if there is no need."""
    ready = {hour: each for hour, each in sorted(hours.items()) if is_rolled_up(each)}
    new = {hour: each for hour, each in ready.items() if hour not in before.hours}
    has_changed = any(not before.holds(each) for hour, each in ready.items() if hour not in new)
    is_whole = not before.hours or {file.table for file in before.files} >= _TABLES
    can_rebuild = can_make_again(before, hours)
    renewals = []
    if (has_changed or not is_whole) and can_rebuild:
        if not new and not is_again:
            return []
        if is_whole:
            renewals.append(_rebuild(before, ready))
    elif new and is_whole:
        has_many = sum(file.rows for file in before.files_of("stacks")) > FOLDED_ABOVE
        if is_over and has_many and can_rebuild:
            renewals.append(_add_last(before, ready, new))
        renewals.append(_add(before, new))
    else:
        return []
    if can_rebuild and before.hours:  # its files may be damaged or missing
        renewals.append(_rebuild(DayManifest(before.type, before.day), ready))
    return renewals


def _add(before: DayManifest, new: Hours) -> _Renewal:
    """Add hours to what a day has."""
    rollups = _rollups_of(new.values())
    has_functions = not before.hours or bool(before.files_of(FUNCTIONS))
    if not has_functions or not any(file.table == FUNCTIONS for file in rollups):
        before = replace(before, files=_without_functions(before.files))
        rollups = _without_functions(rollups)
    source = DaySource(_previous_of(before.files), rollups, _dictionaries_of(new.values()))
    samples, value = _sums_of(new.values())
    made = replace(
        _empty(before, new),
        hours=dict(sorted({**before.hours, **_ids_of(new)}.items())),
        samples=before.samples + samples,
        value=before.value + value,
    )
    return _Renewal(made, source)


def _add_last(before: DayManifest, hours: Hours, new: Hours) -> _Renewal:
    """Add hours to a day, and take its samples from the rollups of all hours."""
    day, source = _add(before, new)
    held = [each for hour, each in hours.items() if hour not in new]
    kept = tuple(file for file in source.previous if file.table not in _FOLDED)
    samples = tuple(file for file in _rollups_of(held) if file.table == HOURLY)
    dictionary = (*source.dictionary, *_dictionaries_of(held))
    return _Renewal(day, DaySource(kept, (*source.rollups, *samples), dictionary))


def _rebuild(before: DayManifest, hours: Hours) -> _Renewal:
    """Make a day of its hours; the samples of those that it holds are taken from its files.

    Its stacks are folded, so what their rollups have may be nowhere but in parts any more.
    """
    others = {hour: each for hour, each in hours.items() if not before.holds(each)}
    held = {hour: each for hour, each in hours.items() if hour not in others}
    rollups = _rollups_of(hours.values())
    of_held = {file.key for file in _rollups_of(held.values()) if file.table == HOURLY}
    source = DaySource(
        _previous_of(before.files_of(HOURLY, *DICTIONARY, STACK_TREE)),
        tuple(file for file in rollups if file.key not in of_held),
        _dictionaries_of(others.values()),
        tuple(start_s_of(f"{before.day}T{hour}") for hour in before.hours if hour not in held),
    )
    samples, value = _sums_of(hours.values())
    made = replace(_empty(before, hours), hours=_ids_of(hours), samples=samples, value=value)
    return _Renewal(made, source)


def _previous_of(files: Sequence[File]) -> tuple[File, ...]:
    """Return those of a day's files that a renewal needs: stacks as a tree or else as lists."""
    has_tree = any(file.table == STACK_TREE for file in files)
    return tuple(file for file in files if not (has_tree and file.table == "stacks"))


def _empty(before: DayManifest, hours: Hours) -> DayManifest:
    unit = next((each.unit for each in hours.values()), before.unit)
    return DayManifest(before.type, before.day, unit=unit)


def _ids_of(hours: Hours) -> dict[str, tuple[str, ...]]:
    return {hour: each.part_ids for hour, each in hours.items()}


def _sums_of(hours: Iterable[HourManifest]) -> tuple[int, int]:
    parts = [part for each in hours for part in each.parts]
    return sum(part.samples for part in parts), sum(part.value for part in parts)


def _rollups_of(hours: Iterable[HourManifest]) -> tuple[File, ...]:
    """Return the rollups of hours; those of functions only if all hours have them."""
    rollups = [each.hourly for each in hours if each.hourly]
    files = tuple(file for each in rollups for file in each.files)
    has_functions = all(each.files_of(FUNCTIONS) for each in rollups)
    return files if has_functions else _without_functions(files)


def _without_functions(files: Iterable[File]) -> tuple[File, ...]:
    return tuple(file for file in files if file.table not in SERIES)


def _dictionaries_of(hours: Iterable[HourManifest]) -> list[File]:
    parts = (part for each in hours for part in each.parts)
    return [file for part in parts for file in part.files if file.table in DICTIONARY]


def _make(compactor: Compactor, renewals: Sequence[_Renewal]) -> DayManifest:
    """Make a day in the first way that works; its files are stored, and nothing names them yet."""
    for number, (day, source) in enumerate(renewals, 1):
        things = (source, day.samples, day.value)
        reads = (*source.previous, *source.rollups, *source.dictionary)
        try:
            files = compactor.work(day.day, write_day_files, *things, reads=reads)
        except ObjectTooLarge as error:
            raise RollupTooLargeError(f"the rollup of the day is too large: {error}") from error
        except (ProfileError, ObjectMissing, DamagedObject) as error:
            if number == len(renewals):
                raise
            log.warning("cannot renew the rollups, making them again day=%s: %s", day.day, error)
        else:
            return replace(day, files=tuple(files))
    raise ValueError("there is no way to renew a day")
