"""Read unwind rows from readelf, and compare our tables with them."""

import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from symbolizer.unwind.cie import RBX
from symbolizer.unwind.rules import (
    RBX_MAX,
    RBX_SAME,
    RBX_SHIFT,
    RBX_UNKNOWN,
    CfaKind,
    RbpKind,
)
from symbolizer.unwind.table import UnwindTable

REGISTERS = {
    name: number
    for number, name in enumerate(
        [*("rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp")]
        + [f"r{n}" for n in range(8, 16)]
    )
}
UNKNOWN = (CfaKind.PLT, CfaKind.PLT_LAZY, CfaKind.DEREF_RBP, CfaKind.DEREF_RSP)


class Row(NamedTuple):
    """A line of `readelf -wF`: its range, and four of its columns, empty if it lacks them."""

    start: int
    end: int
    cfa: str
    rbp: str
    ra: str
    rbx: str


def read_rows(path: Path, section: str = "frames-interp") -> Iterator[Row]:
    """Return the rows of all FDEs, as readelf interprets them."""
    command = ["readelf", "--wide", f"--debug-dump={section}", path]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        yield from parse_rows(process.stdout)


_FDE = re.compile(r"FDE cie=([0-9a-f]+) pc=([0-9a-f]+)\.\.([0-9a-f]+)$")
_CIE = re.compile(r"^([0-9a-f]+) \S+ \S+ CIE\b")
_ROW = re.compile(r"   LOC|[0-9a-f]{16} ")


class _Entry:
    """The CIE or FDE whose lines are being read."""

    def __init__(self, line: str) -> None:
        found = _FDE.search(line.rstrip())
        self.cie = (found or _CIE.match(line) or [""] * 2)[1].lstrip("0")
        self.is_fde = found is not None
        self.start, self.end = (int(found[2], 16), int(found[3], 16)) if found else (0, 0)
        self.columns: dict[str, int] = {}
        self.rows: list[Row] = []

    def add(self, line: str) -> None:
        cells = re.sub(r" \(\w+\)", "", line).split()  # "r10 (r10)": saved in a register
        if cells[0] == "LOC":
            self.columns = {name: place for place, name in enumerate(cells)}
            return
        places = (self.columns.get(name) for name in ("CFA", "rbp", "ra", "rbx"))
        texts = ("" if place is None else cells[place] for place in places)
        self.rows.append(Row(int(cells[0], 16), self.end, *texts))

    def finish(self, cies: dict[str, Row]) -> Iterator[Row]:
        """Return the rows with their ends. For a program that changes nothing, that of its CIE."""
        if not self.is_fde:
            cies.update((self.cie, row) for row in self.rows)
            return
        rows = self.rows or [cies[self.cie]._replace(start=self.start)] * (self.cie in cies)
        ends = [*(row.start for row in rows[1:]), self.end]
        for row, end in zip(rows, ends, strict=True):
            yield row._replace(end=min(end, self.end))


def parse_rows(lines: Iterator[str]) -> Iterator[Row]:
    cies: dict[str, Row] = {}
    entry = _Entry("")
    for line in lines:
        if _FDE.search(line.rstrip()) or _CIE.match(line) or line.startswith("Contents"):
            yield from entry.finish(cies)
            entry = _Entry(line)
        elif _ROW.match(line):
            entry.add(line)
    yield from entry.finish(cies)


_BY_RETURN_ADDRESS = {"u": CfaKind.STOP, "exp": CfaKind.SIGNAL}


