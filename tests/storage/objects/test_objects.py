"""Object stores: one contract, held by a directory and by a bucket of a real S3 server."""

import concurrent.futures
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from profiler.commands import doctor
from storage.objects.directory import DirectoryStore
from storage.objects.keys import (
    LARGEST_OBJECT_BYTES,
    NS_PER_S,
    ObjectMissing,
    ObjectStore,
    ObjectTooLarge,
    StoreError,
    StoreRefused,
    StoreUnavailable,
)
from storage.objects.open import default_store_url, open_store
from storage.objects.s3 import S3Store
from tests.support.weed import (
    BUCKET,
    GARBAGE,
    NONSENSE,
    PAGE_AS_OBJECT,
    REDIRECT,
    SLOW_DOWN,
    UNTYPED_PAGE,
    YES_TO_ALL,
    Proxy,
    Weed,
    free_ports,
    listing,
    s3_error,
    using_keys,
)


@pytest.fixture
def proxy(weed: Weed) -> Iterator[Proxy]:
    with Proxy(weed.port) as running:
        yield running


def keys(store: ObjectStore, prefix: str = "", start_after: str = "") -> list[str]:
    return [stored.key for stored in store.list(prefix, start_after)]


def test_an_object_is_read_as_it_was_written(store: ObjectStore) -> None:
    content = bytes(range(256)) * 500

    assert store.put("v1/a/object.pb.gz", content)

    assert store.get("v1/a/object.pb.gz") == content


def test_an_empty_object_is_an_object(store: ObjectStore) -> None:
    store.put("v1/empty", b"")

    assert store.get("v1/empty") == b""
    assert [stored.size_bytes for stored in store.list("v1/")] == [0]


def test_a_second_put_changes_nothing_and_says_so(store: ObjectStore) -> None:
    """That is what makes a retry a no-op."""
    assert store.put("v1/once", b"first")

    assert not store.put("v1/once", b"second")

    assert store.get("v1/once") == b"first"


def test_one_of_many_that_race_for_a_key_wins(store: ObjectStore) -> None:
    """None of them meets an error, and the object is the winner's."""
    contents = [f"writer {i}".encode() * 100 for i in range(8)]
    start = threading.Barrier(len(contents))

    def put(content: bytes) -> bool:
        start.wait()
        return store.put("v1/raced", content)

    with concurrent.futures.ThreadPoolExecutor(len(contents)) as pool:
        won = list(pool.map(put, contents))

    assert won.count(True) == 1
    assert store.get("v1/raced") == contents[won.index(True)]


def test_a_missing_object_is_named(store: ObjectStore) -> None:
    store.put("v1/folder/object", b"x")

    for key in ("v1/none", "v1/folder", "v1/folder/object/below"):
        with pytest.raises(ObjectMissing, match=key):
            store.get(key)
        with pytest.raises(ObjectMissing):
            store.get_range(key, 0, 10)


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [(0, 3, b"012"), (4, 2, b"45"), (8, 100, b"89"), (10, 5, b""), (99, 1, b"")],
)
def test_a_range_ends_where_the_object_ends(
    store: ObjectStore, start: int, length: int, expected: bytes
) -> None:
    store.put("v1/digits", b"0123456789")

    assert store.get_range("v1/digits", start, length) == expected


@pytest.mark.parametrize(("start", "length"), [(-1, 5), (0, 0), (3, -3)])
def test_a_range_that_is_none_is_refused(store: ObjectStore, start: int, length: int) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        store.get_range("v1/digits", start, length)


def test_an_object_larger_than_any_of_ours_is_refused(store: ObjectStore) -> None:
    """Whoever may write to the store cannot fill the memory of those who read it."""
    store.put("v1/largest", bytes(LARGEST_OBJECT_BYTES))
    store.put("v1/larger", bytes(LARGEST_OBJECT_BYTES + 1))

    assert len(store.get("v1/largest")) == LARGEST_OBJECT_BYTES
    with pytest.raises(ObjectTooLarge, match="v1/larger"):
        store.get("v1/larger")
    assert store.get_range("v1/larger", LARGEST_OBJECT_BYTES, 10) == b"\0"


