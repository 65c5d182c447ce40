"""What a window may take: beyond it detail goes, visibly, and no sample."""

import subprocess
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpf.sampler import SamplerConfig
from bpf.samples import ProcessGeneration
from profiler.agent.budgets import (
    BoundedProfile,
    Limit,
    Limits,
    Owner,
    longest_prefix,
)
from profiler.agent.recorder import Recorder
from storage.formats import pprof, pprof_arrays
from storage.formats.limits import OBJECT
from storage.formats.pprof_head import read_head
from storage.formats.pprof_message import check_parts, decompress
from storage.hashing import Hasher
from storage.profile import Accounting, Labels, Profile, ProfileBuilder, Window, make_labels
from symbolizer.location import (
    REST,
    REST_LOCATION,
    AddressLocation,
    FileOffset,
    Frame,
    Kind,
    Module,
)
from tests.support.live import wait_for
from tests.support.targets import compile_target, running

SMALL = Limits(
    rows=Limit(20_000, 40_000, 100_000),
    label_sets=Limit(10_000, 20_000, 50_000),
)


def owner(pid: int, cgroup_id: int = 1) -> Owner:
    return Owner(ProcessGeneration(pid, 1, 1), cgroup_id)


def labels(pid: int, thread: str = "main", service: str = "web") -> Labels:
    return make_labels({"service": service, "comm": "web", "thread": thread, "pid": str(pid)})


def profile_of(builder: ProfileBuilder, samples: int) -> Profile:
    return builder.build(Window(0, 1), Accounting(ticks=samples, stored=samples))


def builder_of(locations: int) -> ProfileBuilder:
    builder = ProfileBuilder(10)
    for number in range(locations):
        builder.location(AddressLocation("aa", FileOffset(number)))
    return builder


@given(
    st.lists(st.lists(st.integers(0, 300), max_size=5), max_size=9),
    st.lists(st.integers(0, 300), max_size=5),
)
def test_the_longest_prefix_is_found_among_all_that_are_kept(kept, stack):
    packed = sorted(np.array(each, np.int32).tobytes() for each in kept)

    longest = longest_prefix(packed, np.array(stack, np.int32).tobytes())

    assert longest == max(
        (n for n in range(len(stack)) if any(each[:n] == stack[:n] for each in kept)), default=0
    )


def test_stacks_beyond_the_budget_end_after_their_longest_kept_prefix():
    """All samples are counted; the other process keeps each of its stacks."""
    bounded_builder, builder = builder_of(3_000), builder_of(3_000)
    bounded = BoundedProfile(bounded_builder, 1, SMALL)
    rng = np.random.default_rng(1)
    for i in range(1_000):
        bounded.add(owner(7), labels(7), [0, 1, *rng.integers(2, 3_000, 5)], 2)
        if i % 100 == 0:
            for each in (bounded, None):
                stack = [5, i, i + 1]
                if each:
                    each.add(owner(8, 2), labels(8), stack, 3)
                else:
                    builder.add(labels(8), stack, 3)

    counts = profile_of(bounded_builder, 2_030).counts()

    assert sum(samples for samples, _ in counts.values()) == 2_030
    others = {key: count for key, count in counts.items() if ("pid", "8") in key[0]}
    assert others == profile_of(builder, 30).counts()
    folded = [stack for _, stack in counts if stack[-1] == REST_LOCATION]
    assert {len(stack) for stack in folded} >= {3}
    assert all([place.offset for place in stack[:2]] == [0, 1] for stack in folded)
    assert len(counts) < 20_000 * 1.25 / 500 + 10
    assert bounded.folded == 2 * 1_000 - sum(
        n for (_, stack), (n, _) in counts.items() if len(stack) == 7
    )


def test_threads_are_folded_when_a_process_has_too_many():
    builder = builder_of(2)
    bounded = BoundedProfile(builder, 1, SMALL)
    for i in range(200):
        bounded.add(owner(7), labels(7, thread=f"worker-{i}"), [0, 1], 1)
    bounded.add(owner(8, 2), labels(8, thread="its own"), [0, 1], 1)

    sets = {dict(each)["thread"]: each for each, _ in profile_of(builder, 201).counts()}

    assert 8 < len(sets) < 20
    assert sets[REST] == labels(7, thread=REST)
    assert sets["its own"] == labels(8, thread="its own")


