"""Frames: how words of stacks are split, and which processes share the numbers of which frames."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from bpf.samples import Tag, split_frames
from profiler.agent.budgets import Budget, Limit, Limits, LocationBudget
from profiler.agent.frames import FrameNumbers
from symbolizer.location import REST_LOCATION, AddressLocation, FileOffset
from symbolizer.maps import Mapping, MappingTable
from tests.support.live import sample_of

TEXT, HEAP = 0x40_0000, 0x7F00_0000_0000
TWO, THREE = 2 << 56, 3 << 56
FRAME_WORDS = {Tag.NATIVE: 1, 2: 2, 3: 3}


def words(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def test_a_native_stack_has_a_frame_per_word():
    assert split_frames(words(TEXT, HEAP)) == [TEXT, HEAP]


def test_frames_of_runtimes_have_several_words():
    """Only the first word is tagged: the others may look like any tag."""
    stack = words(TEXT, TWO | 5, THREE | 6, HEAP, THREE | 7, HEAP, TWO | 8, HEAP)

    assert split_frames(stack, FRAME_WORDS) == [
        TEXT,
        (TWO | 5, THREE | 6),
        HEAP,
        (THREE | 7, HEAP, TWO | 8),
        HEAP,
    ]


@pytest.mark.parametrize("stack", [(TWO | 5,), (THREE | 5, 6)])
def test_a_frame_that_was_cut_keeps_the_words_there_are(stack):
    assert split_frames(words(TEXT, *stack), FRAME_WORDS) == [TEXT, stack]


def test_a_frame_of_an_unknown_tag_is_one_word():
    assert split_frames(words(9 << 56, TEXT)) == [(9 << 56,), TEXT]


@dataclass
class Located:
    """Numbers locations as a profile does, and notes which process was asked for what."""

    asked: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    numbers: dict[AddressLocation, int] = field(default_factory=dict)

    def number(self, location: AddressLocation) -> int:
        return self.numbers.setdefault(location, len(self.numbers))

    def locate(self, generation, _mappings, addresses):
        """Return what lies at an address: code of the file, or something of this process."""
        pid = generation.pid
        self.asked.append((pid, tuple(sorted(addresses.tolist()))))
        return [
            AddressLocation("file" if a < HEAP else f"heap of {pid}", FileOffset(a))
            for a in addresses.tolist()
        ]

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
        located.number,
        located.locate,
        located.locate_kernel,
        lambda: located.number(REST_LOCATION),
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


def test_a_frame_of_a_runtime_lies_nowhere(frames, located, mappings):
    """No runtime is known yet."""
    unknown = 9 << 56 | TEXT

    stacks = frames.user(mappings, [sample(10, unknown, TEXT), sample(11, unknown, TEXT)])

    assert located.asked == [(10, (0,)), (10, (TEXT,))]
    assert stacks[0].tolist() == stacks[1].tolist()


def test_addresses_outside_of_all_mappings_are_one_location(frames, located, mappings):
    """They mean nothing, and a process can make up any number of them."""
    first = frames.user(mappings, [sample(10, TEXT, *range(0x1000, 0x1100))])
    second = frames.user(mappings, [sample(10, TEXT, *range(0x2000, 0x2100))])

    assert first[0].tolist() == second[0].tolist()
    assert len(located.numbers) == 2


def test_a_stack_ends_where_a_process_has_too_many_locations(located, mappings):
    """Root first they are kept, other processes have theirs, and nothing more is located."""
    frames = numbers_of(located, Limits(locations=Limit(3 * 400, 100 * 400, 100 * 400)))
    rest = located.number(REST_LOCATION)

    (cut,) = frames.user(mappings, [sample(10, *range(TEXT, TEXT + 6))])
    (again,) = frames.user(mappings, [sample(10, TEXT + 2, *range(TEXT + 3, TEXT + 6))])
    (other,) = frames.user(mappings, [sample(11, *range(TEXT, TEXT + 6))])

    assert cut.tolist() == again.tolist() == [rest, *other.tolist()[3:]]
    assert rest not in other
    assert located.asked[0] == (10, (TEXT + 3, TEXT + 4, TEXT + 5))
    assert len(located.asked) == 2


def test_kernel_words_are_addresses(frames, located):
    """Their top byte is no tag."""
    address = 0xFFFF_FFFF_8100_0000

    stacks = frames.kernel([words(address, address + 8), words(), words(address)])

    assert [len(stack) for stack in stacks] == [2, 0, 1]
    assert stacks[0][0] == stacks[2][0]
    assert AddressLocation("kernel", FileOffset(address)) in located.numbers
