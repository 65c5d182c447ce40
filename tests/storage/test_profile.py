"""Profiles as values: grouping keeps every count, and what is shown of locations and labels."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from storage.profile import (
    Accounting,
    Labels,
    NameRank,
    ProfileBuilder,
    Stack,
    label_frames,
    make_labels,
)
from symbolizer.location import Frame, Kind
from tests.support import profiles as some


@given(st.lists(some.accountings, min_size=1, max_size=4))
def test_mismatches_add_up(accountings):
    """The law of conservation is linear: parts that hold it make a whole that holds it."""
    merged = Accounting()
    for accounting in accountings:
        merged = merged.merge(accounting)

    assert merged.mismatch == sum(accounting.mismatch for accounting in accountings)


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


@given(some.profiles(), st.data())
def test_replaced_locations_keep_all_counts(profile, data):
    """Those that become one are counted as one, and have the best of their names."""
    builder = ProfileBuilder.like(profile)
    names = dict(zip(profile.locations, profile.names, strict=True))
    for row in profile.rows():
        numbers = [builder.location(place, names[place]) for place in row.stack]
        builder.add(row.labels, numbers, row.samples, row.value)
    targets = st.sampled_from([*profile.locations, some.native(some.LIBC, 0x77)])
    replaced = {place: data.draw(targets) for place in profile.locations}

    builder.replace_locations(replaced)
    found = builder.build(profile.window, profile.accounting)

    expected: Counter[tuple[Labels, Stack]] = Counter()
    for row in profile.rows():
        expected[row.labels, tuple(replaced[place] for place in row.stack)] += row.samples
    assert {key: samples for key, (samples, _) in found.counts().items()} == expected
    assert found.total_value == profile.total_value
    assert set(found.locations) <= set(replaced.values())
    for place, names in zip(found.locations, found.names, strict=True):
        ranks = [
            NameRank.of(profile.names[number])
            for number, before in enumerate(profile.locations)
            if replaced[before] == place
        ]
        assert NameRank.of(names) == max(ranks)


def test_addresses_without_a_name_share_the_frame_of_their_module():
    """Two places in a stripped library are one box; the kernel's has the kernel's kind."""
    unnamed = [some.native(some.LIBC, 0x30000), some.native(some.LIBC, 0x31000)]
    profile = some.build([({}, [*unnamed, some.READ], 1)])

    frames = [profile.frames(number) for number in range(3)]
    assert frames[0] == frames[1] == (Frame("[libc.so.6]", "libc.so.6", Kind.NATIVE),)
    assert frames[2] == (Frame("[kernel.kallsyms]", "[kernel.kallsyms]", Kind.KERNEL),)


def test_rows_that_lack_a_label_say_so_in_its_frame():
    """A label that only some rows have is drawn for all; one that none has is not drawn."""
    sets = [make_labels({"comm": "sh"}), make_labels({})]

    heads = label_frames(sets, ["comm", "pod"])

    assert heads == [(Frame("sh", "", Kind.LABEL),), (Frame("[no comm]", "", Kind.LABEL),)]
