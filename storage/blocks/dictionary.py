"""Read what the ids of samples mean: stacks, locations, their names and modules, label sets.

All of them may be in files of several parts; what is equal has equal ids. Of several names for one
location the best wins, as `storage.profile.NameRank` says.
"""

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storage.blocks.frame_tree import EMPTY_STACK, Locations, read_tree
from storage.blocks.loading import ADDRESS
from storage.blocks.parquet import Engine, reading_engine
from storage.blocks.scans import LocalFile, numbered_scan_of, of_table
from storage.blocks.schema import NAMES, STACK_TREE
from storage.blocks.tables import one_of_each
from storage.columns import OBJECT_FIELDS, Columns, TextNumbers, Texts
from storage.formats.pprof_arrays import make_readable
from storage.grouping import HashIndex, sort_distinct
from storage.hashing import Hashes, Numbers
from storage.profile import (
    Accounting,
    Integers,
    Labels,
    NameRank,
    ProfileError,
    Window,
    make_labels,
)
from storage.selector import Selector
from storage.stack_tree import StackLists, Stacks, join_stacks
from symbolizer.location import ElfAddress, FileOffset, Kind, Module, Segment
from symbolizer.text import READABLE_LIMIT, readable

_STACKS_AT_ONCE = 122_880
"""Those of a row group, some 3 million words."""
_HEADS = "stack_id, CAST(len(frame_ids) AS BIGINT) AS length"


def read_label_sets(files: Sequence[LocalFile]) -> dict[int, Labels]:
    """Return label sets and hosts by id.

    Raises:
        ProfileError: a file is damaged or not one of ours.
        SchemaError: a later version wrote one.
    """
    with reading_engine() as opened:
        return fetch_label_sets(opened, files)


def read_label_pairs(files: Sequence[LocalFile]) -> list[tuple[int, Labels]]:
    """Return all pairs of an id and a label set, also those that files contradict each other in.

    Raises: as `read_label_sets`.
    """
    chosen = of_table(files, "label_sets")
    if not chosen:
        return []
    with reading_engine() as opened:
        opened.check(chosen)
        query = "SELECT DISTINCT set_id, map_entries(labels) AS pairs FROM {files}"
        opened.load("label_pairs", query, chosen)
        return [_label_set(*row) for row in opened.rows("SELECT set_id, pairs FROM label_pairs")]


def fetch_label_sets(opened: Engine, files: Sequence[LocalFile]) -> dict[int, Labels]:
    """Do what `read_label_sets` does, with a connection that is open."""
    chosen = of_table(files, "label_sets")
    if not chosen:
        return {}
    opened.check(chosen)
    opened.load("label_sets", one_of_each("label_sets", len(chosen)), chosen)
    rows = opened.rows("SELECT set_id, map_entries(labels) FROM label_sets ORDER BY set_id")
    return dict(_label_set(*row) for row in rows)


def _label_set(number: int, pairs: Sequence[Mapping[str, str]]) -> tuple[int, Labels]:
    return number, make_labels({clean(each["key"]): clean(each["value"]) for each in pairs})


def choose_ids(
    files: Sequence[LocalFile], selector: Selector
) -> tuple[Hashes | None, Hashes | None]:
    """Return the ids of the label sets and of the hosts that a selector accepts; None: of all."""
    return choose_among(read_label_sets(files) if selector.matchers else {}, selector)


def choose_among(
    label_sets: Mapping[int, Labels], selector: Selector
) -> tuple[Hashes | None, Hashes | None]:
    """Return what `choose_ids` does, of label sets by id."""
    of_hosts = Selector(tuple(each for each in selector.matchers if each.name == "host"))
    of_sets = Selector(tuple(each for each in selector.matchers if each.name != "host"))

    def ids(selector: Selector) -> Hashes | None:
        if not selector.matchers:
            return None
        numbers, sets = list(label_sets), list(label_sets.values())
        chosen = selector.choose(map(dict, sets))
        return np.array(list(itertools.compress(numbers, chosen)), np.uint64)

    return ids(of_sets), ids(of_hosts)


