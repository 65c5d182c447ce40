"""Spool: profiles on disk between the sampler, which writes them, and the uploader, which sends.

`storage.spool.upload_queue` describes the folder: either process may be killed at any moment, and a
closed profile is neither lost nor counted twice.

The size is bounded. If a profile does not fit, because of the bound or because the disk is full,
the oldest profiles lose their stacks and become tombstones: their stored samples are counted as
lost (`spool_full`), so the law of conservation holds. All tombstones of a host's hour are one file.
Only tombstones may exceed the bound, by one disk block per hour.
"""

import contextlib
import errno
import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from storage.formats import pprof
from storage.formats.pprof_head import read_head
from storage.objects.directory import make_folder, sync_folder, write_synced
from storage.objects.keys import DEFAULT_TENANT, LONGEST_WINDOW_S, NS_PER_S, ObjectKey, object_key
from storage.profile import Loss, Profile, ProfileBuilder, ProfileError, add_counts
from storage.spool.upload_queue import (
    FOLDERS,
    GIVING_UP,
    PARTIAL,
    TOMBSTONES,
    WAITING,
    allocated,
    file_name,
    quarantine,
    scan,
    start_of,
    usage,
)

DEFAULT_LIMIT_BYTES = 512_000_000

_MERGED = ".merged"
_TOMBSTONE = ".tombstone"
_RESERVE = "reserve"
_RESERVE_BYTES = 64 * 1024
"""Disk space kept in addition to the bound: on a full disk, the tombstone that frees space is
written there."""
_FULL_DISK_ATTEMPTS = 8
"""Profiles given up for a new one. More would not help: something else fills the disk."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

_log = logging.getLogger(__name__)


class SpoolStatus(NamedTuple):
    profiles: int
    size_bytes: int
    limit_bytes: int
    given_up: int
    """Profiles turned into tombstones since the start."""
    lost_samples: int
    """Stored samples of those of them that were added since the start: they are lost now."""
    damaged: int
    """Files quarantined since the start: their content did not match their name."""
    unwritten_ticks: int
    """Ticks that could not be written yet: they are in memory only and end with the process."""
    last_error: str


def tombstone(profile: Profile) -> Profile:
    """Return a profile's counts without its stacks: its stored samples count as lost."""
    accounting = profile.accounting
    lost = {Loss.SPOOL_FULL.value: accounting.stored} if accounting.stored else {}
    emptied = replace(
        accounting, stored=0, lost=add_counts(accounting.lost, lost), stops={}, misses={}
    )
    return ProfileBuilder.like(profile).build(profile.window, emptied)


def _read_tombstone(content: bytes) -> Profile:
    """Return the tombstone of an encoded profile; its stacks, the costly part, are not decoded."""
    ours, unit = read_head(content)
    if ours is None or not unit:
        raise ProfileError("it is not a profile of ours")
    stackless = ProfileBuilder(ours.period_ns, ours.type, unit)
    return tombstone(stackless.build(ours.window, ours.accounting))


