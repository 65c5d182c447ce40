"""Profiles as arrays: merging and filtering keep every count."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.columns import Columns
from storage.merging import merge_columns
from storage.profile import Profile, Window
from symbolizer.location import ElfAddress, Frame, Kind, bounded
from tests.support import profiles as some


def merge(profiles: list[Profile]) -> Profile:
    return merge_columns([Columns.of(each) for each in profiles]).to_profile()


@given(st.lists(some.profiles(), min_size=1, max_size=4))
def test_a_merge_is_what_adding_up_rows_makes(profiles):
    """Counts, window, accounting, modules, and names that only some profiles know."""
    merged, expected = merge(profiles), some.merge(profiles)

    assert merged == expected
    assert some.named_locations(merged) == some.named_locations(expected)
    assert merged.modules == expected.modules


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


@given(some.profiles(), st.sampled_from(["service", "comm", "pid"]))
def test_filters_that_complement_each_other_split_a_profile(profile, name):
    """What a filter keeps and what its opposite keeps make the whole again."""
    columns = Columns.of(profile)
    has_name = [name in dict(labels) for labels in profile.label_sets]
    lacks_name = [not has for has in has_name]
    having, lacking = map(columns.with_label_sets, (has_name, lacks_name))

    assert having.total_samples + lacking.total_samples == profile.total_samples
    assert having.time_counts.sum() + lacking.time_counts.sum() == columns.time_counts.sum()
    assert having.to_profile().counts() | lacking.to_profile().counts() == profile.counts()
    assert having.accounting == profile.accounting


def test_a_merge_leaves_out_locations_that_no_row_uses():
    """A part of a profile does not carry the tables of the whole."""
    columns = Columns.of(some.sample_profile())
    jobs = [dict(labels)["service"] == "jobs" for labels in columns.label_sets]

    python = merge_columns([columns.with_label_sets(jobs)]).to_profile()

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


def test_name_is_better_than_where_a_function_begins():
    """A file and its stripped twin have one build id, in whichever order they come."""
    place = some.native(some.LIBC, 0x30000)
    read = Frame("read", "libc.so.6", Kind.NATIVE)
    in_range = bounded("libc.so.6", Kind.NATIVE, ElfAddress(0x2FF00))
    assert in_range.function == "libc.so.6+0x2ff00"
    profiles = [some.build([({}, [place], 1)], {place: (frame,)}) for frame in (read, in_range)]

    for pair in (profiles, profiles[::-1]):
        assert merge(pair).frames(0) == (read,)


def test_large_values_are_added_exactly():
    """Counts beyond 2^53 do not pass through floats."""
    profile = some.build([({}, [some.MAIN], 1)])
    large = dataclasses.replace(profile, row_values=np.array([2**60 + 1]))

    assert merge([large, large]).total_value == 2**61 + 2
