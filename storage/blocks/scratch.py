"""Scratch: temporary folders that do not stay behind when their process is killed.

A folder belongs to the process that holds a lock on a file in it. Whoever makes the next one
removes those that nobody holds.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

_PREFIX = "everflame-scratch-"
_LOCK = "lock"
_UNLOCKED_LASTS_S = 600.0
"""A folder without a lock is about to be locked, unless it is older."""


class ScratchFolder:
    """A folder for this process alone, until it is closed or the process ends.

    A forked child must not close it.

    Raises:
        OSError: none can be made.
    """

    def __init__(self) -> None:
        _remove_abandoned()
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._pid = os.getpid()
        self._lock = (self.path / _LOCK).open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove the folder, in the process that made it."""
        self._lock.close()
        if self._pid == os.getpid():
            shutil.rmtree(self.path, ignore_errors=True)


def _remove_abandoned() -> None:
    """Remove our folders whose processes were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if status.st_uid != os.getuid() or path.is_symlink():
                continue
            try:
                lock = (path / _LOCK).open("rb")
            except FileNotFoundError:
                if status.st_mtime < time.time() - _UNLOCKED_LASTS_S:
                    shutil.rmtree(path, ignore_errors=True)
                continue
            with lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError if somebody holds it
                shutil.rmtree(path, ignore_errors=True)
