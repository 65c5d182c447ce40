"""Compacted samples: the self samples of a compacted hour, second by second.

They are apart from `storage.query.self_samples` because workers, which decode objects, import that
and do without DuckDB.
"""

from collections.abc import Sequence

import numpy as np

from storage.blocks.dictionary import read_label_sets
from storage.blocks.function_sums import read_leaves
from storage.blocks.scans import LocalFile
from storage.blocks.times import read_heads
from storage.hashing import Hasher
from storage.location_functions import LocationFunctions
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
    leaves = read_leaves(files, (start_s, end_s), by_second=True)
    label_sets, columns = read_label_sets(files), leaves.locations
    starts_s, of_second = np.unique(leaves.seconds, return_inverse=True)
    pairs, of_pair = np.unique(
        np.stack([leaves.hosts, leaves.sets], axis=1), axis=0, return_inverse=True
    )
    labels = [
        make_labels({**dict(label_sets[set_]), **dict(label_sets[host])})
        for host, set_ in pairs.tolist()
    ]
    of_label, service_sets = service_sets_of(labels, PROCESS_LABELS)
    functions = LocationFunctions.of(columns, hasher)
    function_hashes, numbers = np.unique(functions.hashes[functions.innermost], return_inverse=True)
    # By second, then by (service set, location), as one number each.
    width = max(1, len(columns.location_hashes))
    services = of_label[of_pair] if len(of_label) else np.zeros(0, np.int64)
    keys, counts = fold(of_second, services * width + leaves.leaves, leaves.counts[:, :1])
    return ObjectSelfSamples(
        type=heads.type,
        unit=heads.unit,
        window=heads.window,
        accounting=heads.accounting,
        objects=np.stack([starts_s.astype(np.int64) * NS_PER_S] * 2, axis=1),
        service_sets=service_sets,
        location_hashes=columns.location_hashes,
        functions=numbers,
        name_ranks=columns.name_ranks,
        named_s=columns.named_s,
        function_hashes=function_hashes,
        line_offsets=np.searchsorted(keys[:, 0], np.arange(len(starts_s) + 1)),
        lines=np.stack(np.divmod(keys[:, 1], width), axis=1),
        line_samples=counts[:, 0],
    )
