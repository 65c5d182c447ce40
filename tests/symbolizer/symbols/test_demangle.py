import os
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from symbolizer.symbols.demangle import Demangler
from tests.support.live import stat_fields, wait_for


@pytest.fixture
def demangler():
    demangler = Demangler()
    yield demangler
    demangler.close()


def program(tmp_path, text):
    path = tmp_path / "filter"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o700)
    return str(path)


def cpu_s_of_children():
    """Return the CPU time of all children that have been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def is_stopped(pid):
    return stat_fields(pid)[0] == b"T"


def test_only_mangled_names_change(demangler):
    """Words that only look like an old compiler's names do not change."""
    names = [
        b"main",
        b"_Z1fv",
        b"f__Fi",
        b"_Z3foov.cold",
        b"_Z1fv@plt",
        b"_Z",
        b"_RNvC1a1b",
        b"a b",
    ]

    assert demangler.demangle(names) == [
        *(b"main", b"f()", b"f__Fi", b"foo() [clone .cold]", b"f()@plt", b"_Z", b"a::b", b"a b"),
    ]


def test_lines_and_options_do_not_reach_the_child(demangler):
    """A name with a newline in it would shift all lines after it."""
    names = [b"_Z1fv\n_Z1gv", b"_Z1fv _Z1gv", b"--help", b"_Z1hv"]

    assert demangler.demangle(names) == [*names[:3], b"h()"]


def test_large_batches_do_not_block(demangler):
    """Both pipes fill up, and each result still belongs to its name."""
    names = [b"_ZN%d%sEi" % (n, b"x" * n) for n in range(1, 200)] * 50

    answers = demangler.demangle(names)

    assert answers == [b"x" * n + b"(int)" for n in range(1, 200)] * 50


def test_missing_program_leaves_names_mangled():
    """binutils need not be installed."""
    assert Demangler("/no/such/program").demangle([b"_Z1fv"]) == [b"_Z1fv"]


@pytest.mark.parametrize("text", ["exit 1", "exec sleep 100", "echo one too many; exec cat"])
def test_failing_child_leaves_names_mangled(tmp_path, text):
    """It exits, hangs, or writes too many lines; the call returns in bounded time."""
    demangler = Demangler(program(tmp_path, text))
    started = time.monotonic()

    answers = demangler.demangle([b"_Z1fv", b"_Z1gv"])

    demangler.close()
    assert answers == [b"_Z1fv", b"_Z1gv"]
    assert time.monotonic() - started < 60


def test_a_child_that_is_busy_for_ever_is_ended(tmp_path):
    """By the CPU time that it has used; the kernel ends it if nobody is left who could."""
    demangler = Demangler(program(tmp_path, "exec yes > /dev/null"))
    before_s = cpu_s_of_children()

    answers = demangler.demangle([b"_Z1fv"] * 2000)

    assert answers == [b"_Z1fv"] * 2000
    assert cpu_s_of_children() - before_s < 4
    child = demangler._running_child()
    assert resource.prlimit(child.pid, resource.RLIMIT_CPU) == (10, 10)
    demangler.close()


def test_names_do_not_depend_on_how_long_the_child_waits_for_a_cpu(tmp_path):
    """On a busy host it may be seconds. A child that is stopped gets none either."""
    file = tmp_path / "pid"
    stopped = f"echo $$ > {file}.new; mv {file}.new {file}; kill -STOP $$; exec c++filt"
    demangler = Demangler(program(tmp_path, stopped))
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(demangler.demangle, [b"_Z1fv"])
        wait_for(file.exists)
        pid = int(file.read_text())
        wait_for(lambda: is_stopped(pid))
        wait([answers], 1.5)
        os.kill(pid, signal.SIGCONT)

        assert answers.result(30) == [b"f()"]
    demangler.close()


def test_name_that_kills_the_child_costs_only_itself(tmp_path):
    """It stays mangled, and the child is asked for the others again."""
    killer = 'while read name; do [ "$name" = _Z3badv ] && exit 1; echo "${name#_Z1}"; done'
    demangler = Demangler(program(tmp_path, killer))

    answers = demangler.demangle([b"_Z1fv", b"_Z3badv", b"_Z1gv"])

    demangler.close()
    assert answers == [b"fv", b"_Z3badv", b"gv"]


def test_expanding_name_is_bounded(demangler):
    """Substitutions double a name many times; memory and time stay bounded."""
    bomb = b"_Z1fI1AE"
    for seq in [b"S_", *(b"S%X_" % n for n in range(30))]:
        bomb += b"1BI" + seq + seq + b"E"
    before_s = cpu_s_of_children()

    answers = demangler.demangle([b"_Z1gv", bomb, b"_Z1hv"])

    assert answers[0] == b"g()"
    assert answers[2] == b"h()"
    assert len(answers[1]) < 8 << 20
    demangler.close()
    assert cpu_s_of_children() - before_s < 4
