"""Read what Go's linker wrote into a program about its sources (Go's package debug/buildinfo).

The section .go.buildinfo holds a header of 32 bytes at a multiple of 16: the magic, the pointers'
size, flags. Since Go 1.18 two strings follow, each preceded by its length as a varint: Go's
version, and the module's lines (`mod`, `dep`, `build`, separated by tabs) between two marks of 16
bytes.
"""

from typing import NamedTuple

from symbolizer.symbols.elf import Elf

_MAGIC = b"\xff Go buildinf:"
_HEADER_BYTES = 32
_FLAGS_AT, _INLINE_STRINGS = 15, 0x2
_MARK_BYTES = 16
_MAX_SECTION_BYTES = 1 << 20  # a program with 2,000 dependencies has 200 KB
_MAX_TEXT = 256


class GoBuild(NamedTuple):
    """Where a program's sources are from; a field is empty if the program does not say it."""

    module_version: str = ""
    revision: str = ""
    """The revision in version control: with git, the commit's hash."""


def read_go_build(elf: Elf) -> GoBuild | None:
    """Return a Go program's build information; None if it was not linked by Go 1.18 or later.

    Raises:
        UnreadableElf: the section is damaged or too large.
    """
    section = next((s for s in elf.sections if s.name == b".go.buildinfo"), None)
    if section is None:
        return None
    content = elf.read(section, _MAX_SECTION_BYTES)
    start = content.find(_MAGIC)
    if start < 0 or len(content) < start + _HEADER_BYTES:
        return None
    if not content[start + _FLAGS_AT] & _INLINE_STRINGS:
        return None
    _, position = _string(content, start + _HEADER_BYTES)
    module, _ = _string(content, position)
    return _parse(module[_MARK_BYTES:-_MARK_BYTES])


def _string(content: bytes, position: int) -> tuple[bytes, int]:
    size = shift = 0
    while position < len(content) and shift < 35:
        byte = content[position]
        position += 1
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return content[position : position + size], position + size


def _parse(module: bytes) -> GoBuild:
    version = revision = b""
    for line in module.split(b"\n"):
        kind, _, rest = line.partition(b"\t")
        if kind == b"mod":
            version = [*rest.split(b"\t"), b""][1]
        elif kind == b"build" and rest.startswith(b"vcs.revision="):
            revision = rest.removeprefix(b"vcs.revision=")
    if version == b"(devel)":
        version = b""
    return GoBuild(*(part[:_MAX_TEXT].decode("ascii", "replace") for part in (version, revision)))
