"""Identities: what files hold, kept in memory and on disk as long as the files do not change.

To identify a file is to parse and to hash it. That is not done again for a file whose times and
size are the same, also not by the next process: `st_ctime` changes with every write and cannot be
set. An identity is kept on disk only where that proves the file:

- The file was not written lately: two writes within one step of the clock have one time, and a page
  that is mapped for writing counts as written when it is written back.
- No other file system can ever have the same device number: those without a device of their own
  (overlay, tmpfs, FUSE) use numbers again, and what FUSE says of a file is what its owner wants. So
  only those on block devices are kept, and besides the numbers that of the file system.
"""

import contextlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from symbolizer.digest import blake2b
from symbolizer.file_cache import FileCache

_MAX_KEPT = 2048
_DISK_BYTES = 16 << 20
_MAX_FILE_BYTES = 256 << 10
_FORMAT = 2
"""To be raised when the same file gets other keys than before."""
_SETTLED_NS = 60 * 10**9


class Identity(NamedTuple):
    """What a file is.

    Attributes:
        build_id: as the file claims it, or `hash_content` if it claims none.
        segments: executable ones, as lists of p_vaddr, p_offset, p_filesz.
        functions: pairs of hashes, of an address and of the name of a function there, for a fixed
            choice of addresses; base64 of 32-bit words, empty without .symtab.
        has_symbols: whether it has a .symtab.
        owner: the user id of the file's owner, or NOBODY.
        frame_bytes: what an unwind table would be built from.
        dynamic: the fields of its `Dynamic`.
    """

    build_id: str
    code_key: str
    table_key: str
    content_key: str
    segments: list[list[int]]
    functions: str
    has_symbols: bool
    owner: int
    frame_bytes: int
    dynamic: list[int]


class Identities:
    """Identities by file status. Several processes may share the folder."""

    def __init__(
        self, folder: Path | None = None, now_ns: Callable[[], int] = time.time_ns
    ) -> None:
        """Read nothing yet; without a folder, keep them in memory only."""
        self._now_ns = now_ns
        self._known: OrderedDict[tuple[int, ...], Identity] = OrderedDict()
        self._files = FileCache(folder, _DISK_BYTES, files="*.identity") if folder else None

    def find(self, fd: int, status: os.stat_result) -> Identity | None:
        """Return what an open file was found to be when it had the same status."""
        key = _key(status)
        identity = self._known.get(key)
        if identity is None and self._files is not None and self._is_proved_by(status):
            opened = self._files.open(_name(fd, key))
            if opened is None:
                return None
            with opened:
                identity = _parse(opened.read(_MAX_FILE_BYTES))
            # Its owner is part of the status, and may have changed with it.
            if identity is None or identity.owner != status.st_uid:
                return None
            self._keep(key, identity)
        return identity

    def add(self, fd: int, status: os.stat_result, identity: Identity) -> None:
        """Keep what an open file is; its status is from before it was read."""
        key = _key(status)
        self._keep(key, identity)
        if self._files is None or not self._is_proved_by(status) or _key(os.fstat(fd)) != key:
            return
        with contextlib.suppress(OSError), self._files.create(_name(fd, key)) as file:
            file.write(json.dumps([_FORMAT, identity._asdict()]).encode())

    def _keep(self, key: tuple[int, ...], identity: Identity) -> None:
        self._known[key] = identity
        if len(self._known) > _MAX_KEPT:
            self._known.popitem(last=False)

    def _is_proved_by(self, status: os.stat_result) -> bool:
        has_device = os.major(status.st_dev) != 0
        return has_device and self._now_ns() - status.st_ctime_ns > _SETTLED_NS


def _key(status: os.stat_result) -> tuple[int, ...]:
    return (
        *(status.st_dev, status.st_ino, status.st_size),
        *(status.st_mtime_ns, status.st_ctime_ns),
    )


def _name(fd: int, key: tuple[int, ...]) -> str:
    text = repr((os.fstatvfs(fd).f_fsid, *key))
    return f"{blake2b(text.encode(), digest_size=20).hexdigest()}.identity"


def _parse(content: bytes) -> Identity | None:
    try:
        number, values = json.loads(content)
        if number != _FORMAT:
            return None
        return _checked(values)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _checked(values: dict[str, Any]) -> Identity:
    return Identity(
        build_id=str(values["build_id"]),
        code_key=str(values["code_key"]),
        table_key=str(values["table_key"]),
        content_key=str(values["content_key"]),
        segments=[[int(number) for number in segment] for segment in values["segments"]],
        functions=str(values["functions"]),
        has_symbols=bool(values["has_symbols"]),
        owner=int(values["owner"]),
        frame_bytes=int(values["frame_bytes"]),
        dynamic=[int(number) for number in values["dynamic"]],
    )
