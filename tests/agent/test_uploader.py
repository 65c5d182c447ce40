"""The uploader: everything closed reaches the store once, whatever store, disk and clock do."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from profiler.agent.status import UPLOADER_STATE
from profiler.agent.supervise import Child
from profiler.agent.uploader import Uploader, UploaderOptions
from storage.formats import pprof
from storage.objects.directory import DirectoryStore
from storage.objects.keys import (
    ObjectKey,
    ObjectMissing,
    ObjectStore,
    StoredObject,
    StoreError,
    StoreRefused,
    StoreUnavailable,
)
from storage.objects.open import open_store
from storage.objects.s3 import S3Store
from storage.spool.spool import Spool
from storage.spool.upload_queue import usage
from tests.support.live import wait_for
from tests.support.targets import running
from tests.support.weed import (
    BUCKET,
    CREDENTIALS_FILE,
    KEYS,
    NONSENSE,
    REDIRECT,
    SLOW_DOWN,
    YES_TO_ALL,
    Proxy,
    Weed,
    using_keys,
)
from tests.support.windows import SIZE_BYTES, START_S, minutes, once, window

OUTAGE_S = 8 * 3600
AWAY = StoreUnavailable("the store is away")


class FakeClock:
    """Passes time when somebody waits for it, and lets `on_wait` change the world meanwhile."""

    def __init__(self, on_wait: Callable[[float], None] = lambda _: None) -> None:
        self.elapsed_s = 0.0
        self.offset_s = float(int(time.time()))
        self.waits: list[float] = []
        self.end_when: Callable[[], bool] = lambda: False
        self.on_wait = on_wait
        self._has_ended = False

    def now_ns(self) -> int:
        return int((self.offset_s + self.elapsed_s) * 1e9)

    def monotonic_s(self) -> float:
        return self.elapsed_s

    def wait(self, seconds: float) -> bool:
        assert len(self.waits) < 100_000, "the uploader does not end"
        if seconds:
            self.waits.append(seconds)
            self.elapsed_s += seconds
            self.on_wait(self.elapsed_s)
        self._has_ended = self._has_ended or self.end_when()
        return self._has_ended


class MemoryStore:
    """Objects in memory. `fails` returns the error that the put of a profile raises, if any.

    Puts of other objects are not counted, and raise `refuses_others`.
    """

    refuses_others: StoreError | None = None

    def __init__(self, fails: Callable[[str], Exception | None] = lambda _: None) -> None:
        self.objects: dict[str, bytes] = {}
        self.order: list[str] = []
        self.requests = 0
        self.fails = fails
        self._lock = threading.Lock()

    def put(self, key: str, content: bytes) -> bool:
        with self._lock:
            if ObjectKey.parse(key) is None:
                if self.refuses_others:
                    raise self.refuses_others
                return self.objects.setdefault(key, content) is content
            self.requests += 1
            error = self.fails(key)
            if error is not None:
                raise error
            if key in self.objects:
                return False
            self.objects[key] = content
            self.order.append(key)
            return True

    def get(self, key: str) -> bytes:
        if key not in self.objects:
            raise ObjectMissing(key)
        return self.objects[key]

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self.get(key)[start : start + length]

    def list(self, prefix: str, start_after: str = "") -> Iterator[StoredObject]:
        for key in sorted(self.objects):
            if key.startswith(prefix) and key > start_after:
                yield StoredObject(key, len(self.objects[key]), 0)

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)


def stored(store: ObjectStore) -> dict[str, int]:
    """Return how often each minute is counted in a store."""
    return minutes(pprof.decode(store.get(each.key)) for each in store.list("v1/default/l0/"))


def uploader(spool: Path, store: ObjectStore, clock: FakeClock, **options: float) -> Uploader:
    """Make one that ends once nothing is pending, unless the clock says otherwise."""
    return Uploader(
        UploaderOptions(spool, str(store), **options), lambda: store, clock, random.Random(1)
    )


def filled(folder: Path, *numbers: int) -> Path:
    spool = Spool(folder / "spool")
    for number in numbers:
        spool.add(window(number))
    return folder / "spool"


def is_empty(spool: Path) -> Callable[[], bool]:
    return lambda: usage(spool)[0] == 0


def start_s(key: str) -> int:
    parsed = ObjectKey.parse(key)
    assert parsed is not None
    return parsed.start_s


def read_state(spool: Path) -> dict[str, object]:
    state: dict[str, object] = json.loads((spool / UPLOADER_STATE).read_bytes())
    return state


def test_everything_reaches_the_store_the_oldest_about_first(tmp_path: Path) -> None:
    """Several go at once, so neighbours may change places."""
    spool, store, clock = filled(tmp_path, *range(100)), MemoryStore(), FakeClock()
    clock.end_when = is_empty(spool)

    assert uploader(spool, store, clock).run()

    assert stored(store) == once(*range(100))
    order = [(start_s(key) - START_S) // 60 for key in store.order]
    assert all(abs(place - number) < 4 for place, number in enumerate(order))


def test_the_tenants_key_is_there_before_its_first_profile(tmp_path: Path) -> None:
    """Whoever reads a profile finds the key, and it stays the same."""
    spool, store, clock = filled(tmp_path, 0), MemoryStore(), FakeClock()
    clock.end_when = is_empty(spool)
    had_key: list[bool] = []
    store.fails = lambda _: had_key.append("v1/default/key" in store.objects)

    assert uploader(spool, store, clock).run()
    key = store.objects["v1/default/key"]
    filled(tmp_path, 1)
    again = FakeClock()
    again.end_when = is_empty(spool)
    assert uploader(spool, store, again).run()

    assert had_key == [True, True]
    assert len(key) == 32
    assert store.objects["v1/default/key"] == key


def test_profiles_are_stored_also_if_nothing_else_may_be(tmp_path: Path) -> None:
    spool, store, clock = filled(tmp_path, *range(20)), MemoryStore(), FakeClock()
    store.refuses_others = StoreRefused("cannot write", "ask for the right")
    clock.end_when = is_empty(spool)

    assert uploader(spool, store, clock).run()

    assert stored(store) == once(*range(20))


def test_the_state_says_what_was_done(tmp_path: Path) -> None:
    spool, store, clock = filled(tmp_path, 0, 1, 2), MemoryStore(), FakeClock()
    (first, *_), clock.end_when = sorted((spool / "waiting").iterdir()), is_empty(spool)
    store.put(first.name.replace("+", "/"), first.read_bytes())

    uploader(spool, store, clock).run()

    state = read_state(spool)
    assert (state["uploaded"], state["duplicates"], state["pending"]) == (2, 1, 0)
    assert state["last_upload_ns"] == state["written_ns"]
    assert state["last_error"] == ""
    assert state["pid"] == os.getpid()
    assert int(str(state["cpu_ns"])) > 0
    assert int(str(state["rss_bytes"])) > 1_000_000


def test_hours_of_outage_cost_few_requests_and_no_count(tmp_path: Path) -> None:
    """Windows go on closing, the spool stays within its bound, and all is there afterwards."""
    limit_bytes = 33 * SIZE_BYTES
    spool = Spool(tmp_path / "spool", limit_bytes)
    store = MemoryStore(lambda _: AWAY if clock.elapsed_s < OUTAGE_S else None)
    closed = 0

    def close_windows(elapsed_s: float) -> None:
        nonlocal closed
        while closed < min(elapsed_s, OUTAGE_S) // 300:
            spool.add(window(closed))
            closed += 1
            assert usage(tmp_path / "spool")[1] <= limit_bytes

    clock = FakeClock(close_windows)
    clock.end_when = lambda: clock.elapsed_s > OUTAGE_S and is_empty(tmp_path / "spool")()

    uploader(tmp_path / "spool", store, clock).run()

    requests = store.requests - len(store.order)
    assert stored(store) == once(*range(OUTAGE_S // 300))
    assert requests / OUTAGE_S < 1.2 / 10
    assert max(clock.waits) <= 60
    assert read_state(tmp_path / "spool")["failed"] == requests


def test_pauses_grow_and_differ_between_hosts(tmp_path: Path) -> None:
    """Full jitter: a fleet that lost its store together does not come back together."""
    pauses = []
    for seed in range(30):
        spool, clock = filled(tmp_path / str(seed), 1), FakeClock()
        clock.end_when = lambda clock=clock: len(clock.waits) >= 12
        options = UploaderOptions(spool, "", grace_s=0)
        store = MemoryStore(lambda _: AWAY)
        Uploader(options, lambda store=store: store, clock, random.Random(seed)).run()
        pauses.append(clock.waits)

    means = [sum(column) / len(column) for column in zip(*pauses, strict=True)]
    assert means[0] < 2 < means[3] < means[11]
    assert 20 < means[11] < 40
    assert len({round(waits[11]) for waits in pauses}) > 15


def test_a_store_that_is_back_gets_everything_soon(tmp_path: Path) -> None:
    spool, clock = filled(tmp_path, *range(50)), FakeClock()
    store = MemoryStore(lambda _: AWAY if clock.elapsed_s < 600 else None)
    clock.end_when = is_empty(spool)

    uploader(spool, store, clock).run()

    assert stored(store) == once(*range(50))
    assert clock.elapsed_s < 600 + 60 + 5


def test_few_profiles_are_claimed_while_the_store_is_away(tmp_path: Path) -> None:
    """Those cannot be dropped any more."""
    spool, clock = filled(tmp_path, *range(50)), FakeClock()
    clock.end_when = lambda: clock.elapsed_s > 3600

    uploader(spool, MemoryStore(lambda _: AWAY), clock, grace_s=0).run()

    assert len(list((spool / "sending").iterdir())) <= 16


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """Mount a disk for the length of the block; the value it yields changes the size."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)

    def resize(to: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={to}", folder], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.kernel
def test_a_store_whose_disk_is_full_gets_everything_once_there_is_room(tmp_path: Path) -> None:
    """Until then each window is in the spool or in the store, and the state says why."""
    spool, errors = filled(tmp_path, *range(40)), set()
    with small_disk(tmp_path / "store", "192k") as resize:
        store = DirectoryStore(tmp_path / "store")

        def change(at_s: float) -> None:
            errors.add(str(read_state(spool)["last_error"]))
            assert 0 < len(stored(store)) < 40
            assert usage(spool)[0] + len(stored(store)) == 40
            if at_s > 100:
                resize("4m")

        clock = FakeClock(change)
        clock.end_when = is_empty(spool)

        uploader(spool, store, clock).run()

        assert stored(store) == once(*range(40))
    assert any("No space left" in error for error in errors)
    assert read_state(spool)["last_error"] == ""


@pytest.mark.kernel
def test_a_spool_on_a_full_disk_is_emptied(tmp_path: Path) -> None:
    """Sending needs no room: not even its state must be written."""
    with small_disk(tmp_path / "disk", "512k"):
        spool, store, clock = filled(tmp_path / "disk", *range(20)), MemoryStore(), FakeClock()
        with contextlib.suppress(OSError), (tmp_path / "disk/hog").open("wb", buffering=0) as hog:
            while hog.write(bytes(4096)):
                pass
        clock.end_when = is_empty(spool)

        assert uploader(spool, store, clock).run()

    assert stored(store) == once(*range(20))


def test_a_profile_that_is_refused_alone_lets_others_pass(tmp_path: Path) -> None:
    """A proxy that takes no large bodies must not hold up the small ones."""
    spool, clock = filled(tmp_path, *range(40)), FakeClock()
    poison = {START_S, START_S + 60, START_S + 600}
    store = MemoryStore(
        lambda key: StoreUnavailable("413 too large") if start_s(key) in poison else None
    )
    clock.end_when = lambda: usage(spool)[0] == len(poison)

    uploader(spool, store, clock, grace_s=0).run()

    assert len(store.order) == 40 - len(poison)
    assert clock.elapsed_s < 600


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("Invalid header value"), "ValueError: Invalid header value"),
        (RecursionError("too deep"), "the store's answer is nested too deeply"),
        (MemoryError(), "there is no memory left to read the store's answer"),
    ],
)
def test_an_error_of_another_kind_is_a_failure_of_its_profile(
    error: Exception, reason: str, tmp_path: Path
) -> None:
    """A library raises what it wants: the state says so, and the profile is tried again."""
    spool, clock, seen = filled(tmp_path, *range(8)), FakeClock(), []
    store = MemoryStore(
        lambda key: error if start_s(key) == START_S and clock.elapsed_s < 100 else None
    )
    clock.on_wait = lambda _: seen.append(read_state(spool)["last_error"])
    clock.end_when = is_empty(spool)

    assert uploader(spool, store, clock).run()

    assert stored(store) == once(*range(8))
    assert reason in seen
    assert read_state(spool)["failed"] > 1


