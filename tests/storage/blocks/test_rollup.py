"""Rollups: rare stacks are folded where there are many, and totals stay exact."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.blocks import rollup, tables
from storage.blocks.block import Block
from storage.blocks.dictionary import read_dictionary
from storage.blocks.reading import sum_samples
from storage.blocks.rollup import fold, keep_common, rest_id, sort_stacks
from storage.blocks.scans import LocalFile, of_table
from storage.blocks.schema import DETAIL
from storage.blocks.tables import merge_parts, write_block
from storage.profile import Profile, Window
from symbolizer.location import REST_LOCATION
from tests.support import profiles as some
from tests.support.blocks import ALWAYS, HASHER, make_stacks, stored

locations = st.integers(1, 4)
stacks = st.lists(st.lists(locations, max_size=6).map(tuple), min_size=1, max_size=12, unique=True)


@given(stacks, st.data())
def test_a_rare_stack_is_folded_into_its_longest_kept_prefix(words, data):
    """Not all of it: what is left is one location `[rest]`."""
    kept_words = data.draw(st.lists(st.sampled_from(words), max_size=4, unique=True))
    whole, kept = make_stacks(words), make_stacks(kept_words)
    _, numbers = np.unique(whole.frame_ids, return_inverse=True)
    order = sort_stacks(whole.offsets, numbers.astype(np.uint32))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollup, "_STACKS_AT_ONCE", 3)
        folded = fold(whole.take(order), np.sort(kept.ids), HASHER)

    rare = [words[i] for i in order.tolist() if words[i] not in kept_words]
    prefixes = {each[:n] for each in kept_words for n in range(len(each) + 1)}
    expected = []
    for each in rare:
        length = max((n for n in range(len(each)) if each[:n] in prefixes), default=0)
        of_words = make_stacks([each[:length]]).frame_ids
        expected.append([*of_words.tolist(), rest_id(HASHER)])
    by_id = {
        number: folded.stacks.frame_ids[start:end].tolist()
        for number, start, end in zip(
            folded.stacks.ids.tolist(),
            folded.stacks.offsets[:-1].tolist(),
            folded.stacks.offsets[1:].tolist(),
            strict=True,
        )
    }
    assert folded.rare.tolist() == make_stacks(rare).ids.tolist()
    assert [by_id[number] for number in folded.folded.tolist()] == expected
    again = HASHER.stacks(
        folded.stacks.frame_ids, folded.stacks.offsets, np.arange(len(folded.stacks.frame_ids))
    )
    assert again.tolist() == folded.stacks.ids.tolist()


@given(st.lists(st.lists(st.integers(0, 2), max_size=70).map(tuple), unique=True))
def test_stacks_are_sorted_by_their_frames(words):
    """Also those that are told apart only by frames far from the root."""
    flat = np.array([word for each in words for word in each], dtype=np.uint32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollup, "_STACKS_AT_ONCE", 3)
        order = sort_stacks(np.cumsum([0, *map(len, words)]), flat)

    assert [words[i] for i in order.tolist()] == sorted(words)


NONE = np.zeros(4, dtype=bool)


def test_stacks_with_most_samples_are_kept_ties_by_id():
    """Half of what may be folded in all, 1 of 100 samples, is left for later."""
    ids = np.array([5, 3, 9, 1], dtype=np.uint64)

    assert keep_common(ids, NONE, np.array([198, 1, 0, 1])).ids.tolist() == [1, 5]
    assert keep_common(ids, NONE, np.array([1, 1, 1, 1])).ids.tolist() == [1, 3, 5, 9]
    assert keep_common(ids[:0], NONE[:0], np.zeros(0, np.int64)).ids.tolist() == []


def test_stacks_with_most_of_the_value_are_kept_as_well():
    """A single allocation may have most of the bytes."""
    ids = np.array([5, 3, 9, 1], dtype=np.uint64)

    kept = keep_common(ids, NONE, np.array([299, 1, 0, 0]), np.array([9, 2**60, 1, 0]))
    assert kept.ids.tolist() == [3, 5]


def test_what_was_folded_before_counts():
    """Once 1 of 100 samples are folded nothing else is; folded stacks are none to keep."""
    ids = np.array([5, 3, 9, 1], dtype=np.uint64)
    is_folded = np.array([False, False, False, True])

    assert keep_common(ids, is_folded, np.array([990, 2, 3, 5])).ids.tolist() == [5, 9]
    assert keep_common(ids, is_folded, np.array([980, 5, 5, 10])).ids.tolist() == [3, 5, 9]
    assert keep_common(ids, is_folded, np.array([1, 0, 5, 9000])).ids.tolist() == [5, 9]


def _many(seed: int, *, is_even: bool = False) -> Profile:
    """Return a profile of many stacks: few are common, or each is a little rarer than another."""
    profile = some.synthetic(400, 12, functions=200, seed=seed)
    numbers = np.arange(len(profile.row_samples))
    samples = 1 + 3000 // (1 + numbers) if is_even else np.where(numbers % 10 == 0, 3000, 1)
    start_ns = seed * 60_000_000_000
    return Profile(
        **{
            name: getattr(profile, name)
            for name in Profile.__dataclass_fields__
            if name not in {"row_samples", "row_values", "window"}
        },
        row_samples=samples,
        row_values=samples * profile.period_ns,
        window=Window(start_ns, start_ns + 60_000_000_000),
    )


def test_rollups_of_many_stacks_are_folded_exactly(tmp_path, monkeypatch):
    """In a part, and again when parts are merged; detail keeps every stack."""
    monkeypatch.setattr(tables, "FOLDED_ABOVE", 100)
    parts = []
    for seed in (1, 2):
        block = Block.of([stored(_many(seed))], HASHER)
        parts.append(write_block(block, tmp_path / str(seed)))
    merged = merge_parts([*parts[0], *parts[1]], tmp_path / "merged", HASHER)

    for files in (*parts, merged):
        detail = sum_samples(of_table(files, DETAIL), **ALWAYS)
        rolled = sum_samples(of_table(files, "samples_10m"), **ALWAYS)
        assert rolled.samples.sum() == detail.samples.sum()
        assert rolled.values.sum() == detail.values.sum()
        assert len(np.unique(rolled.stacks)) < len(np.unique(detail.stacks)) / 2
        columns = read_dictionary(files, np.unique(rolled.stacks))
        rest = np.flatnonzero(columns.location_hashes == np.uint64(rest_id(HASHER)))
        ends = columns.stack_offsets[1:]
        ends_in_rest = np.isin(columns.stack_words[ends - 1], rest)
        is_new = ~np.isin(columns.stack_hashes, detail.stacks)
        assert is_new.any()
        assert ends_in_rest[is_new].all()
        profile = columns.to_profile()
        number = profile.locations.index(REST_LOCATION)
        assert profile.frames(number)[0].function == "[rest]"
        read_dictionary(files, np.unique(detail.stacks))


def test_most_samples_are_kept_however_often_parts_are_merged(tmp_path, monkeypatch):
    """Each merge may fold a part of what may be folded in all."""
    monkeypatch.setattr(tables, "FOLDED_ABOVE", 100)
    merged: list[LocalFile] = []
    for seed in range(1, 7):
        part = write_block(
            Block.of([stored(_many(seed, is_even=True))], HASHER), tmp_path / str(seed)
        )
        merged = merge_parts([*merged, *part], tmp_path / f"{seed}-merged", HASHER)

    rolled = sum_samples(of_table(merged, "samples_10m"), **ALWAYS)
    columns = read_dictionary(merged, np.unique(rolled.stacks))
    rest = np.flatnonzero(columns.location_hashes == np.uint64(rest_id(HASHER)))
    ends_in_rest = np.isin(columns.stack_words[columns.stack_offsets[1:] - 1], rest)
    folded = np.isin(rolled.stacks, columns.stack_hashes[ends_in_rest])
    assert 0 < rolled.samples[folded].sum() <= rolled.samples.sum() / 100


def test_stacks_of_named_locations_are_folded_as_well(tmp_path, monkeypatch):
    """A block may know no module at all."""
    monkeypatch.setattr(tables, "FOLDED_ABOVE", 1)
    rows = [({}, [some.named("main"), some.named(name)], n) for name, n in (("a", 9999), ("b", 1))]

    files = write_block(Block.of([stored(some.build(rows))], HASHER), tmp_path)

    rolled = sum_samples(of_table(files, "samples_10m"), **ALWAYS)
    columns = read_dictionary(files, np.unique(rolled.stacks))
    assert sorted(rolled.samples.tolist()) == [1, 9999]
    assert REST_LOCATION in columns.to_profile().locations
