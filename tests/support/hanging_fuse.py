"""Mount a file system of one file that answers no open and no read as long as a flag exists.

The file is `file` below MOUNTPOINT. Run: `python3 hanging_fuse.py MOUNTPOINT CONTENT FLAG`. It says
`mounted`, and serves until it is killed; whoever waits for an answer then gets an error. It needs
root and /dev/fuse. Layouts are those of include/uapi/linux/fuse.h.
"""

import ctypes
import os
import struct
import sys
from pathlib import Path

ENOENT, ENOSYS = 2, 38
ROOT, FILE = 1, 2
CACHED_S = 3600
KEEP_CACHE = 2
"""Else each open would take the pages of a running program away, and hang it."""


def main() -> None:
    mount, content, flag = sys.argv[1], Path(sys.argv[2]).read_bytes(), Path(sys.argv[3])
    fuse = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"hanging", mount.encode(), b"fuse", 0, options.encode()):
        sys.exit(f"cannot mount: {os.strerror(ctypes.get_errno())}")
    print("mounted", flush=True)
    while True:
        message = os.read(fuse, 1 << 20)
        _, operation, unique, node = struct.unpack_from("<IIQQ", message)
        answer = respond(operation, node, message, content, flag)
        if answer is not None:
            error, body = answer
            os.write(fuse, struct.pack("<IiQ", 16 + len(body), -error, unique) + body)


def respond(  # noqa: PLR0911 - one for each operation
    operation: int, node: int, message: bytes, content: bytes, flag: Path
) -> tuple[int, bytes] | None:
    """Return an error number and the body of an answer; None for no answer."""
    match operation:
        case 26:  # INIT
            sizes = (7, 31, 65536, 0, 12, 9, 65536, 1, 0, 0, 0, *[0] * 7)
            return 0, struct.pack("<IIIIHHIIHHI7I", *sizes)
        case 1:  # LOOKUP
            if message[40:].rstrip(b"\0") != b"file":
                return ENOENT, b""
            times = struct.pack("<QQQQII", FILE, 0, CACHED_S, CACHED_S, 0, 0)
            return 0, times + attributes(FILE, len(content))
        case 3:  # GETATTR
            return 0, struct.pack("<QII", CACHED_S, 0, 0) + attributes(node, len(content))
        case 14 if flag.exists():  # OPEN: nobody can kill who waits for this
            return None
        case 14 | 27:  # OPEN, OPENDIR
            return 0, struct.pack("<QIi", 1, KEEP_CACHE, 0)
        case 15:  # READ
            _, offset, size = struct.unpack_from("<QQI", message, 40)
            return None if flag.exists() else (0, content[offset : offset + size])
        case 2 | 36 | 42:  # FORGET, INTERRUPT, BATCH_FORGET
            return None
        case 18 | 25 | 29 | 34:  # RELEASE, FLUSH, RELEASEDIR, ACCESS
            return 0, b""
    return ENOSYS, b""


def attributes(node: int, size: int) -> bytes:
    is_folder = node == ROOT
    mode, size = (0o40755, 0) if is_folder else (0o100755, size)
    return struct.pack(
        "<QQQQQQIIIIIIIIII", node, size, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0
    )


if __name__ == "__main__":
    main()
