"""Python's names of threads, read from the memory of real processes of each version."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from symbolizer.runtimes.object_layouts import OBJECT_LAYOUTS
from symbolizer.runtimes.python_objects import MAX_CHARACTERS
from symbolizer.runtimes.thread_names import Outcome, read_thread_names
from tests.support.jit_programs import child_of
from tests.support.live import wait_for
from tests.support.python_threads import program, question, tids_of
from tests.support.pythons import Interpreter, installed, interpreters, need_python

# Each kind of instance that may have attributes elsewhere, and each kind of string.
ALL = """
class Mine(threading.Thread):
    def __init__(self, **options):
        super().__init__(**options)
        for number in range(40): setattr(self, f"attribute_{number}", number)
class Slotted(threading.Thread):
    __slots__ = ("mine",)
start("ingest-3", "Gr\\u00fc\\u00dfe", "\\u540d\\u524d", "\\U0001f600")
start("x" * 300, "a\\nb\\x1b[m\\0c")
start("many attributes", of=Mine)
start("with slots", of=Slotted)
(seen,) = start("with a dictionary")
vars(seen)["more"] = 1
pool = ThreadPoolExecutor(2)
for _ in range(2): pool.submit(held.wait)
timer = threading.Timer(1000, print)
timer.name = "timer"
timer.daemon = True
timer.start()
tell("ready")
stay()
"""
NAMES = {
    *("ingest-3", "Grüße", "名前", "😀", "x" * MAX_CHARACTERS + "…", "a\\nb\\x1b[m\\x00c"),
    *("many attributes", "with slots", "with a dictionary", "timer"),
    *("ThreadPoolExecutor-0_0", "ThreadPoolExecutor-0_1"),
}

WITHOUT = [each for each in interpreters() if each.version[1] in OBJECT_LAYOUTS]
STYLES = [(3, 10), (3, 11), (3, 12), (3, 13)]


def names_of(python: Interpreter, pid: int) -> Mapping[int, str]:
    """Return the names of threads by the kernel's numbers."""
    answer = read_thread_names(question(python, pid))
    assert answer is not None
    assert answer["outcome"] == Outcome.READ
    return dict(answer["names"])


@pytest.mark.parametrize("python", WITHOUT, ids=lambda each: each.name)
def test_threads_are_called_what_python_calls_them(python: Interpreter) -> None:
    with program(python, ALL) as process:
        process.stdout.readline()
        names = names_of(python, process.pid)
        tids = tids_of(process.pid)

    assert set(names.values()) == NAMES
    assert names.keys() == tids - {process.pid}


@pytest.mark.parametrize("version", STYLES)
def test_the_thread_with_a_name_is_the_one_that_python_says(version: tuple[int, int]) -> None:
    script = "tell(*(f'{t.native_id}:{t.name}' for t in start('one', 'two', 'three')))\nstay()"
    python = need_python(version)
    with program(python, script) as process:
        told = process.stdout.readline().decode().split()
        names = names_of(python, process.pid)

    assert {f"{tid}:{name}" for tid, name in names.items()} == {*told}


@pytest.mark.parametrize("version", STYLES)
def test_threads_that_start_end_and_change_their_names_are_followed(
    version: tuple[int, int],
) -> None:
    script = """
first, = start("first")
ending = threading.Event()
last, = start("last", target=ending.wait)
tell("ready")
sys.stdin.readline()
first.name = "renamed"
ending.set()
last.join()
start("later")
tell("changed")
stay()
"""
    python = need_python(version)
    with program(python, script) as process:
        process.stdout.readline()
        before = sorted(names_of(python, process.pid).values())
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        after = sorted(names_of(python, process.pid).values())

    assert before == ["first", "last"]
    assert after == ["later", "renamed"]


