"""Replacing an object: of those who have seen the same content one wins, and none is undone."""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import http.client
import inspect
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from storage.objects import directory
from storage.objects.directory import DirectoryStore
from storage.objects.keys import ObjectMissing, ObjectStore, StoreRefused, StoreUnavailable
from storage.objects.s3 import S3Store
from tests.support.stores import MemoryStore
from tests.support.weed import BUCKET, YES_TO_ALL, Proxy, Weed, using_keys

KEY = "v1/default/manifests/cpu/2026-11-30T09.json"


def listed_tags(store: ObjectStore) -> dict[str, str]:
    return {stored.key: stored.tag for stored in store.list("v1/")}


def test_an_object_is_replaced_by_whoever_has_its_tag(store: ObjectStore) -> None:
    first = store.replace(KEY, b"one", None)
    assert first is not None
    assert store.replace(KEY, b"another", None) is None
    assert store.get_tagged(KEY) == (b"one", first)
    assert listed_tags(store) == {KEY: first}

    second = store.replace(KEY, b"two", first)

    assert second not in {None, first}
    assert store.replace(KEY, b"three", first) is None
    assert store.get_tagged(KEY) == (b"two", second)
    assert listed_tags(store) == {KEY: second}


def test_a_tag_of_an_object_that_is_gone_writes_nothing(store: ObjectStore) -> None:
    tag = store.replace(KEY, b"one", None)
    store.delete(KEY)

    assert store.replace(KEY, b"two", tag) is None

    assert listed_tags(store) == {}
    with pytest.raises(ObjectMissing, match=KEY):
        store.get_tagged(KEY)
    assert store.replace(KEY, b"three", None) is not None


def test_an_object_that_was_put_has_a_tag(store: ObjectStore) -> None:
    """And one that was replaced is not put again."""
    store.put(KEY, b"put")
    assert store.replace(KEY, b"two", None) is None

    content, tag = store.get_tagged(KEY)

    assert (content, {KEY: tag}) == (b"put", listed_tags(store))
    assert store.replace(KEY, b"replaced", tag) is not None
    assert not store.put(KEY, b"again")
    assert store.get(KEY) == b"replaced"


def test_the_store_of_tests_replaces_alike() -> None:
    store = MemoryStore()

    test_an_object_is_replaced_by_whoever_has_its_tag(store)
    store.delete(KEY)
    test_a_tag_of_an_object_that_is_gone_writes_nothing(store)


def test_one_of_many_that_replace_the_same_content_wins(store: ObjectStore) -> None:
    """In each round, also if all of them write the same."""
    # Those who wait for SeaweedFS's lock look again after a second.
    writers, rounds = (16, 4) if isinstance(store, DirectoryStore) else (8, 2)
    tag: str | None = None
    start = threading.Barrier(writers)

    def replace(content: bytes) -> str | None:
        start.wait()
        return store.replace(KEY, content, tag)

    with concurrent.futures.ThreadPoolExecutor(writers) as pool:
        for number in range(rounds):
            results = list(pool.map(replace, [b"round %d" % number] * writers))

            won = [result for result in results if result is not None]
            assert len(won) == 1
            assert store.get_tagged(KEY) == (b"round %d" % number, won[0])
            tag = won[0]


def increment(store: ObjectStore, times: int) -> None:
    """Add one to a counter, that often."""
    for _ in range(times):
        while True:
            try:
                content, tag = store.get_tagged(KEY)
            except ObjectMissing:
                content, tag = b"0", None
            if store.replace(KEY, b"%d" % (int(content) + 1), tag) is not None:
                break


def test_no_increment_of_a_counter_is_lost(store: ObjectStore) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: increment(store, 8), range(8)))

    assert store.get(KEY) == b"64"


INCREMENT = f"""
import sys
from pathlib import Path
from storage.objects.directory import DirectoryStore
from storage.objects.keys import ObjectMissing, ObjectStore
KEY = {KEY!r}
{inspect.getsource(increment)}
print("ready", flush=True)
sys.stdin.readline()
increment(DirectoryStore(Path(sys.argv[1])), int(sys.argv[2]))
"""


def test_no_increment_is_lost_between_processes(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", INCREMENT, tmp_path / "store", "25"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )
            for _ in range(8)
        ]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write(b"go\n")
            child.stdin.flush()

    assert [child.returncode for child in children] == [0] * 8
    assert DirectoryStore(tmp_path / "store").get(KEY) == b"200"
    assert list((tmp_path / "store/.partial").iterdir()) == []


def test_each_replacement_in_a_directory_has_a_tag_of_its_own(tmp_path: Path) -> None:
    """The kernel's clock stands still for milliseconds, and gives a freed inode to the next."""
    store = DirectoryStore(tmp_path)
    tags: list[str | None] = [None]
    for number in range(100):
        tags.append(store.replace(KEY, b"%03d" % number, tags[-1]))

    assert None not in tags[1:]
    assert len(set(tags)) == len(tags)


