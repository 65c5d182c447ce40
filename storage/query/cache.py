"""Cache: decoded objects as files of arrays within a byte budget.

Objects never change, so neither does what was made of them: a file is named by a digest of what it
was made from and is never out of date. It carries a CRC-32 of its content; a damaged one counts as
missing.

A file is 16 bytes (mark, CRC-32 of the rest, length of the header), a JSON header, and the arrays,
each at a multiple of 64 bytes and as narrow as its numbers allow.
"""

import contextlib
import functools
import hashlib
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import orjson

from storage.columns import Columns, Texts, Times
from storage.formats.pprof_comments import SCHEMA
from storage.profile import Accounting, Host, Labels, Window
from storage.query.function_totals import FunctionTotals
from storage.query.resolve import LocationNames
from storage.query.self_samples import ObjectSelfSamples
from storage.stack_tree import StackLists, StackTree
from symbolizer.file_cache import FileCache
from symbolizer.location import ElfAddress, FileOffset, Kind, Module, Segment

DEFAULT_LIMIT_BYTES = 1 << 30

_VERSION = 10
"""Of the arrays' meaning. What an object is read as also depends on pprof's schema."""

_PREFIX = struct.Struct("<8sII")
_MARK = b"everfl1\n"
_ALIGNMENT = 64
_STACKS = {"lists": StackLists, "tree": StackTree}
_BULK = frozenset({"texts.blob", "words", "parents", "ends", "lines", "line_samples"})

_Value = Columns | FunctionTotals | LocationNames | Times | ObjectSelfSamples
_Kind = (
    type[Columns]
    | type[FunctionTotals]
    | type[LocationNames]
    | type[Times]
    | type[ObjectSelfSamples]
)
_Kept = TypeVar("_Kept", Columns, FunctionTotals, LocationNames, Times, ObjectSelfSamples)


class DecodedCache:
    """Columns, FunctionTotals, LocationNames, Times, ObjectSelfSamples by name.

    `key` returns the tenant's key, and is called when the first file is read or written.

    A file that cannot be written or read costs time and is never an error.
    """

    def __init__(
        self, folder: Path, key: Callable[[], bytes], limit_bytes: int = DEFAULT_LIMIT_BYTES
    ) -> None:
        self._key = key
        # Files of other versions count as well, and so leave in time.
        self._files = FileCache(folder, limit_bytes, files="decoded-*/*")
        self._is_saving = threading.Lock()

    @functools.cached_property
    def _folder(self) -> str:
        """Hashes that were made with another tenant's key mean nothing here."""
        mark = hashlib.blake2b(self._key(), digest_size=8).hexdigest()
        return f"decoded-{_VERSION}.{SCHEMA}-{mark}"

    def name(self, parts: Iterable[str]) -> str:
        """Return the name of what is made from `parts`."""
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=20).hexdigest()

    def load(self, kind: type[_Kept], name: str) -> tuple[_Kept, Any] | None:
        """Return what was saved under this name, and its note; None if there is none intact."""
        path = self._path(kind, name)
        file = self._files.open(path)
        if file is None:
            return None
        with file, contextlib.suppress(OSError):
            content = file.read()
            try:
                return unpack(kind, content)
            except (ValueError, KeyError, TypeError, IndexError, struct.error):
                self._files.remove(path)
        return None

    def save(self, value: _Kept, name: str, note: Any = None) -> None:
        """Keep a value, and a note that JSON can hold."""
        with contextlib.suppress(orjson.JSONEncodeError):  # damaged counts: sums beyond 64 bits
            self.save_packed(type(value), pack(value, note), name)

    def save_later(self, value: _Kept, name: str, note: Any = None) -> None:
        """Do what `save` does meanwhile: an answer need not wait for a disk.

        At most one value is saved so at a time; a further one is saved at once, as is one for which
        no thread can be started. A process that ends waits for it.
        """
        if not self._is_saving.acquire(blocking=False):
            self.save(value, name, note)
            return

        def save() -> None:
            try:
                self.save(value, name, note)
            finally:
                self._is_saving.release()

        try:
            threading.Thread(target=save, name="save").start()
        except RuntimeError:  # where a container may have no more of them, or while Python ends
            save()

    def save_packed(self, kind: type[_Kept], content: bytes, name: str) -> None:
        """Keep a value that is packed already."""
        # No room, no permission: the object is decoded again next time.
        with (
            contextlib.suppress(OSError),
            self._files.create(self._path(kind, name)) as file,
        ):
            file.write(content)

    def touch(self, kind: _Kind, name: str) -> int:
        """Mark a saved file as used without reading it; return its size, 0 if it is gone."""
        return self._files.touch(self._path(kind, name))

    def size_bytes(self) -> int:
        return self._files.size_bytes()

    def _path(self, kind: _Kind, name: str) -> str:
        return f"{self._folder}/{name}.{kind.__name__.lower()}"


