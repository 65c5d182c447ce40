"""Spool: profiles on disk between the sampler, which writes them, and the uploader, which sends.

The two processes share nothing but the folder, and either may be killed at any moment. A file
belongs to whoever has renamed it into a folder of its own, and a rename is all or nothing:

    partial/     being written; what a crash leaves here was never closed, and is removed
    waiting/     closed profiles. From here on nothing is lost and nothing counted twice
    sending/     the uploader's: perhaps stored already, so nobody may change their content
    giving-up/   the sampler's: on their way to a tombstone
    tombstones/  profiles without stacks, which keep the counts of those given up
    damaged/     the last few files that were not what their names say

The size is bounded. Where a profile does not fit, because of the bound or because the disk is full,
the oldest give up their stacks: their stored samples become lost ones (`spool_full`), so the law of
conservation holds. The tombstones of a host's hour are one file; they alone may exceed the bound,
by a block of the disk an hour. A file's name is its object's key with + for /.
"""

import contextlib
import errno
import heapq
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from storage import pprof
from storage.objects import (
    LONGEST_WINDOW_S,
    NS_PER_S,
    ObjectKey,
    content16,
    make_folder,
    object_key,
    sync_folder,
    write_synced,
)
from storage.profile import Loss, Profile, ProfileBuilder, ProfileError, add_counts, merge

DEFAULT_LIMIT_BYTES = 512_000_000

_PARTIAL = "partial"
_WAITING = "waiting"
_SENDING = "sending"
_GIVING_UP = "giving-up"
_TOMBSTONES = "tombstones"
_DAMAGED = "damaged"
_FOLDERS = (_PARTIAL, _WAITING, _SENDING, _GIVING_UP, _TOMBSTONES, _DAMAGED)
_SENT = frozenset({_WAITING, _SENDING, _TOMBSTONES})

_MERGED = ".merged"
_TOMBSTONE = ".tombstone"
_RESERVE = "reserve"
_RESERVE_BYTES = 64 * 1024
"""Kept on the disk, beside the bound, for the tombstone that is to make room on a full one."""
_BLOCK_BYTES = 4096
_DAMAGED_LIMIT = 16
_FULL_DISK_ATTEMPTS = 8
"""Profiles given up for one new one: more would be pointless where others fill the disk."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

_log = logging.getLogger(__name__)


class SpoolStatus(NamedTuple):
    profiles: int
    size_bytes: int
    limit_bytes: int
    given_up: int
    """Profiles that became tombstones since the start."""
    damaged: int
    """Files since the start that were not what their names say, and were moved aside."""
    unwritten_ticks: int
    """Counts that no disk has taken yet: they are in memory only, and go with the process."""
    last_error: str


class SpooledProfile(NamedTuple):
    """A profile on its way to the store."""

    key: ObjectKey
    path: Path


def tombstone(profile: Profile) -> Profile:
    """Give a profile's counts without its stacks: what was stored is now lost."""
    accounting = profile.accounting
    lost = {Loss.SPOOL_FULL.value: accounting.stored} if accounting.stored else {}
    emptied = replace(
        accounting, stored=0, lost=add_counts(accounting.lost, lost), stops={}, misses={}
    )
    return ProfileBuilder.like(profile).build(profile.window, emptied)


