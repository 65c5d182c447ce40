"""Upload queue: the spool's folder as the uploader sees it.

The sampler and the uploader share only this folder, and either may be killed at any moment. A
process owns a file once it has renamed it into a folder of its own; a rename is atomic:

    partial/     files being written; a crash may leave some here, which are removed
    waiting/     closed profiles: from here on they are neither lost nor counted twice
    sending/     the uploader's: the store may have them already, so their content must not change
    giving-up/   the sampler's: profiles being turned into tombstones
    tombstones/  profiles without stacks, which keep the counts of the profiles given up
    damaged/     quarantine: the last few files whose content does not match their name

A file's name is its object's key with + for /. This module is separate from `storage.spool.spool`,
which makes profiles: the uploader only moves bytes, and needs neither numpy nor protobuf.
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


class UploadQueue:
    """Profiles waiting for the store, oldest first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def pending(self, limit: int) -> list[SpooledProfile]:
        """Return up to `limit` profiles: those claimed earlier first, then the oldest."""
        claimed = heapq.nsmallest(limit, scan(self._folder / SENDING), key=start_of)
        others = (
            spooled for name in (WAITING, TOMBSTONES) for spooled in scan(self._folder / name)
        )
        return claimed + heapq.nsmallest(limit - len(claimed), others, key=start_of)

    def claim(self, profile: SpooledProfile) -> SpooledProfile | None:
        """Take a profile for sending, before the first byte is sent; None if it is gone.

        Its content must not change from now on: the store may have it even if no response arrives.
        """
        if profile.is_claimed:
            return profile
        target = self._folder / SENDING / profile.path.name
        try:
            profile.path.rename(target)
        except FileNotFoundError:
            return None  # the sampler has turned it into a tombstone
        sync_folder(target.parent)
        return profile._replace(path=target)

    def read(self, profile: SpooledProfile) -> bytes | None:
        """Return a profile's content; None if it does not match its name.

        Raises:
            OSError: the file cannot be read.
        """
        content = profile.path.read_bytes()
        return content if content16(content) == profile.key.content16 else None

    def remove(self, profile: SpooledProfile) -> None:
        profile.path.unlink(missing_ok=True)

    def quarantine(self, profile: SpooledProfile) -> None:
        """Move a damaged file to where it is never sent."""
        quarantine(profile.path, self._folder)


def usage(folder: Path) -> tuple[int, int]:
    """Return the number of profiles in a spool and the disk space of all its files."""
    profiles, size_bytes = 0, 0
    for name in FOLDERS:
        for entry in _entries(folder / name):
            with contextlib.suppress(FileNotFoundError):
                size_bytes += allocated(entry.stat(follow_symlinks=False).st_size)
                profiles += name in _SENT
    return profiles, size_bytes


def quarantine(path: Path, folder: Path) -> None:
    """Move a file to damaged/ in the spool `folder`, where only the last few are kept."""
    kept = sorted((folder / DAMAGED).iterdir(), key=lambda each: each.stat().st_mtime_ns)
    for oldest in kept[: max(0, len(kept) + 1 - _DAMAGED_LIMIT)]:
        oldest.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.rename(folder / DAMAGED / path.name)


def scan(folder: Path) -> Iterator[SpooledProfile]:
    """Return the profiles in a folder, in no order; files with other names are ignored."""
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
    """Return the disk space of a file: whole blocks."""
    return -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
