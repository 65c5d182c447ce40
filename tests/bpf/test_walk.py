"""The rules of unwinding stand once and are executed twice: in the kernel, and in Python."""

import ctypes
import subprocess
from collections import Counter
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest

from bpf import tables
from bpf.constants import kernel_constants
from bpf.frames import with_native
from bpf.samples import MAX_NATIVE_WORDS, USER_STACK, StopReason
from bpf.tables import EVALUATES, MAPPING, PAGE, TABLE, CfaKind, RbpKind, TableState
from symbolizer.maps import Mapping, MappingTable
from symbolizer.unwind import table as unwind
from symbolizer.unwind.cie import RBX
from symbolizer.unwind.lookup import ANONYMOUS, RuleFinder, RulePages, missing
from symbolizer.unwind.rules import RBX_MAX, RBX_SAME, RBX_SHIFT, ROW
from symbolizer.unwind.table import UnwindTable
from symbolizer.unwind.walk import PENDING, Rule, StackCopy, Stop, WalkedStack, walk
from tests.support.targets import SOURCES

BPF = Path(tables.__file__).parent
STACK = np.dtype(
    [
        *(("registers", "u8", (16,)), ("pc", "u8"), ("start", "u8"), ("first", "u8")),
        *(("words", "u8"), ("unreadable", "u4"), ("pc_is_return_address", "u4")),
    ]
)
NO_WORDS = np.empty(0, np.uint64)
BY_RBX = CfaKind.REGISTER + RBX
CODE, STACK_START = 0x5500_0000_0000, 0x7FFC_0000_0000
MISSING = {
    TableState.UNKNOWN: Stop.NO_TABLE_YET,
    TableState.NONE: Stop.NO_TABLE,
    TableState.NO_ROOM: Stop.NO_ROOM,
}
LOADED, TAME = 4, 4
"""How many executables have a table: 1 to 4. The next ones have none, for each reason. The last
table has one rule, so that some stacks are deeper than there is room for."""