def test_a_store_that_never_ends_its_answer_is_left_with_the_process(tmp_path: Path) -> None:
    """A byte now and then keeps every timeout away; the agent starts another uploader."""
    spool, ends = filled(tmp_path, 1), threading.Event()
    store = MemoryStore(lambda _: None if ends.wait(30) else StoreUnavailable("ended"))
    options = UploaderOptions(spool, "", answer_s=0.3)

    is_complete = Uploader(options, lambda: store, FakeClock(), random.Random(1)).run()
    state, left = read_state(spool), usage(spool)[0]
    ends.set()

    assert not is_complete
    assert state["last_error"] == "the store did not answer within 0.3 s"
    assert left == 1


def test_retention_survives_what_it_cannot_list(tmp_path: Path) -> None:
    """An error of any kind ends that round of it, and no profile waits for it."""
    spool, clock = filled(tmp_path, *range(3)), FakeClock()
    store = DirectoryStore(tmp_path / "store")
    errors = iter([RecursionError(), MemoryError(), ValueError("odd"), OSError("odd")])
    clock.end_when = is_empty(spool)

    class Odd(DirectoryStore):
        def list(self, *_: str) -> Iterator[StoredObject]:
            raise next(errors, StoreUnavailable("away"))

    odd = Odd(tmp_path / "store")
    options = UploaderOptions(spool, "", keep_s=60)

    assert Uploader(options, lambda: odd, clock, random.Random(1)).run()

    assert stored(store) == once(*range(3))


