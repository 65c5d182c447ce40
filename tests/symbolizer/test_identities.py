"""What files are is kept on disk as long as they do not change."""

import os
import shutil
import time
from pathlib import Path

import pytest

from symbolizer.identify import Identifier
from symbolizer.identities import Identities, Identity
from tests.support.naming import NO_PROCESS, mapping_of_file, request

HOUR_NS = 3600 * 10**9


def in_an_hour() -> int:
    return time.time_ns() + HOUR_NS


@pytest.fixture
def program(tmp_path: Path) -> Path:
    if not os.major(tmp_path.stat().st_dev):
        pytest.skip("the temporary folder is on no block device")
    path = tmp_path / "program"
    shutil.copy("/bin/true", path)
    return path


def identified(path: Path, folder: Path, now_ns=in_an_hour) -> tuple[Identity | None, Identity]:
    """Return what another process, an hour later, knows of a file, and what the file is."""
    identifier = Identifier(Identities(folder, now_ns))
    with identifier.opened(request(NO_PROCESS, mapping_of_file(path))) as found:
        known = found.identity
        return known, identifier.identify(found)


def test_a_file_that_did_not_change_is_known_to_the_next_process(program, tmp_path):
    """Nothing of it is parsed or hashed again."""
    before, identity = identified(program, tmp_path / "files")

    known, again = identified(program, tmp_path / "files")

    assert before is None
    assert known == again == identity


@pytest.mark.parametrize("is_size_kept", [True, False])
def test_a_file_that_was_written_is_identified_again(program, tmp_path, is_size_kept):
    """Not even its time of modification and its size need to differ."""
    _, identity = identified(program, tmp_path / "files")
    status = program.stat()
    content = bytearray(program.read_bytes())
    content[len(content) // 2] ^= 1
    program.write_bytes(content if is_size_kept else content + b"more")
    os.utime(program, ns=(status.st_atime_ns, status.st_mtime_ns))

    known, _ = identified(program, tmp_path / "files")

    assert identity.build_id
    assert known is None


def test_another_owner_is_known(program, tmp_path):
    """An identity says who owns a file, so it is another one after a change."""
    if os.geteuid():
        pytest.skip("changing owners takes root")
    identified(program, tmp_path / "files")
    os.chown(program, 12345, 12345)

    _, identity = identified(program, tmp_path / "files")

    assert identity.owner == 12345


def test_a_file_that_was_written_just_now_is_not_kept(program, tmp_path):
    """It could be written again without another time."""
    identified(program, tmp_path / "files", time.time_ns)

    known, _ = identified(program, tmp_path / "files", time.time_ns)

    assert known is None


def test_a_file_without_a_device_is_not_kept(tmp_path):
    """The number of its file system may be that of another one later."""
    folder = Path("/dev/shm")
    if not folder.is_dir() or os.major(folder.stat().st_dev):
        pytest.skip("no tmpfs")
    path = folder / f"everflame-{os.getpid()}"
    shutil.copy("/bin/true", path)
    try:
        identified(path, tmp_path / "files")
        known, _ = identified(path, tmp_path / "files")
    finally:
        path.unlink()

    assert known is None


@pytest.mark.parametrize("content", [b"", b"[]", b"[1, {}]", b'[1, {"build_id": 1}]', b"[" * 9999])
def test_an_identity_that_cannot_be_read_is_made_again(program, tmp_path, content):
    _, identity = identified(program, tmp_path / "files")
    for path in (tmp_path / "files").iterdir():
        path.write_bytes(content)

    known, again = identified(program, tmp_path / "files")

    assert known is None
    assert again == identity