def test_listing_is_sorted_by_key_and_follows_prefix_and_start(store: ObjectStore) -> None:
    names = ["v1/0", "v1/1", "v1/a/b", "v1/a/c/d", "v1/aa", "v1/b/a", "v2/a"]
    for name in reversed(names):
        store.put(name, name.encode())

    assert keys(store) == names
    assert keys(store, "v1/a") == names[2:5]
    assert keys(store, "v1/a/") == names[2:4]
    assert keys(store, "v1/", "v1/a/b") == names[3:6]
    assert keys(store, "v1/", "v1/a/bb") == names[3:6]
    assert keys(store, "v1/", "v2") == []
    assert keys(store, "none/") == []


def test_a_directory_is_listed_by_the_bytes_of_whole_keys(tmp_path: Path) -> None:
    """As Amazon does: `a-` and `a.` come before `a/`, whatever is a folder."""
    names = ["v1/a-b", "v1/a.b", "v1/a/b", "v1/a0"]
    store = DirectoryStore(tmp_path)
    for name in reversed(names):
        store.put(name, b"")

    assert keys(store) == names
    assert keys(store, "", "v1/a.b") == names[2:]


def test_listing_tells_size_and_time(store: ObjectStore) -> None:
    before_ns = time.time_ns()
    store.put("v1/object", b"12345")

    (stored,) = store.list("v1/")

    assert stored.size_bytes == 5
    assert before_ns - 2 * NS_PER_S <= stored.modified_ns <= time.time_ns() + 2 * NS_PER_S


def test_listing_goes_on_where_a_page_ends(store: ObjectStore) -> None:
    """S3 gives a thousand keys a request."""
    names = [f"v1/{i:05}" for i in range(1_010)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda name: store.put(name, b""), names))

    assert keys(store, "v1/") == names
    assert keys(store, "v1/", names[4]) == names[5:]


def test_a_deleted_object_is_gone_and_may_be_written_again(store: ObjectStore) -> None:
    store.put("v1/a/b", b"x")
    store.put("v1/a/c", b"x")

    store.delete("v1/a/b")
    store.delete("v1/a/b")
    store.delete("v1/never")

    assert keys(store) == ["v1/a/c"]
    assert store.put("v1/a/b", b"again")


def test_putting_and_deleting_in_one_folder_at_once_meets_no_error(store: ObjectStore) -> None:
    """A delete that leaves a folder empty must not take it from under a put."""

    def put_and_delete(number: int) -> None:
        for turn in range(20):
            assert store.put(f"v1/folder/{number}-{turn}", b"x")
            store.delete(f"v1/folder/{number}-{turn}")

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(put_and_delete, range(4)))

    assert keys(store) == []


@pytest.mark.parametrize("key", ["v1/a b", "v1/100%", "v1/a+b", "v1/ü漢", "v1/~a'(b)!*", "a&b=c?d"])
def test_unusual_keys_are_kept_as_they_are(store: ObjectStore, key: str) -> None:
    assert store.put(key, key.encode())

    assert keys(store) == [key]
    assert store.get(key) == key.encode()


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "../outside",
        "v1/../../outside",
        "v1/./a",
        "v1//a",
        "v1/a/",
        "v1/a\0b",
        "v1/a\nb",
        "v1\\..\\a",
        ".partial/a",
        "v1/\udcff",
        "v1/" + "a" * 256,
        "/".join(["a" * 200] * 6),
    ],
)
def test_hostile_keys_are_refused(store: ObjectStore, tmp_path: Path, key: str) -> None:
    """By every method, and nothing is written anywhere."""
    calls: list[Callable[[], object]] = [
        lambda: store.put(key, b"x"),
        lambda: store.get(key),
        lambda: store.get_range(key, 0, 1),
        lambda: store.delete(key),
    ]

    for call in calls:
        with pytest.raises(ValueError, match="cannot use the key"):
            call()

    assert keys(store) == []
    assert list(tmp_path.iterdir()) == []


def test_a_directory_belongs_to_its_owner_alone(tmp_path: Path) -> None:
    os.umask(0)
    try:
        DirectoryStore(tmp_path / "store").put("v1/a/b", b"x")
    finally:
        os.umask(0o022)

    modes = {
        path: path.stat().st_mode & 0o777 for path in (tmp_path / "store", *tmp_path.rglob("v1/**"))
    }
    assert all(mode == 0o700 for path, mode in modes.items() if path.is_dir())
    assert (tmp_path / "store/v1/a/b").stat().st_mode & 0o777 == 0o600


