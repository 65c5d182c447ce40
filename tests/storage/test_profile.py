"""Profiles as values: merging, filtering and grouping keep every count."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.profile import Accounting, Window, label_frames, make_labels, merge
from symbolizer.location import ElfAddress, Frame, Kind, bounded
from tests.support import profiles as some


@given(some.profiles(), some.profiles())
def test_merge_is_commutative(one, other):
    """The order of two profiles does not show in their sum."""
    assert merge([one, other]) == merge([other, one])


@given(some.profiles(), some.profiles(), some.profiles())
def test_merge_is_associative(one, two, three):
    """It does not matter which profiles are merged first."""
    assert merge([merge([one, two]), three]) == merge([one, merge([two, three])])


@given(some.profiles())
def test_a_profile_merged_alone_stays_what_it_is(profile):
    """Merging one profile changes nothing."""
    assert merge([profile]) == profile


@given(st.lists(some.profiles(), min_size=1, max_size=4))
def test_merge_keeps_totals(profiles):
    """The sum of the parts is the whole, in samples and in value."""
    merged = merge(profiles)

    assert merged.total_samples == sum(each.total_samples for each in profiles)
    assert merged.total_value == sum(each.total_value for each in profiles)


@given(st.lists(some.accountings, min_size=1, max_size=4))
def test_mismatches_add_up(accountings):
    """The law of conservation is linear: parts that hold it make a whole that holds it."""
    merged = Accounting()
    for accounting in accountings:
        merged = merged.merge(accounting)

    assert merged.mismatch == sum(accounting.mismatch for accounting in accountings)


@given(some.profiles(), st.sampled_from(["service", "comm", "pid"]))
def test_filters_that_complement_each_other_split_a_profile(profile, name):
    """What a filter keeps and what its opposite keeps make the whole again."""
    having = profile.filter(lambda labels: name in labels)
    lacking = profile.filter(lambda labels: name not in labels)

    assert having.total_samples + lacking.total_samples == profile.total_samples
    assert having.counts() | lacking.counts() == profile.counts()
    assert having.accounting == profile.accounting


@given(some.profiles(), st.lists(st.sampled_from(["service", "comm", "pid"]), unique=True))
def test_grouping_keeps_totals_and_only_the_labels_asked_for(profile, names):
    """Grouping adds rows up and drops labels, never counts."""
    grouped = profile.group_by(names)

    assert grouped.total_value == profile.total_value
    assert {key for labels in grouped.label_sets for key, _ in labels} <= set(names)


@given(some.profiles())
def test_a_pair_of_labels_and_stack_is_in_one_row(profile):
    """Equal stacks under equal labels are folded."""
    grouped = profile.group_by(())

    pairs = list(zip(grouped.row_labels.tolist(), grouped.row_stacks.tolist(), strict=True))
    assert len(pairs) == len(set(pairs))


def test_a_filter_drops_locations_that_no_row_uses_any_more():
    """A part of a profile does not carry the tables of the whole."""
    python = some.sample_profile().filter(lambda labels: labels["service"] == "jobs")

    assert set(python.locations) == {some.HANDLER, some.SQUARE}
    assert not python.modules


def test_different_types_do_not_merge():
    """Seconds and bytes have no sum."""
    profile = some.sample_profile()
    heap = dataclasses.replace(profile, type="space", unit="bytes")

    with pytest.raises(ValueError, match="different types"):
        merge([profile, heap])


def test_the_window_of_a_merge_covers_both():
    """A merged window starts with the earliest and ends with the latest."""
    later = Window(some.WINDOW.end_ns, some.WINDOW.end_ns + 5)
    merged = merge([some.sample_profile(), some.build([], window=later)])

    assert merged.window == Window(some.WINDOW.start_ns, later.end_ns)


def test_addresses_without_a_name_share_the_frame_of_their_module():
    """Two places in a stripped library are one box; the kernel's has the kernel's kind."""
    unnamed = [some.native(some.LIBC, 0x30000), some.native(some.LIBC, 0x31000)]
    profile = some.build([({}, [*unnamed, some.READ], 1)])

    frames = [profile.frames(number) for number in range(3)]
    assert frames[0] == frames[1] == (Frame("[libc.so.6]", "libc.so.6", Kind.NATIVE),)
    assert frames[2] == (Frame("[kernel.kallsyms]", "[kernel.kallsyms]", Kind.KERNEL),)


def test_name_is_better_than_where_a_function_begins():
    """A file and its stripped twin have one build id, in whichever order they come."""
    place = some.native(some.LIBC, 0x30000)
    read = Frame("read", "libc.so.6", Kind.NATIVE)
    in_range = bounded("libc.so.6", Kind.NATIVE, ElfAddress(0x2FF00))
    assert in_range.function == "libc.so.6+0x2ff00"
    profiles = [some.build([({}, [place], 1)], {place: (frame,)}) for frame in (read, in_range)]

    for pair in (profiles, profiles[::-1]):
        assert merge(pair).frames(0) == (read,)


def test_rows_that_lack_a_label_say_so_in_its_frame():
    """A label that only some rows have is drawn for all; one that none has is not drawn."""
    sets = [make_labels({"comm": "sh"}), make_labels({})]

    heads = label_frames(sets, ["comm", "pod"])

    assert heads == [(Frame("sh", "", Kind.LABEL),), (Frame("[no comm]", "", Kind.LABEL),)]


def test_large_values_are_added_exactly():
    """Counts beyond 2^53 do not pass through floats."""
    profile = some.build([({}, [some.MAIN], 1)])
    large = dataclasses.replace(profile, row_values=np.array([2**60 + 1]))

    assert merge([large, large]).total_value == 2**61 + 2
