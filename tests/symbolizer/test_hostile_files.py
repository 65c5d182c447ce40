"""Files made to be expensive or broken: each is read, or refused with a reason, within limits."""

import functools
from collections.abc import Callable

import pytest

from tests.support.hostile_files import KINDS, Cost, measure

# Address space, of which a process has more than memory. That reading takes less than 1 s and less
# than 200 MB is measured by bench/bench_hostile.py.
MEMORY_BYTES = 700 << 20
CPU_S = 10


@pytest.fixture(scope="module")
def costs_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Cost]]:
    """Return what reading the kinds of a group takes; each is written and read once."""

    @functools.cache
    def measured(group: str) -> dict[str, Cost]:
        kinds = [kind for kind in KINDS if kind.startswith(f"{group}:")]
        folder = tmp_path_factory.mktemp("hostile")
        return dict(measure(kinds, folder, memory_bytes=MEMORY_BYTES, cpu_s=CPU_S))

    return measured


@pytest.mark.parametrize("group", sorted({kind.partition(":")[0] for kind in KINDS}))
def test_hostile_files_are_read_or_refused_with_a_reason(costs_of, group):
    """None of them crashes the reader, or takes more memory and time than it may have."""
    costs = costs_of(group)

    assert {kind: cost.outcome for kind, cost in costs.items() if not cost.is_read} == {}


def test_sections_that_are_too_large_in_all_are_refused_before_they_are_expanded(costs_of):
    """Each of them is within the limit for one."""
    kinds = (
        ".debug_frame: 15 compressed sections of 64 MB",
        "frames: 16 sparse sections of 60 MB",
        "frames: a sparse .eh_frame of 16 GB",
    )

    for kind in kinds:
        cost = costs_of(kind.partition(":")[0])[kind]
        assert "unwind: too many symbols" in cost.outcome, kind
        assert cost.grown_bytes < 20 << 20, kind


def test_strings_of_one_file_do_not_fill_the_cache(costs_of):
    """Its symbol table takes at most a quarter of the cache of 512 MB, or it is refused."""
    kinds = (
        "symbols: 1 M symbols with 256 MB of strings",
        "symbols: a sparse string table of 256 MB",
    )

    for kind in kinds:
        cost = costs_of("symbols")[kind]
        assert cost.is_read, kind
        assert cost.stored_bytes < 150 << 20, kind