def read_dictionary(files: Sequence[LocalFile], wanted: Hashes | None = None) -> Columns:
    """Return stacks, their locations, names and modules, as Columns without rows or objects.

    With `wanted` only these stacks; only locations that these have.

    Raises:
        ProfileError: a file is damaged or not one of ours, or something is missing in all of them.
        SchemaError: a later version wrote one.
    """
    with reading_engine() as opened:
        return fetch_dictionary(opened, files, wanted)


def fetch_dictionary(opened: Engine, files: Sequence[LocalFile], wanted: Hashes | None) -> Columns:
    """Do what `read_dictionary` does, with a connection that is open."""
    stack_files = [*of_table(files, STACK_TREE), *of_table(files, "stacks")]
    opened.check([*stack_files, *of_table(files, "frames")])
    ids = sort_distinct(
        opened.arrays_of("SELECT frame_id FROM {files}", of_table(files, "frames"))["frame_id"]
    )
    stack_ids, stacks = _read_stacks(opened, stack_files, wanted, Locations.of(ids))
    is_used = np.zeros(len(ids), dtype=bool)
    is_used[stacks.words] = True
    used = np.flatnonzero(is_used)
    if len(used) < len(ids):
        words = (np.cumsum(is_used) - 1).astype(np.int32).take(stacks.words)
        stacks = replace(stacks, words=words)
    return replace(fetch_locations(opened, files, ids[used]), stack_hashes=stack_ids, stacks=stacks)


def fetch_locations(
    opened: Engine, files: Sequence[LocalFile], wanted: Hashes | None = None
) -> Columns:
    """Return locations, their names and modules, as Columns without stacks, rows or objects.

    They ascend by their ids. With `wanted` only these, which ascend.

    Raises: as `read_dictionary`.
    """
    chosen = {table: of_table(files, table) for table in ("frames", NAMES, "modules")}
    opened.check([each for some in chosen.values() for each in some])
    needed = ""
    if wanted is not None:
        opened.register("used", {"frame_id": wanted})
        needed = "SEMI JOIN used USING (frame_id)"
    for table in ("frames", NAMES):
        query = one_of_each(table, len(chosen[table]), f"(SELECT * FROM {{files}} {needed})")
        opened.load(table, f"SELECT * FROM ({query}) ORDER BY frame_id", chosen[table])
    addressed = f"(SELECT build_id FROM frames WHERE kind = '{ADDRESS}')"
    rows = f"(SELECT * FROM {{files}} SEMI JOIN {addressed} USING (build_id))"
    query = one_of_each("modules", len(chosen["modules"]), rows)
    opened.load("modules", query, chosen["modules"])
    frames = opened.arrays("SELECT * FROM frames")
    names = opened.arrays(
        "SELECT frame_id, name_rank, named_s, CAST(len(frames) AS BIGINT) AS calls FROM names"
    )
    calls = opened.arrays("SELECT unnest(shown) FROM (SELECT unnest(frames) AS shown FROM names)")
    modules = opened.rows("SELECT build_id, path, kind, segments FROM modules ORDER BY 1")
    ids = frames["frame_id"]
    is_whole = wanted is None or np.array_equal(ids, wanted)
    if not is_whole or has_repeated(ids) or has_repeated(names["frame_id"]):
        raise ProfileError(f"cannot read {names_of(files)}: a location is there twice")
    return replace(
        _locations_of(frames, names, calls),
        modules={module.build_id: module for module in map(_module_of, modules)},
    )


class _Stacks(NamedTuple):
    """Stacks by id, whose words are numbers of locations."""

    ids: Hashes
    stacks: Stacks

    def only(self, is_wanted: npt.NDArray[np.bool_]) -> "_Stacks":
        if is_wanted.all():
            return self
        return _Stacks(self.ids[is_wanted], self.stacks.take(np.flatnonzero(is_wanted)))


