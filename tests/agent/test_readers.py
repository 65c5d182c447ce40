import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from profiler.agent import reader_budget
from profiler.agent import readers as module
from profiler.agent.reader_child import Answer, Failure
from profiler.agent.readers import Readers, SetAside
from profiler.processes.facts import request
from profiler.processes.generations import read_stat
from tests.support.elf_files import build
from tests.support.live import has_execed, wait_for
from tests.support.targets import running

KINDS = "tests.support.reader_kinds"


@pytest.fixture
def readers(tmp_path: Path) -> Iterator[Readers]:
    readers = Readers(tmp_path, kinds=KINDS, children=2)
    yield readers
    readers.close()


class Asked:
    """Asks, and keeps the answers by the values that were asked with."""

    def __init__(self, readers: Readers) -> None:
        self.readers = readers
        self.answers: list[tuple[str, Answer]] = []
        self.number = 0

    def ask(
        self,
        kind: str,
        name: str = "",
        *,
        turn: int = 1,
        group: str = "",
        owner: str = "",
        is_long: bool = False,
        **values: Any,
    ) -> None:
        self.number += 1
        name = name or kind
        self.readers.ask(
            *(kind, values, lambda answer: self.answers.append((name, answer))),
            turn=turn,
            group=group,
            owner=owner,
            is_long=is_long,
        )

    def wait(self, timeout_s: float = 30) -> dict[str, Answer]:
        deadline_s = time.monotonic() + timeout_s
        done = self.readers.wait(deadline_s, lambda: len(self.answers) == self.number)
        assert done, f"{len(self.answers)} of {self.number} answers"
        return dict(self.answers)


