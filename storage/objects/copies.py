"""Copies: immutable objects of a store as files on this machine, within a byte budget.

The content16 in an object's key proves its content, so a copy is never out of date, and a damaged
one is fetched again. Several processes may share a folder. Objects of a directory store are files
already: they are verified where they are, and not copied.

A file is hashed once. That it was verified is noted by its inode, size and time of modification, in
memory and for other processes in the folder, so a file that was changed since is hashed again.
"""

import contextlib
import functools
import hashlib
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from storage.objects.directory import DirectoryStore
from storage.objects.keys import (
    NS_PER_S,
    DamagedObject,
    ObjectStore,
    ObjectTooLarge,
    StoreRefused,
    content16_in,
)
from symbolizer.file_cache import FileCache, Pins, UnwrittenError

_THREADS = 16
"""A request to a bucket mostly waits; see bench/bench_copies.py."""
_PIECE_BYTES = 8 << 20
"""What a thread holds in memory; larger objects take several requests."""
_ENDING = ".copy"
_AGE_NS = 10 * NS_PER_S

_NOTES = ".verified"
_NOTE_BYTES = 16
_NOTES_LIMIT_BYTES = 1 << 20
"""Beyond it the notes begin anew, and files are hashed once more: 65,536 of them."""


class FetchedFiles(list[Path]):
    """Paths of files that are not evicted as long as this list exists."""

    def __init__(self, paths: Iterable[Path], pins: Pins | None) -> None:
        super().__init__(paths)
        self._pins = pins


