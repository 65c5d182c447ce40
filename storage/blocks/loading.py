"""Load a block's arrays as tables of a DuckDB connection, as they are written.

Lists and maps are put together by DuckDB from rows (number, position, …): arrays in memory are
flat, and a Python object for each list would take longer than all the rest.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from storage.blocks.block import Block, LabelIds
from storage.blocks.parquet import Engine
from storage.blocks.rollup import Stacks
from storage.blocks.schema import NAMES, OLDER, TABLES
from storage.columns import Columns
from storage.grouping import ranges
from storage.profile import NameRank, make_labels
from symbolizer.location import REST, REST_FRAME, Module

ADDRESS = "address"
"""The kind of a location in `frames` that has an address and no name of its own."""

OBJECT_COUNTS = (
    "cpus",
    "nonidle_ns",
    "profiled_ns",
    "ticks",
    "idle",
    "filtered",
    "stored",
    "uncounted",
    "agent_cpu_ns",
    "agent_rss_bytes",
)
OBJECT_MAPS = ("lost", "stops", "misses")
"""Fields of an accounting that are columns of `objects`."""

SUMS = "CAST(sum(samples) AS BIGINT) AS samples, CAST(sum(value) AS BIGINT) AS value"

_USUAL_DEPTH = 64
"""Deeper stacks are put together in another way, that takes more time and less memory."""
_AT_ONCE = 20_000
"""Stacks that are put together at a time: 10 MB."""


def load_block(opened: Engine, block: Block, stacks: Stacks) -> None:
    """Make the tables detail, times, objects, presence and those of the dictionary.

    `stacks` are those of the block.
    """
    samples, times = block.samples, block.times
    opened.register(
        "block_samples",
        {
            "ts": samples.ts,
            "host_id": samples.hosts,
            "set_id": samples.sets,
            "stack_id": samples.stacks,
            "samples": samples.samples,
            "value": samples.values,
        },
    )
    opened.run(
        "CREATE TEMP VIEW detail AS"
        " SELECT ts, host_id, set_id, stack_id, samples, value FROM block_samples"
    )
    opened.register(
        "block_times",
        {
            "object_id": times.objects,
            "host_id": times.hosts,
            "set_id": times.sets,
            "samples": times.samples,
            "value": times.values,
        },
    )
    opened.run(
        "CREATE TEMP VIEW times AS"
        " SELECT object_id, host_id, set_id, samples, value FROM block_times"
    )
    _load_objects(opened, block)
    opened.run("CREATE TEMP TABLE stacks (stack_id UBIGINT, frame_ids UBIGINT[])")
    insert_stacks(opened, stacks)
    _load_frames(opened, block.dictionary)
    _load_modules(opened, block.dictionary.modules.values())


def insert_stacks(opened: Engine, stacks: Stacks, *, are_new: bool = False) -> None:
    """Insert stacks, all of them different, into the table `stacks`, but for those that it has.

    If they are new it has none of them.
    """
    has_some = not are_new and opened.rows("SELECT count(*) FROM stacks") != [(0,)]
    new = "ANTI JOIN stacks USING (stack_id)" if has_some else ""
    lengths = np.diff(stacks.offsets)
    usual = np.flatnonzero(lengths <= _USUAL_DEPTH)
    for first in range(0, len(usual), _AT_ONCE):
        _insert_usual(opened, stacks.take(usual[first : first + _AT_ONCE]), new)
    deep = stacks.take(np.flatnonzero(lengths > _USUAL_DEPTH))
    if len(deep.ids):
        numbers = np.arange(len(deep.ids))
        opened.register("new_stacks", {"number": numbers, "stack_id": deep.ids})
        opened.register(
            "new_words",
            {
                "number": np.repeat(numbers, deep.offsets[1:] - deep.offsets[:-1]),
                "position": np.arange(len(deep.frame_ids)),
                "frame_id": deep.frame_ids,
            },
        )
        words = _lists("new_words", "frame_id", "frame_ids")
        opened.run(
            f"INSERT INTO stacks SELECT stack_id, frame_ids FROM new_stacks JOIN ({words})"
            f" USING (number) {new}"
        )


def _insert_usual(opened: Engine, stacks: Stacks, new: str) -> None:
    """Insert stacks that are not deep, from an array for each depth: eight times as fast."""
    lengths = stacks.offsets[1:] - stacks.offsets[:-1]
    deepest = int(lengths.max(initial=1))
    by_depth = np.zeros((deepest, len(lengths)), dtype=np.uint64)
    depth = np.arange(len(stacks.frame_ids)) - np.repeat(stacks.offsets[:-1], lengths)
    by_depth[depth, np.repeat(np.arange(len(lengths)), lengths)] = stacks.frame_ids
    columns = {f"word_{i}": words for i, words in enumerate(by_depth)}
    opened.register("new_stacks", {"stack_id": stacks.ids, "depth": lengths, **columns})
    opened.run(
        f"INSERT INTO stacks SELECT stack_id, list_value({', '.join(columns)})[1:depth]"
        f" FROM new_stacks {new}"
    )


def insert_rest(opened: Engine, rest_id: int) -> None:
    """Insert the location `[rest]`, its name and module, where the tables do not have them."""
    function, module, kind, file, line = REST_FRAME
    frame = (
        f"{{'function': '{function}', 'module': '{module}', 'kind': '{kind}', 'file': '{file}',"
        f" 'line': {line}}}"
    )
    for table, key, values in (
        ("frames", str(rest_id), f"'{REST}', 0, '', '', '{ADDRESS}', '', 0, 0"),
        (NAMES, str(rest_id), f"{NameRank.REAL:d}, 0, [{frame}]"),
        ("modules", f"'{REST}'", f"'{REST}', '{kind}', []"),
    ):
        columns = {**TABLES, **OLDER}[table]
        names = ", ".join(f'"{name}"' for name in columns)
        column = next(iter(columns))
        opened.run(
            f"INSERT INTO {table} ({names}) SELECT {key}, {values}"
            f" WHERE {key} NOT IN (SELECT {column} FROM {table})"
        )


def load_label_sets(opened: Engine, labels: LabelIds) -> None:
    """Make the table `label_sets` of all sets that have an id by now."""
    ids = np.array(list(labels.sets), dtype=np.uint64)
    opened.register("new_sets", {"number": np.arange(len(ids)), "set_id": ids})
    pairs = [
        (number, i, name, text)
        for number, labels_ in enumerate(labels.sets.values())
        for i, (name, text) in enumerate(labels_)
    ]
    _register_rows(opened, "new_pairs", pairs, "number", "position", "name:", "text:")
    opened.run(
        "CREATE TEMP TABLE label_sets AS"
        # Where all sets are empty the list would be one of nothing.
        " SELECT set_id, CAST(map_from_entries(coalesce(pairs, []))"
        f" AS {TABLES['label_sets']['labels']}) AS labels FROM new_sets LEFT JOIN ("
        + _lists("new_pairs", "{'k': name, 'v': text}", "pairs")
        + ") USING (number)"
    )


def _load_objects(opened: Engine, block: Block) -> None:
    objects, labels = block.objects, block.labels
    ids = np.array([each.object_id for each in objects], dtype=np.uint64)
    hosts = [make_labels({"host": each.host} if each.host else {}) for each in objects]
    accountings = [each.accounting for each in objects]
    texts = {
        "content16": [each.key.content16 for each in objects],
        "host_key": [each.key.host_id for each in objects],
        "host": [each.host for each in objects],
        "type": [block.type] * len(objects),
        "unit": [block.unit] * len(objects),
    }
    numbers = {
        "number": list(range(len(objects))),
        "start_s": [each.key.start_s for each in objects],
        "length_s": [each.key.length_s for each in objects],
        "start_ns": [each.window.start_ns for each in objects],
        "end_ns": [each.window.end_ns for each in objects],
        "period_ns": [each.period_ns for each in objects],
        **{name: [getattr(each, name) for each in accountings] for name in OBJECT_COUNTS},
    }
    opened.register(
        "new_objects",
        {
            "object_id": ids,
            "host_id": np.array([labels.id(each) for each in hosts], dtype=np.uint64),
            **{name: np.array(each, dtype=object) for name, each in texts.items()},
            **{name: np.array(each, dtype=np.int64) for name, each in numbers.items()},
        },
    )
    host_rows = [
        (number, i, *host)
        for number, each in enumerate(accountings)
        for i, host in enumerate(each.hosts)
    ]
    _register_rows(opened, "new_hosts", host_rows, "number", "position", "name:", "id:")
    joins = [f"({_lists('new_hosts', _HOST, 'hosts')})"]
    for name in OBJECT_MAPS:
        counts = [
            (number, i, text, count)
            for number, each in enumerate(accountings)
            for i, (text, count) in enumerate(sorted(getattr(each, name).items()))
        ]
        _register_rows(opened, f"new_{name}", counts, "number", "position", "text:", "count")
        joins.append(f"({_lists(f'new_{name}', _COUNT, name)})")
    maps = ", ".join(f"map_from_entries(coalesce({name}, [])) AS {name}" for name in OBJECT_MAPS)
    opened.run(
        "CREATE TEMP TABLE objects AS SELECT * EXCLUDE (number, hosts, lost, stops, misses),"
        f" coalesce(hosts, []) AS hosts, {maps} FROM new_objects "
        + " ".join(f"LEFT JOIN {each} USING (number)" for each in joins)
    )
    present = [
        (number, labels.id(services), present_ns)
        for number, each in enumerate(accountings)
        for services, present_ns in each.services.items()
    ]
    opened.register(
        "new_presence",
        {
            "object_id": ids[np.array([each[0] for each in present], dtype=np.int64)],
            "set_id": np.array([each[1] for each in present], dtype=np.uint64),
            "present_ns": np.array([each[2] for each in present], dtype=np.int64),
        },
    )
    opened.run("CREATE TEMP TABLE presence AS SELECT * FROM new_presence")


def _load_frames(opened: Engine, columns: Columns) -> None:
    """Make the tables `frames` and `names`."""
    texts = np.array(
        [text.decode() for text in columns.texts.take(np.arange(len(columns.texts)))] + [""],
        dtype=object,
    )
    nothing = len(texts) - 1
    place = columns.locations
    is_named = place[:, 2] > 0
    named = np.zeros((len(place), 5), dtype=np.int64)
    named[:, :3] = nothing
    named[is_named] = columns.named[place[is_named, 2].astype(np.int64) - 1]
    text = place[:, 0].astype(np.int64)
    kinds = texts[named[:, 1]]
    kinds[~is_named] = ADDRESS
    opened.register(
        "new_frames",
        {
            "frame_id": columns.location_hashes,
            "build_id": texts[np.where(is_named, nothing, text)],
            "frame_offset": np.where(is_named, np.uint64(0), place[:, 1].astype(np.uint64)),
            "function": texts[np.where(is_named, text, nothing)],
            "module": texts[named[:, 0]],
            "kind": kinds,
            "file": texts[named[:, 2]],
            "first_line": named[:, 3],
            "line": named[:, 4],
        },
    )
    opened.run("CREATE TEMP TABLE frames AS SELECT * FROM new_frames")
    starts = columns.frame_offsets[:-1].astype(np.int64)
    counts = columns.frame_offsets[1:].astype(np.int64) - starts
    has_names = np.flatnonzero(counts)
    opened.run(
        "CREATE TEMP TABLE names (frame_id UBIGINT, name_rank UTINYINT, named_s BIGINT,"
        f" frames {OLDER[NAMES]['frames']})"
    )
    # Most have one frame. Lists of more are put together, which takes longer.
    for is_one in (True, False):
        mine = has_names[(counts[has_names] == 1) == is_one]
        frames = columns.frames[ranges(starts[mine], counts[mine])].astype(np.int64)
        opened.register(
            "new_names",
            {
                "number": mine,
                "frame_id": columns.location_hashes[mine],
                "name_rank": columns.name_ranks[mine].astype(np.int64),
                "named_s": columns.named_s[mine].astype(np.int64),
            },
        )
        opened.register(
            "new_calls",
            {
                "number": np.repeat(mine, counts[mine]),
                "position": np.arange(len(frames)),
                **{name: texts[frames[:, i]] for i, name in enumerate(_CALL_TEXTS)},
                "line": frames[:, 4],
            },
        )
        lists = f"SELECT number, [{_CALL}] AS frames FROM new_calls"
        if not is_one:
            lists = _lists("new_calls", _CALL, "frames")
        opened.run(
            "INSERT INTO names SELECT frame_id, name_rank, named_s, frames"
            f" FROM new_names JOIN ({lists}) USING (number)"
        )


def _load_modules(opened: Engine, modules: Iterable[Module]) -> None:
    listed = list(modules)
    heads = [(i, each.build_id, each.path, str(each.kind)) for i, each in enumerate(listed)]
    _register_rows(opened, "new_modules", heads, "number", "build_id:", "path:", "kind:")
    segments = np.array(
        [
            (i, j, *each)
            for i, module in enumerate(listed)
            for j, each in enumerate(module.segments)
        ],
        dtype=np.uint64,
    ).reshape(-1, 5)
    names = ("number", "position", "p_vaddr", "p_offset", "p_filesz")
    opened.register("new_segments", {name: segments[:, i] for i, name in enumerate(names)})
    segment = "{'p_vaddr': p_vaddr, 'p_offset': p_offset, 'p_filesz': p_filesz}"
    # Texts of which there are none would have no type.
    texts = ", ".join(f"CAST({name} AS VARCHAR) AS {name}" for name in ("build_id", "path", "kind"))
    opened.run(
        "CREATE TEMP TABLE modules AS"
        f" SELECT {texts}, coalesce(segments, []) AS segments FROM new_modules"
        f" LEFT JOIN ({_lists('new_segments', segment, 'segments')}) USING (number)"
    )


_CALL_TEXTS = ("function", "module", "kind", "file")
_CALL = "{'function': \"function\", 'module': \"module\", 'kind': kind, 'file': file, 'line': line}"
_HOST = "{'name': \"name\", 'host_id': id}"
_COUNT = "{'k': text, 'v': count}"


def _lists(table: str, element: str, name: str) -> str:
    """Return a query for (number, list of elements in the order of their positions)."""
    return f'SELECT number, list({element} ORDER BY position) AS "{name}" FROM {table} GROUP BY ALL'


def _register_rows(
    opened: Engine, table: str, rows: Sequence[tuple[Any, ...]], *names: str
) -> None:
    """Register rows of integers and texts; a text's name ends with a colon here."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(names)
    opened.register(
        table,
        {
            name.rstrip(":"): np.array(column, dtype=object if name[-1] == ":" else np.int64)
            for name, column in zip(names, columns, strict=True)
        },
    )