def wait_until(readers: Readers, is_true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not is_true() and time.monotonic() < deadline_s:
        readers.poll()
        time.sleep(0.01)
    assert is_true()


@pytest.fixture
def asked(readers: Readers) -> Asked:
    return Asked(readers)


def test_items_are_answered_with_what_was_read(asked: Asked, tmp_path: Path) -> None:
    """Each item gets its own answer; the children know the cache and run nothing when idle."""
    for number in range(100):
        asked.ask("echo", f"{number}", say=f"{number} \udcff")

    answers = asked.wait()

    assert [answers[f"{n}"].result["said"] for n in range(100)] == [
        f"{n} \udcff" for n in range(100)
    ]
    assert answers["0"].result["cache"] == str(tmp_path)
    assert asked.readers.answered == 100
    assert asked.readers.cpu_ns > 0


@pytest.mark.parametrize(("turn", "is_long"), [(0, True), (1, False)])
def test_what_comes_first_does_not_wait_until_long_items_are_done(turn, is_long, asked):
    """Both children would be busy for seconds."""
    for number in range(2):
        asked.ask("spin", f"spin {number}", turn=turn, is_long=is_long)
    asked.readers.wait(time.monotonic() + 0.2, lambda: False)
    asked.ask("echo", say="", turn=0)

    asked.readers.wait(time.monotonic() + 30, lambda: bool(asked.answers))

    assert [name for name, _ in asked.answers] == ["echo"]


def test_a_lower_limit_of_the_user_is_kept(tmp_path: Path) -> None:
    """As with `ulimit -d`: readers may not raise it, and read all the same."""
    script = (
        "import resource, sys, time\n"
        "from pathlib import Path\n"
        "from profiler.agent.readers import Readers\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (200 << 20, 200 << 20))\n"
        f"readers, answers = Readers(Path(sys.argv[1]), kinds={KINDS!r}), []\n"
        "readers.ask('echo', {'say': 'here'}, answers.append)\n"
        "readers.wait(time.monotonic() + 30, lambda: answers)\n"
        "readers.close()\n"
        "print(answers[0].result['said'])\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )

    assert child.stdout == "here\n", child.stderr


@pytest.mark.parametrize(
    ("kind", "values", "failure"),
    [
        ("raise", {}, Failure.ERROR),
        ("fill", {"bytes": 1 << 30}, Failure.MEMORY),
        ("spin", {}, Failure.TIME),
        ("die", {}, Failure.CRASHED),
    ],
)
def test_an_item_that_fails_costs_no_other_item(
    asked: Asked, kind: str, values: dict[str, int], failure: Failure
) -> None:
    """What was asked for together with it is read by another child."""
    asked.ask("echo", "before", say="before")
    asked.ask(kind, **values)
    asked.ask("echo", "after", say="after")

    answers = asked.wait()

    assert answers[kind] == Answer(None, failure)
    assert answers["before"].result["said"] == "before"
    assert answers["after"].result["said"] == "after"
    assert asked.readers.failures == {failure: 1}


def test_failures_are_logged_now_and_then(asked: Asked, caplog) -> None:
    for number in range(3):
        asked.ask("die", f"die {number}")
    asked.wait()

    assert asked.readers.failures == {Failure.CRASHED: 3}
    assert [r.getMessage() for r in caplog.records] == [
        "a reader failed kind=die cause=crashed before=0"
    ]


def test_one_owner_does_not_take_the_readers_from_others(asked: Asked, monkeypatch) -> None:
    monkeypatch.setattr(reader_budget, "_PART_S", 1.0)
    asked.ask("spin", owner="user 1000")
    asked.wait()

    asked.ask("echo", "his", owner="user 1000", say="")
    asked.ask("echo", "hers", owner="user 1001", say="")
    asked.ask("echo", "root", say="")
    answers = asked.wait()

    assert answers["his"] == Answer(None, Failure.BUDGET)
    assert answers["hers"].result
    assert answers["root"].result


def test_budgets_grow_again() -> None:
    budget = reader_budget.ReaderBudget(now_s=0)
    for owner in ("user 1000", "", ""):
        budget.spend(owner, 10, now_s=0)

    assert not budget.is_left(0)
    assert budget.is_left(1)
    assert not budget.is_left_of("user 1000", 390)
    assert budget.is_left_of("user 1000", 410)
    assert budget.is_left_of("", 0)


def test_a_reader_that_hangs_is_replaced_and_its_group_set_aside(
    asked: Asked, tmp_path: Path
) -> None:
    """Opening a FIFO that nobody writes to waits for ever."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("content")

    asked.ask("open", "hung", group="slow", path=str(tmp_path / "fifo"))
    first = asked.wait()
    asked.ask("open", "same group", group="slow", path=str(tmp_path / "file"))
    asked.ask("open", "other group", group="fast", path=str(tmp_path / "file"))
    answers = asked.wait()

    assert first["hung"] == Answer(None, Failure.HUNG)
    assert answers["same group"] == Answer(None, Failure.SET_ASIDE)
    assert answers["other group"] == Answer("content")


def test_a_group_is_set_aside_for_longer_only_if_it_hangs_again_soon() -> None:
    """A file system that fails once a day is not left alone for an hour in the end."""
    aside = SetAside()
    aside.add("slow", now_s=0)

    assert aside.holds("slow", 59)
    assert not aside.holds("slow", 61)
    aside.add("slow", now_s=61)
    assert aside.holds("slow", 61 + 119)

    aside.add("slow", now_s=86400)
    assert aside.holds("slow", 86400 + 59)
    assert not aside.holds("slow", 86400 + 61)
    assert not aside.holds("fast", 86400)


def test_what_is_refused_is_answered_by_a_later_poll(asked: Asked) -> None:
    """Whoever asks is not called back while asking."""
    asked.readers._aside.add("slow", time.monotonic())

    asked.ask("echo", say="", group="slow")

    assert asked.answers == []
    assert asked.wait()["echo"] == Answer(None, Failure.SET_ASIDE)


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is read for long, what is needed least goes, the longest waiting first."""
    monkeypatch.setattr(module, "_MAX_WAITING", 10)
    with contextlib.closing(Readers(tmp_path, kinds=KINDS, children=0)) as readers:
        asked = Asked(readers)
        asked.ask("echo", "first turn", turn=0, say="")
        for number in range(20):
            asked.ask("echo", f"{number}", turn=2, say="")
        readers.poll()

        assert asked.answers == [(f"{n}", Answer(None, Failure.BUDGET)) for n in range(11)]
        assert readers.status()["waiting"] == 10


def test_arguments_of_any_length_are_read_in_time(tmp_path: Path) -> None:
    """The patterns of names would take minutes for what a process may pass as one argument."""
    python = build(tmp_path / "python3", "#include <unistd.h>\nint main() { pause(); }")
    with (
        running(python, "a" + 33_000 * "1.1" + "!") as process,
        contextlib.closing(Readers(tmp_path)) as readers,
    ):
        wait_for(lambda: has_execed(process.pid))
        stat = read_stat(process.pid)
        assert stat is not None
        values = request(process.pid, stat.start_ticks, (), wants_command=False)
        answers: list[Answer] = []
        readers.ask("process", values, answers.append)
        readers.wait(time.monotonic() + 60, lambda: bool(answers))

    assert answers[0].failure is None
    assert answers[0].result["name"] == "a"


def test_what_hangs_is_given_up_sooner_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal does not wait for a file system as long as sampling does."""
    monkeypatch.setattr(module, "_HANGS_AFTER_S", 3600.0)
    os.mkfifo(tmp_path / "fifo")
    with contextlib.closing(Readers(tmp_path, kinds=KINDS)) as readers:
        asked = Asked(readers)
        asked.ask("open", "hung", path=str(tmp_path / "fifo"))
        readers.hasten()

        assert asked.wait()["hung"] == Answer(None, Failure.HUNG)


def test_a_reader_that_waits_for_a_busy_child_does_not_hang(asked: Asked) -> None:
    """c++filt may be a child of it, and wait for a CPU for long."""
    asked.ask("spin in a child", cpu_s=1)
    asked.readers.hasten()

    assert asked.wait()["spin in a child"].result == -signal.SIGKILL


def test_readers_have_few_privileges_and_no_network(asked: Asked) -> None:
    """They keep what reading needs, besides standard streams and their socket no descriptor."""
    asked.ask("privileges")

    found = asked.wait()["privileges"].result

    assert set(found["interfaces"]) <= {"lo"}
    assert not found["new_privileges"]
    reading = {2, 19, 40}
    assert {bit for bit in range(64) if found["effective"] >> bit & 1} <= reading
    assert {bit for bit in range(64) if found["permitted"] >> bit & 1} <= reading
    assert len(found["descriptors"]) <= 5  # the fifth is that of the listing


def test_all_children_but_one_end_soon(asked: Asked, tmp_path: Path) -> None:
    """The one that stays answers what is asked for later without being started."""
    os.mkfifo(tmp_path / "pipe")
    asked.ask("open", path=str(tmp_path / "pipe"))
    asked.ask("echo", say="", turn=0)  # for which a child is kept
    wait_until(asked.readers, lambda: asked.readers.status()["children"] == 2)
    (tmp_path / "pipe").write_text("read")
    asked.wait()

    wait_until(asked.readers, lambda: asked.readers.status()["children"] < 2)

    assert asked.readers.status()["children"] == 1


def test_nothing_is_started_after_the_end(asked: Asked) -> None:
    """Whoever asks then gets no answer, and leaves no process behind."""
    asked.readers.close()

    asked.ask("echo", say="")

    assert asked.readers.status()["children"] == 0


def test_a_child_that_has_grown_is_replaced(asked: Asked) -> None:
    """Python returns little memory: what a large file needed must not stay."""
    asked.ask("echo", "before", say="")
    before = asked.wait()["before"].result["pid"]
    asked.ask("grow", bytes=200 << 20)
    asked.wait()
    asked.ask("echo", "after", say="")

    assert asked.wait()["after"].result["pid"] != before


def test_a_child_of_a_large_parent_stays(asked: Asked) -> None:
    """A process begins with the peak memory of its parent, by getrusage(2)."""
    parent = bytearray(b"x" * (200 << 20))
    asked.ask("echo", "before", say="")
    before = asked.wait()["before"].result["pid"]
    del parent
    asked.ask("echo", "after", say="")

    assert asked.wait()["after"].result["pid"] == before


def test_a_child_that_was_killed_while_it_was_idle_costs_nothing(asked: Asked) -> None:
    asked.ask("echo", "before", say="")
    before = asked.wait()["before"].result["pid"]
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: read_stat(before) is None or read_stat(before).is_exited)
    asked.ask("echo", "after", say="")

    assert asked.wait()["after"].result["pid"] != before
    assert not asked.readers.failures


def test_children_end_with_their_parent(tmp_path: Path) -> None:
    """A killed agent leaves no reader behind."""
    script = (
        "import sys, time; from pathlib import Path\n"
        "from profiler.agent.readers import Readers\n"
        f"r = Readers(Path(sys.argv[1]), kinds={KINDS!r})\n"
        "a = []\n"
        "r.ask('echo', {'say': ''}, a.append); r.wait(time.monotonic() + 30, lambda: a)\n"
        "print(a[0].result['pid'], flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()

    deadline_s = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()
