"""Write the tables of blocks, and merge those of several parts into one.

What is merged is exact: each row of the samples stays as it is, each location and stack occurs
once, and of several names the best wins. Nothing depends on the order of the parts. Rollups are
added up; where they have many stacks, rare ones are folded (`storage.blocks.rollup`).
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from storage.blocks.block import Block
from storage.blocks.loading import SUMS, insert_rest, insert_stacks, load_block, load_label_sets
from storage.blocks.parquet import DEFAULT_MEMORY_BYTES, Engine, engine
from storage.blocks.rollup import FOLDED_ABOVE, Stacks, fold, keep_common, rest_id
from storage.blocks.scans import LocalFile, of_table
from storage.blocks.schema import DETAIL, DICTIONARY, HEADS, NAMES, OLDER, PART, ROLLUPS, TABLES
from storage.grouping import HashIndex, sort_distinct
from storage.hashing import Hasher, Hashes
from storage.profile import ProfileError

_STACKS_AT_ONCE = 100_000
"""Stacks that are fetched at a time, 30 MB."""
PIECE_BYTES = 48 << 20
"""A rollup or dictionary with more bytes is written as several files: no object may have more than
64 MB."""
_DETAIL_BYTES = 4 << 20
"""Detail is written as files of about this size, each of successive hosts, where a part has several
times as much: who asks for one host fetches one of them. Smaller ones would save little beside the
other files of the part, and make more objects: a part has 14 at most."""
_SPLIT_BY = ("stack_id", "stack", "function_id", "function_row")
"""Of tables that have none of them: their first column."""
_FIRST_BUCKET_S, _HOUR_S = sorted(ROLLUPS)[:2]
_FIRST_ROLLUP = ROLLUPS[_FIRST_BUCKET_S]

_LINES = {
    "stacks": "SELECT stack_id, frame_ids FROM {}",
    "frames": "SELECT * EXCLUDE (name_rank, named_s, names) FROM {}",
    NAMES: "SELECT frame_id, name_rank, named_s, names AS frames FROM {} WHERE len(names) > 0",
}
"""The lines of a dictionary's table as they are loaded, where these are not all columns."""
_ONE_OF_EACH = {
    "stacks": "SELECT stack_id, any_value(frame_ids) AS frame_ids FROM {} GROUP BY stack_id",
    "frames": "SELECT frame_id, min(COLUMNS(* EXCLUDE frame_id)) FROM {} GROUP BY frame_id",
    # As `storage.profile.NameRank` chooses, ties by what the names are.
    NAMES: (
        "SELECT frame_id, unnest(max({{'name_rank': name_rank, 'named_s': named_s,"
        " 'frames': frames}})) FROM {} GROUP BY frame_id"
    ),
    # As `storage.profile.adopt_module` chooses.
    "modules": (
        "SELECT build_id, unnest(min({{'is_bare': len(segments) = 0, 'path': path, 'kind': kind,"
        " 'segments': segments}})) FROM {} GROUP BY build_id"
    ),
    "label_sets": "SELECT set_id, any_value(labels) AS labels FROM {} GROUP BY set_id",
}


def one_of_each(table: str, files: int, chosen: str = "{files}") -> str:
    """Return a query for the lines of a dictionary's table, each id once: of several the best.

    `chosen` is what they are read from. A single file has each id once.
    """
    lines = _LINES.get(table, "SELECT * FROM {}").format(chosen)
    return _ONE_OF_EACH[table].format(f"({lines})") if files > 1 else lines


_WITH_NAMES = (
    "SELECT frames.*, coalesce(name_rank, 0) AS name_rank, coalesce(named_s, 0) AS named_s,"
    " coalesce(known.frames, []) AS names FROM frames LEFT JOIN names AS known USING (frame_id)"
)
"""The lines of `frames` as they are written, of the tables `frames` and `names`."""


STACKS_OF_PARTS = (
    "SELECT stack_id, frame_ids FROM {files} SEMI JOIN"
    " (SELECT stack_id, min(part) AS part FROM {files} GROUP BY stack_id) USING (stack_id, part)"
)
"""Those of the parts of an hour, each once, as `one_of_each`: a part has a number of its own and no
stack twice. To find out where each stack is takes half as long as to group lists."""


