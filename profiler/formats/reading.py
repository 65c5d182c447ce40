"""Reading: the door by which every command reads files, ours and those of other programs.

The content decides what a file is, never its name: pprof, speedscope's JSON, perf script's text or
folded text, each plain or in gzip. What can be written by `profiler.formats.export` and holds
stacks can be read here.
"""

import io
from pathlib import Path
from typing import BinaryIO

from profiler.formats.readers import folded, perf_script, pprof, speedscope
from profiler.formats.readers.detect import Format, detect, refuse_json
from profiler.formats.readers.result import ChoiceError, OneSideError, Reading, ReadOptions
from profiler.formats.readers.source import HEAD_BYTES, JSON_GROWTH, Source
from storage.formats.limits import exhaustion_named
from storage.profile import ProfileError

__all__ = ["ChoiceError", "OneSideError", "ReadOptions", "Reading", "read", "read_bytes"]

_ONLY_FOR = {
    "event": {Format.PERF_SCRIPT},
    "sample_type": {Format.PPROF, Format.JSON},
    "side": {Format.FOLDED, Format.JSON},
}
"""Formats that an option is for."""
_DEFAULTS = ReadOptions()


def read(file: str, options: ReadOptions = _DEFAULTS) -> Reading:
    """Read a file of any format that is known.

    Raises:
        UnsupportedFormatError: it is of a format that is not read; the message says which.
        ChoiceError: an option asks for what is not in it, or one is needed.
        ProfileError: it is damaged. All of these name the file.
        OSError: it cannot be read.
    """
    try:
        with Path(file).open("rb") as stream, exhaustion_named():
            return _read(stream, options)
    except ProfileError as error:
        raise type(error)(f"{file}: {error}") from error
    except OSError as error:
        reason = (error.strerror or "it failed").lower()
        raise type(error)(f"cannot read {file}: {reason}") from error


def read_bytes(content: bytes, options: ReadOptions = _DEFAULTS) -> Reading:
    """Read the content of a file, as `read` does."""
    with exhaustion_named():
        return _read(io.BytesIO(content), options)


def _read(stream: BinaryIO, options: ReadOptions) -> Reading:
    source = Source(stream)
    format_ = detect(source.head, is_cut=len(source.head) == HEAD_BYTES)
    for option, formats in _ONLY_FOR.items():
        if getattr(options, option) and format_ not in formats:
            name = option.replace("_", "-")
            error = OneSideError if option == "side" else ChoiceError
            raise error(f"--{name} is not for {format_.value}, which this file is")
    if format_ is Format.PPROF:
        reading = pprof.read(source.content(), options)
    elif format_ is Format.JSON:
        document = speedscope.parse(source.content(JSON_GROWTH), source.read_bytes)
        if not speedscope.is_speedscope(document):
            raise refuse_json(document)
        reading = speedscope.read(document, options, source.read_bytes)
    elif format_ is Format.PERF_SCRIPT:
        reading = perf_script.read(source.lines(), options, source.keep)
    else:
        reading = folded.read(source.lines(), options, source.keep)
    if reading.profile.total_samples == 0:
        warnings = (*reading.warnings, "the profile is empty: it contains no samples")
        return Reading(reading.profile, reading.format, warnings, reading.scale)
    return reading
