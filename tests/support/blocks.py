"""Objects as readers decode them, and the files of blocks made of them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from storage.blocks import reading, times
from storage.blocks.block import DROPPED_LABELS, Block
from storage.blocks.dictionary import read_label_sets
from storage.blocks.rollup import Stacks
from storage.blocks.scans import LocalFile, of_table
from storage.blocks.schema import DETAIL
from storage.blocks.slices import Slice
from storage.blocks.tables import write_block
from storage.columns import Columns, Times
from storage.formats import pprof
from storage.hashing import Hasher
from storage.objects.keys import ObjectKey, object_key
from storage.profile import Profile
from storage.query.decoding import decode_object

HASHER = Hasher(b"tests" * 8)
ALWAYS = {"start_s": 0, "end_s": 1 << 32}

Decoded = tuple[ObjectKey, Columns]


def stored(profile: Profile, hasher: Hasher = HASHER) -> Decoded:
    """Encode a profile as an object, and decode it as readers do."""
    content = pprof.encode(profile)
    key = object_key(profile, content, "default")
    return key, decode_object(key, content, hasher)


def without_processes(columns: Columns) -> Columns:
    """Leave out the labels that blocks drop; label sets that become equal stay apart."""
    reduced = tuple(
        tuple(pair for pair in labels if pair[0] not in DROPPED_LABELS)
        for labels in columns.label_sets
    )
    return dataclasses.replace(columns, label_sets=reduced)


def write(profiles: Sequence[Decoded], folder: Path) -> list[LocalFile]:
    return write_block(Block.of(profiles, HASHER), folder)


def files_of(files: Sequence[LocalFile], *tables: str) -> list[LocalFile]:
    return [each for each in files if each.table in tables]


def read_columns(
    files: Sequence[LocalFile], *, start_s: int, end_s: int, **chosen: Sequence[int]
) -> Columns | None:
    """Return the Columns of the objects in files that start in some seconds, from detail."""
    spans = ((start_s, end_s),)
    detail = Slice(tuple(of_table(files, DETAIL)), spans)
    heads, rows = Slice(tuple(files), spans), reading.Stored([detail], files)
    return reading.read_columns([heads], read_label_sets(files), lambda: rows, **chosen)


def read_times(files: Sequence[LocalFile], *, start_s: int, end_s: int) -> Times | None:
    return times.read_times([Slice(tuple(files), ((start_s, end_s),))])


def make_stacks(words: Sequence[tuple[int, ...]]) -> Stacks:
    """Return stacks of locations whose ids are spread like hashes."""
    flat = np.array([word for each in words for word in each], dtype=np.uint64)
    offsets = np.cumsum([0, *map(len, words)])
    ids = flat * np.uint64(0x9E3779B97F4A7C15)
    return Stacks(HASHER.stacks(ids, offsets, np.arange(len(ids))), offsets, ids)
