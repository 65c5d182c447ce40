"""Write profiles as files: the ending of the name says the format.

Every format contains the same counts. What each can hold differs: `.pb.gz` everything; `.folded`
and `.speedscope.json` names and counts; `.svg` and `.json` a drawing, which cannot be read back.
All but pprof leave out what interpreters add to stacks (`storage.interpreters`), unless it is asked
for. Files are read by `profiler.formats.reading`.

What a query merged is Columns, what was just recorded or read from a file a Profile. pprof is
written from a Profile, all else from Columns: the one is made of the other only where it must be.
"""

import errno
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import orjson

from storage.profile import Profile

if TYPE_CHECKING:
    from profiler.flamegraph.differential import Pair
    from profiler.flamegraph.views import View
    from storage.columns import Columns

DEFAULT_BY = ("comm",)
"""Labels drawn as frames above the root, where the format draws a tree."""

STDOUT = "-"
"""The name that stands for standard output, which gets folded text for other programs to read."""

JSON_WIDTH_PX = 4096
"""The drawing in a `.json` is cut for a screen of this width, twice a common one."""


class ExportError(ValueError):
    """A file whose ending names no format that can be written."""


def check_output(file: str) -> None:
    """Fail early, before there is anything to write.

    Raises:
        ExportError: the ending names no format.
        OSError: it is a directory, or its folder does not exist or cannot be written to.
    """
    refuse_directory(file)
    ending_of(file)
    check_folder(file)


def refuse_directory(file: str) -> None:
    """Fail if the name of a file to write is that of a directory.

    Raises:
        IsADirectoryError: it is.
    """
    if file != STDOUT and Path(file).is_dir():
        raise IsADirectoryError(f"cannot write {file}: it is a directory")


def check_folder(file: str) -> None:
    """Fail early where a file cannot be written.

    Raises:
        OSError: the folder does not exist or cannot be written to.
    """
    path = Path(file)
    if file == STDOUT:
        return
    if path.exists() and not path.is_file():  # a pipe or a device
        if not os.access(path, os.W_OK):
            raise PermissionError(f"cannot write {file}: it is not writable")
        return
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {file}: there is no folder {path.parent}")
    try:  # access(2) does not know of immutable folders, nor of file systems as /proc
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        if error.errno != errno.ENOSPC:  # there may be room at the end
            raise PermissionError(
                f"cannot write {file}: the folder {path.parent} is not writable"
            ) from error


def encode(
    profile: "Profile | Columns",
    file: str,
    by: Sequence[str] | None = None,
    *,
    by_line: bool = False,
    python_native: bool = False,
) -> bytes:
    """Return the profile in the format that the ending of `file` names.

    `by_line` tells the source lines of functions apart, as pprof does in any case.

    Raises:
        ExportError: the ending names no format.
    """
    ending = ending_of(file)
    if ending == _PPROF:
        return _write_pprof(profile if isinstance(profile, Profile) else profile.to_profile())
    shown = _as_columns(profile, python_native=python_native)
    return _WRITERS[ending](shown, DEFAULT_BY if by is None else by, by_line=by_line)


def encode_pair(
    pair: "Pair",
    file: str,
    view: "View | None" = None,
    node: int | None = None,
    *,
    record: Mapping[str, object] = MappingProxyType({}),
    check: Callable[[], None] = lambda: None,
) -> bytes:
    """Return a comparison in the format that the ending of `file` names, as a view leaves it.

    `record` is what is said of the comparison in JSON, to which `.json` adds the graph.

    Raises:
        ExportError: the ending names no format that holds two sides.
        NoSuchNodeError: the node is on neither side.
    """
    from profiler.flamegraph.differential import fields_of_pair
    from profiler.flamegraph.flamegraph import ROOT_ID, Screen
    from profiler.flamegraph.views import View, path_to
    from profiler.formats import svg_diff

    ending = pair_ending(file)
    view, node = view or View(DEFAULT_BY), ROOT_ID if node is None else node
    if ending in _PAIR_WRITERS:
        before, after = pair.shown(view, node, check)
        check()
        first, second = (view.folded(each.profile) for each in (before, after))
        return _PAIR_WRITERS[ending](first, second, after.by, by_line=view.by_line)
    shown = pair.view(view, check)
    check()
    path = [box for _, box in path_to(shown.paths, node, check)]
    if ending == ".svg":
        graph = pair.draw(shown, path, svg_diff.SCREEN)
        return svg_diff.draw(pair, graph, by_line=view.by_line)
    graph = pair.draw(shown, path, Screen(JSON_WIDTH_PX))
    return orjson.dumps(
        {**record, **fields_of_pair(pair, graph)}, option=orjson.OPT_SERIALIZE_NUMPY
    )


