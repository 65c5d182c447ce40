"""Schema: the tables of blocks, their columns and their order.

All columns are of plain Parquet types that any engine reads, and none is null. Ids are 64-bit
hashes under the tenant's key (`storage.hashing`), equal on all machines, so files of any parts can
be joined. Only samples of parts and hours refer to stacks by `part` and `stack`: the number, from
0, of a row in the file of `stacks` that has this `part`; so do functions of hours by `part` and
`function_row`. An id takes up to 8 bytes a row, as it cannot be compressed, a number less than 1.
Days refer to stacks and functions by id.
"""

from collections.abc import Mapping

SCHEMA = 2
"""Of the tables and of what their columns mean. Those of schema 1 are read as well (OLDER)."""

DETAIL = "samples_detail"
ROLLUPS = {600: "samples_10m", 3600: "samples_1h", 86400: "samples_1d"}
"""Table by the length of its buckets in seconds."""
_WRITTEN_DICTIONARY = ("stacks", "frames", "modules", "label_sets")
NAMES = "names"
"""The names of locations, which schema 1 had apart from `frames`."""
DICTIONARY = (*_WRITTEN_DICTIONARY, NAMES)
"""Tables that say what ids mean. Files of them may be read together with any samples."""
HEADS = ("objects", "times", "presence")
"""Tables with a row or more for each object."""
HEADS_10M = tuple(f"{table}_10m" for table in HEADS)
"""The same with a line for each host and ten minutes, made when an hour is rolled up."""
PART = (DETAIL, ROLLUPS[600], *HEADS, *_WRITTEN_DICTIONARY)
"""The tables of a part. All others are rollups of an hour or a day."""
FUNCTIONS = "functions"
"""What the ids of functions mean."""
STACK_TREE = "stack_tree"
"""The stacks of a day once more, as a tree (`storage.blocks.frame_tree`); a day may lack it.

Rows stand in order of depth, those of a depth by `parent` and `frame_id`. `parent` is the number of
a row, or NO_PARENT. Where no stack ends `stack_id` is 0. A stack without locations has no row.
"""
NO_PARENT = (1 << 32) - 1

_SAMPLES = {"samples": "BIGINT", "value": "BIGINT"}
_ROLLUP = {"ts": "UINTEGER", "set_id": "UBIGINT", "stack_id": "UBIGINT", **_SAMPLES}
_NUMBERED = {
    "part": "UBIGINT",
    "ts": "UINTEGER",
    "set_id": "UBIGINT",
    "stack": "UINTEGER",
    **_SAMPLES,
}
_COUNTS = "MAP(VARCHAR, BIGINT)"
_TIMES = {"object_id": "UBIGINT", "host_id": "UBIGINT", "set_id": "UBIGINT", **_SAMPLES}
_PRESENCE = {"object_id": "UBIGINT", "set_id": "UBIGINT", "present_ns": "BIGINT"}
_OBJECT_NUMBERS = (
    "start_ns", "end_ns", "period_ns", "cpus", "nonidle_ns", "profiled_ns", "ticks", "idle",
    "filtered", "stored", "uncounted", "agent_cpu_ns", "agent_rss_bytes",
)  # fmt: skip
_OBJECTS = {
    "object_id": "UBIGINT",
    "content16": "VARCHAR",
    "type": "VARCHAR",
    "unit": "VARCHAR",
    "start_s": "UINTEGER",
    "length_s": "UINTEGER",
    "host_key": "VARCHAR",
    "host": "VARCHAR",
    "host_id": "UBIGINT",
    "hosts": 'STRUCT("name" VARCHAR, host_id VARCHAR)[]',
    **dict.fromkeys(_OBJECT_NUMBERS, "BIGINT"),
    **dict.fromkeys(("lost", "stops", "misses"), _COUNTS),
}
_FUNCTION_SAMPLES = {
    "ts": "UINTEGER",
    "host_id": "UBIGINT",
    "set_id": "UBIGINT",
    "function_id": "UBIGINT",
    **_SAMPLES,
}
_GROUP_SAMPLES = {
    "ts": "UINTEGER",
    "group_id": "UTINYINT",
    "set_id": "UBIGINT",
    "function_id": "UBIGINT",
    **_SAMPLES,
}
_NAMES = 'STRUCT("function" VARCHAR, "module" VARCHAR, kind VARCHAR, file VARCHAR, line BIGINT)[]'
_FRAME = {
    "frame_id": "UBIGINT",
    "build_id": "VARCHAR",
    "frame_offset": "UBIGINT",
    "function": "VARCHAR",
    "module": "VARCHAR",
    "kind": "VARCHAR",
    "file": "VARCHAR",
    "first_line": "BIGINT",
    "line": "BIGINT",
}
_RANK = {"name_rank": "UTINYINT", "named_s": "BIGINT"}
_FUNCTION_TOTALS = {
    "ts": "UINTEGER",
    "set_id": "UBIGINT",
    "function_id": "UBIGINT",
    **_SAMPLES,
    "total_samples": "BIGINT",
    "total_value": "BIGINT",
}
_FUNCTIONS = {
    "function_id": "UBIGINT",
    "function": "VARCHAR",
    "module": "VARCHAR",
    "kind": "VARCHAR",
    "file": "VARCHAR",
    "files": "UTINYINT",
    "weak_ids": "UBIGINT[]",
}


