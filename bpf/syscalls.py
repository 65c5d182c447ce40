"""The bpf(2) commands that the profiler uses once its programs are loaded.

Layouts are those of `union bpf_attr` (include/uapi/linux/bpf.h). Keys and values cross
as bytes or numpy arrays; file descriptors stay the caller's.
"""

import contextlib
import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from bpf.errors import SyscallError

_NR_BPF = {"x86_64": 321, "aarch64": 280}

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE = 0, 1, 2
_PROG_LOAD, _PROG_BY_ID, _OBJ_GET_INFO, _RAW_TRACEPOINT_OPEN = 5, 13, 15, 17
_PROG_GET_NEXT_ID, _MAP_GET_NEXT_ID = 11, 12
_LOOKUP_AND_DELETE_BATCH, _UPDATE_BATCH, _ENABLE_STATS = 25, 26, 32

MAP_TYPE_ARRAY = 2
MAP_TYPE_ARRAY_OF_MAPS = 12
PROG_TYPE_KPROBE, PROG_TYPE_TRACEPOINT, PROG_TYPE_PERF_EVENT = 2, 5, 7

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(command: int, attr: bytes) -> tuple[int, int, bytes]:
    """Run one command; return (result, errno, the attr, into which the kernel may have written)."""
    buffer = ctypes.create_string_buffer(attr, len(attr))
    number = _NR_BPF.get(platform.machine(), 321)
    result = _libc.syscall(
        ctypes.c_long(number), ctypes.c_int(command), buffer, ctypes.c_uint(len(attr))
    )
    return int(result), ctypes.get_errno() if result < 0 else 0, buffer.raw


def _bpf(command: int, attr: bytes, what: str) -> int:
    result, error, _ = _call(command, attr)
    if error:
        raise SyscallError(what, error)
    return result


def create_map(
    map_type: int,
    key_size: int,
    value_size: int,
    max_entries: int,
    *,
    flags: int = 0,
    inner_map_fd: int = 0,
) -> int:
    """Create a map and return its file descriptor (close-on-exec)."""
    attr = struct.pack("<6I", map_type, key_size, value_size, max_entries, flags, inner_map_fd)
    return _bpf(_MAP_CREATE, attr.ljust(72, b"\0"), "create a BPF map")


def load_program(instructions: bytes, program_type: int = PROG_TYPE_PERF_EVENT) -> int:
    """Load instructions (8 bytes each) as a GPL program and return its file descriptor."""
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"GPL")
    attr = struct.pack(
        "<IIQQ",
        program_type,
        len(instructions) // 8,
        ctypes.addressof(code),
        ctypes.addressof(licence),
    )
    return _bpf(_PROG_LOAD, attr.ljust(128, b"\0"), "load a BPF program")


def lookup(map_fd: int, key: int, value_size: int) -> bytes:
    """Read the value of a u32 key. A per-CPU map's value is that of all possible CPUs in a row."""
    key_buffer = ctypes.c_uint32(key)
    value = ctypes.create_string_buffer(value_size)
    addresses = (ctypes.addressof(key_buffer), ctypes.addressof(value))
    _bpf(_MAP_LOOKUP, struct.pack("<IIQQQ", map_fd, 0, *addresses, 0), "read a BPF map")
    return value.raw


def update(map_fd: int, key: int, value: bytes) -> None:
    """Write the value of a u32 key."""
    key_buffer = ctypes.c_uint32(key)
    value_buffer = ctypes.create_string_buffer(value, len(value))
    addresses = (ctypes.addressof(key_buffer), ctypes.addressof(value_buffer))
    _bpf(_MAP_UPDATE, struct.pack("<IIQQQ", map_fd, 0, *addresses, 0), "write a BPF map")


def update_batch(
    map_fd: int, keys: npt.NDArray[np.generic], values: npt.NDArray[np.generic]
) -> None:
    """Write many entries at once; what stood before an error is written."""
    if not len(keys):
        return
    addresses = (keys.ctypes.data, values.ctypes.data)
    attr = struct.pack("<QQQQIIQQ", 0, 0, *addresses, len(keys), map_fd, 0, 0)
    _bpf(_UPDATE_BATCH, attr, "write a BPF map")