def test_what_a_crash_left_in_a_directory_is_invisible_and_goes(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    (tmp_path / ".partial").mkdir()
    fresh, stale = tmp_path / ".partial/fresh", tmp_path / ".partial/stale"
    for path in (fresh, stale):
        path.write_bytes(b"half")
    os.utime(stale, (0, 0))

    store.put("v1/a", b"x")

    assert keys(store) == ["v1/a"]
    assert fresh.exists()
    assert not stale.exists()


def test_a_directory_that_was_taken_away_is_no_empty_store(tmp_path: Path) -> None:
    """One that was never there is: the agent makes it with its first object."""
    store = DirectoryStore(tmp_path / "store")
    assert list(store.list("")) == []
    store.put("v1/a", b"x")
    assert [each.key for each in store.list("")] == ["v1/a"]

    (tmp_path / "store").rename(tmp_path / "away")
    with pytest.raises(StoreUnavailable, match="is not there any more"):
        list(store.list(""))

    (tmp_path / "away").rename(tmp_path / "store")
    assert [each.key for each in store.list("")] == ["v1/a"]


def test_links_and_odd_names_in_a_directory_are_not_listed(tmp_path: Path) -> None:
    """Whatever somebody put there, a listed key can be asked for."""
    store = DirectoryStore(tmp_path / "store")
    store.put("v1/a", b"x")
    (tmp_path / "store/v1/link").symlink_to("/etc/passwd")
    (tmp_path / "store/v1/folder").symlink_to("/etc")
    (tmp_path / "store/.hidden").write_text("")
    os.close(os.open(os.fsencode(tmp_path / "store/v1/") + b"\xff", os.O_CREAT))
    os.mkfifo(tmp_path / "store/v1/fifo")

    assert keys(store) == ["v1/a"]


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "loop", "socket"])
def test_what_has_the_name_of_an_object_and_is_no_file_is_no_object(tmp_path: Path, kind: str):
    """A reader would wait for a named pipe without end; a writer must not count it as stored."""
    store = DirectoryStore(tmp_path)
    store.put("v1/z", b"x")
    path = tmp_path / "v1/a"
    with contextlib.ExitStack() as stack:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path)
        else:
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(path))

        with pytest.raises(StoreError):
            store.get("v1/a")
        with pytest.raises(StoreError):
            store.get_range("v1/a", 0, 1)
        with pytest.raises(StoreRefused):
            store.put("v1/a", b"x")
        assert keys(store) == ["v1/z"]


@pytest.mark.parametrize("name", ["a", "a" * 200])
def test_folders_nested_too_deep_for_a_key_are_not_listed(tmp_path: Path, name: str) -> None:
    """Whoever may write to the folder of a store can make them; the rest is listed."""
    store = DirectoryStore(tmp_path / "store")
    store.put("v1/a", b"x")
    store.put("v1/z", b"x")
    fd = os.open(tmp_path / "store/v1", os.O_RDONLY)
    for _ in range(1200):
        os.mkdir(f"m{name}", dir_fd=fd)
        below = os.open(f"m{name}", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("object", os.O_CREAT, dir_fd=fd))
    os.close(fd)
    try:
        assert keys(store) == ["v1/a", "v1/z"]
    finally:
        subprocess.run(["rm", "-r", tmp_path / "store"], check=True)  # pytest's own recurses


@pytest.mark.parametrize("place", ["file", "file/a/b", "/proc/everflame", "/proc/everflame/a/b"])
def test_a_store_that_cannot_be_a_directory_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    store = open_store(str(tmp_path / place))

    with pytest.raises(StoreRefused, match=r"cannot write .*--store"):
        store.put("v1/a", b"x")
    if not place.startswith("/"):
        with pytest.raises(StoreRefused, match=r"cannot list .*Not a directory.*--store"):
            list(store.list("v1/"))


