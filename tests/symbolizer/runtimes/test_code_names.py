"""What the names of runtimes say."""

import time

import hypothesis.strategies as st
import pytest
from hypothesis import given

from symbolizer.location import Kind, NamedLocation
from symbolizer.runtimes.code_names import CodeName, location_of, split_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Node 24 --perf-basic-prof
        (b"JS:*inner /srv/spin.js:2:15", CodeName("inner", "/srv/spin.js", 2)),
        (b"JS:^get size /srv/spin.js:1:21", CodeName("get size", "/srv/spin.js", 1)),
        (b"JS:+'arrow /srv/spin.js:3:15", CodeName("arrow", "/srv/spin.js", 3)),
        (b"JS:* /srv/spin.js:4:114", CodeName("(anonymous)", "/srv/spin.js", 4)),
        (b"Eval:~ /srv/spin.js:1:1", CodeName("(anonymous)", "/srv/spin.js", 1)),
        (b"Function:~run node:internal/a:9:1", CodeName("run", "node:internal/a", 9)),
        # older versions
        (b"LazyCompile:*foo /srv/a.js:12:3", CodeName("foo", "/srv/a.js", 12)),
        (b"LazyCompile:~ file:///srv/a.mjs:1:2", CodeName("(anonymous)", "/srv/a.mjs", 1)),
        (b"JS:*foo /my files/a.js:12:3", CodeName("foo", "/my files/a.js", 12)),
        (b"JS:*foo evalmachine.<anonymous>:1:2", CodeName("foo", "evalmachine.<anonymous>", 1)),
        (b"Builtin:ArrayMap", CodeName("Builtin:ArrayMap")),
        (b"JS:*foo", CodeName("JS:*foo")),
        (b"JS:*foo a.js:x:2", CodeName("JS:*foo a.js:x:2")),
        # Python 3.12 -X perf
        (b"py::Box.<lambda>:/srv/a.py", CodeName("Box.<lambda>", "/srv/a.py", 0, Kind.PYTHON)),
        (b"py::f:<frozen abc>", CodeName("f", "<frozen abc>", 0, Kind.PYTHON)),
        (b"py::f", CodeName("py::f")),
        # JDK 17, .NET
        (b"int Main.leaf(int)", CodeName("int Main.leaf(int)")),
        (b"void [App] App::Run(int32)[Tier1]", CodeName("void [App] App::Run(int32)[Tier1]")),
    ],
)
def test_names_are_split_as_their_runtimes_put_them(name: bytes, expected: CodeName):
    assert split_name(name) == expected


def test_a_python_function_is_one_in_all_views():
    assert location_of(b"py::Box.size:/srv/a.py") == NamedLocation(
        "Box.size", "[python]", Kind.PYTHON, "/srv/a.py", 0, 0
    )


def test_a_line_counts_if_it_is_in_the_function_s_own_file():
    """V8 gives lines of inlined functions, and dangling pointers for the files of others."""
    name = b"JS:*f file:///srv/a.mjs:3:1"

    places = [location_of(name, file, 7) for file in (b"file:///srv/a.mjs", b"\x7f\xac", b"")]

    assert [(place.file, place.first_line, place.line) for place in places] == [
        ("/srv/a.mjs", 3, 7),
        ("/srv/a.mjs", 3, 3),
        ("/srv/a.mjs", 3, 3),
    ]


def test_a_line_tells_the_file_where_the_name_does_not():
    assert location_of(b"Main.leaf", b"Main.java", 7)[3:] == ("Main.java", 0, 7)


@given(st.binary(max_size=3000))
def test_every_part_of_a_name_is_readable(name: bytes):
    function, _, _, file, *_ = location_of(b"JS:*" + name + b" /a\x1b.js:1:2")

    assert (function + file).isprintable()
    assert function


def test_no_name_takes_long():
    hostile = [b"JS:*" + b" a:1" * 2000, b"JS:*" + b":" * 8000, b"py::" + b":" * 8000]
    begun_s = time.thread_time()
    for name in hostile * 100:
        split_name(name)

    assert time.thread_time() - begun_s < 2  # some milliseconds where nothing else runs
