"""Unwind tables in the kernel's maps: what goes in, what is freed, what does not fit."""

import contextlib
import os
import re
import resource
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest

from bpf import syscalls, tables
from bpf.sampler import Sampler, SamplerConfig
from bpf.samples import ProcessGeneration
from bpf.tables import (
    PROCESS,
    PROCESS_PLACES,
    PROCESSES_CAPACITY,
    ROW,
    SHARD_BYTES,
    MappingRow,
    NoRoomError,
)
from symbolizer.unwind import rules
from symbolizer.unwind import table as unwind

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def sampler():
    with Sampler(SamplerConfig()) as sampler:
        yield sampler


def table_of(pages: int, rows_a_page: int):
    """Return a table whose rows are all different."""
    listed = np.zeros(pages, unwind.PAGE)
    listed["number"] = 3 + np.arange(pages)
    listed["first"] = np.arange(pages) * rows_a_page
    listed["count"] = rows_a_page
    rows = np.zeros(pages * rows_a_page, ROW)
    rows["cfa"] = np.arange(len(rows)) % 65536
    return listed, rows


def numbers(kinds: type[IntEnum]) -> dict[str, int]:
    return {name: kind.value for name, kind in kinds.__members__.items()}


def test_the_programs_are_compiled_with_the_numbers_of_the_enums():
    """Each enumerator that the C side uses has a constant of its name, and its value."""
    constants = tables.constants()
    sources = "".join(path.read_text() for path in Path(tables.__file__).parent.glob("*.bpf.*"))

    for prefix, kinds in (
        ("CFA", tables.CfaKind),
        ("RBP", tables.RbpKind),
        ("TABLE", tables.TableState),
    ):
        defined = {f"{prefix}_{name}": value for name, value in numbers(kinds).items()}
        used = set(re.findall(rf"\b{prefix}_[A-Z][A-Z_]*\b", sources)) - {"TABLE_SIZE"}
        assert defined.items() <= constants.items()
        assert used <= defined.keys()


def test_the_kernel_and_the_tables_makers_speak_of_the_same():
    """Two packages that do not know each other name the same kinds by the same numbers."""
    assert numbers(tables.CfaKind) == numbers(rules.CfaKind)
    assert numbers(tables.RbpKind) == numbers(rules.RbpKind)
    assert (tables.RBX_UNKNOWN, tables.RBX_SAME) == (rules.RBX_UNKNOWN, rules.RBX_SAME)
    assert max(tables.RbpKind) < 1 << rules.RBX_SHIFT
    assert rules.EVALUATES == tables.EVALUATES
    assert rules.ROW == tables.ROW


def test_room_is_used_again_when_no_walk_can_read_it(sampler):
    pages, rows = table_of(80, 3_000)
    held = sampler.tables.memory_bytes

    for number in range(1, 60):  # far more than the limit, one after the other
        sampler.tables.load(number, pages, rows)
        sampler.tables.unload(number)
        sampler.wait_for_programs()

    assert sampler.tables.memory_bytes <= held + SHARD_BYTES


def test_memory_that_the_kernel_refuses_is_no_room(sampler):
    """As below a memory limit; here it is the descriptor of a new map that cannot be had."""
    pages, rows = table_of(80, 3_000)
    sampler.tables.load(50, pages, rows)
    before = sampler.tables.memory_bytes
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(NoRoomError):
            sampler.tables.load(51, pages, rows)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    sampler.tables.load(52, *table_of(5, 4_000))  # what the first left free of its map
    assert sampler.tables.memory_bytes == before
    for number in (50, 52):
        sampler.tables.unload(number)
    sampler.wait_for_programs()


def test_what_does_not_fit_changes_nothing(sampler):
    pages, rows = table_of(80, 3_000)
    loaded = []
    with contextlib.suppress(NoRoomError):
        while len(loaded) < 100:
            sampler.tables.load(100 + len(loaded), pages, rows)
            loaded.append(100 + len(loaded))

    with pytest.raises(NoRoomError):
        sampler.tables.load(250, pages, rows)
    assert sampler.tables.memory_bytes <= tables.DEFAULT_LIMIT_BYTES
    assert len(loaded) * len(rows) > 0.7 * tables.DEFAULT_LIMIT_BYTES / ROW.itemsize
    sampler.tables.unload(loaded.pop())
    sampler.wait_for_programs()
    sampler.tables.load(300, pages, rows)
    for number in (300, *loaded):
        sampler.tables.unload(number)
    sampler.wait_for_programs()


def test_a_page_is_never_cut(sampler):
    """Whatever was freed where, the rows of a page lie in one shard, one after the other."""
    shapes = [(60, 2_500), (90, 700), (64, 4_096), (17, 3_001), (200, 11)]
    for number, shape in enumerate(shapes, start=400):
        sampler.tables.load(number, *table_of(*shape))
    for number in (401, 403):
        sampler.tables.unload(number)
    sampler.wait_for_programs()
    pages, rows = table_of(66, 2_500)
    sampler.tables.load(500, pages, rows)

    for number in (400, 402, 404, 500):
        sampler.tables.unload(number)
    sampler.wait_for_programs()


def test_a_process_and_its_space_come_and_go(sampler):
    rows = [
        MappingRow(0x400000, 0x523000, 0x1000, 7),
        MappingRow(0x7F0000001000, 0x7F0000002000, 0, 0),
    ]

    sampler.tables.add_space(9, rows)
    sampler.tables.set_process(ProcessGeneration(1, 12345, 6), 9)
    sampler.tables.remove_process(1)
    sampler.tables.remove_process(1)
    sampler.tables.remove_space(9)


def pids_in_the_kernel(sampler, pid):
    """Return who has the places that a pid may have."""
    fd = sampler._fds["processes"]
    found = []
    for nth in range(PROCESS_PLACES):
        raw = syscalls.lookup(fd, (pid ^ nth) % PROCESSES_CAPACITY, PROCESS.itemsize)
        found.append(int(np.frombuffer(raw, PROCESS)["pid"][0]))
    return sorted(filter(None, found))


def test_processes_whose_pids_want_one_place_have_others(sampler):
    pids = [77 + nth * PROCESSES_CAPACITY for nth in range(PROCESS_PLACES)]
    sampler.tables.add_space(11, [MappingRow(0x400000, 0x523000, 0, 7)])

    for pid in (*pids, *pids):  # the second time they are there already
        sampler.tables.set_process(ProcessGeneration(pid, 12345, 6), 11)
    assert pids_in_the_kernel(sampler, 77) == pids

    another = 77 + PROCESS_PLACES * PROCESSES_CAPACITY
    sampler.tables.set_process(ProcessGeneration(another, 12345, 6), 11)
    there = pids_in_the_kernel(sampler, 77)
    assert another in there
    assert len(set(pids) & set(there)) == PROCESS_PLACES - 1

    for pid in (*pids, another):
        sampler.tables.remove_process(pid)
    assert not pids_in_the_kernel(sampler, 77)
    sampler.tables.remove_space(11)