@pytest.mark.kernel
def test_a_full_disk_is_a_store_to_try_again(tmp_path: Path) -> None:
    """And what did not fit leaves nothing behind."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], check=True)
    try:
        store = DirectoryStore(tmp_path)
        store.put("v1/small", b"x")

        with pytest.raises(StoreUnavailable, match="No space left"):
            store.put("v1/large", bytes(100_000))

        assert keys(store) == ["v1/small"]
        assert list((tmp_path / ".partial").iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_the_store_is_found_by_its_url(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("EVERFLAME_STORE", f"file://{tmp_path}/by-variable")

    assert str(open_store()) == f"{tmp_path}/by-variable"
    assert str(open_store("plain")) == str(Path("plain").absolute())
    assert str(open_store("s3://bucket/some/prefix/")) == "s3://bucket/some/prefix/"
    monkeypatch.delenv("EVERFLAME_STORE")
    assert default_store_url() in {
        "/var/lib/everflame",
        str(Path("~/.local/share/everflame").expanduser()),
    }


@pytest.mark.parametrize("url", ["gs://bucket", "file://host/path", "s3://", "s3:///prefix"])
def test_a_url_that_names_no_store_is_refused(url: str) -> None:
    with pytest.raises(StoreRefused, match="cannot open"):
        open_store(url)


def test_an_aws_profile_that_does_not_exist_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")

    with pytest.raises(StoreRefused, match=r"no-such-profile.*\(correct AWS_PROFILE\)"):
        open_store("s3://bucket")


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("storage.spool.spool", {"boto3", "botocore"}),
        ("storage.objects.open", {"boto3", "botocore", "numpy", "google"}),
        ("profiler.agent.uploader", {"numpy", "google"}),
    ],
)
def test_a_process_loads_only_what_it_needs(module: str, forbidden: set[str]) -> None:
    """The sampler has no network; the uploader no arrays."""
    script = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"

    child = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)

    assert set(child.stdout.decode().split()) & forbidden == set()


def complaint(call: Callable[[], object]) -> StoreError:
    with pytest.raises(StoreError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("bucket", "access", "secret", "expected"),
    [
        (BUCKET, None, "wrong", "the secret key is wrong (check AWS_SECRET_ACCESS_KEY)"),
        (BUCKET, "nobody", None, "the access key is unknown (check AWS_ACCESS_KEY_ID)"),
        ("no-such-bucket", None, None, "there is no such bucket (create it, or correct --store)"),
        ("Not A Bucket", None, None, "correct --store"),
    ],
)
def test_a_bucket_that_refuses_says_what_to_do_in_one_line(
    weed: Weed, bucket: str, access: str | None, secret: str | None, expected: str
) -> None:
    given = {"access": access, "secret": secret}
    with using_keys(**{name: value for name, value in given.items() if value}):
        store = S3Store(bucket, "", weed.endpoint)
        for call in (
            lambda: store.put("v1/a", b"x"),
            lambda: store.get("v1/a"),
            lambda: list(store.list("v1/")),
        ):
            error = complaint(call)
            assert isinstance(error, StoreRefused)
            assert expected in str(error)


def test_a_bucket_without_keys_says_which_are_missing(weed: Weed, tmp_path: Path, monkeypatch):
    with using_keys():
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        store = S3Store(BUCKET, "", weed.endpoint)

        error = complaint(lambda: store.put("v1/a", b"x"))

    assert isinstance(error, StoreRefused)
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in str(error)


def test_a_bucket_out_of_reach_is_to_be_tried_again() -> None:
    with using_keys():
        store = S3Store(BUCKET, "", f"http://127.0.0.1:{free_ports(1)[0]}")

        error = complaint(lambda: store.put("v1/a", b"x"))

    assert isinstance(error, StoreUnavailable)
    assert "Could not connect" in str(error)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (SLOW_DOWN, "503 SlowDown"),
        (NONSENSE, "not an object store's"),
        (PAGE_AS_OBJECT, "not an object store's"),
        (UNTYPED_PAGE, "not an object store's"),
        (YES_TO_ALL, "not an object store's"),
        (REDIRECT, "not an object store's"),
        (GARBAGE, "cannot"),
        (Proxy.STALL, "Read timeout"),
    ],
    ids=[
        "throttled",
        "a page",
        "a page with an ETag",
        "one without a type",
        "yes to everything",
        "a redirect",
        "garbage",
        "silence",
    ],
)
# Where the answer is no HTTP, the client's library leaves its socket to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_bucket_that_answers_wrongly_is_to_be_tried_again(
    proxy: Proxy, answer: bytes, expected: str
) -> None:
    """Nothing passes for stored or for read that was not."""
    with using_keys():
        store = S3Store(BUCKET, "wrong", proxy.endpoint, timeout_s=0.3)
        proxy.switch(answer)
        errors = [
            complaint(lambda: store.put("v1/a", b"x")),
            complaint(lambda: list(store.list("v1/"))),
        ]
        if answer not in {
            UNTYPED_PAGE,
            YES_TO_ALL,
        }:  # it could be the object's content, which its key proves wrong
            errors.append(complaint(lambda: store.get("v1/a")))
        proxy.switch(None)
        left = keys(store)

    assert all(isinstance(error, StoreUnavailable) for error in errors)
    assert expected in str(errors[0])
    assert left == []


_ONE = "<IsTruncated>false</IsTruncated><Contents><Key>v1/a</Key>{}</Contents>"
_TIME = "<LastModified>2026-01-01T00:00:00Z</LastModified>"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "<a>" * 20_000 + "</a>" * 20_000,
        "<IsTruncated>true</IsTruncated>",
        "<IsTruncated>true</IsTruncated><NextContinuationToken>x</NextContinuationToken>",
        _ONE.format("<Size>1</Size>"),
        _ONE.format(_TIME),
        _ONE.format(_TIME + "<Size>x</Size>"),
        _ONE.format(_TIME + f"<Size>{'9' * 5000}</Size>"),
        _ONE.format("<Size>1</Size><LastModified>9999999999-01-01</LastModified>"),
        _ONE.format("<Size>1</Size><LastModified>soon</LastModified>"),
    ],
    ids=lambda content: content[:60],
)
def test_a_listing_that_no_store_sends_is_to_be_tried_again(proxy: Proxy, content: str) -> None:
    """Nested deeply, without an end, with numbers and times that are none."""
    with using_keys():
        store = S3Store(BUCKET, "", proxy.endpoint, timeout_s=5)
        proxy.switch(listing(content))

        error = complaint(lambda: list(store.list("v1/")))

    assert isinstance(error, StoreUnavailable)
    assert "cannot list" in str(error)


class OlderServer(BaseHTTPRequestHandler):
    """Objects in memory; it neither checks nor repeats checksums, as servers of before 2022."""

    objects: ClassVar[dict[str, bytes]] = {}
    requests: ClassVar[list[str]] = []
    is_away: ClassVar[bool] = False

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append("PUT")
        if self.is_away:
            self._respond(503)
            return
        self.objects[self.path] = content
        self._respond(200, content)

    def do_HEAD(self) -> None:
        self.requests.append("HEAD")
        content = self.objects[self.path]
        self._respond(200, content, len(content))

    def _respond(self, status: int, content: bytes = b"", length: int = 0) -> None:
        self.send_response(status)
        self.send_header("ETag", f'"{zlib.crc32(content):x}"')
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_that_repeats_no_checksum_is_asked_for_the_object() -> None:
    """After a start and after a failure: one that answers yes to everything would not have it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), OlderServer) as server, using_keys():
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = S3Store(BUCKET, "", f"http://127.0.0.1:{server.server_port}")
        for key in ("v1/a", "v1/b"):
            assert store.put(key, b"x")
        before = list(OlderServer.requests)
        OlderServer.is_away = True
        assert isinstance(complaint(lambda: store.put("v1/c", b"x")), StoreUnavailable)
        OlderServer.is_away = False
        OlderServer.requests.clear()
        store.put("v1/c", b"x")
        server.shutdown()

    assert before == ["PUT", "HEAD", "PUT"]
    assert OlderServer.requests == ["PUT", "HEAD"]