def write_block(block: Block, folder: Path) -> list[LocalFile]:
    """Write a block as one part: a file of each table but those of longer rollups.

    The files are named after their tables. The folder must not have such files yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with engine(folder=folder) as opened:
        stacks = Stacks.of(block.dictionary)
        load_block(opened, block, stacks)
        sets = sort_distinct(block.samples.sets)
        opened.register("sets", {"set_id": sets, "rolled_id": block.labels.roll_up(sets)})
        load_label_sets(opened, block.labels)
        opened.run(
            f"CREATE TEMP TABLE rollup AS SELECT {bucket_of(_FIRST_BUCKET_S)} AS ts,"
            f" rolled_id AS set_id, stack_id, {SUMS} FROM detail JOIN sets USING (set_id)"
            " GROUP BY ALL"
        )
        _fold_rollup(opened, block.hasher, stacks)
        part = _number_part(block.hasher, [each.object_id for each in block.objects])
        written = {"stacks": _write_stacks(opened, folder, part)}
        sources = {table: f"SELECT * FROM {table}" for table in PART} | {
            "frames": _WITH_NAMES,
            _FIRST_ROLLUP: f"SELECT {part} AS part, * FROM rollup JOIN numbered USING (stack_id)",
            DETAIL: f"SELECT {part} AS part, * FROM detail JOIN numbered USING (stack_id)",
        }
        detail = _write_detail(opened, sources[DETAIL], folder)
        for table in PART:
            if table not in written and table != DETAIL:
                written[table] = opened.write(table, sources[table], folder)
        return [*detail, *written.values()]


def merge_parts(
    files: Sequence[LocalFile],
    folder: Path,
    hasher: Hasher,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> list[LocalFile]:
    """Merge all files of several parts into one part; the order of the parts does not show.

    Raises:
        ProfileError: a file is damaged or not one of ours, or two parts hold the same object.
        SchemaError: a later version wrote one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with engine(memory_bytes, folder) as opened:
        opened.check(files)
        refuse_repeated(opened, files)
        opened.load(
            "rollup",
            f"SELECT ts, set_id, stack_id, {SUMS} FROM {{files}} GROUP BY ALL",
            of_table(files, _FIRST_ROLLUP),
        )
        for table in DICTIONARY:
            chosen = of_table(files, table)
            query = one_of_each(table, len(chosen))
            if table == "stacks":
                query = f"{STACKS_OF_PARTS} ORDER BY frame_ids"
            opened.load(table, query, chosen)
        _fold_rollup(opened, hasher)
        objects = opened.arrays_of("SELECT object_id FROM {files}", of_table(files, "objects"))
        part = _number_part(hasher, objects["object_id"])
        merged = {"stacks": _write_stacks(opened, folder, part)}
        opened.load(
            "renumbered",
            "SELECT part, numbered.stack AS stack, old.stack AS old_stack FROM {files} AS old"
            " JOIN numbered USING (stack_id)",
            of_table(files, "stacks"),
        )
        detail = _write_detail(
            opened,
            f"SELECT {part} AS part, ts, host_id, set_id, renumbered.stack AS stack, samples, value"
            " FROM {files} AS old JOIN renumbered"
            " ON old.part = renumbered.part AND old.stack = old_stack",
            folder,
            [each for each in files if each.table == DETAIL],
        )
        for table in PART:
            if table in HEADS:
                query = "SELECT * FROM {files}"
                merged[table] = opened.write(table, query, folder, of_table(files, table))
            elif table not in merged and table != DETAIL:
                sources = {
                    "frames": _WITH_NAMES,
                    _FIRST_ROLLUP: f"SELECT {part} AS part, * FROM rollup"
                    " JOIN numbered USING (stack_id)",
                }
                query = sources.get(table, f"SELECT * FROM {table}")
                merged[table] = opened.write(table, query, folder)
    return [*detail, *merged.values()]