def _read_stacks(
    opened: Engine, files: Sequence[LocalFile], wanted: Hashes | None, locations: Locations
) -> _Stacks:
    """Return the stacks of some files, each once: those of the largest tree or file, then others.

    In a file stacks that begin alike stand together, and so they stay: what is drawn of them then
    finds them near each other.
    """
    needed = None if wanted is None else sort_distinct(wanted)
    known = np.zeros(0, dtype=np.uint64)
    parts: list[_Stacks] = []
    for file in sorted(files, key=lambda each: (each.table != STACK_TREE, -each.rows)):
        if needed is not None and not len(needed):
            break
        if file.table == STACK_TREE:
            part = _read_tree(opened, file, known, needed, locations)
        else:
            part = _read_file(opened, file, known, needed, locations)
        parts.append(part)
        known = np.concatenate([known, part.ids])
        if needed is not None:
            needed = needed[HashIndex(np.sort(part.ids)).find(needed) < 0]
    if needed is not None and np.array_equal(needed, [EMPTY_STACK]):  # it is in no tree
        parts.append(_Stacks(needed, StackLists(np.zeros(2, np.int64), np.zeros(0, np.int32))))
        known, needed = np.concatenate([known, needed]), needed[:0]
    if has_repeated(np.sort(known)):
        raise ProfileError(f"cannot read {names_of(files)}: a stack is there twice")
    if needed is not None and len(needed):
        raise ProfileError(f"cannot read {names_of(files)}: {len(needed)} stacks are missing")
    if not parts:
        return _Stacks(known, StackLists(np.zeros(1, np.int64), np.zeros(0, np.int32)))
    if len(parts) == 1:
        return parts[0]
    highest = max(int(part.stacks.words.max(initial=0)) for part in parts)
    numbers = np.arange(highest + 1, dtype=np.int32)
    return _Stacks(known, join_stacks([part.stacks for part in parts], [numbers] * len(parts)))


def _read_tree(
    opened: Engine, file: LocalFile, known: Hashes, needed: Hashes | None, locations: Locations
) -> _Stacks:
    """Return the stacks of a tree that are needed and not known."""
    read = read_tree(opened, file, locations)
    found = _Stacks(read.ids, read.tree)
    if needed is None:
        return found.only(HashIndex(np.sort(known)).find(found.ids) < 0)
    return found.only(HashIndex(needed).find(found.ids) >= 0)


def _read_file(
    opened: Engine,
    file: LocalFile,
    known: Hashes,
    needed: Hashes | None,
    locations: Locations,
) -> _Stacks:
    """Return the stacks of a file that are needed and not known."""
    is_whole = needed is None and not len(known)
    if needed is not None:
        ids = opened.arrays_of("SELECT stack_id FROM {files}", [file])["stack_id"]
        needed = needed[HashIndex(np.sort(ids)).find(needed) >= 0]
        # If most are needed it is faster to look for them here.
        is_whole = 2 * len(needed) > len(ids)
    if is_whole:
        heads = opened.arrays_of(f"SELECT {_HEADS} FROM {{files}}", [file])
        part = _Stacks(heads["stack_id"], _number_words(file, _offsets_of(heads), locations))
        return part if needed is None else part.only(HashIndex(needed).find(part.ids) >= 0)
    opened.register("listed", {"stack_id": known if needed is None else needed})
    join = "ANTI" if needed is None else "SEMI"
    opened.load("fetched", f"SELECT * FROM {{files}} {join} JOIN listed USING (stack_id)", [file])
    heads = opened.arrays(f"SELECT {_HEADS} FROM fetched")
    words = opened.arrays("SELECT unnest(frame_ids) AS frame_id FROM fetched")["frame_id"]
    opened.run("DROP TABLE fetched")
    return _Stacks(heads["stack_id"], StackLists(_offsets_of(heads), locations.find(words)))


def _offsets_of(heads: Mapping[str, Numbers]) -> Integers:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(heads["length"])])


def _number_words(file: LocalFile, offsets: Integers, locations: Locations) -> StackLists:
    """Return all stacks of a file, read two pieces at a time."""
    numbered = np.empty(int(offsets[-1]), dtype=np.int32)

    def number(first: int) -> None:
        last = min(first + _STACKS_AT_ONCE, file.rows)
        query = (
            f"SELECT unnest(frame_ids) AS frame_id FROM {numbered_scan_of(file)}"
            f" WHERE file_row_number >= {first} AND file_row_number < {last}"
        )
        with reading_engine() as opened:
            words = opened.arrays_of(query, [file])["frame_id"]
        numbered[offsets[first] : offsets[last]] = locations.find(words)

    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(number, range(0, file.rows, _STACKS_AT_ONCE)):
            pass
    return StackLists(offsets, numbered)