def test_a_wrong_clock_is_named_as_the_reason(proxy: Proxy) -> None:
    proxy.switch(s3_error("403 Forbidden", "RequestTimeTooSkewed"))
    with using_keys():
        store = S3Store(BUCKET, "", proxy.endpoint)

        error = complaint(lambda: store.put("v1/a", b"x"))

    assert isinstance(error, StoreRefused)
    assert "this machine's clock is wrong" in str(error)


def test_an_existing_object_that_is_not_there_is_not_believed(proxy: Proxy) -> None:
    """A 412 makes the uploader forget a profile: it is checked first."""
    proxy.switch(b"HTTP/1.1 412 Precondition Failed\r\nContent-Length: 0\r\n\r\n")
    with using_keys():
        store = S3Store(BUCKET, "gone", proxy.endpoint)
        error = complaint(lambda: store.put("v1/a", b"x"))

    assert isinstance(error, StoreUnavailable)


def checks(url: str, endpoint: str | None = None) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.store_checks(url, endpoint)}


def test_doctor_passes_a_store_that_works(store: ObjectStore, request, tmp_path: Path) -> None:
    """And leaves nothing in it."""
    url, endpoint = str(store), None
    if url.startswith("s3://"):
        url, endpoint = url.split(" at ")

    found = checks(url, endpoint)

    assert list(found) == [
        "store", "store_write", "store_conditional", "store_replace", "store_clock",
        "store_pins",
    ]  # fmt: skip
    assert {check.status for check in found.values()} == {doctor.Status.OK}
    assert keys(store) == []