def test_a_refusal_is_told_and_met_slowly_with_the_store_opened_anew(tmp_path: Path) -> None:
    """Whoever mends the credentials need not restart anything."""
    spool, clock, opened = filled(tmp_path, 1, 2), FakeClock(), []
    refusal = StoreRefused("cannot write: the secret key is wrong", "check it")

    def reopen() -> ObjectStore:
        opened.append(clock.elapsed_s)
        if len(opened) % 2:
            raise refusal
        return MemoryStore(lambda _: refusal) if len(opened) < 6 else good

    good = MemoryStore()
    seen = []
    clock.on_wait = lambda _: seen.append(read_state(spool)["last_error"])
    clock.end_when = is_empty(spool)

    Uploader(UploaderOptions(spool, ""), reopen, clock, random.Random(1)).run()

    assert stored(good) == once(1, 2)
    assert len(opened) == 6
    assert all(30 <= wait <= 60 for wait in clock.waits[:5])
    assert set(seen[:5]) == {str(refusal)}
    assert read_state(spool)["last_error"] == ""


def test_a_damaged_file_is_set_aside_and_counted_once(tmp_path: Path) -> None:
    spool, store, clock = filled(tmp_path, 0, 1, 2), MemoryStore(), FakeClock()
    damaged = sorted((spool / "waiting").iterdir())[1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    clock.end_when = lambda: clock.elapsed_s > 100

    uploader(spool, store, clock).run()

    assert stored(store) == once(0, 2)
    assert read_state(spool)["damaged"] == 1
    assert [path.name for path in (spool / "damaged").iterdir()] == [damaged.name]


def test_uploads_are_spread_over_the_jitter(tmp_path: Path) -> None:
    """Each profile has a moment of its own: its hash decides."""
    spool, clock, sent = filled(tmp_path, *range(60)), FakeClock(), []
    clock.offset_s = time.time()
    store = MemoryStore(lambda _: sent.append(clock.elapsed_s))
    clock.end_when = is_empty(spool)

    uploader(spool, store, clock, jitter_s=20).run()

    assert stored(store) == once(*range(60))
    assert 17 <= clock.elapsed_s <= 22
    quarters = [sum(5 * i <= at < 5 * i + 5 for at in sent) for i in range(4)]
    assert all(5 <= count <= 27 for count in quarters)


@pytest.mark.parametrize("step_s", [-3600, 3600])
def test_a_clock_that_steps_by_an_hour_holds_nothing_up(tmp_path: Path, step_s: int) -> None:
    spool, store, clock = filled(tmp_path, *range(10)), MemoryStore(), FakeClock()
    clock.offset_s += step_s
    clock.end_when = is_empty(spool)

    uploader(spool, store, clock, jitter_s=20).run()

    assert clock.elapsed_s < 5


def test_at_the_end_what_waits_for_its_moment_is_sent_too(tmp_path: Path) -> None:
    spool, store, clock = filled(tmp_path, *range(10)), MemoryStore(), FakeClock()
    clock.offset_s = time.time()
    clock.end_when = lambda: True

    uploader(spool, store, clock, jitter_s=1000).run()

    assert stored(store) == once(*range(10))


def test_at_the_end_a_store_that_is_away_is_waited_for_no_longer_than_the_grace(
    tmp_path: Path,
) -> None:
    """And what is left stays in the spool for the next one."""
    spool, clock = filled(tmp_path, *range(10)), FakeClock()
    clock.end_when = lambda: True

    assert uploader(spool, MemoryStore(lambda _: AWAY), clock, grace_s=10).run()

    assert 9 < clock.elapsed_s < 12
    assert usage(spool)[0] == 10


def test_what_is_too_old_or_too_much_is_removed_and_counted(tmp_path: Path) -> None:
    """In a directory, not more often than once a minute."""
    spool, store, clock = filled(tmp_path, *range(100)), DirectoryStore(tmp_path / "s"), FakeClock()
    clock.offset_s = START_S + 100 * 60
    clock.end_when = lambda: clock.elapsed_s > 150

    manifest = "v1/default/manifests/cpu/2001-01-01T00.json"
    store.put(manifest, b"{}")
    os.utime(store.root / manifest, (0, 0))

    uploader(spool, store, clock, keep_s=60 * 60, keep_compacted_s=60 * 60).run()

    assert stored(store) == once(*range(42, 100))
    assert [each.key for each in store.list("v1/default/manifests")] == []
    state = read_state(spool)
    assert (state["uploaded"], state["expired"]) == (100, 42)


def test_two_uploaders_of_one_spool_meet_no_error(tmp_path: Path) -> None:
    """Each profile is stored once; whoever comes second finds it gone."""
    spool, store = filled(tmp_path, *range(200)), DirectoryStore(tmp_path / "store")
    both = []
    for _ in range(2):
        clock = FakeClock()
        clock.end_when = is_empty(spool)
        both.append(uploader(spool, store, clock))

    threads = [threading.Thread(target=each.run) for each in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert stored(store) == once(*range(200))
    assert sum(each.state.uploaded for each in both) == 200
    assert [each.state.failed + each.state.damaged for each in both] == [0, 0]


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_two_stores_that_race_for_one_key_store_it_once(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    """A restored backup of a host: one wins, the other finds it there, and neither fails."""
    url, endpoint, both = f"{tmp_path}/store", None, []
    if kind == "s3":
        url, endpoint = f"s3://{BUCKET}/{tmp_path.name}", request.getfixturevalue("bucket").endpoint
    for name in ("one", "two"):
        spool, clock = filled(tmp_path / name, *range(50)), FakeClock()
        clock.end_when = is_empty(spool)
        store = open_store(url, endpoint)
        both.append(uploader(spool, store, clock))

    threads = [threading.Thread(target=each.run) for each in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert stored(store) == once(*range(50))
    assert sum(each.state.uploaded for each in both) == 50
    assert sum(each.state.duplicates for each in both) == 50
    assert [each.state.failed for each in both] == [0, 0]


@pytest.fixture
def bucket(weed: Weed) -> Iterator[Weed]:
    with using_keys():
        yield weed


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Proxy.STALL, "timeout"),
        (SLOW_DOWN, "SlowDown"),
        (NONSENSE, "not an object store's"),
        (REDIRECT, "not an object store's"),
        (YES_TO_ALL, "not an object store's"),
    ],
    ids=["silent", "throttling", "answering wrongly", "redirecting", "saying yes to all"],
)
def test_a_bucket_that_misbehaves_gets_everything_once_it_is_well(
    bucket: Weed, tmp_path: Path, answer: bytes, reason: str
) -> None:
    spool, errors = filled(tmp_path, *range(8)), []
    # A bucket that answers is never asked twice because a busy machine made it late.
    timeout_s = 0.2 if answer == Proxy.STALL else 30
    with Proxy(bucket.port) as proxy:
        store = S3Store(BUCKET, tmp_path.name, proxy.endpoint, timeout_s=timeout_s)

        def change(_: float) -> None:
            errors.append(str(read_state(spool)["last_error"]))
            proxy.switch(answer if len(errors) < 2 else None)

        proxy.switch(answer)
        clock = FakeClock(change)
        clock.end_when = is_empty(spool)

        uploader(spool, store, clock).run()

        assert stored(store) == once(*range(8))
        assert all(reason in error for error in errors[:2])
        # botocore asks where the bucket is after a redirect, and we for what is said to be stored,
        # so that each attempt is two requests.
        per_attempt = 2 if answer in {REDIRECT, YES_TO_ALL} else 1
        assert proxy.requests <= 2 * (4 + 1) * per_attempt


def test_a_bucket_that_goes_away_and_comes_back_gets_everything_once(tmp_path: Path) -> None:
    """Stopped and started for real, while windows wait."""
    weed = Weed(tmp_path / "weed")
    weed.start()
    try:
        with using_keys():
            store = S3Store(BUCKET, "profiles", weed.endpoint)
            store.put("v1/before", b"")
            spool, clock = filled(tmp_path, *range(50)), FakeClock()
            weed.stop()
            clock.on_wait = lambda at_s: weed.start() if at_s > 10 else None
            clock.end_when = is_empty(spool)
            result = uploader(spool, store, clock)

            result.run()

            store.delete("v1/before")
            assert result.state.failed > 0
            assert stored(store) == once(*range(50))
    finally:
        weed.stop()


def test_credentials_that_are_mended_in_their_file_are_used(
    weed: Weed, tmp_path: Path, monkeypatch
) -> None:
    spool, file = filled(tmp_path, 1, 2), tmp_path / "credentials"
    file.write_text(CREDENTIALS_FILE.format(KEYS["AWS_ACCESS_KEY_ID"], "wrong"))

    def mend(at_s: float) -> None:
        errors.append(read_state(spool)["last_error"])
        if at_s > 100:
            file.write_text(CREDENTIALS_FILE.format(*KEYS.values()))

    errors: list[object] = []
    clock = FakeClock(mend)
    clock.end_when = is_empty(spool)
    url = f"s3://{BUCKET}/{tmp_path.name}"
    with using_keys():
        for name in KEYS:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
        result = Uploader(
            UploaderOptions(spool, url),
            lambda: open_store(url, weed.endpoint),
            clock,
            random.Random(1),
        )
        result.run()

        assert stored(open_store(url, weed.endpoint)) == once(1, 2)
    assert "the secret key is wrong (check AWS_SECRET_ACCESS_KEY)" in str(errors[0])
    assert result.state.last_error == ""


def command(spool: Path, store: str, *options: str) -> list[str]:
    arguments = [f"--spool={spool}", f"--store={store}", *options]
    return [sys.executable, "-m", "profiler.agent.uploader", *arguments]


def test_sigterm_ends_it_after_what_is_waiting(tmp_path: Path) -> None:
    """Exit status 0; the long jitter is not waited for."""
    spool = filled(tmp_path, *range(20))
    with running(*command(spool, f"{tmp_path}/store", "--jitter-s=3000")) as process:
        wait_for((spool / UPLOADER_STATE).exists, what="the first state")

        process.terminate()

        assert process.wait(10) == 0
    assert stored(DirectoryStore(tmp_path / "store")) == once(*range(20))


def test_what_is_waiting_is_sent_by_an_uploader_that_is_to_end_as_it_starts(
    tmp_path: Path,
) -> None:
    """As of an agent that runs for a moment: SIGTERM does not kill it before it is handled."""
    spool = filled(tmp_path, *range(3))
    uploader = Child("uploader", command(spool, f"{tmp_path}/store"), unblocks_sigterm=True)

    uploader.supervise()
    uploader.end(60)

    assert stored(DirectoryStore(tmp_path / "store")) == once(*range(3))


def test_sigterm_ends_it_in_the_middle_of_a_request_without_an_answer(
    weed: Weed, tmp_path: Path
) -> None:
    """Within the grace, with exit status 0; the profile stays for the next one."""
    spool = filled(tmp_path, 1)
    with Proxy(weed.port) as proxy, using_keys():
        proxy.switch(Proxy.STALL)
        options = [f"--endpoint={proxy.endpoint}", "--grace-s=0.5"]
        with running(*command(spool, f"s3://{BUCKET}/x", *options)) as process:
            wait_for(lambda: proxy.requests, what="a request")
            asked_s = time.monotonic()

            process.send_signal(signal.SIGTERM)

            assert process.wait(10) == 0
            assert time.monotonic() - asked_s < 5
    assert usage(spool)[0] == 1


def test_it_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    script = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([*sys.argv[1:], f'--parent={os.getpid()}'])\n"
        "child.wait()\n"
    )
    parent = [sys.executable, "-c", script]
    with running(*parent, *command(spool, f"{tmp_path}/store")) as process:
        wait_for((spool / UPLOADER_STATE).exists, what="the first state")
        pid = read_state(spool)["pid"]

        process.kill()

        wait_for(lambda: not _lives(int(str(pid))), what="the uploader's end")


