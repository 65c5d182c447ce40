"""Memory that was made to be expensive for whoever looks for threads in it, or to mislead him.

It is memory of the process that runs the tests, which a reader is asked for.
"""

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbolizer.runtimes.python_objects import MAX_CHARACTERS
from symbolizer.runtimes.thread_names import MAX_THREADS, Outcome, read_thread_names
from tests.support.live import stat_fields
from tests.support.python_heap import LAYOUT, VERSION, Heap, Runtime

CPU_S = 1.0
MB = 1 << 20


@pytest.fixture(scope="module")
def tid() -> Iterator[int]:
    """Run a thread, and return its number."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    assert thread.native_id is not None
    yield thread.native_id
    done.set()
    thread.join()


def read(runtime: int) -> dict[str, Any]:
    pid = os.getpid()
    ticks = int(stat_fields(pid)[19])
    answer = read_thread_names(
        {"pid": pid, "start_ticks": ticks, "version": VERSION, "runtime": runtime}
    )
    assert answer is not None
    return answer


def test_the_sound_one_is_read(tid: int) -> None:
    """Otherwise the others would be refused for nothing."""
    heap = Heap()

    answer = read(heap.runtime("sound", tid).runtime)

    assert answer == {"outcome": Outcome.READ, "names": [(tid, "sound")]}


def ring_of_interpreters(heap: Heap, made: Runtime) -> None:
    """Let the list of interpreters have no end, and never come back to its beginning."""
    first, second = (heap.put(bytes(LAYOUT.modules + 8)) for _ in range(2))
    heap.write_word(made.runtime + LAYOUT.interpreters, first)
    heap.write_word(first, second)
    heap.write_word(second, second)


def keys_of_themselves(heap: Heap, made: Runtime) -> None:
    heap.write_word(made.modules + LAYOUT.dict_keys, made.modules)


def modules_without_end(heap: Heap, made: Runtime) -> None:
    """Let there be 60,000 modules, each with another name of as many letters."""
    names = [heap.text(f"m{number:08}") for number in range(60_000)]
    keys = heap.keys([(name, made.thread) for name in names])
    heap.write_word(made.modules + LAYOUT.dict_keys, keys)


def too_many_modules(heap: Heap, made: Runtime) -> None:
    keys = heap.keys([(made.name, made.thread)] * 65_537)
    heap.write_word(made.modules + LAYOUT.dict_keys, keys)


def billions_of_modules(heap: Heap, made: Runtime) -> None:
    keys = heap.put(bytes(8) + bytes([39, 42, 0, 0]) + bytes(12) + (1 << 38).to_bytes(8, "little"))
    heap.write_word(made.modules + LAYOUT.dict_keys, keys)


def large_dictionaries(heap: Heap, made: Runtime) -> None:
    """Let 4,000 threads share a dictionary of 60,000 attributes."""
    own = heap.dictionary_of(heap.keys([(made.number, made.number)] * 60_000))
    with_dictionaries(heap, made, [own] * 4_000)


def distinct_large_dictionaries(heap: Heap, made: Runtime) -> None:
    """Let each of 4,000 threads have a dictionary whose keys overlap those of the next."""
    big = heap.keys([(made.number, made.number)] * 60_000)
    head = heap.content(big, LAYOUT.keys_header)
    places = [big + 200_000 + 48 * number for number in range(4_000)]
    for place in places:
        heap.write(place, head)
    with_dictionaries(heap, made, [heap.dictionary_of(place) for place in places])


def with_dictionaries(heap: Heap, made: Runtime, dictionaries: Sequence[int]) -> None:
    """Replace the threads by others, which have these attributes."""
    (of_class,) = struct.unpack("<Q", heap.content(made.thread + LAYOUT.type, 8))
    threads = [heap.put(struct.pack("<QQQ", 1, of_class, each)) for each in dictionaries]
    keys = heap.keys([(made.number, each) for each in threads])
    heap.write_word(made.active + LAYOUT.dict_keys, keys)


def too_many_threads(heap: Heap, made: Runtime) -> None:
    entries = [(made.number, made.thread)] * (MAX_THREADS + 1)
    heap.write_word(made.active + LAYOUT.dict_keys, heap.keys(entries))


def unreadable_threads(heap: Heap, made: Runtime) -> None:
    """Let each of 4,000 threads be where nothing is, so that each read ends at once."""
    entries = [(made.number, 0x1000 + 8 * number) for number in range(4_000)]
    heap.write_word(made.active + LAYOUT.dict_keys, heap.keys(entries))


def wild_pointers(heap: Heap, made: Runtime) -> None:
    for field, word in ((LAYOUT.dict_keys, 1 << 63), (LAYOUT.dict_values, (1 << 64) - 8)):
        heap.write_word(made.active + field, word)


def own_type(heap: Heap, made: Runtime) -> None:
    """Let the type of a thread be the thread."""
    heap.write_word(made.thread + LAYOUT.type, made.thread)


REFUSED: dict[Callable[[Heap, Runtime], None], set[Outcome]] = {
    keys_of_themselves: {Outcome.UNREADABLE, Outcome.NO_MODULE},
    modules_without_end: {Outcome.NO_MODULE},
    too_many_modules: {Outcome.TOO_LARGE},
    billions_of_modules: {Outcome.TOO_LARGE},
    large_dictionaries: {Outcome.TOO_LARGE},
    distinct_large_dictionaries: {Outcome.TOO_LARGE},
    too_many_threads: {Outcome.TOO_LARGE},
    unreadable_threads: {Outcome.TOO_LARGE},
    wild_pointers: {Outcome.UNREADABLE},
    own_type: {Outcome.READ},
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda each: each.__name__)
def test_hostile_memory_gives_no_names_in_time(
    change: Callable[[Heap, Runtime], None], tid: int
) -> None:
    heap = Heap(32 * MB)
    made = heap.runtime("name", tid)
    change(heap, made)
    begun_s = time.thread_time()

    answer = read(made.runtime)

    assert time.thread_time() - begun_s < CPU_S
    assert answer["outcome"] in REFUSED[change]
    assert answer["names"] == []


def test_interpreters_without_end_do_not_hide_the_main_one(tid: int) -> None:
    heap = Heap()
    made = heap.runtime("main", tid)
    ring_of_interpreters(heap, made)

    assert read(made.runtime)["names"] == [(tid, "main")]


@pytest.mark.parametrize("length", [1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_name_of_any_length_is_cut_or_none(length: int, tid: int) -> None:
    heap = Heap()
    made = heap.runtime("n" * 200, tid)
    heap.write_word(made.name + LAYOUT.text.str_length, length)

    names = dict(read(made.runtime)["names"])

    assert names.get(tid, "n") in {"n", "n" * MAX_CHARACTERS + "…"}


@pytest.mark.parametrize("number", [0, 1, (1 << 30) - 1])
def test_a_number_of_no_thread_of_the_process_gives_no_name(number: int) -> None:
    heap = Heap()

    assert read(heap.runtime("other", number).runtime)["names"] == []


@pytest.mark.parametrize("runtime", [0, 1, -8, 1 << 47, 1 << 63, 1 << 64, 1 << 70])
def test_no_runtime_is_refused(runtime: int) -> None:
    assert read(runtime) == {"outcome": Outcome.UNREADABLE, "names": []}


@given(st.data())
def test_damaged_memory_gives_what_is_no_name_at_most(data: st.DataObject) -> None:
    """Whatever bits are wrong, the only thread that can get a name is one of the process."""
    heap = Heap()
    number = threading.get_native_id()
    made = heap.runtime("sound", number)
    for _ in range(data.draw(st.integers(1, 8))):
        heap.flip(data.draw(st.integers(0, heap.size_bytes - 1)), data.draw(st.integers(1, 255)))

    answer = read(made.runtime)

    assert Outcome(answer["outcome"]) in Outcome
    assert {tid for tid, _ in answer["names"]} <= {number}