def _locations_of(
    frames: Mapping[str, Numbers], names: Mapping[str, Numbers], calls: Mapping[str, Numbers]
) -> Columns:
    """Return the tables of locations, which ascend by their ids as the rows given do."""
    numbers = TextNumbers()
    is_address = frames["kind"] == ADDRESS
    kinds = {*frames["kind"][~is_address].tolist(), *calls["kind"].tolist()}
    if not kinds <= {str(kind) for kind in Kind}:
        raise ProfileError("cannot read blocks: there are unknown kinds of frames")
    lines = np.concatenate([frames["first_line"], frames["line"], calls["line"]])
    if lines.min(initial=0) < 0 or names["name_rank"].max(initial=0) > NameRank.REAL:
        raise ProfileError("cannot read blocks: a line or rank of a name is impossible")
    texts = np.where(is_address, frames["build_id"], frames["function"])
    locations = np.zeros((len(texts), 3), dtype=np.uint64)
    locations[:, 0] = numbers.numbers(texts.tolist())
    locations[is_address, 1] = frames["frame_offset"][is_address]
    named_at = np.flatnonzero(~is_address)
    locations[named_at, 2] = np.arange(1, len(named_at) + 1)
    named = np.zeros((len(named_at), 5), dtype=np.int64)
    for i, name in enumerate(("module", "kind", "file")):
        named[:, i] = numbers.numbers(frames[name][named_at].tolist())
    named[:, 3], named[:, 4] = frames["first_line"][named_at], frames["line"][named_at]
    table = np.zeros((len(calls["line"]), 5), dtype=np.int64)
    for i, name in enumerate(("function", "module", "kind", "file")):
        table[:, i] = numbers.numbers(calls[name].tolist())
    table[:, 4] = calls["line"]
    at = np.searchsorted(frames["frame_id"], names["frame_id"])
    counts, ranks, named_s = (np.zeros(len(texts), dtype=np.int64) for _ in range(3))
    counts[at], ranks[at], named_s[at] = names["calls"], names["name_rank"], names["named_s"]
    nothing = np.zeros((0, 2), dtype=np.int64)
    return Columns(
        type="",
        unit="",
        period_ns=1,
        window=Window(0, 0),
        accounting=Accounting(),
        modules={},
        label_sets=(),
        texts=Texts.of(make_readable(numbers.contents())),
        location_hashes=frames["frame_id"],
        locations=locations,
        named=named,
        frame_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
        frames=table,
        name_ranks=ranks,
        named_s=named_s,
        stack_hashes=np.zeros(0, np.uint64),
        stacks=StackLists(np.zeros(1, np.int64), np.zeros(0, np.int32)),
        rows=nothing,
        counts=nothing,
        objects=np.zeros((0, len(OBJECT_FIELDS)), dtype=np.int64),
        times=nothing,
        time_counts=nothing,
        present_sets=(),
        presence=np.zeros((0, 3), dtype=np.int64),
    )


def _module_of(row: tuple[str, str, str, Sequence[Mapping[str, int]]]) -> Module:
    build_id, path, kind, segments = row
    try:
        known = Kind(kind)
    except ValueError:
        raise ProfileError("cannot read blocks: a module has an unknown kind") from None
    if any(s is None or None in s.values() for s in segments):
        raise ProfileError("cannot read blocks: a value is missing")
    return Module(
        clean(build_id),
        clean(path),
        known,
        tuple(
            Segment(ElfAddress(s["p_vaddr"]), FileOffset(s["p_offset"]), s["p_filesz"])
            for s in segments
        ),
    )


def has_repeated(ascending: Hashes) -> bool:
    return bool((ascending[1:] == ascending[:-1]).any())


def names_of(files: Sequence[LocalFile]) -> str:
    return ", ".join(str(each.path) for each in files)


def clean(text: str | None) -> str:
    """Return a text that is safe to show: what we wrote stays as it is.

    Raises:
        ProfileError: it is null.
    """
    if text is None:
        raise ProfileError("cannot read blocks: a value is missing")
    if len(text) <= READABLE_LIMIT and text.isascii() and text.isprintable():
        return text  # as nearly all are, of thousands
    return readable(text.encode("utf-8", "backslashreplace"))
