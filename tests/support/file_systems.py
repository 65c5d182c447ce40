"""File systems that do what real ones do on a bad day."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.targets import running


class HangingFileSystem(NamedTuple):
    """A file system of one file, which answers no read once the flag exists."""

    file: Path
    flag: Path
    server: subprocess.Popen[bytes]

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """End the file system with the block, so that whoever waits for it gets an error."""
        try:
            yield
        finally:
            self.server.kill()


@contextlib.contextmanager
def hanging(folder: Path, content: Path) -> Iterator[HangingFileSystem]:
    """Mount a file system whose file has this content, until the block ends."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse")
    folder.mkdir()
    flag = folder.with_name("hang")
    server = Path(__file__).with_name("hanging_fuse.py")
    with running("python3", server, folder, content, flag, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"mounted\n"
            yield HangingFileSystem(folder / "file", flag, process)
        finally:
            process.kill()
            subprocess.run(["umount", "--lazy", folder], check=False, timeout=10)


@contextlib.contextmanager
def small(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mount a file system of this size until the block ends."""
    folder.mkdir(exist_ok=True)
    options = ("-t", "tmpfs", "-o", f"size={size_bytes}", "none")
    subprocess.run(["mount", *options, folder], check=True, timeout=10)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=False, timeout=10)


def fill(path: Path) -> None:
    """Write a file that takes all that is left of its file system."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def drop_caches(path: Path) -> None:
    """Have the pages of a file read again that nobody has mapped."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