def test_tags_of_a_directory_differ_where_the_clock_went_back(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    tag = store.replace(KEY, b"one", None)
    later_ns = 2**62
    os.utime(tmp_path / KEY, ns=(later_ns, later_ns))
    tag = store.get_tagged(KEY)[1]

    second = store.replace(KEY, b"two", tag)

    assert second not in {None, tag}
    assert (tmp_path / KEY).stat().st_mtime_ns > later_ns


REPLACE = """
import itertools, sys
from pathlib import Path
from storage.objects.directory import DirectoryStore
store, key = DirectoryStore(Path(sys.argv[1])), sys.argv[2]
try:
    tag = store.get_tagged(key)[1]
except Exception:
    tag = None
for number in itertools.count():
    tag = store.replace(key, b"%06d" % (number % 1000000) * 20_000, tag)
    assert tag is not None
    print(number, flush=True)
"""


def test_a_killed_writer_leaves_a_whole_object_and_no_lock(tmp_path: Path) -> None:
    """Whenever it is killed; meanwhile readers see one content or the other."""
    store = DirectoryStore(tmp_path)
    for turn in range(6):
        command = [sys.executable, "-c", REPLACE, tmp_path, KEY]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            for _ in range(1 + turn):
                assert child.stdout.readline()
                seen = store.get(KEY)
                assert seen == seen[:6] * 20_000
            child.send_signal(signal.SIGKILL)
            child.wait()

        content, tag = store.get_tagged(KEY)

        assert content == content[:6] * 20_000
        assert store.replace(KEY, content, tag) is not None
    assert list(listed_tags(store)) == [KEY]


def test_a_writer_killed_at_any_step_leaves_the_old_object_or_the_new_one(tmp_path: Path) -> None:
    """And whoever comes next is not kept waiting."""
    store = DirectoryStore(tmp_path)
    content, tag = b"step -1", store.replace(KEY, b"step -1", None)
    seen = []
    for step in itertools.count():
        new = b"step %d" % step
        pid = os.fork()
        if pid == 0:
            with kill_at_step(step):
                store.replace(KEY, new, tag)
                os._exit(0)
        _, status = os.waitpid(pid, 0)

        found, tag = store.get_tagged(KEY)

        assert found in {content, new}
        seen.append(found == new)
        content = found
        assert list(listed_tags(store)) == [KEY]
        if not os.WIFSIGNALED(status):
            break
    assert len(seen) > 8
    assert {True, False} == set(seen)


@contextlib.contextmanager
def kill_at_step(step: int) -> Iterator[None]:
    """Let this process kill itself before the system call of that number, of those that change."""
    steps = itertools.count()

    def killing(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for module, name in [
        *((os, name) for name in ("open", "fsync", "utime", "replace", "unlink", "close")),
        (fcntl, "flock"),
    ]:
        setattr(module, name, killing(getattr(module, name)))
    try:
        yield
    finally:
        os._exit(1)


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "rb+")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_that_is_held_too_long_is_an_error_until_its_holder_ends(
    tmp_path: Path, monkeypatch
) -> None:
    """A stopped writer keeps others waiting, but not without end; a deletion waits as well."""
    monkeypatch.setattr(directory, "_LOCK_WAIT_S", 0.05)
    store = DirectoryStore(tmp_path)
    tag = store.replace(KEY, b"one", None)
    command = [sys.executable, "-c", HOLD, tmp_path / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"

        with pytest.raises(StoreUnavailable, match="another process"):
            store.replace(KEY, b"two", tag)
        with pytest.raises(StoreUnavailable, match="another process"):
            store.delete(KEY)
        assert store.get(KEY) == b"one"
        child.kill()

    assert store.replace(KEY, b"two", tag) is not None


def test_a_lock_is_released_though_a_fork_took_its_descriptor(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    tag = store.replace(KEY, b"one", None)
    read, write = os.pipe()
    with store._locked():
        pid = os.fork()
        if pid == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    try:
        with (tmp_path / ".lock").open("rb+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(write)
        os.waitpid(pid, 0)
        os.close(read)

    assert store.replace(KEY, b"two", tag) is not None


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, kind: str) -> None:
    store = DirectoryStore(tmp_path)
    store.put("v1/z", b"x")
    path = tmp_path / "v1/a"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "v1/z")

    with pytest.raises(StoreRefused):
        store.replace("v1/a", b"x", None)

    assert store.get("v1/z") == b"x"


class Relay(BaseHTTPRequestHandler):
    """Passes requests on to `port`; does `instead` or `afterwards` once, and then hangs up."""

    protocol_version = "HTTP/1.1"
    port: ClassVar[int] = 0
    instead: ClassVar[Callable[[], object] | None] = None
    afterwards: ClassVar[Callable[[], object] | None] = None

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        relay = type(self)
        instead, relay.instead = relay.instead, None
        if instead is not None:
            instead()
            self.close_connection = True
            return
        status, headers, content = self._pass_on(body)
        afterwards, relay.afterwards = relay.afterwards, None
        if afterwards is not None:
            afterwards()
            self.close_connection = True
            return
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in {"transfer-encoding", "content-length"}:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_HEAD(self) -> None:
        status, headers, _ = self._pass_on(None)
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def _pass_on(self, body: bytes | None) -> tuple[int, list[tuple[str, str]], bytes]:
        server = http.client.HTTPConnection("127.0.0.1", self.port)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
        server.request(self.command, self.path, body, headers)
        response = server.getresponse()
        result = response.status, response.getheaders(), response.read()
        server.close()
        return result

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def relayed(weed: Weed, tmp_path: Path) -> Iterator[tuple[S3Store, S3Store, type[Relay]]]:
    """Return one bucket twice: behind a relay, whose server's type is the third, and as it is."""
    relay = type("OneRelay", (Relay,), {"port": weed.port})
    with ThreadingHTTPServer(("127.0.0.1", 0), relay) as server, using_keys():
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        prefix = tmp_path.name
        yield S3Store(BUCKET, prefix, endpoint), S3Store(BUCKET, prefix, weed.endpoint), relay
        server.shutdown()


@pytest.mark.parametrize("is_new", [True, False])
def test_a_writer_whose_response_was_lost_learns_that_it_won(
    relayed: tuple[S3Store, S3Store, type[Relay]], is_new: bool
) -> None:
    """The client sends the request again, and that meets its own object."""
    store, direct, relay = relayed
    first = store.replace(KEY, b"one", None)
    key, tag = ("v1/new.json", None) if is_new else (KEY, first)
    lost: list[str] = []
    relay.afterwards = lambda: lost.append(direct.get_tagged(key)[1])

    won = store.replace(key, b"two", tag)

    assert lost == [won]
    assert direct.get_tagged(key) == (b"two", won)


def test_a_writer_whose_request_was_lost_learns_that_another_one_won(
    relayed: tuple[S3Store, S3Store, type[Relay]],
) -> None:
    """Even one with the same content: both would count it as theirs."""
    store, direct, relay = relayed
    tag = store.replace(KEY, b"one", None)
    others: list[str | None] = []
    relay.instead = lambda: others.append(direct.replace(KEY, b"two", tag))

    assert store.replace(KEY, b"two", tag) is None

    assert others == [direct.get_tagged(KEY)[1]]


def test_conditions_are_tried_once_and_leave_nothing(weed: Weed, tmp_path: Path) -> None:
    with using_keys():
        store = S3Store(BUCKET, tmp_path.name, weed.endpoint)
        tag = store.replace(KEY, b"one", None)
        first = dict(store.requests)
        store.replace(KEY, b"two", tag)

        assert first == {"PutObject": 2}
        assert store.requests == {"PutObject": 3}
        assert list(listed_tags(store)) == [KEY]
        assert store.requests == {"PutObject": 3, "ListObjectsV2": 1}


class HeedlessServer(BaseHTTPRequestHandler):
    """Objects in memory, written whatever the conditions, as by servers of before 2024."""

    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict[str, bytes]] = {}

    def do_PUT(self) -> None:
        self.objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._respond(200, tag=hashlib.md5(self.objects[self.path]).hexdigest())

    def do_HEAD(self) -> None:
        content = self.objects[self.path]
        self._respond(200, len(content), hashlib.md5(content).hexdigest())

    def do_DELETE(self) -> None:
        del self.objects[self.path]
        self._respond(204)

    def _respond(self, status: int, length: int = 0, tag: str = "") -> None:
        self.send_response(status)
        if tag:
            self.send_header("ETag", f'"{tag}"')
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_that_ignores_conditions_is_refused_before_it_loses_a_change() -> None:
    HeedlessServer.objects.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), HeedlessServer) as server, using_keys():
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        store = S3Store(BUCKET, "", f"http://127.0.0.1:{server.server_port}")
        store.put(KEY, b"one")
        stored = dict(HeedlessServer.objects)

        for tag in (None, hashlib.md5(b"one").hexdigest()):
            with pytest.raises(StoreRefused, match=r"ignores If-Match.*\(use a server that"):
                store.replace(KEY, b"two", tag)

        assert HeedlessServer.objects == stored
        server.shutdown()


def test_something_that_says_yes_to_everything_has_replaced_nothing(weed: Weed) -> None:
    with Proxy(weed.port) as proxy, using_keys():
        store = S3Store(BUCKET, "yes", proxy.endpoint)
        proxy.switch(YES_TO_ALL)

        with pytest.raises(StoreUnavailable, match="not an object store's"):
            store.replace(KEY, b"one", None)


def test_an_object_to_replace_that_is_too_large_is_named(tmp_path: Path) -> None:
    """Its tag cannot be had, so nothing takes it for one that is not there."""
    store = DirectoryStore(tmp_path)
    store.put(KEY, b"x")
    os.truncate(tmp_path / KEY, directory.LARGEST_OBJECT_BYTES + 1)

    with pytest.raises(directory.ObjectTooLarge, match=KEY):
        store.get_tagged(KEY)
    assert store.replace(KEY, b"x", None) is None