class Spool:
    """The sampler's side: writes closed profiles within the bound. A folder has one writer."""

    def __init__(
        self, folder: Path, limit_bytes: int = DEFAULT_LIMIT_BYTES, tenant: str = DEFAULT_TENANT
    ) -> None:
        self._folder = folder
        self._tenant = tenant
        self._limit_bytes = limit_bytes
        self._unwritten: list[Profile] = []
        self._given_up = 0
        self._lost_samples = 0
        self._first_ns: int | None = None
        """When the first profile that was added begins; earlier ones are another process's."""
        self._damaged = 0
        self._last_error = ""
        self._make_folders()
        for path in (folder / PARTIAL).iterdir():
            path.unlink()
        self._settle()
        self._used_bytes = usage(folder)[1]

    def add(self, profile: Profile) -> None:
        """Write a closed profile: after this returns, a crash does not lose it.

        A failed write is not an error here: the counts stay in memory until a write succeeds.

        Raises:
            ValueError: the window is longer than an hour.
        """
        content = pprof.encode(profile)
        if self._first_ns is None:
            self._first_ns = profile.window.start_ns
        try:
            self._make_folders()  # somebody may have removed them
        except OSError as error:
            self._note(error)
        if not self._keep(object_key(profile, content, self._tenant), content):
            stackless = tombstone(profile)
            self._count_given_up(stackless)
            self._carry(stackless)
        self._write_unwritten()

    def status(self) -> SpoolStatus:
        profiles, size_bytes = usage(self._folder)
        return SpoolStatus(
            profiles=profiles,
            size_bytes=size_bytes,
            limit_bytes=self._limit_bytes,
            given_up=self._given_up,
            lost_samples=self._lost_samples,
            damaged=self._damaged,
            unwritten_ticks=self._unwritten_ticks(),
            last_error=self._last_error,
        )

    def _make_folders(self) -> None:
        for name in FOLDERS:
            make_folder(self._folder / name)

    def _keep(self, key: ObjectKey, content: bytes) -> bool:
        """Write a profile, giving up older ones until it fits; False if it never fits."""
        size_bytes = allocated(len(content))
        failures = 0
        while size_bytes <= self._limit_bytes and failures < _FULL_DISK_ATTEMPTS:
            self._make_reserve()
            if self._used_bytes + size_bytes > self._limit_bytes:
                self._used_bytes = usage(self._folder)[1]  # the uploader may have freed space
            if self._used_bytes + size_bytes <= self._limit_bytes:
                try:
                    self._write(content, self._folder / WAITING / file_name(key))
                except OSError as error:
                    self._note(error)
                    if error.errno not in _FULL:
                        break
                    failures += 1
                else:
                    self._used_bytes += size_bytes
                    self._last_error = ""
                    return True
            if not self._give_up_oldest():
                break
        return False

    def _give_up_oldest(self) -> bool:
        """Turn the oldest waiting profile into a tombstone; False if none or a write fails."""
        oldest = min(scan(self._folder / WAITING), key=start_of, default=None)
        if oldest is None:
            return False
        try:
            self._settle()
            source = self._take(oldest.path, "")
            profile = self._read(source) if source else None
            if profile is None:
                return True  # the uploader claimed it, or it was damaged: try the next
            self._bury(profile)
        except OSError as error:
            self._note(error)
            return False
        self._count_given_up(profile)
        _log.warning("gave up window=%d ticks=%d", oldest.key.start_s, profile.accounting.ticks)
        return True

    def _count_given_up(self, profile: Profile) -> None:
        """Count a tombstone."""
        self._given_up += 1
        if self._first_ns is not None and profile.window.start_ns >= self._first_ns:
            self._lost_samples += profile.accounting.lost.get(Loss.SPOOL_FULL, 0)

    def _carry(self, profile: Profile) -> None:
        if self._unwritten and _are_of_one_hour(self._unwritten[-1], profile):
            # One profile per hour in memory.
            profile = _join_tombstones(self._unwritten.pop(), profile)
        self._unwritten.append(profile)

    def _write_unwritten(self) -> None:
        while self._unwritten:
            try:
                self._settle()
                self._bury(self._unwritten[0])
            except OSError as error:
                self._note(error)
                _log.warning("kept in memory ticks=%d", self._unwritten_ticks())
                return
            del self._unwritten[0]

    def _bury(self, profile: Profile) -> None:
        """Replace the files in giving-up/ by one tombstone, merged with that of its hour.

        The rename to the merged file's name replaces all of them at once; `_settle` then removes
        them, now or after a crash. If this raises, nothing has changed.
        """
        try:
            profile = self._join_hour(profile)
            content = pprof.encode(profile)
            name = file_name(object_key(profile, content, self._tenant)) + _MERGED
            target = self._folder / GIVING_UP / name
            try:
                self._write(content, target)
            except OSError as error:
                reserve = self._folder / _RESERVE
                if error.errno not in _FULL or not reserve.exists():
                    raise
                reserve.unlink()
                self._write(content, target)
        finally:
            with contextlib.suppress(OSError):
                self._settle()

    def _join_hour(self, profile: Profile) -> Profile:
        hour = _hour(object_key(profile, b"", self._tenant))
        for spooled in sorted(scan(self._folder / TOMBSTONES), key=start_of):
            source = self._take(spooled.path, _TOMBSTONE) if _hour(spooled.key) == hour else None
            earlier = self._read(source) if source else None
            if source is None or earlier is None:
                continue
            if _are_of_one_hour(earlier, profile):
                return _join_tombstones(earlier, profile)
            source.rename(spooled.path)
        return profile

    def _settle(self) -> None:
        """Empty giving-up/: remove the files that a merged one replaced, else move them back."""
        folder = self._folder / GIVING_UP
        paths = list(folder.iterdir())
        merged = [path for path in paths if path.name.endswith(_MERGED)]
        for path in paths:
            if path in merged:
                continue
            if merged:
                path.unlink()
            elif path.name.endswith(_TOMBSTONE):
                path.rename(self._folder / TOMBSTONES / path.name.removesuffix(_TOMBSTONE))
            else:
                path.rename(self._folder / WAITING / path.name)
        if merged:
            sync_folder(folder)
        for path in merged:
            path.rename(self._folder / TOMBSTONES / path.name.removesuffix(_MERGED))
            sync_folder(self._folder / TOMBSTONES)

    def _take(self, path: Path, mark: str) -> Path | None:
        """Move a file to giving-up/; None if the uploader has claimed it."""
        taken = self._folder / GIVING_UP / (path.name + mark)
        try:
            path.rename(taken)
        except FileNotFoundError:
            return None
        return taken

    def _read(self, taken: Path) -> Profile | None:
        """Return a file in giving-up/ as a tombstone; None if damaged: it is then quarantined."""
        try:
            return _read_tombstone(taken.read_bytes())
        except ProfileError as error:
            _log.warning("quarantined file=%s reason=%s", taken.name, error)
        self._damaged += 1
        quarantine(taken, self._folder)
        return None

    def _write(self, content: bytes, target: Path) -> None:
        """Write a file so that it is complete and durable once it has its name."""
        partial = self._folder / PARTIAL / target.name
        try:
            write_synced(partial, content)
            partial.rename(target)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        # The file exists: an error from here on must not make the caller count it again.
        with contextlib.suppress(OSError):
            sync_folder(target.parent)

    def _unwritten_ticks(self) -> int:
        return sum(profile.accounting.ticks for profile in self._unwritten)

    def _make_reserve(self) -> None:
        path = self._folder / _RESERVE
        if path.exists():
            return
        with contextlib.suppress(OSError):
            self._write(bytes(_RESERVE_BYTES), path)

    def _note(self, error: OSError) -> None:
        reason = f"cannot write the spool {self._folder}: {error.strerror}"
        if reason != self._last_error:
            _log.warning("failed to write spool=%s error=%s", self._folder, error.strerror)
        self._last_error = reason


def _join_tombstones(one: Profile, other: Profile) -> Profile:
    """Add up what profiles without stacks hold: their windows and what they account for."""
    return replace(
        one,
        period_ns=min(one.period_ns, other.period_ns),
        window=one.window.union(other.window),
        accounting=one.accounting.merge(other.accounting),
    )


def _hour(key: ObjectKey) -> tuple[str, int]:
    return key.host_id, key.start_s // LONGEST_WINDOW_S


def _are_of_one_hour(one: Profile, other: Profile) -> bool:
    """Return whether one object can hold both profiles: its window starts in their hour."""
    if (one.type, one.unit, one.accounting.hosts) != (
        other.type,
        other.unit,
        other.accounting.hosts,
    ):
        return False
    starts_s = [profile.window.start_ns // NS_PER_S for profile in (one, other)]
    end_s = -(-one.window.union(other.window).end_ns // NS_PER_S)
    is_one_hour = starts_s[0] // LONGEST_WINDOW_S == starts_s[1] // LONGEST_WINDOW_S
    return is_one_hour and end_s - min(starts_s) <= LONGEST_WINDOW_S
