"""Outbox: the folder of the spool, as the uploader sees it.

The sampler and the uploader share nothing but this folder, and either may be killed at any moment.
A file belongs to whoever has renamed it into a folder of its own; a rename is all or nothing:

    partial/     being written; what a crash leaves here was never closed, and is removed
    waiting/     closed profiles. From here on nothing is lost and nothing counted twice
    sending/     the uploader's: perhaps stored already, so nobody may change their content
    giving-up/   the sampler's: on their way to a tombstone
    tombstones/  profiles without stacks, which keep the counts of those given up
    damaged/     the last few files that were not what their names say

A file's name is its object's key with + for /. This module is apart from `storage.spool.spool`,
which makes profiles: the uploader moves bytes, and needs neither numpy nor protobuf.
"""

import contextlib
import heapq
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from storage.objects.directory import sync_folder
from storage.objects.keys import ObjectKey, content16

PARTIAL = "partial"
WAITING = "waiting"
SENDING = "sending"
GIVING_UP = "giving-up"
TOMBSTONES = "tombstones"
DAMAGED = "damaged"
FOLDERS = (PARTIAL, WAITING, SENDING, GIVING_UP, TOMBSTONES, DAMAGED)

_SENT = frozenset({WAITING, SENDING, TOMBSTONES})
_BLOCK_BYTES = 4096
_DAMAGED_LIMIT = 16


class SpooledProfile(NamedTuple):
    """A profile on its way to the store."""

    key: ObjectKey
    path: Path

    @property
    def is_claimed(self) -> bool:
        return self.path.parent.name == SENDING


class Outbox:
    """Gives the oldest profiles first, and removes what is stored."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def pending(self, limit: int) -> list[SpooledProfile]:
        """Return the oldest `limit` profiles, those claimed before first of all."""
        claimed = heapq.nsmallest(limit, scan(self._folder / SENDING), key=start_of)
        others = (
            spooled for name in (WAITING, TOMBSTONES) for spooled in scan(self._folder / name)
        )
        return claimed + heapq.nsmallest(limit - len(claimed), others, key=start_of)

    def claim(self, profile: SpooledProfile) -> SpooledProfile | None:
        """Take a profile for sending, before the first byte is sent; None when it is gone.

        Nobody changes it from now on: the store may have it, whatever becomes of the answer.
        """
        if profile.is_claimed:
            return profile
        target = self._folder / SENDING / profile.path.name
        try:
            profile.path.rename(target)
        except FileNotFoundError:
            return None  # the sampler has given it up
        sync_folder(target.parent)
        return profile._replace(path=target)

    def read(self, profile: SpooledProfile) -> bytes | None:
        """Return a profile's content; None when it is not what its name says.

        Raises:
            OSError: the disk does not give it.
        """
        content = profile.path.read_bytes()
        return content if content16(content) == profile.key.content16 else None

    def remove(self, profile: SpooledProfile) -> None:
        profile.path.unlink(missing_ok=True)

    def set_aside(self, profile: SpooledProfile) -> None:
        """Move a damaged file to where nobody tries it again."""
        move_aside(profile.path, self._folder)


def usage(folder: Path) -> tuple[int, int]:
    """Count the profiles of a spool, and the bytes that all its files take."""
    profiles, size_bytes = 0, 0
    for name in FOLDERS:
        for entry in _entries(folder / name):
            with contextlib.suppress(FileNotFoundError):
                size_bytes += allocated(entry.stat(follow_symlinks=False).st_size)
                profiles += name in _SENT
    return profiles, size_bytes


def move_aside(path: Path, folder: Path) -> None:
    """Move a file to damaged/ in the spool `folder`, where only the last few are kept."""
    kept = sorted((folder / DAMAGED).iterdir(), key=lambda each: each.stat().st_mtime_ns)
    for oldest in kept[: max(0, len(kept) + 1 - _DAMAGED_LIMIT)]:
        oldest.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.rename(folder / DAMAGED / path.name)


def scan(folder: Path) -> Iterator[SpooledProfile]:
    """Return the profiles in a folder, in no order. A file that is named otherwise is not ours."""
    for entry in _entries(folder):
        key = ObjectKey.parse(entry.name.replace("+", "/"))
        if key is not None:
            yield SpooledProfile(key, Path(entry))


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        yield from entries


def file_name(key: ObjectKey) -> str:
    return key.text.replace("/", "+")


def start_of(spooled: SpooledProfile) -> int:
    return spooled.key.start_s


def allocated(size_bytes: int) -> int:
    """Return what a file takes on the disk, in whole blocks."""
    return -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
