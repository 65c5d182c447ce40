"""Compacted: which files hold the data of a compacted hour, and whether they say the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from storage.blocks.manifest import File, HourManifest, start_s_of
from storage.blocks.parquet import DETAIL, ROLLUPS
from storage.columns import Columns, Times
from storage.objects.keys import NS_PER_S
from storage.objects.tenant import HOUR_NS
from storage.profile import ProfileError, Window
from storage.query.coverage import Skipped

HEADS = ("objects", "presence", "times")
"""Tables with a row or more for each object."""
_PART_SUMS = ("objects", "samples", "value")
_TEN_MINUTES, _HOURLY = ROLLUPS[600], ROLLUPS[3600]


@dataclass(frozen=True, slots=True)
class CompactedHour:
    """The compacted objects of an hour that start in a window, which lies inside of the hour."""

    manifest: HourManifest
    window: Window

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

    @classmethod
    def of(cls, manifest: HourManifest) -> "CompactedHour":
        start_ns = start_s_of(manifest.hour) * NS_PER_S
        return cls(manifest, Window(start_ns, start_ns + HOUR_NS))

    def cut(self, window: Window) -> "CompactedHour | None":
        """Return what of it is in another window as well; None if that is nothing."""
        start_ns = max(self.window.start_ns, window.start_ns)
        end_ns = min(self.window.end_ns, window.end_ns)
        return CompactedHour(self.manifest, Window(start_ns, end_ns)) if start_ns < end_ns else None


class CompactedHours(NamedTuple):
    """The compacted hours of a window, and the manifests that could not be read."""

    hours: list[CompactedHour]
    skipped: tuple[Skipped, ...]


def files_of(hour: CompactedHour, *tables: str) -> list[File]:
    """Return the files of an hour's parts that hold some tables."""
    return [file for part in hour.manifest.parts for file in part.files if file.table in tables]


def has_detail(hour: CompactedHour) -> bool:
    """Return whether the samples of an hour are kept with all of their labels."""
    return all(part.files_of(DETAIL) for part in hour.manifest.parts)


def samples_of(hour: CompactedHour, *, prefers_rollup: bool) -> list[File]:
    """Return the files with the samples of an hour, each sample once, as detailed as they are kept.

    Or, where a rollup is preferred, the longest buckets that lie in an hour. Nothing if no table
    has the samples of some part any more.
    """
    manifest = hour.manifest
    hourly = manifest.hourly
    if prefers_rollup and hourly is not None and manifest.has_hourly:
        return list(hourly.files_of(_HOURLY))
    levels = (_TEN_MINUTES, DETAIL) if prefers_rollup else (DETAIL, _TEN_MINUTES)
    by_part = {
        part.id: next((files for level in levels if (files := part.files_of(level))), ())
        for part in manifest.parts
    }
    if all(by_part.values()):
        return [file for files in by_part.values() for file in files]
    # What has expired is in the hourly rollup, which may be older than the last parts.
    rolled_up = set(hourly.parts) if hourly else set()
    left = {id_: files for id_, files in by_part.items() if id_ not in rolled_up}
    if hourly is None or not rolled_up <= by_part.keys() or not all(left.values()):
        return []
    return [*hourly.files_of(_HOURLY), *(file for files in left.values() for file in files)]


def check_named(hours: Sequence[CompactedHour], files: Sequence[File]) -> None:
    """Check that manifests name what is needed, and nothing twice: it would count twice.

    Raises:
        ProfileError: they do not.
    """
    for part in (part for hour in hours for part in hour.manifest.parts):
        missing = {*HEADS, "label_sets"} - {file.table for file in part.files}
        if missing:
            raise ProfileError(f"its manifest names no {', '.join(sorted(missing))}")
    if len({file.key for file in files}) < len(files):
        raise ProfileError("its manifest names a file twice")


def check_whole(hours: Sequence[CompactedHour], value: Columns | Times | None) -> None:
    """Check that whole hours hold what their manifests say, if nothing of them was left out.

    Raises:
        ProfileError: they do not.
    """
    units = {hour.manifest.unit for hour in hours} - {""}
    if value is not None and units and units != {value.unit}:
        raise ProfileError(f"its unit is {value.unit}, its manifest says {', '.join(units)}")
    if not all(hour.is_whole for hour in hours):
        return
    parts = [part for hour in hours for part in hour.manifest.parts]
    expected = tuple(sum(getattr(part, name) for part in parts) for name in _PART_SUMS)
    found = (0, 0, 0)
    if value is not None:
        found = (len(value.objects), *value.time_counts.sum(axis=0).tolist())
    if found != expected:
        raise ProfileError(f"its {', '.join(_PART_SUMS)} are {found}, its manifest says {expected}")


def is_aligned(window: Window, bucket_s: int) -> bool:
    bucket_ns = bucket_s * NS_PER_S
    return window.start_ns % bucket_ns == 0 and window.end_ns % bucket_ns == 0
