"""Interpreters in the kernel: their number is bounded, and anybody can make files like them."""

from collections.abc import Iterator

import pytest

from bpf.interpreters import INTERPRETERS_CAPACITY
from bpf.sampler import Sampler, SamplerConfig
from profiler.agent.runtimes import Runtimes
from symbolizer.maps import Mapping
from symbolizer.runtimes.cpython import Image
from tests.support.python_images import known_image_of
from tests.support.pythons import need_python

pytestmark = pytest.mark.kernel

WHOLE_FILE = Mapping(0x10000, 1 << 40, 0, b"/usr/lib/libpython.so", (8, 1), 7)


@pytest.fixture(scope="module")
def sampler() -> Iterator[Sampler]:
    with Sampler(SamplerConfig()) as sampler:
        yield sampler


@pytest.fixture(scope="module")
def image() -> Image:
    return known_image_of(need_python((3, 11)).runtime_file)[0]


def test_interpreters_that_no_process_has_make_room_for_others(sampler: Sampler, image: Image):
    """Who runs many files one after the other takes the numbers of his own."""
    in_use: set[int] = set()
    runtimes = Runtimes(sampler, lambda: in_use)
    runtimes.take("real", image)
    real = runtimes.runtime("real", WHOLE_FILE)
    assert real is not None
    in_use.add(real.interpreter)
    for number in range(2 * INTERPRETERS_CAPACITY):
        runtimes.take(f"file {number}", image)
        assert runtimes.runtime(f"file {number}", WHOLE_FILE) is not None

    assert runtimes.runtime("real", WHOLE_FILE) == real
    assert runtimes.status()["interpreters"] < INTERPRETERS_CAPACITY


def test_an_interpreter_without_room_is_known_when_there_is_some(sampler: Sampler, image: Image):
    in_use = range(INTERPRETERS_CAPACITY)
    runtimes = Runtimes(sampler, lambda: in_use)
    keys = [f"file {number}" for number in range(INTERPRETERS_CAPACITY)]
    for key in keys:
        runtimes.take(key, image)
    found = [runtimes.runtime(key, WHOLE_FILE) for key in keys]
    assert found[-1] is None
    assert None not in found[:-1]
    assert runtimes.status()["refused_too_many_interpreters"] == 1

    in_use = range(0)

    assert runtimes.runtime(keys[-1], WHOLE_FILE) is not None