def test_pids_are_folded_where_processes_come_without_end():
    """Those of one cgroup and comm; in the end all that is left has one label set."""
    builder = builder_of(2)
    bounded = BoundedProfile(builder, 1, SMALL)
    for pid in range(1_000):
        service = f"run-{pid // 10 % 50}"
        bounded.add(owner(pid, pid // 10), labels(pid, service=service), [0, 1], 1)

    counts = profile_of(builder, 1_000).counts()

    services = {dict(each)["service"] for each, _ in counts if dict(each).get("pid") == REST}
    assert len(counts) < 80
    assert sum(samples for samples, _ in counts.values()) == 1_000
    assert len(services) > 3
    assert any(dict(each) == {"service": REST} for each, _ in counts)


def test_a_longer_window_has_more_room():
    builder = builder_of(1_000)
    bounded = BoundedProfile(builder, 2, SMALL)
    for i in range(200):
        bounded.add(owner(7), labels(7), [i], 1)
    before = len(profile_of(builder, 0).row_stacks)
    bounded.grow(2)
    for i in range(200, 400):
        bounded.add(owner(7), labels(7), [i], 1)

    assert 1.8 * before < len(profile_of(builder, 0).row_stacks) < 2.2 * before


def test_names_beyond_the_budget_are_left_out():
    """Of that module; the locations stay."""
    builder = builder_of(0)
    bounded = BoundedProfile(builder, 1, SMALL._replace(module_names_bytes=5_000))
    places = [AddressLocation(build_id, FileOffset(i)) for build_id in "ab" for i in range(40)]
    for place in places:
        builder.location(place)
    for place in places:
        length = 900 if place.build_id == "a" else 9
        name = f"{place.offset:0{length}}"
        bounded.name(place, (Frame(name, "m", Kind.NATIVE),))

    named = {place for place in places if place not in set(builder.unnamed_locations())}

    assert 3 <= sum(place.build_id == "a" for place in named) <= 6
    assert sum(place.build_id == "b" for place in named) == 40


def fullest() -> tuple[Profile, int]:
    """Return a profile that has as much of everything as the budgets allow, made 1/16 as large."""
    part = 16
    limits = Limits(
        *(Limit(*(size // part for size in limit)) for limit in Limits()[:3]),
        module_names_bytes=Limits().module_names_bytes // part,
        names_bytes=Limits().names_bytes // part,
        modules_bytes=Limits().modules_bytes // part,
    )
    builder = ProfileBuilder(10)
    bounded = BoundedProfile(builder, 8, limits)
    rng = np.random.default_rng(2)
    samples, pid = 0, 0
    places: list[int] = []
    while True:
        pid += 1
        me = owner(pid, cgroup_id=pid)
        granted = bounded.locations.take(me, 500)
        for _ in range(granted):
            offset = FileOffset(2**60 + len(places))
            places.append(builder.location(AddressLocation(f"{pid % 500:040x}", offset)))
        for i in range(8):
            long = f"{pid}-{i}-" + "x" * 200
            bounded.add(me, labels(pid, thread=long, service=long), rng.choice(places, 255), 1)
            samples += 1
        if not granted and bounded._rows.left(me) < 4_000 and bounded._label_sets.left(me) < 3_000:
            break
    names = [("名" * 1000 + str(number), "f" * 1000 + str(number)) for number in range(5_000)]
    for place, (function, file) in zip(builder.unnamed_locations(), names, strict=False):
        bounded.name(place, (Frame(function, "m", Kind.NATIVE, file, 7),))
    bounded.add_modules(
        {f"{n:040x}": Module(f"{n:040x}", "/" + "名" * 1000 + str(n)) for n in range(500)}
    )
    return profile_of(builder, samples), part


def test_what_is_written_at_the_limits_every_reader_accepts():
    profile, part = fullest()

    content = pprof.encode(profile)

    most = {each.name: getattr(OBJECT, each.name) // part for each in fields(OBJECT)}
    check_parts(decompress(content), replace(OBJECT, **most))
    assert pprof.decode(content) == profile
    assert read_head(content).ours.accounting == profile.accounting
    assert pprof_arrays.decode(content, Hasher(b"k")).total_samples == profile.total_samples


@pytest.mark.kernel
def test_fabricated_return_addresses_are_one_location(tmp_path: Path) -> None:
    """A program above which 254 addresses lie in no mapping, others each time."""
    fabricate = compile_target("fabricated_stacks.c", tmp_path / "fabricate", "-O1")
    with (
        running(fabricate, stdout=subprocess.PIPE) as process,
        Recorder(SamplerConfig(frequency_hz=499), tmp_path / "cache") as recorder,
    ):
        assert process.stdout.readline() == b"there\n"
        recorder.start()

        def is_sampled() -> bool:
            recorder.step()
            return recorder.counts.stops.get("no_mapping", 0) > 100

        wait_for(is_sampled, what="its samples")
        profile = recorder.close_window()

    mine = [row for row in profile.rows() if dict(row.labels).get("pid") == str(process.pid)]
    places = {place for row in mine for place in row.stack}
    assert max(len(row.stack) for row in mine) > 250
    assert [place.offset for place in places if place.build_id == "[unknown]"] == [0]
    assert len(places) < 1_000
    assert profile.accounting.mismatch == 0
    assert pprof.decode(pprof.encode(profile)) == profile