class Spool:
    """The sampler's side: takes closed profiles and keeps the bound. One writer for a folder."""

    def __init__(self, folder: Path, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._unwritten: list[Profile] = []
        self._given_up = 0
        self._damaged = 0
        self._last_error = ""
        for name in _FOLDERS:
            make_folder(folder / name)
        for path in (folder / _PARTIAL).iterdir():
            path.unlink()
        self._settle()
        self._used_bytes = usage(folder)[1]

    def add(self, profile: Profile) -> None:
        """Keep a closed profile: once this returns, a crash does not lose it.

        A disk that takes nothing is no error here: the counts wait in memory for one that does.

        Raises:
            ValueError: the window is longer than an hour.
        """
        content = pprof.encode(profile)
        if not self._keep(object_key(profile, content), content):
            self._given_up += 1
            self._carry(tombstone(profile))
        self._write_unwritten()

    def status(self) -> SpoolStatus:
        profiles, size_bytes = usage(self._folder)
        return SpoolStatus(
            profiles=profiles,
            size_bytes=size_bytes,
            limit_bytes=self._limit_bytes,
            given_up=self._given_up,
            damaged=self._damaged,
            unwritten_ticks=sum(profile.accounting.ticks for profile in self._unwritten),
            last_error=self._last_error,
        )

    def _keep(self, key: ObjectKey, content: bytes) -> bool:
        """Write a profile, giving up older ones until it fits; False when that is not enough."""
        size_bytes = _allocated(len(content))
        failures = 0
        while size_bytes <= self._limit_bytes and failures < _FULL_DISK_ATTEMPTS:
            self._make_reserve()
            if self._used_bytes + size_bytes > self._limit_bytes:
                self._used_bytes = usage(self._folder)[1]  # the uploader may have made room
            if self._used_bytes + size_bytes <= self._limit_bytes:
                try:
                    self._write(content, self._folder / _WAITING / _file_name(key))
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
        """Turn the oldest waiting profile into a tombstone; False when there is none or no way."""
        oldest = min(_scan(self._folder / _WAITING), key=_start, default=None)
        if oldest is None:
            return False
        try:
            self._settle()
            source = self._take(oldest.path, "")
            profile = self._decode(source) if source else None
            if profile is None:
                return True  # the uploader has taken it, or it was damaged: look again
            self._bury(tombstone(profile))
        except OSError as error:
            self._note(error)
            return False
        self._given_up += 1
        _log.warning("gave up window=%d samples=%d", oldest.key.start_s, profile.accounting.stored)
        return True

    def _carry(self, profile: Profile) -> None:
        if self._unwritten and _are_of_one_hour(self._unwritten[-1], profile):
            profile = merge([self._unwritten.pop(), profile])  # an hour of counts is one in memory
        self._unwritten.append(profile)

    def _write_unwritten(self) -> None:
        while self._unwritten:
            try:
                self._settle()
                self._bury(self._unwritten[0])
            except OSError as error:
                self._note(error)
                _log.warning("kept in memory windows=%d", len(self._unwritten))
                return
            del self._unwritten[0]

    def _bury(self, profile: Profile) -> None:
        """Write a tombstone in the place of what lies in giving-up/, joined with its hour's.

        The rename to a merged file is the one moment at which it takes the place of the others;
        `_settle` then finishes, now or after a crash. Raises only when nothing has changed.
        """
        try:
            profile = self._join_hour(profile)
            content = pprof.encode(profile)
            name = _file_name(object_key(profile, content)) + _MERGED
            target = self._folder / _GIVING_UP / name
            try:
                self._write(content, target)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                (self._folder / _RESERVE).unlink()
                self._write(content, target)
        finally:
            with contextlib.suppress(OSError):
                self._settle()

    def _join_hour(self, profile: Profile) -> Profile:
        hour = _hour(object_key(profile, b""))
        for spooled in sorted(_scan(self._folder / _TOMBSTONES), key=_start):
            source = self._take(spooled.path, _TOMBSTONE) if _hour(spooled.key) == hour else None
            earlier = self._decode(source) if source else None
            if source is None or earlier is None:
                continue
            if _are_of_one_hour(earlier, profile):
                return merge([earlier, profile])
            source.rename(spooled.path)
        return profile

    def _settle(self) -> None:
        """Empty giving-up/: finish what a merged file has replaced, undo anything else."""
        folder = self._folder / _GIVING_UP
        paths = list(folder.iterdir())
        merged = [path for path in paths if path.name.endswith(_MERGED)]
        for path in paths:
            if path in merged:
                continue
            if merged:
                path.unlink()
            elif path.name.endswith(_TOMBSTONE):
                path.rename(self._folder / _TOMBSTONES / path.name.removesuffix(_TOMBSTONE))
            else:
                path.rename(self._folder / _WAITING / path.name)
        if merged:
            sync_folder(folder)
        for path in merged:
            path.rename(self._folder / _TOMBSTONES / path.name.removesuffix(_MERGED))
            sync_folder(self._folder / _TOMBSTONES)

    def _take(self, path: Path, mark: str) -> Path | None:
        """Move a file to giving-up/; None when the uploader was faster."""
        taken = self._folder / _GIVING_UP / (path.name + mark)
        try:
            path.rename(taken)
        except FileNotFoundError:
            return None
        return taken

    def _decode(self, taken: Path) -> Profile | None:
        """Read a file in giving-up/; None, and it is moved aside, when it is damaged."""
        try:
            return pprof.decode(taken.read_bytes())
        except ProfileError as error:
            _log.warning("set aside file=%s reason=%s", taken.name, error)
        self._damaged += 1
        _set_aside(taken, self._folder)
        return None

    def _write(self, content: bytes, target: Path) -> None:
        """Write a file that is whole and durable as soon as it has its name."""
        partial = self._folder / _PARTIAL / target.name
        try:
            write_synced(partial, content)
            partial.rename(target)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        # The file is there: an error of the disk from here on must not count it a second time.
        with contextlib.suppress(OSError):
            sync_folder(target.parent)

    def _make_reserve(self) -> None:
        path = self._folder / _RESERVE
        if path.exists():
            return
        with contextlib.suppress(OSError):
            self._write(bytes(_RESERVE_BYTES), path)

    def _note(self, error: OSError) -> None:
        self._last_error = f"cannot write the spool {self._folder}: {error.strerror}"
        _log.warning("failed to write spool=%s error=%s", self._folder, error.strerror)


class SpoolReader:
    """The uploader's side: gives the oldest profiles first and removes what is stored."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def pending(self, limit: int) -> list[SpooledProfile]:
        """Give the oldest `limit` profiles, those claimed before first of all."""
        claimed = heapq.nsmallest(limit, _scan(self._folder / _SENDING), key=_start)
        others = (
            spooled for name in (_WAITING, _TOMBSTONES) for spooled in _scan(self._folder / name)
        )
        return claimed + heapq.nsmallest(limit - len(claimed), others, key=_start)

    def claim(self, profile: SpooledProfile) -> SpooledProfile | None:
        """Take a profile for sending, before the first byte is sent; None when it is gone.

        Nobody changes it from now on: the store may have it, whatever becomes of the answer.
        """
        target = self._folder / _SENDING / profile.path.name
        if profile.path == target:
            return profile
        try:
            profile.path.rename(target)
        except FileNotFoundError:
            return None  # the sampler has given it up
        sync_folder(target.parent)
        return profile._replace(path=target)

    def read(self, profile: SpooledProfile) -> bytes:
        """Give a profile's content.

        Raises:
            ProfileError: it is not what its name says it is.
        """
        content = profile.path.read_bytes()
        if content16(content) != profile.key.content16:
            raise ProfileError(f"{profile.path.name}: the content is not that of its name")
        return content

    def remove(self, profile: SpooledProfile) -> None:
        profile.path.unlink(missing_ok=True)

    def set_aside(self, profile: SpooledProfile) -> None:
        """Move a damaged file to where nobody tries it again; only the last few are kept."""
        _set_aside(profile.path, self._folder)


def usage(folder: Path) -> tuple[int, int]:
    """Count the profiles of a spool, and the bytes that all its files take, in whole blocks."""
    profiles, size_bytes = 0, 0
    for name in _FOLDERS:
        for entry in _entries(folder / name):
            with contextlib.suppress(FileNotFoundError):
                size_bytes += _allocated(entry.stat(follow_symlinks=False).st_size)
                profiles += name in _SENT
    return profiles, size_bytes


def _set_aside(path: Path, folder: Path) -> None:
    kept = sorted((folder / _DAMAGED).iterdir(), key=lambda each: each.stat().st_mtime_ns)
    for oldest in kept[: max(0, len(kept) + 1 - _DAMAGED_LIMIT)]:
        oldest.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.rename(folder / _DAMAGED / path.name)


def _scan(folder: Path) -> Iterator[SpooledProfile]:
    """Give the profiles in a folder, in no order. A file that is named otherwise is not ours."""
    for entry in _entries(folder):
        key = ObjectKey.parse(entry.name.replace("+", "/"))
        if key is not None:
            yield SpooledProfile(key, Path(entry))


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        yield from entries


def _file_name(key: ObjectKey) -> str:
    return key.text.replace("/", "+")


def _start(spooled: SpooledProfile) -> int:
    return spooled.key.start_s


def _hour(key: ObjectKey) -> tuple[str, int]:
    return key.host_id, key.start_s // LONGEST_WINDOW_S


def _are_of_one_hour(one: Profile, other: Profile) -> bool:
    """Tell whether two profiles can become one whose key finds both of their windows."""
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


def _allocated(size_bytes: int) -> int:
    return -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