def pack(value: _Value, note: Any = None) -> bytes:
    """Return a value as the content of a file.

    Raises:
        orjson.JSONEncodeError: its sums are beyond 64 bits.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    meta: dict[str, Any] = {}
    for field in fields(value):
        content = getattr(value, field.name)
        if isinstance(content, Texts):
            arrays["texts.blob"] = np.frombuffer(content.blob, np.uint8)
            arrays["texts.offsets"] = _narrow(content.offsets)
        elif isinstance(content, StackLists | StackTree):
            meta[field.name] = "lists" if isinstance(content, StackLists) else "tree"
            arrays |= {each.name: _narrow(getattr(content, each.name)) for each in fields(content)}
        elif isinstance(content, np.ndarray):
            arrays[field.name] = _narrow(content)
        elif isinstance(content, Accounting):
            meta[field.name] = _accounting_record(content)
        elif field.name == "modules":
            meta[field.name] = [[m.build_id, m.path, m.kind, m.segments] for m in content.values()]
        else:
            meta[field.name] = content
    places: dict[str, tuple[str, tuple[int, ...], int]] = {}
    end = 0
    for name, array in arrays.items():
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        places[name] = (array.dtype.str, array.shape, start)
        end = start + array.nbytes
    header = orjson.dumps({"meta": meta, "arrays": places, "note": note}, default=list)
    pieces: list[bytes | memoryview] = [header]
    end = _PREFIX.size + len(header)
    for array in arrays.values():
        pieces.append(bytes(-end % _ALIGNMENT))
        pieces.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        end += len(pieces[-2]) + array.nbytes
    checksum = zlib.crc32(_PREFIX.pack(_MARK, 0, len(header))[12:], zlib.crc32(_MARK))
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    return b"".join([_PREFIX.pack(_MARK, checksum, len(header)), *pieces])


def _checksum(content: bytes) -> int:
    """Return the CRC-32 of a file but for its own four bytes."""
    view = memoryview(content)
    return zlib.crc32(view[12:], zlib.crc32(view[:8]))


def unpack(kind: type[_Kept], content: bytes) -> tuple[_Kept, Any]:
    """Return what was packed, and its note. Damage raises one of the errors of `load`."""
    mark, checksum, header_bytes = _PREFIX.unpack_from(content)
    if mark != _MARK or checksum != _checksum(content):
        raise ValueError("damaged")
    header = orjson.loads(content[_PREFIX.size : _PREFIX.size + header_bytes])
    first = -(-(_PREFIX.size + header_bytes) // _ALIGNMENT) * _ALIGNMENT
    arrays = {}
    for name, (dtype, shape, start) in header["arrays"].items():
        count = int(np.prod(shape))
        array = np.frombuffer(content, dtype, count, first + start).reshape(shape)
        # Sums of narrow numbers would overflow; only the bulk of it stays as it is.
        is_bulk = name in _BULK or array.dtype == np.uint64
        arrays[name] = array if is_bulk else array.astype(np.int64)
    meta = header["meta"]
    values: dict[str, Any] = {**meta, **arrays}
    if "texts.blob" in arrays:
        blob = values.pop("texts.blob").tobytes()
        values["texts"] = Texts(blob, values.pop("texts.offsets"))
    if "stacks" in meta:
        stacks = _STACKS[meta["stacks"]]
        values["stacks"] = stacks(*(values.pop(each.name) for each in fields(stacks)))
    if "window" in meta:
        values["window"] = Window(*meta["window"])
        values["accounting"] = _parse_accounting(meta["accounting"])
    for name in ("label_sets", "service_sets", "present_sets"):
        if name in meta:
            values[name] = tuple(map(_parse_labels, meta[name]))
    if "modules" in meta:
        values["modules"] = {
            build_id: Module(build_id, path, Kind(kind), _parse_segments(segments))
            for build_id, path, kind, segments in meta["modules"]
        }
    return kind(**values), header["note"]


def _narrow(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the same numbers in the narrowest unsigned type; uint64 stays, it is hashes."""
    if array.dtype == np.uint64 or array.size == 0 or array.min() < 0:
        return array
    return array.astype(np.min_scalar_type(int(array.max())).newbyteorder("<"))


def _accounting_record(accounting: Accounting) -> dict[str, Any]:
    record = {field.name: getattr(accounting, field.name) for field in fields(accounting)}
    return {**record, "services": list(accounting.services.items())}


def _parse_accounting(record: Mapping[str, Any]) -> Accounting:
    # A version that did not know one of the counts has left it out of what it read.
    if record.keys() != {field.name for field in fields(Accounting)}:
        raise ValueError("another version's")
    services = {_parse_labels(labels): present_ns for labels, present_ns in record["services"]}
    hosts = tuple(Host(*host) for host in record["hosts"])
    return Accounting(**{**record, "hosts": hosts, "services": services})


def _parse_labels(pairs: Iterable[tuple[str, str]]) -> Labels:
    return tuple((name, value) for name, value in pairs)


def _parse_segments(segments: Iterable[tuple[int, int, int]]) -> tuple[Segment, ...]:
    return tuple(Segment(ElfAddress(v), FileOffset(o), size) for v, o, size in segments)


def default_folder() -> Path:
    """Return where this user's decoded objects are kept: EVERFLAME_CACHE, else the usual places."""
    if chosen := os.environ.get("EVERFLAME_CACHE"):
        return Path(chosen) / "query"
    if os.geteuid() == 0:
        return Path("/var/cache/everflame/query")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "everflame" / "query"