def attach_raw_tracepoint(name: str, program_fd: int) -> int:
    """Attach a program until the returned file descriptor is closed. Needs no tracefs."""
    text = ctypes.create_string_buffer(name.encode())
    attr = struct.pack("<QI", ctypes.addressof(text), program_fd).ljust(24, b"\0")
    return _bpf(_RAW_TRACEPOINT_OPEN, attr, f"attach to the raw tracepoint {name}")


def program_by_id(program_id: int) -> int:
    """Return a descriptor of a program that somebody else has loaded."""
    attr = struct.pack("<III", program_id, 0, 0)
    return _bpf(_PROG_BY_ID, attr, f"open the BPF program {program_id}")


def program_ids() -> list[int]:
    """Return the ids of all BPF programs of this host, of whomever."""
    return list(_ids(_PROG_GET_NEXT_ID))


def map_ids() -> list[int]:
    """Return the ids of all BPF maps of this host, of whomever."""
    return list(_ids(_MAP_GET_NEXT_ID))


def _ids(command: int) -> Iterator[int]:
    number = 0
    while True:
        _, error, attr = _call(command, struct.pack("<III", number, 0, 0))
        if error == errno.ENOENT:
            return
        if error:
            raise SyscallError("list BPF programs or maps", error)
        (number,) = struct.unpack_from("<I", attr, 4)
        yield number


class ProgramInfo:
    """What the kernel says of a loaded program (struct bpf_prog_info)."""

    _SIZE = 232

    def __init__(self, program_fd: int) -> None:
        info = ctypes.create_string_buffer(self._SIZE)
        attr = struct.pack("<IIQ", program_fd, self._SIZE, ctypes.addressof(info))
        _bpf(_OBJ_GET_INFO, attr, "ask about a BPF program")
        self.run_time_ns, self.run_count = struct.unpack_from("<QQ", info.raw, 192)
        self.type, self.id = struct.unpack_from("<II", info.raw, 0)
        self.name = info.raw[64:80].partition(b"\0")[0]


@contextlib.contextmanager
def run_time_stats() -> Iterator[None]:
    """Let the kernel measure the run time of BPF programs inside of the block (kernel 5.8)."""
    fd = _bpf(_ENABLE_STATS, struct.pack("<I", 0), "enable BPF run time statistics")
    try:
        yield
    finally:
        os.close(fd)


class BatchReader:
    """Empties a hash map in batches, into buffers that are kept from one time to the next."""

    def __init__(self, map_fd: int, key: np.dtype[np.generic], value: np.dtype[np.generic]) -> None:
        self._map_fd = map_fd
        self._key, self._value = key, value
        self._room = 0
        self._grow(256)

    def _grow(self, room: int) -> None:
        self._room = room
        self._keys = np.empty(room, self._key)
        self._values = np.empty(room, self._value)

    def take_all(self) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
        """Remove every entry and return (keys, values).

        BPF_MAP_LOOKUP_AND_DELETE_BATCH ends with ENOENT *and* a count: that count is the last
        batch, not a failure. ENOSPC means that one bucket holds more than the buffers.
        """
        keys, values = [], []
        position = ctypes.create_string_buffer(max(8, self._key.itemsize))
        started = False
        while True:
            attr = struct.pack(
                "<QQQQIIQQ",
                ctypes.addressof(position) if started else 0,
                ctypes.addressof(position),
                self._keys.ctypes.data,
                self._values.ctypes.data,
                self._room,
                self._map_fd,
                0,
                0,
            )
            _, error, attr = _call(_LOOKUP_AND_DELETE_BATCH, attr)
            count = struct.unpack_from("<I", attr, 32)[0]
            if error == errno.ENOSPC and count == 0:
                self._grow(self._room * 2)
                continue
            if error not in (0, errno.ENOENT, errno.ENOSPC):
                raise SyscallError("empty a BPF map", error)
            if count:
                keys.append(self._keys[:count].copy())
                values.append(self._values[:count].copy())
            if error == errno.ENOENT:
                break
            started = True
        if not keys:
            return np.empty(0, self._key), np.empty(0, self._value)
        return np.concatenate(keys), np.concatenate(values)