def pair_ending(file: str) -> str:
    """Return the ending that says in which format a comparison is written.

    Raises:
        ExportError: it names no format, or one that holds no two sides.
    """
    for ending in _PAIR_ENDINGS:
        if file == ending or (ending != STDOUT and file.endswith(ending)):
            return ".folded" if ending == STDOUT else ending
    endings = ", ".join(_PAIR_ENDINGS[:-1])
    if file.endswith(".pb.gz"):
        raise ExportError(
            f"cannot write a comparison as {file}: pprof holds one side; write each by itself,"
            f" or both as one of {endings}"
        )
    raise ExportError(
        f"cannot write a comparison as {file}: its ending names no format (there are {endings})"
    )


def write(
    profile: "Profile | Columns",
    file: str,
    by: Sequence[str] | None = None,
    *,
    by_line: bool = False,
    python_native: bool = False,
) -> None:
    """Write a profile in the format that the ending names; `-` is folded text on stdout.

    A file appears complete or not at all. pprof keeps labels on its samples and ignores `by`.

    Raises:
        ExportError: the ending names no format.
        OSError: the file cannot be written.
    """
    put(encode(profile, file, by, by_line=by_line, python_native=python_native), file)


def put(content: bytes, file: str) -> None:
    """Write a file, which appears complete or not at all; `-` is standard output.

    Raises:
        OSError: the file cannot be written.
    """
    if file == STDOUT:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    path = Path(file)
    if path.exists() and not path.is_file():
        path.write_bytes(content)  # a pipe or a device must be written to, not replaced
        return
    part = path.with_name(f".{path.name[:200]}.{os.urandom(4).hex()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class _Writer(Protocol):
    def __call__(self, profile: "Columns", by: Sequence[str], *, by_line: bool) -> bytes: ...


class _PairWriter(Protocol):
    def __call__(
        self, before: "Columns", after: "Columns", by: Sequence[str], *, by_line: bool
    ) -> bytes: ...


# Each format is imported when it is needed: the sampling process is to stay small, and what only
# draws or encodes would be 6 MB of it.
# ruff: noqa: PLC0415


def _as_columns(profile: "Profile | Columns", *, python_native: bool) -> "Columns":
    from storage.columns import Columns
    from storage.interpreters import fold_interpreters

    columns = profile if isinstance(profile, Columns) else Columns.of(profile)
    return columns if python_native else fold_interpreters(columns)


def _write_pprof(profile: Profile) -> bytes:
    from storage.formats import pprof

    return pprof.encode(profile)


def _write_speedscope(profile: "Columns", by: Sequence[str], *, by_line: bool) -> bytes:
    from profiler.formats import speedscope

    return speedscope.encode(profile, by, by_line=by_line)


def _write_folded(profile: "Columns", by: Sequence[str], *, by_line: bool) -> bytes:
    from storage.formats import folded

    return folded.encode(profile, by, by_line=by_line)


def _write_svg(profile: "Columns", by: Sequence[str], *, by_line: bool) -> bytes:
    from profiler.formats import svg

    return svg.draw(profile, by, by_line=by_line)


def _write_json(profile: "Columns", by: Sequence[str], *, by_line: bool) -> bytes:
    from profiler.flamegraph import flamegraph
    from profiler.flamegraph.stacks import Group

    group = Group.LINE if by_line else Group.FUNCTION
    graph = flamegraph.build(profile, by, group, screen=flamegraph.Screen(JSON_WIDTH_PX))
    return orjson.dumps(
        flamegraph.fields_of_graph(profile, graph),
        option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_SORT_KEYS,
    )


def _pair_as_speedscope(
    before: "Columns", after: "Columns", by: Sequence[str], *, by_line: bool
) -> bytes:
    from profiler.formats import speedscope

    return speedscope.encode_pair(before, after, by, by_line=by_line)


def _pair_as_folded(
    before: "Columns", after: "Columns", by: Sequence[str], *, by_line: bool
) -> bytes:
    from storage.formats import folded

    return folded.encode_pair(before, after, by, by_line=by_line)


_WRITERS: dict[str, _Writer] = {
    ".speedscope.json": _write_speedscope,
    ".folded": _write_folded,
    ".svg": _write_svg,
    ".json": _write_json,
    STDOUT: _write_folded,
}
_PPROF = ".pb.gz"
_ENDINGS = (_PPROF, *_WRITERS)
_PAIR_WRITERS: dict[str, _PairWriter] = {
    ".speedscope.json": _pair_as_speedscope,
    ".folded": _pair_as_folded,
}
_PAIR_ENDINGS = (".speedscope.json", ".folded", ".svg", ".json", STDOUT)


def ending_of(file: str) -> str:
    """Return the ending that says in which format a profile is written.

    Raises:
        ExportError: it names no format.
    """
    # In this order: `.speedscope.json` stands before `.json`.
    for ending in _ENDINGS:
        if file == ending or (ending != STDOUT and file.endswith(ending)):
            return ending
    endings = ", ".join(ending for ending in _ENDINGS if ending != STDOUT)
    raise ExportError(f"cannot write {file}: its ending names no format (there are {endings})")