def expected_kinds(row: Row) -> tuple[tuple[CfaKind | int, ...], int | None]:
    """Return the kinds that match readelf's row, and the operand, None if readelf has none."""
    if row.ra in _BY_RETURN_ADDRESS:
        return (_BY_RETURN_ADDRESS[row.ra],), 0
    in_register = re.fullmatch(r"r(\d+)", row.ra)
    if in_register and row.cfa.startswith("rsp+"):
        return (CfaKind.RETURN_REGISTER + int(in_register[1]),), int(row.cfa[4:]) // 8
    if row.ra != "c-8":
        return (CfaKind.UNSUPPORTED,), 0
    if row.cfa == "exp":
        return (*UNKNOWN, CfaKind.UNSUPPORTED), None
    register, sign, number = re.fullmatch(r"(\w+)([+-])(\d+)", row.cfa).groups()
    offset = int(sign + number)
    if offset % 8 or not 0 <= offset <= 8 * 0xFFFF or register not in REGISTERS:
        return (CfaKind.UNSUPPORTED,), 0
    kinds = {"rsp": CfaKind.RSP, "rbp": CfaKind.RBP}
    return (kinds.get(register, CfaKind.REGISTER + REGISTERS[register]),), offset // 8


def expected_rbp(row: Row) -> tuple[tuple[RbpKind, ...], int | None]:
    if row.rbp in ("", "u", "s"):
        return (RbpKind.SAME,), 0
    if row.rbp.startswith("c"):
        offset = int(row.rbp[1:])
        if offset % 8 or not -(8 << 15) <= offset < 8 << 15:
            return (RbpKind.UNDEFINED,), 0
        return (RbpKind.AT_CFA,), offset // 8
    if row.rbp == "exp":
        return (RbpKind.DEREF_RBP, RbpKind.DEREF_RSP, RbpKind.UNDEFINED), None
    return (RbpKind.UNDEFINED,), 0


def expected_rbx(row: Row) -> int:
    if row.rbx in ("", "u", "s"):
        return RBX_SAME
    words = -int(row.rbx[1:]) // 8 if row.rbx.startswith("c") else 0
    return words if RBX_SAME < words <= RBX_MAX else RBX_UNKNOWN


class Comparison(NamedTuple):
    rows: int
    different: list[tuple[Row, str]]
    unsupported: int


def compare(path: Path, table: UnwindTable, chunk: int = 100_000) -> Comparison:
    """Compare the rules at the first and last address of each row of readelf with it.

    In a table with a CFA that is based on rbx, rules say where rbx is; in others none does.
    """
    knows_rbx = bool((table.rows["cfa_kind"] == CfaKind.REGISTER + RBX).any())
    count = unsupported = 0
    different: list[tuple[Row, str]] = []
    known: dict[tuple[object, ...], bool] = {}
    rows = (row for row in read_rows(path) if row.end > row.start)
    while part := list(itertools.islice(rows, chunk)):
        starts = table.find(np.array([row.start for row in part], dtype=np.uint64))
        ends = table.find(np.array([row.end - 1 for row in part], dtype=np.uint64))
        count += len(part)
        unsupported += int((starts["cfa_kind"] == CfaKind.UNSUPPORTED).sum())
        for row, first, last in zip(part, starts.tolist(), ends.tolist(), strict=True):
            key = (*row[2:], *first[1:])
            if key not in known:
                known[key] = _agrees(row, knows_rbx, *first[1:])
            if not known[key] or first[1:] != last[1:]:
                different.append((row, f"{first[1:]} .. {last[1:]}"))
    return Comparison(count, different, unsupported)


def _agrees(  # noqa: PLR0917 - the columns of a row
    row: Row, knows_rbx: bool, cfa: int, kind: int, rbp_kind: int, rbp: int
) -> bool:
    rbp_kind, rbx = rbp_kind & 7, rbp_kind >> RBX_SHIFT
    kinds, operand = expected_kinds(row)
    if kind not in kinds or operand not in (None, cfa):
        return False
    if kind in (CfaKind.STOP, CfaKind.SIGNAL, CfaKind.UNSUPPORTED):
        return (rbp_kind, rbp, rbx) == (0, 0, RBX_UNKNOWN)
    if rbx != (expected_rbx(row) if knows_rbx and kind < CfaKind.RETURN_REGISTER else RBX_UNKNOWN):
        return False
    rbp_kinds, rbp_operand = expected_rbp(row)
    return rbp_kind in rbp_kinds and rbp_operand in (None, rbp)
