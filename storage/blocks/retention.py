"""Retention: how long each level of detail is kept, and the deletion of all that is deleted.

| level | what it is | default |
|---|---|---|
| level0 | objects as agents uploaded them, counted from when they were compacted | 2 days |
| detail | samples by host and object | 14 days |
| 10m, 1h, 1d | rollups in buckets of ten minutes, an hour, a day | 30, 90, 400 days |

Ages of the other levels count from the end of their hour or day. A level is removed from its
manifest; its files are then garbage, which is deleted when no reader can still be using it.
Level-0 objects are deleted themselves, and only if a part contains them. An hour's manifest goes
only when the rollups of its day contain it. So whatever is deleted, a coarser level has it, until
that has expired too. Of an hour or a day that a pin overlaps (`storage.objects.pins`) nothing is
deleted.

A day older than the level 1h has neither stacks by hour nor functions by host any more: flame
graphs are of whole days then. It keeps its heads and the functions by hour, so that timelines, the
top and what there is to know of hosts are still exact: they are small beside the stacks.

Ages are measured by the store's clock: one of a machine that is ahead deletes nothing.
"""

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from storage.blocks.compactor import Compactor, awake_s
from storage.blocks.day import can_make_again
from storage.blocks.functions import FUNCTIONS_1D, GROUPS_1D, OF_HOUR
from storage.blocks.manifest import (
    DayManifest,
    HourManifest,
    Listed,
    blocks_prefix,
    end_ns_of,
    is_known,
    named_by,
    start_s_of,
)
from storage.blocks.schema import DETAIL, ROLLUPS
from storage.objects.keys import DEFAULT_TENANT, NS_PER_S, ObjectMissing, StoreError
from storage.objects.pins import Held
from storage.profile import ProfileError

LEVELS = ("level0", "detail", "10m", "1h", "1d")
DAY_S = 86400
_DEFAULT_S = {level: days * DAY_S for level, days in zip(LEVELS, (2, 14, 30, 90, 400), strict=True)}
_LATE_DAYS = 8
"""How much later than its hour a file may be written: a week, and a day for the day's rollup."""
_PROBE_LASTS_NS = 3600 * NS_PER_S
_TEN_MINUTES = ROLLUPS[600]
_FUNCTIONS_OF_HOUR = frozenset(OF_HOUR)
"""Tables of an hour's rollups that expire with buckets of ten minutes. The day has coarser ones."""
_HOUR_OF_DAY = frozenset({ROLLUPS[3600], FUNCTIONS_1D, GROUPS_1D})
"""Tables of a day that expire with its hours."""

log = logging.getLogger(__name__)


class KeepError(ValueError):
    """What is to be kept contradicts itself; the message says how."""


@dataclass(frozen=True, slots=True)
class Keep:
    """For how many seconds each level is kept."""

    level0_s: float
    detail_s: float
    ten_minutes_s: float
    hour_s: float
    day_s: float

    @classmethod
    def of(cls, asked_s: Mapping[str, float]) -> "Keep":
        """Return what was asked for by level, and the default of all other levels.

        A coarser level that was not named is kept at least as long as the finer ones.

        Raises:
            KeepError: there is no such level, or it is kept for a shorter time than a finer one.
        """
        for level in asked_s:
            if level not in LEVELS:
                raise KeepError(f"{level!r} is not a level (there are {', '.join(LEVELS)})")
        kept_s = [asked_s.get("level0", _DEFAULT_S["level0"])]
        finer, finer_s = "", 0.0
        for level in LEVELS[1:]:
            seconds = asked_s.get(level, max(finer_s, _DEFAULT_S[level]))
            if seconds < finer_s:
                raise KeepError(
                    f"{level} cannot be kept for {seconds / DAY_S:g} days: {finer}, which is finer,"
                    f" is kept for {finer_s / DAY_S:g} days (give a shorter time for {finer}, too)"
                )
            kept_s.append(seconds)
            finer, finer_s = level, seconds
        return cls(*kept_s)


