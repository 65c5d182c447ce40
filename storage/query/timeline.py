"""Timeline: samples and values per step of a window, one series for each combination of labels."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from storage.blocks.times import Lines
from storage.columns import OBJECT_FIELDS, Times
from storage.hashing import Numbers
from storage.objects.keys import NS_PER_S
from storage.profile import Integers, Labels, Window
from storage.query.coverage import Coverage
from storage.selector import Selector

_TOTALS = OBJECT_FIELDS[3:-2]
_TEN_MINUTES_NS = 600 * NS_PER_S
_LENGTH = OBJECT_FIELDS.index("length_ns")


class Series(NamedTuple):
    """One line of a timeline, with a number of samples and a value per step."""

    labels: Labels
    samples: Integers
    values: Integers


@dataclass(frozen=True, slots=True)
class Timeline:
    """Sums per step. Step i begins at `start_ns + i * step_ns`; the largest series comes first."""

    type: str
    unit: str
    start_ns: int
    step_ns: int
    series: tuple[Series, ...]
    totals: dict[str, Integers]
    """OBJECT_FIELDS from `nonidle_ns` to `lost`, added up over the objects of each step."""
    covered_ns: Integers
    """For how long of each step at least one host was profiled: what makes values a rate."""
    coverage: Coverage


def choose_step(step_ns: int | Callable[[int], int], parts: Sequence[Times] = ()) -> int:
    """Return how long steps are, of a function of the length of the longest object.

    Raises:
        ValueError: the step is not positive.
    """
    if callable(step_ns):
        lengths = [part.objects[:, _LENGTH] for part in parts]
        step_ns = step_ns(max((int(each.max(initial=0)) for each in lengths), default=0))
    if step_ns <= 0:
        raise ValueError(f"cannot make a timeline of steps of {step_ns} ns")
    return step_ns


def choose_lines(window: Window, step_ns: int, by: Iterable[str], *, is_aligned: bool) -> Lines:
    """Return how far lines may be added up so that each still begins in one step."""
    if "host" in by and not is_aligned and window.start_ns + step_ns >= window.end_ns:
        return Lines.SPAN
    is_whole = step_ns % NS_PER_S == 0 and (is_aligned or window.start_ns % NS_PER_S == 0)
    return Lines.SECOND if is_whole and "host" not in by else Lines.EACH


def is_coarse(window: Window, step_ns: int, *, is_aligned: bool) -> bool:
    """Return whether each ten minutes of the clock begin in one step as a whole."""
    has_whole = step_ns % _TEN_MINUTES_NS == 0
    starts_whole = is_aligned or window.start_ns % _TEN_MINUTES_NS == 0
    return (has_whole and starts_whole) or window.start_ns + step_ns >= window.end_ns


def make_timeline(
    parts: Sequence[Times],
    coverage: Coverage,
    selector: Selector,
    *,
    step_ns: int,
    by: Sequence[str],
    type_: str,
    is_aligned: bool,
) -> Timeline:
    """Add up samples and values per step; see `Query.timeline`."""
    window = coverage.window
    origin_ns = window.start_ns - (window.start_ns % step_ns if is_aligned else 0)
    count = -(-(window.end_ns - origin_ns) // step_ns)
    totals = {name: np.zeros(count, np.int64) for name in _TOTALS}
    sums: dict[Labels, Integers] = {}
    intervals = [np.zeros((0, 3), np.int64)]
    for part in parts:
        # The key of an object says the second in which it begins: the object may begin after a
        # window that ends inside that second.
        objects = part.objects.astype(np.int64)
        step = (objects[:, 0] - origin_ns) // step_ns
        step = np.clip(step, 0, count - 1)
        for i, name in enumerate(_TOTALS, start=3):
            np.add.at(totals[name], step, objects[:, i])
        intervals.append(np.column_stack([step, objects[:, :2]]))
        _add_series(sums, part.filter(selector), step, by, count)
    series = [Series(labels, *sum_.T) for labels, sum_ in sums.items()]
    series.sort(key=lambda each: (-int(each.values.sum()), each.labels))
    unit = parts[0].unit if parts else "nanoseconds"
    covered_ns = _cover_steps(np.concatenate(intervals), count)
    return Timeline(type_, unit, origin_ns, step_ns, tuple(series), totals, covered_ns, coverage)


def cover(objects: Numbers) -> int:
    """Return for how many ns at least one of some objects was profiled."""
    intervals = np.column_stack([np.zeros(len(objects), np.int64), objects[:, :2]])
    return int(_cover_steps(intervals.astype(np.int64), 1)[0])


def _cover_steps(intervals: Integers, steps: int) -> Integers:
    """Return per step how long its intervals (step, start, end) last together, overlaps once."""
    covered = np.zeros(steps, np.int64)
    step, start, end = intervals[np.lexsort((intervals[:, 1], intervals[:, 0]))].T
    firsts = np.flatnonzero(np.diff(step, prepend=-1))
    # Until where those before it reach: the latest end so far, which begins anew with each step.
    ends, rank = np.unique(end, return_inverse=True)
    of_step = np.repeat(np.arange(len(firsts)), np.diff(np.append(firsts, len(step))))
    reached = np.maximum.accumulate(rank + of_step * (len(rank) + 1))
    latest = ends[reached % (len(rank) + 1)]
    before = np.concatenate([start[:1], latest[:-1]])
    before[firsts] = start[firsts]
    np.add.at(covered, step, np.maximum(0, end - np.maximum(start, before)))
    return covered


def _add_series(
    series: dict[Labels, Integers], part: Times, step: Integers, by: Sequence[str], count: int
) -> None:
    wanted = set(by)
    chosen = [
        tuple((name, value) for name, value in labels if name in wanted)
        for labels in part.label_sets
    ]
    numbers: dict[Labels, int] = {}
    mine = np.array([numbers.setdefault(each, len(numbers)) for each in chosen], dtype=np.int64)
    cells = np.zeros((len(numbers), count, 2), dtype=np.int64)
    np.add.at(cells, (mine[part.times[:, 1]], step[part.times[:, 0]]), part.time_counts)
    is_present = np.zeros(len(numbers), dtype=bool)
    is_present[mine[part.times[:, 1]]] = True
    for labels, number in numbers.items():
        if is_present[number]:
            known = series.get(labels)
            series[labels] = cells[number] if known is None else known + cells[number]
