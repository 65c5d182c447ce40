"""Merges: parts of an hour into fewer parts, and their samples into rollups of the hour.

What is written replaces nothing that has changed meanwhile: see `storage.blocks.compactor`.
"""

from collections.abc import Sequence

from msgspec.structs import replace

from storage.blocks.compactor import Compactor, awake_s
from storage.blocks.functions import OF_HOUR
from storage.blocks.manifest import HourManifest, Part, Rollup, part_id
from storage.blocks.schema import DETAIL, HEADS_10M, ROLLUPS
from storage.blocks.work import files_to_roll_up, merge_files, roll_up_hour
from storage.objects.keys import ObjectTooLarge
from storage.profile import ProfileError

MOST_PARTS = 8
"""An hour that goes on has so many parts before they are merged."""
MERGED_BYTES = 56 << 20
"""Parts are merged up to this size: no object may have more than 64 MB."""
_RATIO_BEFORE, _RATIO_AFTER = 1, 4
"""A part is merged with smaller ones unless it is so many times larger than all of them. While the
hour goes on each is rewritten about three times; later, what is late does not rewrite all."""
_TEN_MINUTES = ROLLUPS[600]


class RollupTooLargeError(ProfileError):
    """A rollup would have more bytes than readers take: finer ones are read instead."""


def merge(compactor: Compactor, hour: str) -> int:
    """Merge parts of an hour where that is worth it; return how many fewer there are.

    Raises:
        StoreError: the store cannot be reached or refuses, or a part's file is missing.
        ProfileError: the manifest or a part's file is damaged.
    """
    fewer = 0
    while chosen := choose_parts(
        _free_parts(compactor.manifests.hour(hour)), is_over=compactor.is_over(hour)
    ):
        compactor.report.add(merged=len(chosen))
        fewer += len(chosen) - 1
        if compactor.is_dry:
            break
        if not _merge(compactor, hour, chosen):
            compactor.report.add(merged=-len(chosen))
            return fewer - len(chosen) + 1
        compactor.tell(f"{hour}: parts merged: {len(chosen)}")
    return fewer


def _free_parts(manifest: HourManifest) -> list[Part]:
    """Return the parts that may be merged: not those whose samples only the hourly rollup has."""
    held = set(manifest.hourly.parts) if _needs_hourly(manifest) and manifest.hourly else set()
    return [part for part in manifest.parts if part.id not in held]


def _needs_hourly(manifest: HourManifest) -> bool:
    """Return whether finer tables of some parts have expired: the hourly rollup cannot be redone.

    It stays, though later parts are not in it: these have tables of their own.
    """
    return manifest.hourly is not None and not all(
        part.files_of(_TEN_MINUTES) for part in manifest.parts if part.id in manifest.hourly.parts
    )


def choose_parts(parts: Sequence[Part], *, is_over: bool) -> list[Part]:
    """Return the parts to merge next: the smallest, and none much larger than all of these.

    While the hour goes on parts are left alone up to MOST_PARTS.
    """
    if len(parts) < 2 or (len(parts) <= MOST_PARTS and not is_over):
        return []
    # Of some, tables may have expired: these are not mixed with whole ones.
    by_tables: dict[frozenset[str], list[Part]] = {}
    for part in sorted(parts, key=lambda part: part.size_bytes):
        by_tables.setdefault(frozenset(file.table for file in part.files), []).append(part)
    ratio = _RATIO_AFTER if is_over else _RATIO_BEFORE
    for alike in by_tables.values():
        for most in (ratio, MERGED_BYTES if len(parts) > MOST_PARTS else ratio):
            chosen: list[Part] = []
            size_bytes = 0
            for part in alike:
                is_larger = chosen and part.size_bytes > most * size_bytes
                if is_larger or size_bytes + part.size_bytes > MERGED_BYTES:
                    break
                chosen.append(part)
                size_bytes += part.size_bytes
            if len(chosen) > 1:
                return chosen
    return []


def _merge(compactor: Compactor, hour: str, chosen: Sequence[Part]) -> bool:
    """Replace parts by one; return False if others have changed them meanwhile."""
    begun_s = awake_s()
    reads = [file for part in chosen for file in part.files]
    files = compactor.work(hour, merge_files, list(chosen), reads=reads)
    gone = {part.id for part in chosen}
    merged = Part(
        id=part_id(gone),
        objects=sum(part.objects for part in chosen),
        samples=sum(part.samples for part in chosen),
        value=sum(part.value for part in chosen),
        start_s=min(part.start_s for part in chosen),
        end_s=max(part.end_s for part in chosen),
        files=tuple(files),
        made_ns=max(part.made_ns for part in chosen),
    )
    compactor.remember_contents(merged.id, frozenset(compactor.contents_of(chosen)))

    def put_in_place(manifest: HourManifest) -> HourManifest | None:
        if not gone <= set(manifest.part_ids) or not compactor.is_in_time(begun_s):
            return None
        if not gone <= {part.id for part in _free_parts(manifest)}:
            return None  # their finer tables have expired meanwhile
        kept = [part for part in manifest.parts if part.id not in gone]
        hourly = manifest.hourly if _needs_hourly(manifest) else None
        return replace(manifest, parts=(*kept, merged), hourly=hourly)

    after = compactor.manifests.change_hour(hour, put_in_place)
    is_merged = merged.id in after.part_ids  # or a compactor that made the same was faster
    compactor.report.add(conflicts=not is_merged)
    return is_merged


def is_rolled_up(manifest: HourManifest) -> bool:
    """Return whether an hour has all rollups of its parts that can be made.

    Older versions made no heads and no functions, which cannot be made once detail has expired.
    """
    tables = {file.table for file in manifest.hourly.files} if manifest.hourly else set()
    has_functions = tables.issuperset(OF_HOUR) or not all(
        part.files_of(DETAIL) for part in manifest.parts
    )
    return manifest.has_hourly and tables.issuperset(HEADS_10M) and has_functions


def roll_up(compactor: Compactor, hour: str) -> bool:
    """Make the hourly rollups if the hour is over and has none of its parts; return whether.

    Raises:
        RollupTooLargeError: it would have more bytes than readers take.
        StoreError, ProfileError: as `merge`.
    """
    manifest = compactor.manifests.hour(hour)
    if not compactor.is_over(hour) or not manifest.parts or is_rolled_up(manifest):
        return False
    if not all(part.files_of(_TEN_MINUTES) for part in manifest.parts):
        return False  # they have expired
    if compactor.is_dry:
        compactor.report.add(hourly=1)
        return True
    begun_s = awake_s()
    try:
        files = compactor.work(
            hour,
            roll_up_hour,
            list(manifest.parts),
            reads=files_to_roll_up(manifest.parts),
        )
    except ObjectTooLarge as error:
        raise RollupTooLargeError(f"the hourly rollup is too large: {error}") from error
    rollup = Rollup(manifest.part_ids, tuple(files))

    def put_in_place(current: HourManifest) -> HourManifest | None:
        is_same = current.part_ids == manifest.part_ids and not is_rolled_up(current)
        return (
            replace(current, hourly=rollup) if is_same and compactor.is_in_time(begun_s) else None
        )

    after = compactor.manifests.change_hour(hour, put_in_place)
    is_made = after.hourly == rollup
    compactor.report.add(hourly=is_made, conflicts=not is_made)
    if is_made:
        compactor.tell(f"{hour}: rolled up")
    return is_made