def expire(compactor: Compactor, keep: Keep) -> None:
    """Delete what is older than it is kept, and count it in the compactor's report.

    Raises:
        StoreError: the store cannot be reached, or refuses.
    """
    now_ns = _store_now_ns(compactor)
    known = compactor.manifests.list()
    held = Held(compactor.store, compactor.tenant.tenant)
    _expire_level0(compactor, keep, known, now_ns, held)
    for hour, manifest in known.hours.items():
        age_s = (now_ns - end_ns_of(hour)) / NS_PER_S
        if age_s > keep.detail_s and _is_pinned(compactor, held, hour):
            continue
        day = known.days.get(hour[:10])
        is_in_day = day is not None and day.holds(manifest)
        if age_s > keep.day_s or (age_s > keep.hour_s and is_in_day):
            compactor.report.add(**{"1h": 1})
            if not compactor.is_dry:
                compactor.manifests.delete(hour)
            continue
        tables = {DETAIL} if age_s > keep.detail_s else set()
        if age_s > keep.ten_minutes_s and manifest.has_hourly:
            tables.add(_TEN_MINUTES)
            tables |= _FUNCTIONS_OF_HOUR if is_in_day else set()
        _expire_tables(compactor, manifest, tables)
    for name, day in known.days.items():
        age_s = (now_ns - end_ns_of(name)) / NS_PER_S
        if age_s > min(keep.hour_s, keep.day_s) and not _is_pinned(compactor, held, name):
            _expire_day(compactor, name, day, is_over=age_s > keep.day_s)


def _expire_day(compactor: Compactor, name: str, day: DayManifest, *, is_over: bool) -> None:
    """Remove a day, or of one that is not over yet what is kept as long as the level 1h."""
    if is_over:
        compactor.report.add(**{"1d": 1})
        if not compactor.is_dry:
            compactor.manifests.delete(name)
    elif day.files_of(*_HOUR_OF_DAY):
        compactor.report.add(**{"1h": 1})
        if not compactor.is_dry:
            compactor.manifests.change_day(name, _without_hours)


def _without_hours(day: DayManifest) -> DayManifest:
    files = tuple(file for file in day.files if file.table not in _HOUR_OF_DAY)
    return replace(day, files=files)


def _is_pinned(compactor: Compactor, held: Held, name: str) -> bool:
    """Return whether a pin holds an hour or a day; hours are counted, as they would expire."""
    is_held = held.holds(compactor.type, start_s_of(name) * NS_PER_S, end_ns_of(name))
    if is_held and "T" in name:
        compactor.report.add(pinned=1)
    return is_held


def _expire_tables(compactor: Compactor, manifest: HourManifest, tables: set[str]) -> None:
    """Remove the files of some tables from an hour."""
    gone = tables & {file.table for file in manifest.files}
    if not gone:
        return
    compactor.report.add(**{"detail": DETAIL in gone, "10m": bool(gone - {DETAIL})})
    if compactor.is_dry:
        return

    def remove(current: HourManifest) -> HourManifest:
        # A part that has just come is not in the hourly rollup yet.
        expired = gone if current.has_hourly else gone - {_TEN_MINUTES}
        parts = tuple(
            replace(part, files=tuple(file for file in part.files if file.table not in expired))
            for part in current.parts
        )
        hourly = current.hourly and replace(
            current.hourly,
            files=tuple(file for file in current.hourly.files if file.table not in expired),
        )
        return replace(current, parts=parts, hourly=hourly)

    compactor.manifests.change_hour(manifest.hour, remove)