@pytest.mark.parametrize("version", STYLES)
def test_a_fork_has_the_names_of_its_own_threads(version: tuple[int, int]) -> None:
    """What it inherits says the numbers of its parent's threads."""
    script = """
start("of parent", "also of parent")
if os.fork() == 0:
    start("of child")
    tell(os.getpid())
held.wait()
"""
    python = need_python(version)
    with program(python, script) as process:
        child = int(process.stdout.readline())
        try:
            names = [names_of(python, pid) for pid in (process.pid, child)]
        finally:
            os.kill(child, 9)

    assert [sorted(each.values()) for each in names] == [
        ["also of parent", "of parent"],
        ["of child"],
    ]


@pytest.mark.kernel
@pytest.mark.parametrize("options", [("--pid",), ("--pid", "--mount", "--mount-proc")])
def test_threads_in_another_pid_namespace_have_the_hosts_numbers(options: tuple[str, ...]) -> None:
    python = need_python((3, 11))
    script = "start('inside')\ntell(os.getpid())\nstay()"
    with program(python, script, "unshare", *options, "--fork", "--kill-child") as process:
        own = int(process.stdout.readline())
        pid = child_of(process.pid)
        names = names_of(python, pid)
        tids = tids_of(pid)

    assert own == 1
    assert names == {(tids - {pid}).pop(): "inside"}


@pytest.mark.parametrize("version", [(3, 10), (3, 12), (3, 13)])
def test_threads_of_sub_interpreters_have_names(version: tuple[int, int]) -> None:
    script = """
try: import _interpreters as interpreters
except ImportError: import _xxsubinterpreters as interpreters
inner = "import threading; threading.Thread(target=threading.Event().wait, name='inner').start()"
try: number = interpreters.create("legacy")
except TypeError:
    try: number = interpreters.create(isolated=False)
    except TypeError: number = interpreters.create()
def outer(): interpreters.run_string(number, inner)
start("outer", target=outer)
"""
    python = need_python(version)
    with program(python, script + "tell('ready')\nstay()") as process:
        process.stdout.readline()
        wait_for(lambda: "inner" in names_of(python, process.pid).values(), 20, "the inner thread")


def test_a_number_that_two_threads_claim_is_nobodys() -> None:
    """As greenlets do, which all have that of the thread that runs them."""
    script = """
one, two, three = start("one", "two", "three")
two._native_id = one._native_id
tell(three.native_id)
stay()
"""
    python = need_python((3, 11))
    with program(python, script) as process:
        third = int(process.stdout.readline())
        names = names_of(python, process.pid)

    assert names == {third: "three"}


@pytest.mark.parametrize(
    "changes",
    [
        "thread._native_id = 1",
        "thread._native_id = -thread._native_id",
        "thread._native_id = thread._native_id + (1 << 60)",
        "thread._native_id = str(thread._native_id)",
        "thread._native_id = True",
        "thread._native_id = os.getpid()",
        "del thread._native_id",
        "thread._name = b'bytes'",
        "thread._name = 7",
        "thread._name = ''",
        "thread._name = None",
        "del thread._name",
        "threading._active[threading.get_ident()] = 'no thread'",
        "threading._active[1] = 1.5",
    ],
)
@pytest.mark.parametrize("version", [(3, 8), (3, 11), (3, 13)])
def test_what_is_no_name_of_a_thread_that_runs_is_left_out(
    version: tuple[int, int], changes: str
) -> None:
    python = need_python(version)
    script = f"thread, = start('changed')\nstart('kept')\n{changes}\ntell('ready')\nstay()"
    with program(python, script) as process:
        process.stdout.readline()
        names = set(names_of(python, process.pid).values())

    assert names == ({"kept", "changed"} if "_active" in changes else {"kept"})


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ("threading._active = None", Outcome.UNREADABLE),
        ("threading._active = [threading.main_thread()]", Outcome.UNREADABLE),
        ("del threading._active", Outcome.UNREADABLE),
        ("del sys.modules['threading']", Outcome.NO_MODULE),
        ("threading._active.update((n, held) for n in range(70_000))", Outcome.TOO_LARGE),
        ("threading._active.update((n, held) for n in range(5_000))", Outcome.TOO_LARGE),
    ],
)
def test_what_is_no_list_of_threads_is_refused(script: str, outcome: Outcome) -> None:
    python = need_python((3, 11))
    with program(python, f"start('one')\n{script}\ntell('ready')\nstay()") as process:
        process.stdout.readline()
        answer = read_thread_names(question(python, process.pid))

    assert answer == {"outcome": outcome, "names": []}


