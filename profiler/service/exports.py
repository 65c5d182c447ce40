"""Exports: a window or a comparison as a file for other tools."""

import re
from dataclasses import replace

from profiler.comparison.gate import Gate
from profiler.formats import export
from profiler.service.comparisons import Compared
from profiler.service.diff import diff_graph
from profiler.service.merged import Check, MergedProfiles, PanelRequest
from profiler.service.sharing import Body, json_body

NAME_PATTERN = r"[A-Za-z0-9._-]{0,100}\.(speedscope\.json|folded|pb\.gz|svg|json)"
"""Of the files that can be asked for."""
_NAME = re.compile(NAME_PATTERN, re.ASCII)
_MEDIA_TYPES = {
    ".json": "application/json",
    ".folded": "text/plain; charset=utf-8",
    ".gz": "application/octet-stream",
    ".svg": "image/svg+xml",
}


class NoSuchFileError(LookupError):
    """No file of this name can be made; the message says which can."""


def check_name(name: str, *, is_comparison: bool) -> None:
    """Refuse a name that does not say the format.

    Raises:
        NoSuchFileError: no format has this ending, or it cannot hold a comparison.
    """
    if not _NAME.fullmatch(name):
        raise NoSuchFileError(
            "a name consists of letters, digits, . _ and -, and ends in .speedscope.json,"
            " .folded, .pb.gz, .svg or .json"
        )
    if is_comparison:
        try:
            export.pair_ending(name)
        except export.ExportError as error:
            raise NoSuchFileError(str(error)) from error


def export_profile(
    profiles: MergedProfiles, request: PanelRequest, name: str, check: Check
) -> Body:
    """Return a window as a file.

    Raises:
        NoSuchNodeError: the request's node is not there.
    """
    merged = profiles.merge(request, check)
    check()
    shown = request.view.shown(merged.answer.profile, request.node, check)
    check()
    content = export.encode(
        shown.profile,
        name,
        shown.by,
        by_line=shown.by_line,
        python_native=request.python_native,
    )
    return content, _media_type(name)


def export_comparison(
    compared: Compared, request: PanelRequest, gate: Gate, name: str, check: Check
) -> Body:
    """Return a comparison as a file.

    Raises:
        NoSuchNodeError: the request's node is on neither side.
    """
    if export.pair_ending(name) == ".json":
        wide = replace(request, width_px=float(export.JSON_WIDTH_PX))
        return json_body(diff_graph(compared, wide, gate, check))
    view, node = request.view, request.node
    return export.encode_pair(compared.pair, name, view, node, check=check), _media_type(name)


def _media_type(name: str) -> str:
    return _MEDIA_TYPES[f".{name.rpartition('.')[2]}"]