def _expire_level0(
    compactor: Compactor, keep: Keep, known: Listed, now_ns: int, held: Held
) -> None:
    """Delete the level-0 objects that parts have contained for long enough, and no pin holds.

    Those that cannot be read, and those that came when their hour was only in the day's rollup, are
    kept as long as detail is; what is in no part as long as the coarsest level.
    """
    made_before_ns = now_ns - round(keep.level0_s * NS_PER_S)
    for hour in compactor.occupied_hours():
        age_s = (now_ns - end_ns_of(hour)) / NS_PER_S
        manifest = known.hours.get(hour)
        parts = [
            part for part in (manifest.parts if manifest else ()) if part.made_ns <= made_before_ns
        ]
        if hour in known.problems or (not parts and age_s <= keep.detail_s):
            continue
        try:
            # Once more: what is deleted must still be in a part.
            ids = set(compactor.manifests.hour(hour).part_ids) if parts else set()
            gone = compactor.contents_of([part for part in parts if part.id in ids])
        except (ProfileError, ObjectMissing) as error:
            compactor.report.problems[hour] = str(error)
            continue
        useless: set[str] = set()
        if age_s > keep.detail_s and manifest is not None:
            useless = {each.key for each in manifest.unreadable}
        is_late = manifest is None and is_in_rollup(known, hour) and age_s > keep.detail_s
        for key, stored in compactor.level0(hour):
            is_useless = key.text in useless or is_late or age_s > keep.day_s
            is_expired = key.content16 in gone or is_useless
            if is_expired and not held.holds(compactor.type, key.start_ns, key.end_ns):
                compactor.report.add(level0=1)
                if not compactor.is_dry:
                    compactor.store.delete(stored.key)


def is_in_rollup(known: Listed, hour: str) -> bool:
    """Return whether the rollup of its day contains an hour, wherever else its samples are."""
    day = known.days.get(hour[:10])
    return day is not None and hour[-2:] in day.hours


def collect_garbage(compactor: Compactor) -> int:
    """Delete files that no manifest names, and take back parts whose files are missing.

    Returns how many were deleted. Files are listed before manifests are: so what a manifest names
    and the listing does not have may only have been written since, and is asked for.

    Raises:
        StoreError: the store cannot be reached, or refuses.
    """
    listed_s = awake_s()
    now_ns = _store_now_ns(compactor)
    prefix = blocks_prefix(compactor.tenant.tenant, compactor.type)
    files = list(compactor.store.list(prefix))
    known = compactor.manifests.list()
    if not all(map(is_known, known.problems)):
        return 0  # a later version keeps something here that this one does not understand
    manifests: list[HourManifest | DayManifest] = [*known.hours.values(), *known.days.values()]
    named = {file.key for each in manifests for file in each.files}
    oldest_ns = now_ns - round(compactor.grace_s * NS_PER_S)
    deleted = 0
    for stored in files:
        name = named_by(stored.key)
        # What was replaced a moment ago may be being read; what is damaged may name anything.
        is_settled = known.modified_ns.get(name, 0) < oldest_ns and name not in known.problems
        if not name or stored.key in named or stored.modified_ns >= oldest_ns or not is_settled:
            continue
        if not compactor.is_in_time(listed_s):
            break  # too much may have changed since the listing: the rest is for the next time
        deleted += 1
        if not compactor.is_dry:
            compactor.store.delete(stored.key)
    compactor.report.add(garbage=deleted)
    _drop_incomplete(compactor, known, {stored.key for stored in files})
    return deleted


def _drop_incomplete(compactor: Compactor, known: Listed, stored: set[str]) -> None:
    """Take back parts and rollups whose files are missing, if they can be made again.

    Nothing of this program deletes such files; a bucket's lifecycle rule or a person may.
    """
    for hour, manifest in known.hours.items():
        if missing := _missing_of(compactor, hour, manifest, stored):
            _drop_parts(compactor, manifest, missing)
    for name, day in known.days.items():
        hours = {hour[-2:]: each for hour, each in known.hours.items() if hour.startswith(name)}
        missing = _missing_of(compactor, name, day, stored)
        if missing and not compactor.is_dry and can_make_again(day, hours):
            log.warning("files are missing: its rollups are made again day=%s", name)
            compactor.manifests.change_day(name, _emptied)


def _emptied(day: DayManifest) -> DayManifest:
    return DayManifest(day.type, day.day, unit=day.unit)


def _missing_of(
    compactor: Compactor, name: str, manifest: HourManifest | DayManifest, stored: set[str]
) -> set[str]:
    """Return which files of an hour or a day are missing, and report it."""
    missing = {
        file.key
        for file in manifest.files
        if file.key not in stored and _is_missing(compactor, file.key)
    }
    if missing:
        compactor.report.problems[name] = f"files are missing: {', '.join(sorted(missing))}"
    return missing


