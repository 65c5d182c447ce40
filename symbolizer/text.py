r"""Make a name from outside safe to store, log and draw.

Names come from files and processes of other users: symbol tables, paths, demanglers. No name that
passed through here can break a line, control a terminal or hide characters from a reader.
"""

import re
import zlib

READABLE_LIMIT = 1024
"""The most characters a name may have. A longer one is cut, and ends in `…` and 8 hex digits of its
CRC-32, so that two long names with the same beginning stay different."""

# Characters that are invisible although str.isprintable() accepts them: Unicode's default-ignorable
# code points outside the categories Cc, Cf, Cn (DerivedCoreProperties.txt).
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def readable(name: bytes) -> str:
    r"""Decode a name, and write everything invisible as a visible escape.

    Bytes that are not UTF-8 become `\xNN`; control characters (newline, NUL, ESC), bidirectional
    controls, zero-width characters, line and paragraph separators, private and unassigned ones
    become `\n`, `\xNN`, `\uNNNN` or `\UNNNNNNNN`. The result holds at most READABLE_LIMIT
    characters and never a newline, a NUL, an ESC or a lone surrogate: it always encodes to UTF-8.
    """
    # A character takes at most 4 bytes, and escapes are longer than what they stand for: what
    # follows would be cut anyway.
    text = name[: 4 * READABLE_LIMIT + 4].decode("utf-8", "backslashreplace")
    if not text.isprintable() or not text.isascii():
        text = text[: READABLE_LIMIT + 1].translate(_VISIBLE)
    if len(text) <= READABLE_LIMIT:
        return text
    mark = f"…{zlib.crc32(name):08x}"
    return text[: READABLE_LIMIT - len(mark)] + mark


class _Visible(dict[int, str]):
    """How characters are written, by code point; a million of names may be nothing but controls."""

    def __missing__(self, code_point: int) -> str:
        character = chr(code_point)
        if not character.isprintable() or _INVISIBLE.match(character):
            character = character.encode("unicode_escape").decode("ascii")
        if len(self) < _VISIBLE_KEPT:
            self[code_point] = character
        return character


_VISIBLE_KEPT = 4096
_VISIBLE = _Visible()