def merge_dictionaries(
    files: Sequence[LocalFile],
    folder: Path,
    wanted: Hashes,
    wanted_sets: Hashes,
    *,
    rest: int,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> list[LocalFile]:
    """Merge the DICTIONARY files of several parts, but for stacks, into one of each or several.

    Only the locations `wanted` and their names and modules are in them, and the label sets
    `wanted_sets`. The location `[rest]`, whose id is `rest`, need not be in any of the files.

    Raises:
        ProfileError: a file is damaged or not one of ours, or something that is wanted is missing.
        SchemaError: a later version wrote one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    needed = {
        "frames": "SEMI JOIN wanted USING (frame_id)",
        NAMES: "SEMI JOIN wanted USING (frame_id)",
        "modules": "SEMI JOIN frames USING (build_id)",
        "label_sets": "SEMI JOIN wanted_sets USING (set_id)",
    }
    with engine(memory_bytes, folder) as opened:
        chosen = {table: of_table(files, table) for table in needed}
        opened.check([each for some in chosen.values() for each in some])
        opened.register("wanted", {"frame_id": sort_distinct(wanted)})
        opened.register("wanted_sets", {"set_id": sort_distinct(wanted_sets)})
        for table, join in needed.items():
            query = one_of_each(table, len(chosen[table]), f"(SELECT * FROM {{files}} {join})")
            opened.load(table, query, chosen[table])
        if np.uint64(rest) in wanted:
            insert_rest(opened, rest)
        _refuse_missing(opened, "wanted", "frame_id", "frames")
        _refuse_missing(opened, "wanted_sets", "set_id", "label_sets")
        sources = {table: f"SELECT * FROM {table}" for table in needed if table != NAMES}
        sources["frames"] = _WITH_NAMES
        return [
            file
            for table, query in sources.items()
            for file in write_in_pieces(opened, table, query, folder)
        ]


def _refuse_missing(opened: Engine, wanted: str, column: str, table: str) -> None:
    query = (
        f"SELECT count(*) FROM (SELECT {column} FROM {wanted} ANTI JOIN {table} USING ({column}))"
    )
    ((missing,),) = opened.rows(query)
    if missing:
        raise ProfileError(f"cannot merge blocks: {missing:,} of what is wanted is not in {table}")


def write_in_pieces(
    opened: Engine,
    table: str,
    query: str,
    folder: Path,
    files: Sequence[LocalFile] = (),
    *,
    is_sorted: bool = False,
    by_id: bool = False,
) -> list[LocalFile]:
    """Do what `Engine.write` does, with several files if one would be large.

    Each has the rows of some stacks, functions or other ids.
    """
    whole = opened.write(table, query, folder, files, is_sorted=is_sorted, by_id=by_id)
    size_bytes = whole.path.stat().st_size
    if size_bytes <= PIECE_BYTES:
        return [whole]
    columns = (OLDER if by_id else TABLES)[table]
    by = next((name for name in _SPLIT_BY if name in columns), next(iter(columns)))
    count = 2 * size_bytes // PIECE_BYTES
    pieces = []
    for number in range(count):
        inside = folder / f"{table}-{number}"
        inside.mkdir()
        some = f"SELECT * FROM {{files}} WHERE hash({by}) % {count} = {number}"
        pieces.append(opened.write(table, some, inside, [whole], is_sorted=True, by_id=by_id))
    whole.path.unlink()
    return pieces


def _write_detail(
    opened: Engine, query: str, folder: Path, files: Sequence[LocalFile] = ()
) -> list[LocalFile]:
    """Write detail as `Engine.write` does, with several files if one would be large.

    Each has all rows of some successive hosts.
    """
    whole = opened.write(DETAIL, query, folder, files)
    count = whole.path.stat().st_size // _DETAIL_BYTES
    if count < 2:
        return [whole]
    found = opened.arrays_of(
        "SELECT host_id, count(*) AS rows FROM {files} GROUP BY host_id ORDER BY host_id", [whole]
    )
    before = np.cumsum(found["rows"]) - found["rows"]
    firsts = np.flatnonzero(np.diff(before * count // whole.rows, prepend=-1))
    if len(firsts) < 2:
        return [whole]
    pieces = []
    for number, hosts in enumerate(np.split(found["host_id"], firsts[1:])):
        inside = folder / f"{DETAIL}-{number}"
        inside.mkdir()
        rows = (
            "SELECT * FROM {files} WHERE"
            f" host_id BETWEEN {hosts[0]}::UBIGINT AND {hosts[-1]}::UBIGINT"
        )
        pieces.append(opened.write(DETAIL, rows, inside, [whole], is_sorted=True))
    whole.path.unlink()
    return pieces


def roll_up(
    files: Sequence[LocalFile], folder: Path, memory_bytes: int = DEFAULT_MEMORY_BYTES
) -> list[LocalFile]:
    """Add up the rollups of all parts of an hour, as one file or several. Totals stay equal.

    `files` are those of ten minutes and of stacks. A stack is that of the first part that has it.

    Raises:
        ProfileError: a file is damaged or not one of ours, a stack is missing, or sums exceed 64
            bits.
        SchemaError: a later version wrote one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples, stacks = of_table(files, _FIRST_ROLLUP), of_table(files, "stacks")
    with engine(memory_bytes, folder) as opened:
        opened.check(samples)
        opened.load(
            "places",
            "SELECT stack_id, min(part) AS part, arg_min(stack, part) AS stack FROM {files}"
            " GROUP BY stack_id",
            stacks,
        )
        opened.load(
            "sums",
            f"SELECT {bucket_of(_HOUR_S)} AS ts, set_id, stack_id, {SUMS} FROM {{files}}"
            " GROUP BY ALL",
            samples,
        )
        _refuse_missing(opened, "sums", "stack_id", "places")
        query = "SELECT * FROM sums JOIN places USING (stack_id)"
        return write_in_pieces(opened, ROLLUPS[_HOUR_S], query, folder)


def refuse_repeated(opened: Engine, files: Sequence[LocalFile]) -> None:
    """Refuse parts of which two hold the same object: it would count twice.

    Raises:
        ProfileError: there is one.
    """
    chosen = of_table(files, "objects")
    opened.load("contents", "SELECT content16 FROM {files}", chosen)
    repeated = opened.rows(
        "SELECT content16 FROM contents GROUP BY content16 HAVING count(*) > 1 ORDER BY 1 LIMIT 1"
    )
    if repeated:
        names = ", ".join(str(each.path) for each in chosen)
        raise ProfileError(f"cannot read {names}: the object {repeated[0][0]} is there twice")


def _number_part(hasher: Hasher, object_ids: Sequence[int] | Hashes) -> int:
    """Return the number of the part that has some objects, in whatever order.

    It depends on the tenant's key: else somebody could upload objects of which two parts become
    that have one number, and stacks of one would be taken for those of the other.
    """
    ids = np.sort(np.array(object_ids, dtype="<u8")).tobytes()
    return int(hasher.texts([hashlib.blake2b(ids, digest_size=16).digest()])[0])


def _write_stacks(opened: Engine, folder: Path, part: int) -> LocalFile:
    """Write the table `stacks` as that of a part; make a table `numbered` of their numbers."""
    query = "SELECT * FROM stacks"
    file = opened.write("stacks", query, folder, part=part, is_sorted=True)
    opened.load("numbered", "SELECT stack, stack_id FROM {files}", [file])
    return file


def fetch_stacks(opened: Engine) -> Stacks:
    """Return the stacks of the table `fetched` (stack_id, frame_ids), and drop it."""
    heads = opened.arrays("SELECT stack_id, CAST(len(frame_ids) AS BIGINT) AS length FROM fetched")
    words = opened.arrays("SELECT unnest(frame_ids) AS frame_id FROM fetched")
    opened.run("DROP TABLE fetched")
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(heads["length"])])
    return Stacks(heads["stack_id"], offsets, words["frame_id"])


