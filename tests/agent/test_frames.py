"""Frames: which processes share the numbers of which frames, and what is counted of them."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from bpf.interpreters import ChainEnd
from bpf.samples import TAG_SHIFT, Tag
from profiler.agent.budgets import Budget, Limit, Limits, LocationBudget
from profiler.agent.frames import FrameNumbers, Locators, Numbering
from symbolizer.location import REST_LOCATION, AddressLocation, FileOffset
from symbolizer.maps import Mapping, MappingTable
from tests.support.live import sample_of

TEXT, HEAP = 0x40_0000, 0x7F00_0000_0000


def words(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


@dataclass
class Located:
    """Numbers locations as a profile does, and notes which process was asked for what."""

    asked: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    numbers: dict[AddressLocation, int] = field(default_factory=dict)
    is_shared: bool = False
    base: int = 0

    def number(self, location: AddressLocation) -> int:
        return self.numbers.setdefault(location, len(self.numbers))

    def locate(self, generation, _mappings, addresses):
        """Return what lies at an address: code of the file, or something of this process."""
        pid = generation.pid
        self.asked.append((pid, tuple(sorted(addresses.tolist()))))
        return [
            AddressLocation("file" if a < HEAP else f"heap of {pid}", FileOffset(a - self.base))
            for a in addresses.tolist()
        ]

    def locate_python(self, generation, frame):
        self.asked.append((generation.pid, (frame.code,)))
        owner = "all" if self.is_shared else generation.pid
        return AddressLocation(f"python of {owner}", FileOffset(frame.code))

    def locate_kernel(self, addresses):
        return [AddressLocation("kernel", FileOffset(a)) for a in addresses.tolist()]


@pytest.fixture
def located() -> Located:
    return Located()


@pytest.fixture
def frames(located) -> FrameNumbers:
    return numbers_of(located, Limits())


def numbers_of(located, limits: Limits) -> FrameNumbers:
    return FrameNumbers(
        Numbering(
            located.number,
            located.numbers.__contains__,
            lambda: located.number(REST_LOCATION),
        ),
        Locators(
            located.locate, located.locate_kernel, located.locate_python, lambda _mappings: True
        ),
        LocationBudget(Budget(limits.locations)),
    )


@pytest.fixture
def mappings() -> MappingTable:
    return MappingTable.of(
        [
            Mapping(TEXT, TEXT + 4096, 0, b"/usr/bin/worker"),
            Mapping(HEAP, HEAP + 4096, 0, b"//anon"),
        ]
    )


def sample(pid: int, *user: int, exec_id: int = 1):
    return sample_of(1, start_ns=7)._replace(pid=pid, exec_id=exec_id, user=words(*user))


def test_forked_processes_share_files_and_never_what_lies_in_their_memory(
    frames, located, mappings
):
    """Both have one MappingTable; the file's code is located once, the heap for each."""
    stacks = frames.user(mappings, [sample(10, TEXT, HEAP), sample(11, TEXT, HEAP)])

    assert located.asked == [(10, (TEXT, HEAP)), (11, (HEAP,))]
    assert stacks[0][0] == stacks[1][0]
    assert stacks[0][1] != stacks[1][1]


def test_an_exec_forgets_what_lay_in_memory(frames, located, mappings):
    """The same pid and start, another generation."""
    frames.user(mappings, [sample(10, TEXT, HEAP)])
    frames.user(mappings, [sample(10, TEXT, HEAP, exec_id=2)])

    assert located.asked == [(10, (TEXT, HEAP)), (10, (HEAP,))]


def test_what_is_known_is_not_located_again(frames, located, mappings):
    first = frames.user(mappings, [sample(10, TEXT, HEAP)])
    second = frames.user(mappings, [sample(10, HEAP), sample(10, TEXT)])

    assert len(located.asked) == 1
    assert [stack.tolist() for stack in second] == [[first[0][1]], [first[0][0]]]


def python(code: int) -> tuple[int, int]:
    return Tag.PYTHON << TAG_SHIFT | code, 5 << 32 | 8