def test_a_module_among_thousands_is_found() -> None:
    python = need_python((3, 12))
    script = """
threads = sys.modules.pop("threading")
for number in range(5_000): sys.modules[f"module_{number}"] = sys
sys.modules["threading"] = threads
start("one")
tell("ready")
stay()
"""
    with program(python, script) as process:
        process.stdout.readline()
        names = names_of(python, process.pid)

    assert [*names.values()] == ["one"]


def test_threads_are_read_when_the_first_one_has_exited() -> None:
    """/proc shows no memory of the process by its own number then."""
    python = need_python((3, 11))
    script = """
start("one")
tell("ready")
sys.stdin.readline()
ctypes.CDLL(None).syscall(60, 0)
"""
    with program(python, script) as process:
        process.stdout.readline()
        asked = question(python, process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        stat = Path(f"/proc/{process.pid}/stat")
        wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z")
        answer = read_thread_names(asked)

    assert answer is not None
    assert [name for _, name in answer["names"]] == ["one"]


def test_a_process_that_has_ended_has_no_names() -> None:
    python = need_python((3, 11))
    with program(python, "tell('ready')\nstay()") as process:
        process.stdout.readline()
        asked = question(python, process.pid)
        another = read_thread_names({**asked, "start_ticks": asked["start_ticks"] + 1})

    assert another is None
    assert read_thread_names(asked) is None


def test_versions_that_tell_the_kernel_are_not_read() -> None:
    python = installed()[-1]
    with program(python, "tell('ready')\nstay()") as process:
        process.stdout.readline()
        asked = {**question(python, process.pid), "version": 0x030E00F0}
        answer = read_thread_names(asked)

    assert answer == {"outcome": Outcome.UNKNOWN_VERSION, "names": []}


def test_processes_that_may_not_be_read_are_refused() -> None:
    """Without CAP_SYS_PTRACE only those of the same user can."""
    python = need_python((3, 11))
    with program(python, "start('one')\ntell('ready')\nstay()") as process:
        process.stdout.readline()
        asked = question(python, process.pid)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.setgid(12345)
                os.setuid(12345)
                os.write(writer, str((read_thread_names(asked) or {}).get("outcome")).encode())
            os._exit(0)
        os.close(writer)
        outcome = os.read(reader, 100).decode()
        os.close(reader)
        os.waitpid(child, 0)

    assert outcome == Outcome.NOT_PERMITTED


@pytest.mark.parametrize("version", STYLES)
def test_names_are_those_of_threads_while_these_come_and_go(version: tuple[int, int]) -> None:
    """Memory that is used again while it is read gives no other name."""
    python = need_python(version)
    script = """
def come_and_go():
    while True:
        text = [f"no name {number}" for number in range(50)]
        threading.Thread(target=text.clear, name="short").start()
start("churn", target=come_and_go)
tell("ready")
stay()
"""
    seen: set[str] = set()
    outcomes: set[str] = set()
    with program(python, script) as process:
        process.stdout.readline()
        asked = question(python, process.pid)
        for _ in range(200):
            answer = read_thread_names(asked)
            assert answer is not None
            outcomes.add(answer["outcome"])
            seen.update(name for _, name in answer["names"])

    assert "churn" in seen
    assert seen <= {"churn", "short"}
    assert outcomes <= {Outcome.READ, Outcome.UNREADABLE}