def test_doctor_names_the_remedy_where_the_store_refuses(weed: Weed) -> None:
    with using_keys(secret="wrong"):
        found = checks(f"s3://{BUCKET}/x", weed.endpoint)

    assert list(found) == ["store"]
    assert found["store"].status is doctor.Status.FAIL
    assert "AWS_SECRET_ACCESS_KEY" in found["store"].remedy


def test_doctor_fails_a_store_that_replaces_objects(tmp_path: Path, monkeypatch) -> None:
    """An old S3 server that ignores If-None-Match would let retries replace what is there."""

    def replacing(self: DirectoryStore, key: str, content: bytes) -> bool:
        with contextlib.suppress(StoreError):
            self.delete(key)
        return put(self, key, content)

    put = DirectoryStore.put
    monkeypatch.setattr(DirectoryStore, "put", replacing)

    found = checks(str(tmp_path / "store"))

    assert found["store_conditional"].status is doctor.Status.FAIL


@pytest.mark.parametrize("is_told", [True, False])
def test_doctor_warns_of_a_store_whose_changes_are_lost(
    tmp_path: Path, monkeypatch, is_told: bool
) -> None:
    """One that replaces whatever is there, as the store notices itself or not: agents work."""

    def overwriting(self: DirectoryStore, key: str, content: bytes, _tag: str | None) -> str | None:
        if is_told:
            raise StoreRefused(f"cannot replace {key!r}: it ignores If-Match", "use a server")
        return replace(self, key, content, self.get_tagged(key)[1])

    replace = DirectoryStore.replace
    monkeypatch.setattr(DirectoryStore, "replace", overwriting)

    found = checks(str(tmp_path / "store"))

    assert [name for name, check in found.items() if check.status is not doctor.Status.OK] == [
        "store_replace"
    ]
    assert found["store_replace"].status is doctor.Status.WARN
    assert "everflame compact" in found["store_replace"].detail
    assert "use a server" in found["store_replace"].remedy
    assert keys(DirectoryStore(tmp_path / "store")) == []


def test_doctor_warns_of_a_clock_that_is_not_the_stores(tmp_path: Path, monkeypatch) -> None:
    ahead_ns = time.time_ns() + 90 * NS_PER_S
    monkeypatch.setattr(time, "time_ns", lambda: ahead_ns)

    found = checks(str(tmp_path / "store"))

    assert found["store_clock"].status is doctor.Status.WARN
    assert "chrony" in found["store_clock"].remedy


def test_doctor_warns_where_it_may_not_delete(tmp_path: Path, monkeypatch) -> None:
    """Agents need no such right in a bucket; the object that is left is named."""

    def refusing(_self: DirectoryStore, key: str) -> None:
        raise StoreRefused(f"cannot delete {key}: not permitted", "give s3:DeleteObject")

    monkeypatch.setattr(DirectoryStore, "delete", refusing)

    found = checks(str(tmp_path / "store"))

    assert [name for name, check in found.items() if check.status is doctor.Status.FAIL] == []
    assert found["store_delete"].status is doctor.Status.WARN
    assert "delete v1/.doctor/" in found["store_delete"].remedy