def test_python_frames_are_those_of_a_process(frames, located, mappings):
    """Forked processes have their code objects at the same addresses; they may differ by now."""
    entry = Tag.ENTRY << TAG_SHIFT | 1
    stack = (Tag.EVALUATION << TAG_SHIFT | TEXT, 2, *python(HEAP), entry)

    first, second = frames.user(mappings, [sample(10, *stack), sample(11, *stack)])

    assert located.asked == [(10, (TEXT,)), (10, (HEAP,)), (11, (HEAP,))]
    assert first[1] == second[1]
    assert first[0] != second[0]


def test_functions_that_processes_have_in_common_are_charged_once(located, mappings):
    """Workers run the same program, each with code objects of its own."""
    frames = numbers_of(located, Limits(locations=Limit(20 * 400, 24 * 400, 24 * 400)))
    located.is_shared = True
    stack = [word for code in range(16) for word in python(HEAP + 64 * code)]

    (first,) = frames.user(mappings, [sample(10, *stack)])
    (second,) = frames.user(mappings, [sample(11, *stack)])
    (third,) = frames.user(mappings, [sample(12, *stack)])

    assert first == second
    assert len(set(first)) == 16
    assert third.tolist() == [located.number(REST_LOCATION)]


def test_samples_and_frames_of_interpreters_are_counted(frames, mappings):
    reason = Tag.REASON << TAG_SHIFT
    chain = (*python(HEAP), *python(HEAP + 64))
    samples = [
        sample(10, TEXT),
        sample(10, TEXT, *chain)._replace(samples=3),
        sample(10, TEXT, reason | ChainEnd.NO_PYTHON),
        sample(10, TEXT, *chain, reason | ChainEnd.TRUNCATED)._replace(samples=2),
    ]

    frames.user(mappings, samples)

    assert frames.python == {"attempts": 6, "frames": 10, "no_python": 1, "truncated": 2}


def test_addresses_outside_of_all_mappings_are_one_location(frames, located, mappings):
    """They mean nothing, and a process can make up any number of them."""
    first = frames.user(mappings, [sample(10, TEXT, *range(0x1000, 0x1100))])
    second = frames.user(mappings, [sample(10, TEXT, *range(0x2000, 0x2100))])

    assert first[0].tolist() == second[0].tolist()
    assert len(located.numbers) == 2


def test_a_stack_ends_where_a_process_has_too_many_locations(located, mappings):
    """Root first they are kept, other processes have theirs, and nothing more is located.

    Six frames take two locations, and three of them as many.
    """
    frames = numbers_of(located, Limits(locations=Limit(5 * 400, 100 * 400, 100 * 400)))
    rest = located.number(REST_LOCATION)

    (cut,) = frames.user(mappings, [sample(10, *range(TEXT, TEXT + 6))])
    (again,) = frames.user(mappings, [sample(10, TEXT + 2, *range(TEXT + 3, TEXT + 6))])
    (other,) = frames.user(mappings, [sample(11, *range(TEXT, TEXT + 6))])

    assert cut.tolist() == again.tolist() == [rest, *other.tolist()[3:]]
    assert rest not in other
    assert len(located.asked) == 2


def test_processes_of_a_program_are_not_charged_for_what_others_have(located):
    """Each has its files elsewhere, and shares their locations with the first."""
    frames = numbers_of(located, Limits(locations=Limit(200 * 400, 200 * 400, 200 * 400)))
    stacks = []
    for pid in range(12):
        start = TEXT + 4096 * pid
        mappings = MappingTable.of([Mapping(start, start + 4096, 0, b"/usr/bin/worker")])
        located.base = start
        stacks += frames.user(mappings, [sample(pid, *range(start, start + 40))])

    assert all(stack == stacks[0] for stack in stacks)
    assert located.number(REST_LOCATION) not in stacks[0]


def test_kernel_words_are_addresses(frames, located):
    """Their top byte is no tag."""
    address = 0xFFFF_FFFF_8100_0000

    stacks = frames.kernel([words(address, address + 8), words(), words(address)])

    assert [len(stack) for stack in stacks] == [2, 0, 1]
    assert stacks[0][0] == stacks[2][0]
    assert AddressLocation("kernel", FileOffset(address)) in located.numbers
