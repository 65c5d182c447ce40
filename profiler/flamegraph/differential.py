"""Differential: two profiles as one flame graph, the union of their stacks, and what changed in it.

A node holds what both sides cost there. It is as wide as the mean of both in cores per host, so the
graph nests and shows what only one side has. Changes are not tested again here: each node takes
over the one decision per function (`profiler.comparison.comparison`). If what interpreters add to
stacks is drawn, its cost is still that of the function it is added to.

- A node is *more*, *less*, *new* or *gone* where its function is, and where its own self time went
  the same way, less the common change. An inverted graph says so at the leaf function, one of
  callers at its root.
- Above and below nothing is coloured: an ancestor's change is that of its deepest changed
  descendants, which `Pair.reasons` names for each function.
- A function that is unchanged overall, and costs more under some callers and less under others, is
  *moved* there: `_find_moved` says by how much it must differ.
- A function that only has a new caller is not new, and is moved at most.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from profiler.comparison.comparison import Comparison, Function
from profiler.comparison.verdict import Change, Floats, NoiseSource
from profiler.flamegraph.flamegraph import Screen, grow
from profiler.flamegraph.paths import Paths, Rows, sum_by
from profiler.flamegraph.stacks import Group, PairStacks
from profiler.flamegraph.views import NoSuchNodeError, Shown, View
from storage.columns import Columns
from storage.grouping import add_groups, find_firsts, group_keys
from storage.profile import Indices, Integers, label_frames
from symbolizer.location import Frame

VERDICTS = ("unchanged", "more", "less", "new", "gone", "moved", "too little data")
"""What may be said of a node; numbers of it stand in graphs."""
_EQUAL = 1e-9
"""Sums of costs that differ by less are equal: they were added in another order."""
UNCHANGED, MORE, LESS, NEW, GONE, MOVED, TOO_LITTLE = range(len(VERDICTS))
_CODES = {change: VERDICTS.index(change) for change in Change}
_MOVED_Z = 5.0
"""With 200 unchanged functions of 1 to 11 callers that vary by 10 or 20 % each, normally or with
heavy tails (t, 4 df), 0 to 13 of 200 pairs raise an alarm; with a limit of 4 up to 36 do."""
_MOVED_SHARE = 0.001
"""Of the total: smaller moves are ignored."""
_MIN_SAMPLES = 10.0
_GUARD = 0.5
_MOVED_PART = 0.1
"""Of the function itself, likewise."""
_QUANTILE, _SQUARE_AT_QUANTILE = 0.75, 1.3233
"""The noise of parts is estimated from this quantile, where a squared standard normal has this
value. The median would take heavy tails for changes, a higher quantile changes for noise."""
_MIN_PARTS = 10
_REASONS = 3
_REASON_SHARE = 0.01
"""Of a function's total: smaller parts do not explain its change."""

_Counts = tuple[Integers, Integers, Integers, Integers]
"""Values before and after, then samples before and after."""
_Key = tuple[str, str, str]
"""Function, module, kind."""


class Scale(NamedTuple):
    """Factors from the nanoseconds of each side to cores per host."""

    before: float
    after: float


class Reason(NamedTuple):
    """A changed function below another one, and what it costs there on both sides."""

    frame: Frame
    before: int
    after: int


@dataclass(frozen=True, slots=True, eq=False)
class UnionGraph:
    """Nodes in preorder, siblings by width, ties by name; nanoseconds as measured."""

    frames: tuple[Frame, ...]
    frame: Indices
    depth: Indices
    parent: Indices
    end: Indices
    before: Integers
    after: Integers
    before_self: Integers
    after_self: Integers
    before_samples: Integers
    after_samples: Integers
    verdict: npt.NDArray[np.int8]
    """Numbers of VERDICTS."""
    cut_nodes: int
    cut_before: int
    cut_after: int

    def __len__(self) -> int:
        return len(self.frame)

    def widths(self, scale: Scale) -> Floats:
        """Return how wide nodes are: the mean of both sides in cores per host."""
        return _widths(scale, self.before, self.after)


