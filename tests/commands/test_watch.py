"""`everflame watch`: deployments told once, and regressions called, over a store that grows."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from profiler.comparison.deployment_verdicts import DeploymentVerdicts
from profiler.comparison.deployments import ChangedFunction, DeploymentVerdict
from profiler.comparison.verdict import Change
from profiler.service.watch import StateFile, Watch, WatchError
from profiler.service.webhook import Webhook
from profiler.times import rfc3339
from storage.objects.directory import DirectoryStore
from storage.objects.tenant import TenantStore
from storage.query.query import Query
from tests.support.deployments import (
    MINUTES,
    NEW_AT,
    SHOWN_HOSTILE,
    fill,
    minute_of,
    until_now,
)
from tests.support.live import wait_for
from tests.support.receivers import Receiver, hang, receiving
from tests.support.services import service
from tests.support.stores import START_NS, put

EVERFLAME = Path(sys.executable).with_name("everflame")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> DirectoryStore:
    return fill(tmp_path_factory.mktemp("watched") / "store")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVERFLAME_CACHE", str(tmp_path / "cache"))
    for name in ("EVERFLAME_STORE", "EVERFLAME_WEBHOOK"):
        monkeypatch.delenv(name, raising=False)


def command(store: DirectoryStore, *arguments: str) -> list[str]:
    start = f"--from={rfc3339(START_NS)}"
    return [str(EVERFLAME), "watch", f"--store={store.root}", start, *arguments]


def once(store: DirectoryStore, *arguments: str) -> subprocess.CompletedProcess[str]:
    asked = command(store, "--once", *arguments)
    return subprocess.run(asked, capture_output=True, text=True, timeout=100, check=False)


def test_one_look_prints_each_deployment_and_calls_of_regressions(store, receiver):
    """The exit code tells that there is a new one; a second look has nothing to say."""
    page = "http://127.0.0.1:4040/"
    first = once(store, f"--webhook={receiver.url}", f"--page={page}")
    again = once(store, f"--webhook={receiver.url}", f"--page={page}")

    assert (first.returncode, first.stderr) == (1, "")
    told = {line.split()[1]: line for line in first.stdout.splitlines()}
    assert set(told) == {"calm", "faster", "slower", "fresh"}
    assert told["calm"].endswith("calm 2.0 (previously 1.0), rollout: unchanged")
    assert "rollout: improvement: parse ([python]) -" in told["faster"]
    assert "rollout: regression: parse ([python]) +" in told["slower"]
    assert told["slower"].endswith(f"{SHOWN_HOSTILE} ([python]) new")
    assert "rollout: no verdict: not comparable: it has settled only at" in told["fresh"]
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    (call,) = receiver.received
    said = json.loads(call.content)
    link = said.pop("link")
    assert link.startswith(f"{page}?q=%7Bservice%3D%22slower%22%2Cversion%3D%222.0%22%7D&from=")
    assert [each.pop("growth") is None for each in said["functions"]] == [False, True]
    assert said == {
        "schema": 1,
        "service": "slower",
        "version": "2.0",
        "previous": "1.0",
        "kind": "rollout",
        "first_ms": START_NS // 10**6 + NEW_AT * 60_000,
        "verdict": "regression",
        "provisional": False,
        "functions": [
            {"function": "parse", "module": "[python]", "change": "more"},
            {"function": SHOWN_HOSTILE, "module": "[python]", "change": "new"},
        ],
    }


def test_the_selector_says_which_deployments_are_followed(store, receiver):
    done = once(store, "-q", '{service="calm"}', f"--webhook={receiver.url}")

    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1)
    assert receiver.received == []


def test_a_command_is_run_for_a_regression(store, tmp_path):
    """With the JSON on its standard input, and its values in the environment."""
    found = tmp_path / "found"
    script = f"cat > {found}; env | grep ^EVERFLAME_ >> {found}"

    done = once(store, f'--run=sh -c "{script}; echo said"')

    content, *environment = found.read_text().partition("}]}")[0::2]
    assert json.loads(content + "}]}")["service"] == "slower"
    values = dict(line.partition("=")[0::2] for line in environment[0].splitlines())
    assert values["EVERFLAME_SERVICE"] == "slower"
    assert values["EVERFLAME_VERSION"] == "2.0"
    assert values["EVERFLAME_PREVIOUS"] == "1.0"
    assert values["EVERFLAME_VERDICT"] == "regression"
    assert values["EVERFLAME_PROVISIONAL"] == "0"
    assert values["EVERFLAME_FUNCTIONS"].startswith("parse ([python]) +")
    assert "said" not in done.stdout
    assert done.stderr == "said\n"


def test_a_call_that_failed_is_made_again_at_the_next_look(store, receiver):
    """The line is not printed again, and it is no new regression."""
    receiver.responses = [500]
    first = once(store, f"--webhook={receiver.url}")
    failed = len(receiver.received)
    receiver.responses = [204]
    second = once(store, f"--webhook={receiver.url}")
    third = once(store, f"--webhook={receiver.url}")

    assert [each.returncode for each in (first, second, third)] == [1, 0, 0]
    assert "cannot call the webhook at 127.0.0.1: it responded with status 500" in first.stderr
    assert "secret" not in first.stderr
    assert (second.stdout, second.stderr) == ("", "")
    assert (failed, len(receiver.received)) == (4, 5)


@contextlib.contextmanager
def watching(store: DirectoryStore, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    asked = command(store, "--every=100ms", *arguments)
    with subprocess.Popen(
        asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[str], number: int) -> tuple[int, str]:
    """Send a signal; return the exit status and what was said."""
    process.send_signal(number)
    _, talk = process.communicate(timeout=60)
    return process.returncode, talk


def lines_until(process: subprocess.Popen[str], part: str) -> list[str]:
    assert process.stdout is not None
    found = []
    for line in process.stdout:
        found.append(line.rstrip())
        if part in line:
            return found
    raise AssertionError(found)


def test_a_deployment_is_told_when_it_is_found_and_when_its_verdict_changes(tmp_path, receiver):
    """While the store grows; a restart repeats nothing."""
    rng = np.random.default_rng(2)
    store = fill(tmp_path / "store", until=NEW_AT + 3)
    arguments = ("-q", '{service="slower"}', f"--webhook={receiver.url}")

    with watching(store, *arguments) as process:
        lines_until(process, "slower 2.0 (previously 1.0), rollout: no verdict")
        assert receiver.received == []
        for number in range(NEW_AT + 3, MINUTES - 2):
            put(store, minute_of(rng, number))
        lines_until(process, "rollout: regression")
        receiver.wait_for(1)
        assert ended(process, signal.SIGTERM) == (0, "")
    with watching(store, *arguments) as process:
        put(store, minute_of(rng, MINUTES - 2))
        time.sleep(1)  # what must not happen has time to
        assert ended(process, signal.SIGINT) == (0, "")

    assert len(receiver.received) == 1


def test_a_watch_ends_at_once_while_a_receiver_hangs(store, receiver):
    """The call counts as not made."""
    receiver.responses = [hang(receiver)]
    with watching(store, f"--webhook={receiver.url}") as process:
        receiver.wait_for(1)
        begun_s = time.monotonic()
        status, talk = ended(process, signal.SIGTERM)

    assert time.monotonic() - begun_s < 9
    assert status == 0
    assert "Traceback" not in talk
    receiver.responses = [204]
    once(store, f"--webhook={receiver.url}")
    assert len(receiver.received) == 2


def test_a_store_that_is_away_does_not_end_a_watch(tmp_path, receiver):
    """It is told on standard error, and the deployments when it is back."""
    store = fill(tmp_path / "store")
    (tmp_path / "store").rename(tmp_path / "away")
    (tmp_path / "store").write_text("not a folder")
    with watching(store, f"--webhook={receiver.url}") as process:
        assert process.stderr is not None
        assert "cannot look for deployments" in process.stderr.readline()
        (tmp_path / "store").unlink()
        (tmp_path / "away").rename(tmp_path / "store")
        lines_until(process, "regression")
        receiver.wait_for(1)
        assert ended(process, signal.SIGTERM)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--webhook=ftp://h/secret"], "a webhook is named by its URL"),
        (["--page=4040"], "named by its URL"),
        (["--run=no-such-program"], "there is no program 'no-such-program'"),
        (["--every=soon"], "is not a duration"),
        (["--from=yesterday"], "is not a time"),
        (["-q", "{"], "{"),
    ],
)
def test_what_cannot_be_watched_is_refused_at_the_start(store, arguments, message):
    done = once(store, *arguments)

    assert done.returncode == 2
    assert message in done.stderr
    assert "secret" not in done.stderr
    assert "Traceback" not in done.stderr


def test_two_watches_do_not_share_a_state(store, tmp_path):
    """The second one says so; those of other selectors have files of their own."""
    state = f"--state={tmp_path / 'state.json'}"
    with watching(store, state) as process:
        lines_until(process, "regression")
        second = once(store, state)
        other = once(store, "-q", '{service="calm"}')
        assert ended(process, signal.SIGTERM)[0] == 0

    assert second.returncode == 2
    assert "another watch uses" in second.stderr
    assert other.returncode == 0


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 100_000, b'{"schema":2,"deployments":[]}', b'{"schema":1}', b"\xff" * 99],
)
def test_a_damaged_state_is_said_and_begins_anew(store, tmp_path, content):
    state = tmp_path / "state.json"
    state.write_bytes(content)

    first = once(store, f"--state={state}")
    second = once(store, f"--state={state}")

    assert "is damaged: deployments may be told again" in first.stderr
    assert (first.returncode, len(first.stdout.splitlines())) == (1, 4)
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")


def test_a_state_that_cannot_be_written_is_said(store, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")

    done = once(store, f"--state={blocked}/state.json")

    assert done.returncode == 2
    assert "name another file with --state" in done.stderr


# Verdicts that change, one look after the other


class Scripted(DeploymentVerdicts):
    """Verdicts that a test sets."""

    def __init__(self, store: TenantStore, query: Query) -> None:
        super().__init__(store, query)
        self.verdict = DeploymentVerdict()

        self.is_of_all = False

    def of(self, service, *_) -> DeploymentVerdict:
        is_set = service == "slower" or self.is_of_all
        return self.verdict if is_set else DeploymentVerdict("unchanged")


FUNCTION = ChangedFunction("parse", "app", Change.MORE, 0.5)
PROVISIONAL = DeploymentVerdict("regression", True, (FUNCTION,))
REGRESSION = DeploymentVerdict("regression", False, (FUNCTION,))
UNCHANGED = DeploymentVerdict("unchanged")


class Looks:
    """A watch of one service whose verdicts are set, and what it tells."""

    def __init__(self, store: DirectoryStore, folder: Path, receiver: Receiver, **more) -> None:
        tenant = TenantStore(store)
        query = Query(tenant, folder / "cache")
        self.verdicts, self.lines = Scripted(tenant, query), []
        self.watch = Watch(
            tenant,
            query,
            self.verdicts,
            StateFile(folder / "scripted.json"),
            callers=[Webhook(receiver.url, pauses_s=())],
            lookback=rfc3339(START_NS),
            tell=self.lines.append,
            **more,
        )
        self.receiver = receiver

    def see(self, verdict: DeploymentVerdict) -> tuple[bool, list[str], list[bool]]:
        """Look; return whether a regression is new, what was told, and which calls were made."""
        self.verdicts.verdict = verdict
        self.lines.clear()
        self.receiver.received.clear()
        is_new = self.watch.look()
        told = [line.partition("rollout: ")[2] for line in self.lines if " slower " in line]
        calls = [json.loads(each.content)["provisional"] for each in self.receiver.received]
        return is_new, told, calls


@pytest.fixture
def looks_of(tmp_path, receiver) -> Iterator[Callable[..., Looks]]:
    """Return what makes a watch of a store."""
    with contextlib.ExitStack() as stack:

        def begin(store: DirectoryStore, **more: object) -> Looks:
            looks = Looks(store, tmp_path, receiver, **more)
            stack.callback(looks.watch.state.close)
            return looks

        yield begin


def test_each_regression_is_called_once(store, looks_of):
    """A provisional one, again when it is confirmed, and never a second time."""
    looks = looks_of(store)
    provisional = "regression (provisional): parse (app) +50%"
    confirmed = "regression: parse (app) +50%"

    assert looks.see(PROVISIONAL) == (True, [provisional], [True])
    assert looks.see(PROVISIONAL) == (False, [], [])
    assert looks.see(REGRESSION) == (True, [confirmed], [False])
    assert looks.see(PROVISIONAL) == (False, [provisional], [])
    assert looks.see(UNCHANGED) == (False, ["unchanged"], [])
    assert looks.see(REGRESSION) == (False, [confirmed], [])


def test_provisional_regressions_need_not_be_called(store, looks_of):
    """They are told all the same."""
    looks = looks_of(store, has_provisional=False)

    is_new, told, calls = looks.see(PROVISIONAL)

    assert (is_new, len(told), calls) == (False, 1, [])
    assert looks.see(REGRESSION)[2] == [False]


def test_a_receiver_that_is_away_is_called_once_a_look(tmp_path, receiver, looks_of):
    """However many regressions wait for it."""
    looks = looks_of(fill(tmp_path / "store"))
    looks.verdicts.verdict, looks.verdicts.is_of_all = REGRESSION, True
    receiver.responses = [503]

    looks.watch.look()
    assert len(receiver.received) == 1
    receiver.received.clear()
    receiver.responses = [204]
    looks.watch.look()

    assert len(receiver.received) == 4


def test_a_state_is_used_by_one_watch(tmp_path):
    with contextlib.closing(StateFile(tmp_path / "state")), pytest.raises(WatchError):
        StateFile(tmp_path / "state")
    StateFile(tmp_path / "state").close()


def test_names_of_calls_are_cut(store, receiver, looks_of):
    """Nothing of what is told is long or has a control character."""
    looks = looks_of(store, page="http://127.0.0.1:4040")
    long = ChangedFunction("f" * 200, "m" * 200, Change.MORE, 1e9)
    looks.verdicts.verdict = DeploymentVerdict("regression", False, (long,) * 3)

    looks.watch.look()

    (call,) = receiver.received
    assert len(call.content) < 10_000
    assert all(len(line) < 2_000 and line.isprintable() for line in looks.lines)


# In the service


def test_the_service_calls_of_regressions(tmp_path, receiver):
    """As the command does, with a link to its own page; a restart repeats nothing."""
    fill(tmp_path / "store", moved=until_now())
    environment = {"EVERFLAME_WEBHOOK": receiver.url}
    for _ in range(2):
        with service(tmp_path, environment=environment) as (_, client):
            receiver.wait_for(1)
            found = client.json("deployments", **{"from": "now-1d"})["deployments"]
            assert {each["service"] for each in found} >= {"slower"}
            wait_for(lambda: list((tmp_path / "cache" / "watch").glob("*.json")))
            if len(receiver.received) == 1:
                url = client.url

    (call,) = receiver.received
    said = json.loads(call.content)
    assert (said["service"], said["verdict"]) == ("slower", "regression")
    assert said["link"].startswith("http://127.0.0.1:")
    assert url.startswith("http://127.0.0.1:")


def test_the_service_ends_at_once_while_a_receiver_hangs(tmp_path, receiver):
    fill(tmp_path / "store", moved=until_now())
    receiver.responses = [hang(receiver)]
    with service(tmp_path, f"--webhook={receiver.url}") as (process, _):
        receiver.wait_for(1)
        begun_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert time.monotonic() - begun_s < 9