class Copies:
    """Immutable objects of a store as files below `folder`, of `limit_bytes` in all.

    The longest unused copies are evicted first. Those in use are never evicted: if they are more
    than the limit, the folder is larger meanwhile. Safe to use from several threads.
    """

    def __init__(self, store: ObjectStore, folder: Path, limit_bytes: int) -> None:
        self.requests = 0
        """GET requests that copies have taken so far."""
        self._store = store
        self._files = FileCache(folder, limit_bytes, files=f"*{_ENDING}")
        self._verified = _Verified(folder / _NOTES)
        self._lock = threading.Lock()
        self._fetching: dict[str, threading.Lock] = {}

    def fetch(self, keys: Sequence[str]) -> FetchedFiles:
        """Return the path of each object's complete file, in the order of the keys.

        Objects that are not at hand are fetched, several at a time. The files stay as long as the
        returned list exists, so keep it while you read them, rather than a copy of it. (Objects of
        a directory store stay until they are deleted from it.)

        Raises:
            ValueError: a key has no content16.
            ObjectMissing, DamagedObject: the object named is not in the store, or has another
                content than its name says.
            ObjectTooLarge: it is larger than the limit.
            StoreUnavailable, StoreRefused: the store cannot be read, or no copy can be kept.
        """
        unique = list(dict.fromkeys(keys))
        for key in unique:
            if content16_in(key) is None:
                raise ValueError(f"the key {key!r} does not prove its object's content")
        pins = self._pin(unique)
        unready = [key for key in unique if not self._is_verified(key)]
        if unready:
            with ThreadPoolExecutor(min(_THREADS, len(unready))) as pool:
                # After an error those that are not yet begun are cancelled.
                for _ in pool.map(self._prepare, unready):
                    pass
        return FetchedFiles(map(self._path, keys), pins)

    def _path(self, key: str) -> Path:
        if isinstance(self._store, DirectoryStore):
            return self._store.root / key
        return self._files.folder / self._name(key)

    def _name(self, key: str) -> str:
        place = f"{self._store}\0{key}".encode()
        digest = hashlib.blake2b(place, digest_size=16).hexdigest()
        return f"{content16_in(key)}-{digest}{_ENDING}"

    def _pin(self, keys: Iterable[str]) -> Pins | None:
        if isinstance(self._store, DirectoryStore):
            return None
        try:
            return self._files.pin(map(self._name, keys))
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> StoreRefused:
        return StoreRefused(
            f"cannot keep copies of objects in {self._files.folder}: {error.strerror}",
            "make room or give the right to it, or choose another folder with EVERFLAME_CACHE",
        )

    def _prepare(self, key: str) -> None:
        """Verify an object's file, or fetch it; only one thread does so for a key."""
        with self._lock:
            fetching = self._fetching.setdefault(key, threading.Lock())
        try:
            with fetching:
                if not (self._is_verified(key) or self._verify(key)):
                    self._download(key)
        finally:
            with self._lock:
                self._fetching.pop(key, None)

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[BinaryIO | None]:
        """Return an object's file for the length of the block; None if there is no copy."""
        if isinstance(self._store, DirectoryStore):
            with self._store.open(key) as file:
                yield file
        elif (copy := self._files.open(self._name(key))) is not None:
            with copy:
                yield copy
        else:
            yield None

    def _is_verified(self, key: str) -> bool:
        with self._opened(key) as file:
            return file is not None and _note(key, file) in self._verified

    def _verify(self, key: str) -> bool:
        """Return whether there is an intact copy.

        Raises:
            DamagedObject: a directory's object is not intact.
        """
        try:
            with self._opened(key) as file:
                if file is None:
                    return False
                note = _note(key, file)
                digest = hashlib.sha256()
                while piece := file.read(_PIECE_BYTES):
                    digest.update(piece)
        except OSError:  # of this machine's disk: a store has errors of its own
            return False
        if digest.hexdigest()[:16] == content16_in(key):
            self._verified.add(note)
            return True
        if isinstance(self._store, DirectoryStore):
            raise DamagedObject(key)
        return False

    def _download(self, key: str) -> None:
        digest = hashlib.sha256()
        try:
            with self._files.create(self._name(key)) as file:
                for piece in self._pieces(key):
                    digest.update(piece)
                    file.write(piece)
                if digest.hexdigest()[:16] != content16_in(key):
                    raise DamagedObject(key)
                file.flush()
                # The kernel's clock only ticks every few milliseconds: a time that it no longer
                # gives tells the file from one that is written to right afterwards.
                now_ns = time.time_ns()
                os.utime(file.fileno(), ns=(now_ns, now_ns - _AGE_NS))
                note = _note(key, file)
        except UnwrittenError as error:
            raise self._refusal(error) from error
        self._verified.add(note)

    def _pieces(self, key: str) -> Iterator[bytes]:
        start = 0
        while True:
            with self._lock:
                self.requests += 1
            piece = self._store.get_range(key, start, _PIECE_BYTES)
            yield piece
            start += len(piece)
            if len(piece) < _PIECE_BYTES:
                return
            if start > self._files.limit_bytes:
                raise ObjectTooLarge(key, self._files.limit_bytes)


def _note(key: str, file: BinaryIO) -> bytes:
    """Return what stands for this state of an object's file."""
    status = os.fstat(file.fileno())
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return hashlib.blake2b(f"{key}\0{state}".encode(), digest_size=_NOTE_BYTES).digest()


class _Verified:
    """Notes of files that were verified, shared with other processes by a file of nothing else.

    A note that is lost or damaged costs one more hashing, so nothing here is an error.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    @functools.cached_property
    def _notes(self) -> set[bytes]:
        with contextlib.suppress(OSError):
            content = self._path.read_bytes()
            if len(content) % _NOTE_BYTES == 0:
                starts = range(0, len(content), _NOTE_BYTES)
                return {content[start : start + _NOTE_BYTES] for start in starts}
            self._path.unlink()  # a write was cut short: notes after it would not be found
        return set()

    def __contains__(self, note: bytes) -> bool:
        with self._lock:
            return note in self._notes

    def add(self, note: bytes) -> None:
        with self._lock, contextlib.suppress(OSError):
            if len(self._notes) * _NOTE_BYTES >= _NOTES_LIMIT_BYTES:
                self._notes.clear()
            self._notes.add(note)
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(fd, note)
                is_full = os.fstat(fd).st_size >= _NOTES_LIMIT_BYTES
            finally:
                os.close(fd)
            if is_full:
                self._path.unlink()
