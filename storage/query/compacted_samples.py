"""Compacted samples: the self samples of a compacted hour, second by second.

They are apart from `storage.query.self_samples` because workers, which decode objects, import that
and do without DuckDB.
"""

from collections.abc import Sequence

import numpy as np

from storage.blocks import reading
from storage.blocks.dictionary import read_dictionary, read_label_sets
from storage.blocks.parquet import DETAIL, LocalFile
from storage.blocks.times import read_heads
from storage.grouping import distinct, find_hashes
from storage.hashing import Hasher
from storage.location_functions import hash_functions
from storage.objects.keys import NS_PER_S
from storage.profile import make_labels
from storage.query.function_totals import PROCESS_LABELS, fold, service_sets_of
from storage.query.self_samples import ObjectSelfSamples


def read_self_samples(
    files: Sequence[LocalFile], start_s: int, end_s: int, hasher: Hasher
) -> ObjectSelfSamples | None:
    """Return the self samples of compacted objects, for each second in which objects begin.

    None if none begins between these seconds. The files are those of detail, of the dictionary and
    of objects.

    Raises:
        ProfileError: a file is damaged or not one of ours.
        SchemaError: a later version wrote one.
    """
    heads = read_heads(files, start_s=start_s, end_s=end_s)
    if heads is None:
        return None
    rows = reading.sum_samples(
        of_table(files, DETAIL), start_s=start_s, end_s=end_s, by_host=True, bucket_s=1
    )
    columns = read_dictionary(files, rows.stacks)
    label_sets = read_label_sets(files)
    starts_s, of_second = np.unique(rows.ts, return_inverse=True)
    pairs, of_pair = np.unique(
        np.stack([rows.hosts, rows.sets], axis=1), axis=0, return_inverse=True
    )
    labels = [
        make_labels({**dict(label_sets[set_]), **dict(label_sets[host])})
        for host, set_ in pairs.tolist()
    ]
    of_label, service_sets = service_sets_of(labels, PROCESS_LABELS)
    stacks = find_hashes(columns.stack_hashes, rows.stacks)
    offsets = columns.stack_offsets.astype(np.int64)
    has_leaf = offsets[stacks + 1] > offsets[stacks]
    leaves = columns.stack_words[offsets[stacks[has_leaf] + 1] - 1]
    places, which = distinct(leaves, len(columns.locations))
    shown = columns.shown_frames(places)
    function_hashes, functions = np.unique(
        hash_functions(shown, hasher)[shown.offsets[:-1]], return_inverse=True
    )
    # By second, then by (service set, location), as one number each.
    width = max(1, len(places))
    services = of_label[of_pair[has_leaf]] if len(of_label) else np.zeros(0, np.int64)
    keys, counts = fold(of_second[has_leaf], services * width + which, rows.samples[has_leaf, None])
    return ObjectSelfSamples(
        type=heads.type,
        unit=heads.unit,
        window=heads.window,
        accounting=heads.accounting,
        objects=np.stack([starts_s.astype(np.int64) * NS_PER_S] * 2, axis=1),
        service_sets=service_sets,
        location_hashes=columns.location_hashes[places],
        functions=functions,
        name_ranks=columns.name_ranks[places],
        named_s=columns.named_s[places],
        function_hashes=function_hashes,
        line_offsets=np.searchsorted(keys[:, 0], np.arange(len(starts_s) + 1)),
        lines=np.stack(np.divmod(keys[:, 1], width), axis=1),
        line_samples=counts[:, 0],
    )
