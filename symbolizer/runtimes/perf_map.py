"""Perf maps: `/tmp/perf-PID.map`, where just-in-time compilers write which code they have made.

A line is `START SIZE NAME`, both numbers hexadecimal, as tools/perf/Documentation/jit-interface.txt
of Linux says. Node and Python write them without 0x, the JDK with it. Lines are appended; memory
that is used again gets another line, and the last one holds.
"""

import re
from collections.abc import Sequence

from symbolizer.runtimes.code_map import CodeMap

LONGEST_LINE_BYTES = 8192
_LINE = re.compile(
    rb"^(?:0x)?([0-9a-f]{1,16})[ \t]+(?:0x)?([0-9a-f]{1,16})[ \t]+(\S[^\n\r]*)",
    re.MULTILINE | re.IGNORECASE,
)


class PerfMap:
    """What a perf map says, fed piece by piece."""

    def __init__(self) -> None:
        self._code: CodeMap[bytes] = CodeMap()
        self._rest = b""
        self._is_too_long = False
        self.lines = 0
        """How many were read."""

    @property
    def size_bytes(self) -> int:
        return self._code.size_bytes + len(self._rest)

    @property
    def dropped(self) -> int:
        return self._code.dropped

    def feed(self, part: bytes) -> None:
        """Take the next bytes of the file. The last line counts when it is whole.

        Lines that are none, or too long, are passed over.
        """
        before, end, rest = part.rpartition(b"\n")
        if not end:
            self._hold(part)
            return
        whole = b"" if self._is_too_long else self._rest
        if self._is_too_long:
            before = before.partition(b"\n")[2] if b"\n" in before else b""
        self._rest, self._is_too_long = b"", False
        for line in _LINE.finditer(whole + before):
            start, size, name = line.groups()
            if len(name) <= LONGEST_LINE_BYTES:
                self._code.add(int(start, 16), int(size, 16), name, len(name))
                self.lines += 1
        self._hold(rest)

    def find(self, addresses: Sequence[int]) -> list[tuple[int, int, bytes]]:
        """Return the ranges that hold any of these addresses: start, end, name as it stands."""
        return self._code.find(addresses)

    def _hold(self, part: bytes) -> None:
        if self._is_too_long or len(self._rest) + len(part) > LONGEST_LINE_BYTES:
            self._rest, self._is_too_long = b"", True
        else:
            self._rest += part