@dataclass(frozen=True, slots=True, eq=False)
class UnionPaths:
    """The paths of both sides as one view leaves them, each once, and what they count."""

    paths: Paths
    """Their `samples` are the rows that the other columns are of."""
    counts: _Counts
    """Before, after, and both in samples."""
    codes: npt.NDArray[np.int8]
    own_depth: int | None
    """Where the box stands whose self time a path is; None: at its end."""
    callers: str

    def sums_along(self, path: Sequence[int]) -> list[dict[str, int]]:
        """Return the cost of each of these boxes, from the first one on."""
        names = ("before", "after", "before_samples", "after_samples")
        columns = [column[self.paths.samples] for column in self.counts]
        return [
            dict(zip(names, sums, strict=True)) for sums in self.paths.sums_along(path, columns)
        ]


@dataclass(slots=True, eq=False)
class Pair:
    """Two profiles, of the hosts that were compared, and what the comparison found."""

    found: Comparison
    before: Columns
    after: Columns
    made: InitVar[PairStacks | None] = None
    """Stacks of both, if they were made while both were compared."""
    stacks: PairStacks = field(init=False)
    _judged: "_Judged | None" = None

    def __post_init__(self, made: PairStacks | None) -> None:
        self.stacks = PairStacks(self.before, self.after) if made is None else made
        self.before, self.after = self.stacks.before, self.stacks.after

    @property
    def scale(self) -> Scale:
        sides = (self.found.before, self.found.after)
        spans = (max(float(side.present_s.sum()), 1e-9) for side in sides)
        return Scale(*(1e-9 / span for span in spans))

    @property
    def moved(self) -> frozenset[_Key]:
        """The functions whose cost moved between callers."""
        return self._judge().moved

    def reasons(self, functions: Collection[Function]) -> dict[_Key, tuple[Reason, ...]]:
        """Return by function the changed ones below it that explain its change, largest first."""
        judged, scale = self._judge(), self.scale
        paths, leaves = judged.changed, judged.leaves
        size = len(paths.frames)
        wholes = np.full(size, np.inf)
        numbers = {_key(frame): i for i, frame in enumerate(paths.frames)}
        for function in functions:
            before, after = function.total
            whole = (before * scale.before + after * scale.after) / 2
            wholes[numbers.get(_key(function.frame), [])] = whole
        rows, boxes = paths.shape.pairs(np.isfinite(wholes))
        is_asked = boxes != leaves[rows]
        rows, boxes = rows[is_asked], boxes[is_asked]
        keys = boxes * size + leaves[rows]
        firsts, order = group_keys(keys)
        above, below = np.divmod(keys[order[firsts]], size)
        chosen = rows[order]
        sums = [add_groups(column[chosen], firsts) for column in (paths.values, paths.samples)]
        growth = np.abs(self._growth(*sums))
        explains = np.flatnonzero(growth >= _REASON_SHARE * wholes[above])
        found: dict[_Key, tuple[Reason, ...]] = {}
        for i in explains[np.argsort(-growth[explains], kind="stable")].tolist():
            key = _key(paths.frames[above[i]])
            known = found.get(key, ())
            if len(known) < _REASONS:
                reason = Reason(paths.frames[below[i]], int(sums[0][i]), int(sums[1][i]))
                found[key] = (*known, reason)
        return found

    def view(self, view: View, check: Callable[[], None] = lambda: None) -> UnionPaths:
        """Return the stacks of both sides as a view shows them."""
        stacks, number_of, limit = self.stacks.of_group(
            view.group, python_native=view.python_native
        )
        check()
        heads = label_frames((*self.before.label_sets, *self.after.label_sets), view.by)
        raw = self._raw_rows()
        numbers: dict[tuple[Frame, ...], int] = {}
        table = np.array([numbers.setdefault(head, len(numbers)) for head in heads], np.int64)
        keys = table[raw.labels] * limit + number_of[raw.stacks]
        first, which = find_firsts(keys, len(numbers) * limit)
        counts = self._counts(raw, which, len(first))
        check()
        weights = raw.values * np.repeat(self.scale, [len(self.before.rows), len(self.after.rows)])
        codes = _most_costly(which, self._judge().codes, weights, len(first))
        check()
        rows = Rows(raw.stacks[first], raw.labels[first], raw.values[first], np.arange(len(first)))
        whole = Paths.of_rows(stacks, heads, rows, self.before.unit)
        paths = view.of(replace(whole, values=counts[0] + counts[1]))
        own_depth = whole.heads + 1 if view.invert and not view.callers else None
        return UnionPaths(paths, counts, codes, own_depth, view.callers)

    def shown(
        self, view: View, node: int, check: Callable[[], None] = lambda: None
    ) -> tuple[Shown, Shown]:
        """Return what a view leaves of each side, only the stacks that go through a node.

        Raises:
            NoSuchNodeError: no stack of either side goes there.
        """
        found: list[Shown | None] = []
        for profile in (self.before, self.after):
            try:
                found.append(view.shown(profile, node, check))
            except NoSuchNodeError:
                found.append(None)
        before, after = found
        if before is None and after is None:
            raise NoSuchNodeError(f"{node:016x}")
        return before or _nothing_of(self.before, after), after or _nothing_of(self.after, before)

    def draw(self, shown: UnionPaths, path: Sequence[int], screen: Screen | None) -> UnionGraph:
        """Draw what lies below the box that a path leads to; without a screen nothing is cut."""
        paths = shown.paths.below(path)
        chosen = paths.samples
        scale = self.scale

        def widths(totals: Sequence[Integers]) -> Floats:
            return _widths(scale, totals[0], totals[1])

        counts = tuple(column[chosen] for column in shown.counts)
        depth = None if shown.own_depth is None else shown.own_depth - len(path)
        tree = grow(paths, counts, widths, screen, depth)
        codes = shown.codes[chosen]
        if not shown.callers:
            own = tree.nodes()
        else:
            codes, own = self._code_of(shown.callers), np.zeros(1, np.int64)
            counts = tuple(total[:1] for total in tree.totals)
        return UnionGraph(
            frames=tree.frames,
            frame=tree.frame,
            depth=tree.depth,
            parent=tree.parent,
            end=tree.end,
            before=tree.totals[0],
            after=tree.totals[1],
            before_self=tree.selves[0],
            after_self=tree.selves[1],
            before_samples=tree.totals[2],
            after_samples=tree.totals[3],
            verdict=self._verdicts(len(tree.frame), own, counts, codes),
            cut_nodes=tree.cut_nodes,
            cut_before=tree.cut[0],
            cut_after=tree.cut[1],
        )

    def _verdicts(
        self, size: int, own: Integers, counts: Sequence[Integers], codes: npt.NDArray[np.int8]
    ) -> npt.NDArray[np.int8]:
        """Return for each node the verdict that most of the cost that ends there has."""
        if self.found.source == NoiseSource.NONE:
            return np.full(size, TOO_LITTLE, np.int8)
        is_own = own >= 0
        own, codes = own[is_own], codes[is_own]
        scale = self.scale
        before = counts[0][is_own] * scale.before
        after = counts[1][is_own] * scale.after
        verdicts = _most_costly(own, codes, before + after, size)
        selves = [sum_by(own, counts[i][is_own], size) for i in (0, 1)]
        growth = self._growth(selves[0], selves[1])
        goes_up = np.isin(verdicts, (MORE, NEW))
        goes_down = np.isin(verdicts, (LESS, GONE))
        verdicts[(goes_up & (growth <= 0)) | (goes_down & (growth >= 0))] = UNCHANGED
        return verdicts

    def _growth(self, before: Integers, after: Integers) -> Floats:
        """Return by how much costs grew beyond the common change, in cores per host."""
        scale, common = self.scale, self.found.common.relative
        # Divided equally between both sides, so that swapping them changes only the sign.
        factor = np.sqrt(1 + common)
        growth: Floats = after * scale.after / factor - before * scale.before * factor
        return growth

    def _code_of(self, function: str) -> npt.NDArray[np.int8]:
        changes = (each.change for each in self.found.functions if each.frame.has_name(function))
        return np.array([next((_CODES[change] for change in changes), UNCHANGED)], np.int8)

    def _raw_rows(self) -> Rows:
        """Return the rows of both profiles, those of the after side numbered after the others."""
        before, after = Rows.of(self.before), Rows.of(self.after)
        stacks = after.stacks + len(self.before.stacks)
        labels = after.labels + len(self.before.label_sets)
        return Rows(
            np.concatenate([before.stacks, stacks]),
            np.concatenate([before.labels, labels]),
            np.concatenate([before.values, after.values]),
            np.concatenate([before.samples, after.samples]),
        )

    def _counts(self, raw: Rows, which: Integers, count: int) -> _Counts:
        """Add up the rows of both profiles, each side on its own: values, then samples."""
        middle = len(self.before.rows)
        return (
            sum_by(which[:middle], raw.values[:middle], count),
            sum_by(which[middle:], raw.values[middle:], count),
            sum_by(which[:middle], raw.samples[:middle], count),
            sum_by(which[middle:], raw.samples[middle:], count),
        )

    def _judge(self) -> "_Judged":
        if self._judged is None:
            self._judged = self._judge_anew()
        return self._judged

    def _judge_anew(self) -> "_Judged":
        stacks, number_of, limit = self.stacks.of_group(Group.FUNCTION)
        raw = self._raw_rows()
        first, which = find_firsts(number_of[raw.stacks], limit)
        counts = self._counts(raw, which, len(first))
        numbers = raw.stacks[first]
        leaves = stacks.leaves(of_empty=len(stacks.frames))[numbers]
        functions = {_key(each.frame): each for each in self.found.functions}
        known = [functions.get(_key(frame)) for frame in stacks.frames]
        of_frame = np.array([_CODES[f.change] if f else UNCHANGED for f in known] + [0], np.int8)
        codes = of_frame[leaves]
        moved = _find_moved(leaves, counts, known)
        codes[moved] = MOVED
        chosen = np.isin(codes, (MORE, LESS, NEW, GONE))
        labels = np.zeros(chosen.sum(), np.int64)
        rows = Rows(numbers[chosen], labels, *(column[chosen] for column in counts[:2]))
        paths = Paths.of_rows(stacks, [()], rows, self.before.unit)
        return _Judged(
            codes=codes[which],
            moved=frozenset(_key(stacks.frames[i]) for i in np.unique(leaves[moved]).tolist()),
            changed=paths,
            leaves=leaves[chosen],
        )