def _by_row(columns: Mapping[str, str]) -> Mapping[str, str]:
    """Return the columns of a table that refers to functions by `part` and `function_row`."""
    others = {name: type_ for name, type_ in columns.items() if name != "function_id"}
    return {"part": "UBIGINT", **others, "function_row": "UINTEGER"}


TABLES: Mapping[str, Mapping[str, str]] = {
    DETAIL: {
        "part": "UBIGINT",
        "ts": "UINTEGER",
        "host_id": "UBIGINT",
        "set_id": "UBIGINT",
        "stack": "UINTEGER",
        **_SAMPLES,
    },
    ROLLUPS[600]: _NUMBERED,
    ROLLUPS[3600]: _NUMBERED,
    ROLLUPS[86400]: _ROLLUP,
    "times": _TIMES,
    "stacks": {"part": "UBIGINT", "stack_id": "UBIGINT", "frame_ids": "UBIGINT[]"},
    "frames": {**_FRAME, **_RANK, "names": _NAMES},
    "modules": {
        "build_id": "VARCHAR",
        "path": "VARCHAR",
        "kind": "VARCHAR",
        "segments": "STRUCT(p_vaddr UBIGINT, p_offset UBIGINT, p_filesz UBIGINT)[]",
    },
    "label_sets": {"set_id": "UBIGINT", "labels": "MAP(VARCHAR, VARCHAR)"},
    "objects": _OBJECTS,
    "presence": _PRESENCE,
    "objects_10m": {**_OBJECTS, "objects": "BIGINT"},
    "times_10m": _TIMES,
    "presence_10m": _PRESENCE,
    "functions_10m": _by_row(_FUNCTION_SAMPLES),
    "functions_1h": _by_row(_FUNCTION_TOTALS),
    "functions_1d": _FUNCTION_SAMPLES,
    "function_groups_1h": _by_row(_GROUP_SAMPLES),
    "function_groups_1d": _GROUP_SAMPLES,
    FUNCTIONS: {**_FUNCTIONS, "part": "UBIGINT"},
    STACK_TREE: {
        "parent": "UINTEGER",
        "frame_id": "UBIGINT",
        "stack_id": "UBIGINT",
        "is_stack": "BOOLEAN",
    },
}

OLDER: Mapping[str, Mapping[str, str]] = {
    "frames": _FRAME,
    NAMES: {"frame_id": "UBIGINT", **_RANK, "frames": _NAMES},
    "stacks": {
        "part": "UBIGINT",
        "stack": "UINTEGER",
        "stack_id": "UBIGINT",
        "frame_ids": "UBIGINT[]",
    },
    ROLLUPS[600]: _ROLLUP,
    ROLLUPS[3600]: _ROLLUP,
    "functions_10m": _FUNCTION_SAMPLES,
    "functions_1h": _FUNCTION_TOTALS,
    "function_groups_1h": _GROUP_SAMPLES,
    FUNCTIONS: _FUNCTIONS,
}
"""The columns that tables of schema 1 had, where they were others. Those of a day's hours still are
(ORDER_BY_ID)."""

ORDER = {
    DETAIL: "host_id, set_id, stack, ts, samples, value",
    ROLLUPS[600]: "set_id, part, stack, ts",
    ROLLUPS[3600]: "set_id, part, stack, ts",
    ROLLUPS[86400]: "set_id, stack_id, ts",
    "times": "object_id, host_id, set_id",
    "stacks": "frame_ids, stack_id",
    "frames": "build_id, frame_offset, module, file, function, frame_id",
    "modules": "build_id",
    "label_sets": "set_id",
    "objects": "start_s, host_key, length_s, content16",
    "presence": "object_id, set_id, present_ns",
    "objects_10m": "start_s, host_key, host, object_id",
    "times_10m": "object_id, host_id, set_id",
    "presence_10m": "object_id, set_id",
    "functions_10m": "set_id, part, function_row, host_id, ts",
    "functions_1h": "set_id, part, function_row, ts",
    "functions_1d": "set_id, function_id, host_id, ts",
    "function_groups_1h": "set_id, part, function_row, group_id, ts",
    "function_groups_1d": "set_id, function_id, group_id, ts",
    FUNCTIONS: "module, function, function_id",
}
"""By what each table is sorted: that makes it small, and the order of parts does not show."""
ORDER_BY_ID = {ROLLUPS[3600]: "set_id, stack_id, ts", "functions_1h": "set_id, function_id, ts"}
"""The same of tables of a day, of which those of hours have numbers."""
