"""Timeline: samples and values per step of a window, one series for each combination of labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from storage.columns import OBJECT_FIELDS, Times
from storage.profile import Integers, Labels
from storage.query.coverage import Coverage
from storage.selector import Selector

_TOTALS = OBJECT_FIELDS[3:]


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
    """OBJECT_FIELDS from `nonidle_ns` on, added up over the objects of each step."""
    covered_ns: Integers
    """For how long of each step at least one host was profiled: what makes values a rate."""
    coverage: Coverage


def make_timeline(
    parts: Sequence[Times],
    coverage: Coverage,
    selector: Selector,
    *,
    step_ns: int | Callable[[int], int],
    by: Sequence[str],
    type_: str,
    is_aligned: bool,
) -> Timeline:
    """Add up samples and values per step; see `Query.timeline`.

    Raises:
        ValueError: the step is not positive.
    """
    window = coverage.window
    if callable(step_ns):
        lengths = [part.objects[:, 1] - part.objects[:, 0] for part in parts]
        step_ns = step_ns(max((int(each.max(initial=0)) for each in lengths), default=0))
    if step_ns <= 0:
        raise ValueError(f"cannot make a timeline of steps of {step_ns} ns")
    origin_ns = window.start_ns - (window.start_ns % step_ns if is_aligned else 0)
    count = -(-(window.end_ns - origin_ns) // step_ns)
    totals = {name: np.zeros(count, np.int64) for name in _TOTALS}
    sums: dict[Labels, Integers] = {}
    intervals: list[tuple[int, int, int]] = []
    for part in parts:
        # The key of an object says the second in which it begins: the object may begin after a
        # window that ends inside that second.
        step = (part.objects[:, 0] - origin_ns) // step_ns
        step = np.clip(step, 0, count - 1)
        for i, name in enumerate(_TOTALS, start=3):
            np.add.at(totals[name], step, part.objects[:, i])
        intervals.extend(zip(step.tolist(), *part.objects[:, :2].T.tolist(), strict=True))
        _add_series(sums, part.filter(selector), step, by, count)
    series = [Series(labels, *sum_.T) for labels, sum_ in sums.items()]
    series.sort(key=lambda each: (-int(each.values.sum()), each.labels))
    unit = parts[0].unit if parts else "nanoseconds"
    covered_ns = _cover_steps(intervals, count)
    return Timeline(type_, unit, origin_ns, step_ns, tuple(series), totals, covered_ns, coverage)


def _cover_steps(intervals: list[tuple[int, int, int]], steps: int) -> Integers:
    """Return per step how long its intervals (step, start, end) last together, overlaps once."""
    covered = np.zeros(steps, np.int64)
    reached = (-1, 0)
    for step, start, end in sorted(intervals):
        begun = max(start, reached[1]) if step == reached[0] else start
        covered[step] += max(0, end - begun)
        reached = (step, max(begun, end))
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