def fields_of_pair(pair: Pair, graph: UnionGraph) -> dict[str, object]:
    """Return the fields that a graph adds to the JSON of a comparison."""
    return {
        "type": pair.after.type,
        "unit": pair.after.unit,
        "scale": pair.scale._asdict(),
        "totals": {"before": pair.before.total_value, "after": pair.after.total_value},
        "verdicts": VERDICTS,
        "frames": [list(frame) for frame in graph.frames],
        "nodes": {
            "frame": graph.frame,
            "depth": graph.depth,
            "before": graph.before,
            "after": graph.after,
            "before_samples": graph.before_samples,
            "after_samples": graph.after_samples,
            "verdict": graph.verdict,
        },
        "rest": {
            "nodes": graph.cut_nodes,
            "before": graph.cut_before,
            "after": graph.cut_after,
        },
    }


def _widths(scale: Scale, before: Integers, after: Integers) -> Floats:
    found: Floats = (before * scale.before + after * scale.after) / 2
    return found


class _Judged(NamedTuple):
    codes: npt.NDArray[np.int8]
    """By row of both profiles: the verdict on the box at the end of its stack."""
    moved: frozenset[_Key]
    changed: Paths
    """The stacks of changed functions; `values` count before, `samples` after."""
    leaves: Integers
    """By such a stack: the box at its end."""