def test_a_parent_that_is_dead_already_is_noticed(tmp_path: Path) -> None:
    """The kernel's signal comes only to those who had asked for it before."""
    dead = subprocess.Popen(["true"])
    dead.wait()

    with running(*command(tmp_path / "spool", "store", f"--parent={dead.pid}")) as process:
        assert process.wait(10) == 0


def _lives(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


NAMED_STEPS = [
    f"{half} {when} {call}"
    for half, calls in {
        "sampler": [
            "rename partial waiting",
            "rename waiting giving-up",
            "rename tombstones giving-up",
            "rename partial giving-up",
            "unlink giving-up",
            "rename giving-up tombstones",
        ],
        "uploader": [
            "rename waiting sending",
            "rename tombstones sending",
            "put",
            "unlink sending",
        ],
    }.items()
    for call in calls
    for when in ("before", "after")
]


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_no_kill_between_closing_and_deleting_loses_or_doubles_a_window(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    """SIGKILL at every step that touches a file or the store, and at random to either process.

    Counted are those that ended a living process, at least 200 for each kind of store.
    """
    url, options = f"{tmp_path}/store", ["--random=50"]
    if kind == "s3":
        weed: Weed = request.getfixturevalue("weed")
        url = f"s3://{BUCKET}/{tmp_path.name}"
        options = [f"--endpoint={weed.endpoint}", "--random=110", "--run-s=0.1"]
        options += ["--steps=rename,unlink"]
    options += [f"--named={step}" for step in NAMED_STEPS]
    driver = Path(__file__).parents[1] / "support" / "crash_driver.py"
    arguments = [f"--store={url}", f"--folder={tmp_path}", *options]

    with using_keys():
        child = subprocess.run(
            [sys.executable, driver, *arguments], capture_output=True, check=False
        )
        assert child.returncode == 0, child.stderr.decode()[-2000:]
        endpoint = options[0].removeprefix("--endpoint=") if kind == "s3" else None
        store = open_store(url, endpoint)
        objects = [pprof.decode(store.get(each.key)) for each in store.list("v1/default/l0/")]

    report = json.loads(child.stdout)
    found = minutes(objects)
    numbers = [int(name.removeprefix("minute-")) for name in found]
    assert set(found.values()) == {1}
    assert set(report["closed"]) <= set(numbers) <= set(report["begun"])
    assert sum(profile.accounting.ticks for profile in objects) == sum(
        window(number).accounting.ticks for number in numbers
    )
    assert any(profile.accounting.lost for profile in objects)
    kills = report["kills"]
    assert sum(kills.values()) >= 200
    assert min(kills["sampler"], kills["uploader"]) >= 60
    assert set(NAMED_STEPS) <= report["places"].keys()