def _drop_parts(compactor: Compactor, manifest: HourManifest, missing: set[str]) -> None:
    """Take back the parts of an hour that lack files, if level 0 still has their objects."""
    lost = [part for part in manifest.parts if any(f.key in missing for f in part.files)]
    whole = [part for part in manifest.parts if part not in lost]
    try:
        kept = compactor.contents_of(whole)
    except (ProfileError, StoreError):
        return
    at_level0 = {key.content16 for key, _ in compactor.level0(manifest.hour)}
    # The list of a part's objects may be what is missing: then their number must do.
    if compactor.is_dry or sum(part.objects for part in lost) > len(at_level0 - kept):
        return
    gone = {part.id for part in lost}

    def drop(current: HourManifest) -> HourManifest:
        parts = tuple(part for part in current.parts if part.id not in gone)
        hourly = current.hourly
        is_lost = hourly and any(file.key in missing for file in hourly.files)
        if is_lost and all(part.files_of(_TEN_MINUTES) for part in current.parts):
            hourly = None
        return replace(current, parts=parts, hourly=hourly)

    log.warning("files are missing: its objects are compacted again hour=%s", manifest.hour)
    compactor.manifests.change_hour(manifest.hour, drop)


def _is_missing(compactor: Compactor, key: str) -> bool:
    try:
        compactor.store.get_range(key, 0, 1)
    except ObjectMissing:
        return True
    return False


def _store_now_ns(compactor: Compactor) -> int:
    """Return the time by the store's clock, which also says when objects were written.

    A dry run returns that of this machine. Else a probe is written, listed and deleted; those of
    killed processes are deleted as well.
    """
    store = compactor.store
    if compactor.is_dry:
        return compactor.now_ns()
    prefix = f"v1/{compactor.tenant.tenant}/clock/"
    key = prefix + secrets.token_hex(8)
    store.put(key, b"")
    try:
        probes = {stored.key: stored.modified_ns for stored in store.list(prefix)}
    finally:
        store.delete(key)
    now_ns = probes.pop(key, 0)
    for other, modified_ns in probes.items():
        if modified_ns < now_ns - _PROBE_LASTS_NS:
            store.delete(other)
    return now_ns


def lifecycle(prefix: str, keep: Keep, tenant: str = DEFAULT_TENANT) -> dict[str, Any]:
    """Return lifecycle rules of S3, as `put-bucket-lifecycle-configuration` takes them.

    S3 selects objects by prefix and by age alone, and all levels of an hour have one prefix: rules
    can delete files only when the coarsest level has expired, and level 0 only by when it was
    uploaded, compacted or not. `prefix` is that of the store in its bucket, empty or with a slash
    at its end.
    """
    coarsest_days = _days(keep.day_s) + _LATE_DAYS
    days = {
        "l0": _days(max(keep.level0_s, keep.detail_s)),
        "blocks": coarsest_days,
        "manifests": coarsest_days,
    }
    return {
        "Rules": [
            {
                "ID": f"everflame-{tenant}-{folder}",
                "Status": "Enabled",
                "Filter": {"Prefix": f"{prefix}v1/{tenant}/{folder}/"},
                "Expiration": {"Days": number},
            }
            for folder, number in days.items()
        ]
    }


def lifecycle_limits(keep: Keep) -> str:
    """Say what the rules cannot do, for whoever is about to use them."""
    return (
        "S3 selects objects by prefix and age alone, and all levels of an hour have one prefix."
        " So these rules delete compacted files when the coarsest level has expired: they cannot"
        " express detail, 10m and 1h. And they delete level 0"
        f" {_days(max(keep.level0_s, keep.detail_s))} days after its upload, compacted or not."
        " They ignore pins: they delete pinned windows, too."
        " `everflame compact` deletes each level when it is due: use the rules in addition to it,"
        " never in its place."
    )


def _days(seconds: float) -> int:
    return -(-round(seconds) // DAY_S)
