"""The terminal: tables and flame graphs that fit, with and without colours."""

import io
import os
import pty
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler import text
from profiler.commands import terminal
from profiler.flamegraph import flamegraph
from storage.columns import Columns
from tests.support import profiles as some
from tests.support.python_profiles import shop_profile

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_table_shows_self_and_total_with_recursion_once():
    """The columns are aligned, the largest self time stands first."""
    table = terminal.function_table(Columns.of(some.sample_profile()), width=72, limit=3)

    assert table.splitlines() == [
        "SELF             TOTAL            FUNCTION                     MODULE",
        "31.2 %  50.5 ms  50.0 %  80.8 ms  clamp                        api",
        "25.0 %  40.4 ms  25.0 %  40.4 ms  square                       [jit]",
        "18.8 %  30.3 ms  18.8 %  30.3 ms  memcpy                       libc.so.6",
        "and 5 more functions",
    ]


@given(some.profiles(), st.integers(40, 120))
def test_no_line_is_wider_than_the_terminal(profile, width):
    """Whatever the names are, nothing wraps."""
    graph = flamegraph.build(Columns.of(profile), ("comm",))
    shown = [
        terminal.function_table(Columns.of(profile), width=width, limit=20),
        terminal.icicle(graph, width),
        terminal.tree(graph, width),
    ]

    for line in "\n".join(shown).split("\n"):
        assert text.cells(COLOUR.sub("", line)) <= width


def test_hostile_names_leave_only_our_own_escape_codes():
    """A name cannot steer the terminal or start a line."""
    profile = some.hostile_profile()
    graph = flamegraph.build(Columns.of(profile), ("comm",))

    drawn = terminal.icicle(graph, 100) + terminal.tree(graph, 100)
    table = terminal.function_table(Columns.of(profile), width=100, limit=50)

    left = COLOUR.sub("", drawn) + table
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", left)


def test_wide_characters_do_not_break_the_alignment():
    """The module column starts in the same cell in every line."""
    wide, plain = some.named("漢字の関数"), some.named("plain")
    profile = some.build([({}, [wide], 2), ({}, [plain], 1)])

    lines = terminal.function_table(Columns.of(profile), width=80, limit=5).splitlines()

    starts = {text.cells(line[: line.index("[python]")]) for line in lines[1:]}
    assert len(starts) == 1


def test_the_icicle_has_one_line_per_level_that_tiles_the_root():
    """The root spans the terminal; the level below it is as wide when nothing has self time."""
    graph = flamegraph.build(Columns.of(some.sample_profile()), ("comm",))

    lines = COLOUR.sub("", terminal.icicle(graph, 64)).split("\n")

    assert lines[0] == "162 ms in 16 samples"
    assert [text.cells(line) for line in lines[1:4]] == [64, 64, 64]
    assert lines[2].startswith("api ")
    assert lines[2][44:].startswith("python3")
    assert lines[3].startswith("main ")


def test_the_icicle_names_the_modules_of_python_functions():
    """As the page and the drawings do."""
    graph = flamegraph.build(Columns.of(shop_profile()))

    lines = COLOUR.sub("", terminal.icicle(graph, 100))

    assert "shop.pricing.<module> " in lines
    assert "shop.pricing.main " in lines


def test_the_tree_indents_callees_with_their_share():
    """Without colours, depth is indentation."""
    graph = flamegraph.build(Columns.of(some.sample_profile()), ("comm",))

    lines = terminal.tree(graph, 80).splitlines()

    assert lines[:5] == [
        "162 ms in 16 samples",
        "  100 %  all",
        " 68.8 %   api",
        " 68.8 %    main  [api]",
        " 50.0 %     work  [api]",
    ]


@pytest.mark.parametrize(
    ("stream", "environment", "has_colours"),
    [
        (Terminal(), {"TERM": "xterm-256color"}, True),
        (Terminal(), {"TERM": "xterm-256color", "NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "xterm-256color", "NO_COLOR": ""}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {"TERM": "xterm-256color"}, False),
    ],
)
def test_colours_only_where_they_are_wanted(monkeypatch, stream, environment, has_colours):
    """Pipes, dumb terminals and NO_COLOR get text without escape codes."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    chart = terminal.flame_chart(Columns.of(some.sample_profile()), ("comm",), stream)

    assert ("\x1b[" in chart) is has_colours


def test_an_empty_profile_is_shown_as_one():
    """A window in which nothing ran is not an error."""
    profile = some.build([])

    assert terminal.function_table(Columns.of(profile), width=80, limit=5).startswith("SELF")
    assert "0 samples" in terminal.tree(flamegraph.build(Columns.of(profile)), 80)
    assert "0 samples" in terminal.icicle(flamegraph.build(Columns.of(profile)), 80)


def test_counts_of_folded_files_have_no_time():
    """A profile without a clock is told in samples."""
    profile = some.samples_only(some.sample_profile())

    assert terminal.tree(flamegraph.build(Columns.of(profile)), 80).startswith("16 samples\n")


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0, "nanoseconds", "0 s"),
        (0, "bytes", "0 B"),
        (999, "nanoseconds", "999 ns"),
        (1_234_000, "nanoseconds", "1.23 ms"),
        (61_500_000_000, "nanoseconds", "61.5 s"),
        (7_200_000_000_000, "nanoseconds", "7,200 s"),
        (1536, "bytes", "1.50 KiB"),
        (12_345, "count", "12,345"),
        (5, "pages", "5 pages"),
    ],
)
def test_quantities_have_three_digits_and_a_unit(value, unit, shown):
    """The unit suits the size."""
    assert text.quantity(value, unit) == shown


@given(st.text(), st.integers(0, 30))
def test_padded_text_has_exactly_the_width(content, width):
    """Wide and zero-width characters are counted as they are drawn."""
    assert text.cells(text.pad(content, width)) == width
    assert text.cells(text.fit(content, width)) <= width


def test_top_draws_on_a_terminal_that_does_not_say_its_size():
    """A serial console, or a terminal that nobody has given a window, has 0 lines of 0 columns."""
    code = (
        "from profiler.commands.top import screen;"
        "from tests.support.profiles import sample_profile;"
        "print(screen(sample_profile(), is_screen=True))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    pid, drawn = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", code], environment)
    shown = b""
    try:
        while part := os.read(drawn, 4096):
            shown += part
    except OSError:  # its other side is closed
        pass
    os.close(drawn)
    os.waitpid(pid, 0)

    lines = shown.decode().splitlines()
    assert lines[0].startswith("everflame top  ")
    assert len([line for line in lines if "%" in line]) > 1
