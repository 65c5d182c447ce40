"""The files that a command writes: checked before anything is recorded or read, then written."""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from profiler.formats import export
from profiler.text import path_text

if TYPE_CHECKING:
    from storage.columns import Columns  # memory that sampling does not need
    from storage.profile import Profile


def check_places(files: Sequence[str]) -> None:
    """Fail early if a file cannot be written, whatever is to be in it.

    Raises:
        OSError: a file is a directory, its folder cannot be written to, or stdout is closed.
    """
    for file in files:
        export.refuse_directory(file)
        export.check_folder(file)
        _check_stdout(file)


def _check_stdout(file: str) -> None:
    if file == export.STDOUT:
        sys.stdout.write("")  # raises if it is closed


def check(files: Sequence[str]) -> None:
    """Fail early, while nothing is lost yet.

    Raises:
        ExportError: an ending names no format.
        OSError: a file is a directory, its folder cannot be written to, or stdout is closed.
    """
    for file in files:
        export.check_output(file)
        _check_stdout(file)


def write(
    profile: "Profile | Columns",
    files: Sequence[str],
    by: tuple[str, ...] | None,
    *,
    by_line: bool = False,
    python_native: bool = False,
) -> tuple[list[str], OSError | None]:
    """Write every file. Return those that were written, and the error of the first that was not."""
    return _write_each(
        files,
        lambda file: export.write(
            profile, file, by=by, by_line=by_line, python_native=python_native
        ),
    )


def _write_each(
    files: Sequence[str], write_one: Callable[[str], None]
) -> tuple[list[str], OSError | None]:
    written, first = [], None
    for file in files:
        try:
            write_one(file)
        except BrokenPipeError:
            raise
        except OSError as error:
            problem = OSError(f"cannot write {path_text(file)}: {error.strerror or error}")
            problem.__cause__ = error
            first = first or problem
        else:
            written.append(file)
    return written, first


def write_all(
    profile: "Profile | Columns",
    files: Sequence[str],
    by: tuple[str, ...] | None,
    *,
    by_line: bool = False,
    python_native: bool = False,
) -> None:
    """Write every file, and say so on stderr.

    Raises:
        OSError: one of them cannot be written; the others are.
    """
    _tell(*write(profile, files, by, by_line=by_line, python_native=python_native))


def put_all(content: bytes, files: Sequence[str]) -> None:
    """Write the same content into every file, and say so on stderr.

    Raises:
        OSError: one of them cannot be written; the others are.
    """
    _tell(*_write_each(files, lambda file: export.put(content, file)))


def _tell(written: Sequence[str], error: OSError | None) -> None:
    for file in written:
        if file != export.STDOUT:
            print(f"wrote {path_text(file)}", file=sys.stderr)
    if error:
        raise error