@pytest.fixture(scope="module")
def kernels_walk(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernel's walk, compiled by gcc; memory and tables are arrays."""
    library = tmp_path_factory.mktemp("walk") / "walk.so"
    constants = kernel_constants() | {"FRAMES_PER_PROGRAM": 24}
    constants |= {"TASK_FLAGS": 0, "TASK_MM": 0, "MM_START_CODE": 0}
    defined = [f"-D{name}={value}" for name, value in constants.items()]
    command = ["gcc", "-O2", "-w", "-shared", "-fPIC", f"-I{BPF}", f"-I{BPF / 'include'}", *defined]
    subprocess.run([*command, "-o", library, SOURCES / "walk.c"], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.walk_all.restype = ctypes.c_uint64
    return loaded


class World:
    """A process whose memory, registers and unwind tables are all random, but plausible."""

    def __init__(self, seed: int, stacks: int) -> None:
        self.random = np.random.default_rng(seed)
        self.tables = {n: self.random_table(n == TAME) for n in range(1, LOADED + 1)}
        self.states = {LOADED + 1 + i: state for i, state in enumerate(MISSING)}
        self.mappings = self.random_mappings()
        self.stacks = [self.random_stack(i) for i in range(stacks)]

    def random_table(self, is_tame: bool) -> UnwindTable:
        random = self.random
        numbers = np.flatnonzero(random.random(28) < (1 if is_tame else 0.95))
        counts = random.integers(1, 60, len(numbers))
        pages = np.zeros(len(numbers), unwind.PAGE)
        pages["number"], pages["count"] = numbers, counts
        pages["first"] = np.cumsum(counts) - counts
        rows = np.zeros(int(counts.sum()), ROW)
        for first, count in zip(pages["first"].tolist(), counts.tolist(), strict=True):
            lows = np.sort(random.choice(4095, count - 1, replace=False)) + 1
            rows["pc_low"][first : first + count] = [0, *lows.tolist()]
        usual = [CfaKind.RSP] * 300 + [CfaKind.RBP] * 50 + [CfaKind.FRAME_POINTER] * 8
        rare = [*range(16), *(base + n for base in (16, 32) for n in range(16) if n not in (6, 7))]
        rare += [CfaKind.STOP, CfaKind.SIGNAL, CfaKind.UNSUPPORTED, CfaKind.CLONE] * 3
        kinds = np.array([*usual, *rare])
        rows["cfa_kind"] = random.choice(kinds, len(rows))
        rows["cfa"] = random.integers(1, 9, len(rows))
        is_deref = np.isin(rows["cfa_kind"], [CfaKind.DEREF_RBP, CfaKind.DEREF_RSP])
        operands = random.integers(-3, 9, len(rows)) & 0xFF | random.integers(0, 5, len(rows)) << 8
        rows["cfa"][is_deref] = operands[is_deref]
        is_plt = np.isin(rows["cfa_kind"], [CfaKind.PLT, CfaKind.PLT_LAZY])
        rows["cfa"][is_plt] = random.integers(0, 17, int(is_plt.sum()))
        rows["rbp_kind"] = random.choice([*[0] * 60, *[1] * 20, *range(6)], len(rows))
        if random.random() < 0.8:  # as in ld.so, whose rules say where rbx is
            places = np.array([*[RBX_SAME] * 40, *range(RBX_MAX + 1)], np.uint8)
            rows["rbp_kind"] |= random.choice(places, len(rows)) << RBX_SHIFT
            is_by_rbx = random.random(len(rows)) < 0.04
            rows["cfa_kind"][is_by_rbx] = BY_RBX
        rows["rbp"] = random.choice([-2, -2, -2, *range(-6, 7)], len(rows))
        if is_tame:
            rows["cfa_kind"], rows["cfa"], rows["rbp_kind"] = CfaKind.RSP, 2, RbpKind.SAME
        rows["cfa_kind"][random.random(len(rows)) < 0.1] |= EVALUATES
        return UnwindTable("", pages, rows)

    def random_mappings(self) -> MappingTable:
        mappings, at = [], CODE
        for executable in [0, *self.tables, *self.states, *self.tables]:
            offset = int(self.random.integers(0, 8)) << 12
            size = int(self.random.integers(8, 20) if executable in self.tables else 1) << 12
            path = b"" if not executable else f"/file{executable}".encode()
            mappings.append(Mapping(at, at + size, offset, path))
            at += size + (int(self.random.random() < 0.3) << 12)
        return MappingTable.of(mappings)

    def executable(self, place: int) -> int:
        return int(self.mappings.mappings[place].path[5:] or b"0")

    def random_stack(self, number: int) -> StackCopy:
        random = self.random
        words = int(random.choice([30, 200, 2000, 6000]))
        start = STACK_START + (number << 20) + int(random.integers(0, 512)) * 8
        share = float(random.choice([0.7, 0.9, 0.98]))  # of addresses of code
        low, high = int(self.mappings.starts[0]), int(self.mappings.ends[-1])

        def values(count: int) -> np.ndarray:
            code = random.integers(low, high + 4096, count)
            in_stack = start + random.integers(0, words, count) * 8
            unaligned = in_stack + random.integers(1, 8, count)
            junk = random.integers(0, 1 << 63, count)
            zero = np.zeros(count, np.int64)
            others = (1 - share) * np.array([0.7, 0.1, 0.1, 0.1])
            which = random.choice(5, count, p=[share, *others])
            return np.choose(which, [code, in_stack, unaligned, junk, zero]).astype(np.uint64)

        memory, registers, pc = values(words), values(16), random.integers(low, high)
        if random.random() < 0.02:
            tame = self.mappings.mappings[TAME]
            memory = random.integers(tame.start + 1, tame.end, words).astype(np.uint64)
            pc = int(memory[0])
        registers[7] = start + 128 + int(random.choice([0, 0, 0, 0, 8, 64, 3]))
        if random.random() < 0.7:
            higher = random.integers(0, [20, 60]).astype(np.uint64) * np.uint64(8)
            registers[[6, RBX]] = registers[7] + higher
        return StackCopy(
            registers,
            int(pc),
            bool(random.random() < 0.3),
            start,
            memory,
            int(random.integers(0, 1 << 14)) if random.random() < 0.1 else 0,
        )

    def finder(self) -> RuleFinder:
        def table_of(mappings: MappingTable, place: int) -> int:
            executable = self.executable(place)
            if executable in self.states:
                return missing(MISSING[self.states[executable]])
            return executable or ANONYMOUS

        pages = RulePages(self.tables.__getitem__)
        return RuleFinder([self.mappings] * len(self.stacks), table_of, pages)

    def by_python(self) -> list[WalkedStack]:
        return walk(self.stacks, self.finder(), MAX_NATIVE_WORDS)

    def callers_left_by_rbx(self, walked: list[WalkedStack]) -> int:
        """Return how many frames were left by an rbx that frames below had saved, or left alone."""
        find = self.finder()
        rules = [
            find(place, address)
            for place, stack in enumerate(walked)
            for address in stack.addresses[1:-1].tolist()
        ]
        return sum(isinstance(rule, Rule) and rule.cfa_kind == BY_RBX for rule in rules)

    def by_kernels_walk(self, library: ctypes.CDLL, space: int) -> np.ndarray:
        mappings = np.zeros(len(self.mappings.mappings), MAPPING)
        for place, mapping in enumerate(self.mappings.mappings):
            head = (mapping.start, mapping.end, mapping.file_offset)
            mappings[place] = (*head, self.executable(place), 0)
        listed = np.zeros(1 + LOADED + len(self.states), TABLE)
        pages, rows, first = [], [], 0
        for number, table in self.tables.items():
            low, high = int(table.pages["number"][0]), int(table.pages["number"][-1])
            listed[number] = (TableState.LOADED, low, high - low + 1, sum(map(len, pages)))
            there = np.zeros(high - low + 1, PAGE)
            there["first"][table.pages["number"] - low] = table.pages["first"] + first
            there["count"][table.pages["number"] - low] = table.pages["count"]
            pages.append(there)
            rows.append(table.rows)
            first += len(table.rows)
        for number, state in self.states.items():
            listed[number] = (state, 0, 0, 0)
        stacks = np.zeros(len(self.stacks), STACK)
        words = 0
        for place, stack in enumerate(self.stacks):
            head = (stack.registers, stack.pc, stack.start, words, len(stack.memory))
            stacks[place] = (*head, stack.unreadable, stack.is_return_address)
            words += len(stack.memory)
        memory = np.concatenate([stack.memory for stack in self.stacks])
        found = np.zeros(len(stacks), USER_STACK)
        arrays = (listed, np.concatenate(pages), np.concatenate(rows), stacks)
        at = [ctypes.c_void_p(array.ctypes.data) for array in (mappings, *arrays, memory, found)]
        library.walk_all(space, at[0], len(mappings), *at[1:5], len(stacks), *at[5:])
        return found


def numbers(kinds: type[IntEnum]) -> dict[str, int]:
    return {name: kind.value for name, kind in kinds.__members__.items()}


def test_both_walks_name_their_ends_alike():
    reasons = numbers(StopReason)

    assert numbers(Stop).items() <= reasons.items()
    assert {PENDING}.isdisjoint(reasons.values())
    assert unwind.PAGE_BITS == tables.PAGE_BITS


@pytest.mark.parametrize("seed", range(6))
def test_both_walks_find_the_same_frames_of_random_stacks(seed, kernels_walk):
    """Rows of all kinds, memory that is code, stack, zero or anything, pages that are missing."""
    world = World(seed, 2_000)

    walked = world.by_python()

    found = world.by_kernels_walk(kernels_walk, seed + 1)
    for place, (one, other) in enumerate(zip(walked, found, strict=True)):
        expected = other["words"][: other["length"]].tolist()
        words = with_native(NO_WORDS, one.addresses, one.loops).tolist()
        assert (words, one.stop) == (expected, other["stop"]), place
    ends = Counter(each.stop for each in walked)
    assert ends.keys() == set(Stop)
    assert sum(map(len, (each.loops for each in walked))) > 100
    assert sum(len(each.addresses) > 10 for each in walked) > 30
    assert world.callers_left_by_rbx(walked) > 1


def test_all_kinds_of_rules_are_among_the_random_ones():
    world = World(0, 1)
    rows = np.concatenate([table.rows for table in world.tables.values()])

    kinds = set(rows["cfa_kind"].tolist())
    assert {kind.value for kind in CfaKind} <= kinds
    assert {CfaKind.RSP | EVALUATES, CfaKind.RBP | EVALUATES} <= kinds
    rbp_kinds = rows["rbp_kind"] & (1 << RBX_SHIFT) - 1
    assert {kind.value for kind in RbpKind} <= set(rbp_kinds.tolist())
    assert set(range(RBX_MAX + 1)) == set((rows["rbp_kind"] >> RBX_SHIFT).tolist())


def stack_of(words: list[int], *, is_cut: bool = False) -> tuple[StackCopy, RuleFinder]:
    """A stack of functions whose frames are two words, in a file that has one rule."""
    pages, rows = np.zeros(1, unwind.PAGE), np.zeros(1, ROW)
    pages["count"], rows["cfa_kind"], rows["cfa"] = 1, CfaKind.RSP, 2
    registers = np.zeros(16, np.uint64)
    registers[7] = STACK_START
    memory = np.array([0] * 16 + words, np.uint64)
    stack = StackCopy(registers, CODE, False, STACK_START - 128, memory, is_cut=is_cut)
    mappings = MappingTable.of([Mapping(CODE, CODE + 4096, 0, b"/file")])
    table = UnwindTable("", pages, rows)
    return stack, RuleFinder([mappings], lambda *_: 0, RulePages(lambda _: table))


@pytest.mark.parametrize(("is_cut", "stop"), [(True, Stop.TRUNCATED), (False, Stop.UNREADABLE)])
def test_a_stack_that_was_copied_in_part_is_truncated(is_cut, stop):
    """Not unreadable: there was more of it, and too little room."""
    stack, find = stack_of([0, CODE + 8, 0, CODE + 16], is_cut=is_cut)

    (walked,) = walk([stack], find, 100)

    assert walked.addresses.tolist() == [CODE, CODE + 7, CODE + 15]
    assert walked.stop == stop


def test_a_stack_is_not_finished_while_a_table_is_pending():
    stack, _ = stack_of([0, CODE + 8])
    other, whole = stack_of([0, CODE + 8, 0, 0])
    mappings = [MappingTable.of([Mapping(CODE, CODE + 4096, 0, path)]) for path in (b"/a", b"/b")]
    answers = {mappings[0]: missing(PENDING), mappings[1]: 0}
    pages = RulePages(lambda _: whole._pages._load(0))

    walked = walk([stack, other], RuleFinder(mappings, lambda m, _: answers[m], pages), 100)

    assert [each.stop for each in walked] == [PENDING, Stop.CHAIN_END]
    assert [len(each.addresses) for each in walked] == [1, 2]


def test_pages_of_tables_are_kept_up_to_a_limit():
    world = World(1, 500)
    loads = Counter()

    def load(number: int) -> UnwindTable:
        loads[number] += 1
        return world.tables[number]

    def walk_with(pages: RulePages) -> list[tuple[list[int], int]]:
        def table_of(mappings: MappingTable, place: int) -> int:
            return world.executable(place) % (LOADED + 1) or ANONYMOUS

        finder = RuleFinder([world.mappings] * len(world.stacks), table_of, pages)
        walked = walk(world.stacks, finder, MAX_NATIVE_WORDS)
        return [(each.addresses.tolist(), each.stop) for each in walked]

    kept, dropped = RulePages(load), RulePages(load, max_rows=50)
    first = walk_with(kept)
    loads.clear()

    assert walk_with(kept) == first
    assert not loads
    assert walk_with(dropped) == first
    assert loads
