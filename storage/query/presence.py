"""Presence: which services ran during a window, object by object, whether sampled or not."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from storage.columns import Times, key_starts_ns
from storage.merging import join_lines, merge_label_sets
from storage.profile import Integers, Labels
from storage.query.coverage import Coverage
from storage.selector import Selector


@dataclass(frozen=True, slots=True)
class ServicePresence:
    """For how long each service was there in each object, sampled or not.

    `objects` has a line (start_ns, end_ns) per object, `rows` a line (object, label set,
    present_ns) for each of its services, labelled as in `Accounting.services` and with `host`.
    """

    objects: Integers
    label_sets: tuple[Labels, ...]
    rows: Integers
    coverage: Coverage


def make_presence(
    parts: Sequence[Times], coverage: Coverage, selector: Selector
) -> ServicePresence:
    """Join the presence of the objects that start in the window that `coverage` names."""
    if not parts:
        return ServicePresence(np.zeros((0, 2), np.int64), (), np.zeros((0, 3), np.int64), coverage)
    window = coverage.window
    is_inside, lines = [], []
    for part in parts:
        starts_ns = key_starts_ns(part.objects)
        is_inside.append((window.start_ns <= starts_ns) & (starts_ns < window.end_ns))
        presence = part.filter(selector).presence
        lines.append(presence[is_inside[-1][presence[:, 0]]])
    label_sets, numbers = merge_label_sets(
        [part.present_sets for part in parts], [each[:, 1] for each in lines]
    )
    rows = join_lines(parts, lines, numbers)
    chosen = np.concatenate(is_inside)
    rows[:, 0] = (np.cumsum(chosen) - 1)[rows[:, 0]]
    objects = np.concatenate([part.objects[:, :2] for part in parts])[chosen]
    return ServicePresence(objects.astype(np.int64), label_sets, rows, coverage)