def bucket_of(bucket_s: int) -> str:
    return f"CAST(ts - ts % {bucket_s} AS UINTEGER)"


def _fold_rollup(opened: Engine, hasher: Hasher, stacks: Stacks | None = None) -> None:
    """Fold the rare stacks of the table `rollup`, if it has many. New ones go into `stacks`.

    Stacks are sorted, in that table as well.
    """
    totals = opened.arrays(f"SELECT stack_id, {SUMS} FROM rollup GROUP BY stack_id")
    if len(totals["stack_id"]) <= FOLDED_ABOVE:
        return
    if stacks is None:
        stacks = _fetch_some(opened, np.sort(totals["stack_id"]))
    folded_before = HashIndex(np.sort(stacks.ids[stacks.end_with(rest_id(hasher))]))
    is_folded = folded_before.find(totals["stack_id"]) >= 0
    kept = keep_common(totals["stack_id"], is_folded, totals["samples"], totals["value"])
    folded = fold(stacks, kept.ids, hasher)
    opened.register("folded", {"stack_id": folded.rare, "folded_id": folded.folded})
    opened.run(
        "CREATE OR REPLACE TEMP TABLE rollup AS"
        f" SELECT ts, set_id, coalesce(folded_id, stack_id) AS stack_id, {SUMS}"
        " FROM rollup LEFT JOIN folded USING (stack_id) GROUP BY ALL"
    )
    insert_stacks(opened, folded.stacks)
    insert_rest(opened, rest_id(hasher))


def _fetch_some(opened: Engine, wanted: Hashes) -> Stacks:
    """Return those of the table `stacks` that are wanted, in its order; the ids ascend."""
    index = HashIndex(wanted)
    ((count,),) = opened.rows("SELECT count(*) FROM stacks")
    pieces = []
    for first in range(0, count, _STACKS_AT_ONCE):
        rows = f"rowid >= {first} AND rowid < {first + _STACKS_AT_ONCE}"
        opened.run(f"CREATE TEMP TABLE fetched AS SELECT * FROM stacks WHERE {rows}")
        piece = fetch_stacks(opened)
        pieces.append(piece.take(np.flatnonzero(index.find(piece.ids) >= 0)))
    return Stacks.joined(pieces)