def _most_costly(
    which: Integers, codes: npt.NDArray[np.int8], weights: Floats, size: int
) -> npt.NDArray[np.int8]:
    """Return for each number the verdict with the largest sum of weights.

    If two weigh the same it is unchanged: swapped sides then agree. Unchanged weighs nothing.
    """
    cells = codes.astype(np.int64) * size + which
    sums = np.bincount(cells, weights, len(VERDICTS) * size).reshape(len(VERDICTS), size)
    sums[UNCHANGED] = 0
    largest = sums.max(axis=0)
    is_one = (sums >= largest * (1 - _EQUAL)).sum(axis=0) == 1
    verdicts: npt.NDArray[np.int8] = sums.argmax(axis=0).astype(np.int8)
    return np.where(is_one, verdicts, np.int8(UNCHANGED))


def _nothing_of(profile: Columns, other: Shown | None) -> Shown:
    """Return a profile without rows, with the labels of the other side."""
    nothing = profile.with_rows(np.zeros(0, np.int64))
    return Shown(nothing, other.by if other else ())


def _key(frame: Frame) -> _Key:
    return (frame.function, frame.module, frame.kind)


def _find_moved(
    leaves: Integers,
    counts: _Counts,
    functions: Sequence[Function | None],
) -> npt.NDArray[np.bool_]:
    """Return the stacks between which the cost of an unchanged function has moved.

    Each stack has a part of the cost of its leaf function, before and after; the odds of both are
    compared. They vary more than counting samples explains, because the mixture of requests varies:
    this noise is estimated from all parts of unchanged functions together. A part has changed if it
    differs by _MOVED_Z standard deviations, by more than the function's own interval, by
    _MOVED_PART of the function and by _MOVED_SHARE of the total. It has moved if another part of
    the same function has changed the other way.
    """
    count = len(functions) + 1
    is_unchanged = np.zeros(count, bool)
    reach = np.zeros(count)
    for i, function in enumerate(functions):
        if function is not None and function.change == Change.UNCHANGED:
            is_unchanged[i] = True
            with np.errstate(divide="ignore"):  # an interval may reach down to zero
                low, high = np.log1p(function.relative[1:])
            reach[i] = (high - low) / 2
    before, after = (column.astype(np.float64) for column in counts[2:])
    sums = [np.bincount(leaves, column, count)[leaves] for column in (before, after)]
    both = before + after
    looked_at = (
        is_unchanged[leaves]
        & (np.minimum(*sums) >= _MIN_SAMPLES)
        & (both >= _MIN_SAMPLES)
        & (both < sums[0] + sums[1])
    )
    nothing = np.zeros(len(leaves), bool)
    if not looked_at.any():
        return nothing
    mine = [column[looked_at] for column in (before, after)]
    wholes = [column[looked_at] for column in sums]
    rests = [whole - own for whole, own in zip(wholes, mine, strict=True)]
    change = np.log(
        ((mine[1] + _GUARD) * (rests[0] + _GUARD)) / ((mine[0] + _GUARD) * (rests[1] + _GUARD))
    )
    # If nothing had changed, each side would have the part that both have together.
    part = both[looked_at] / (wholes[0] + wholes[1])
    counts_expected = [share * whole + _GUARD for whole in wholes for share in (part, 1 - part)]
    counting = (1 / np.array(counts_expected)).sum(axis=0)
    shared = 0.0
    if len(change) >= _MIN_PARTS:
        variances = change**2 / _SQUARE_AT_QUANTILE - counting
        shared = max(0.0, _weighted_quantile(variances, 1 / counting))
    own_reach = reach[leaves[looked_at]]
    parts = [own / whole for own, whole in zip(mine, wholes, strict=True)]
    shift = np.abs(parts[1] - parts[0])
    has_changed = (
        (np.abs(change) >= _MOVED_Z * np.sqrt(counting + shared))
        & (np.abs(change) > own_reach)
        & (shift >= _MOVED_PART)
        & (shift * (wholes[0] + wholes[1]) >= _MOVED_SHARE * both.sum())
    )
    where = leaves[looked_at]
    went_up = np.bincount(where[has_changed & (change > 0)], minlength=count) > 0
    went_down = np.bincount(where[has_changed & (change < 0)], minlength=count) > 0
    nothing[looked_at] = has_changed & (went_up & went_down)[where]
    return nothing


def _weighted_quantile(values: Floats, weights: Floats) -> float:
    order = np.argsort(values)
    so_far = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(so_far, so_far[-1] * _QUANTILE)])
