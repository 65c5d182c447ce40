"""FlameGraph: a profile as boxes in preorder, and the table of its functions.

A box is (function, module, kind). Node 0 is the root. Parallel arrays, one element per node; a
node's subtree is the range from itself to its `end`. Siblings stand largest total first, ties by
name. For every node, total = self + the sum of its children's totals; what was too narrow to draw
is a node of kind `rest`, the last of its siblings, so that this holds after pruning too.

Trees are built and cut level by level with numpy: 200,000 stacks make 3.6 million nodes, which
is too many to visit one by one. If the width of the screen is known, boxes that are too narrow are
cut while the tree grows, and only the drawn ones are made (bench/bench_flamegraph.py).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from profiler.flamegraph.paths import FunctionRow, Paths, sum_by
from profiler.flamegraph.stacks import Group
from storage.columns import Columns
from storage.profile import Indices, Integers
from symbolizer.location import Frame, Kind

DEPTH_LIMIT = 4096
"""Frames of a stack that become nodes. Deeper ones are one node of kind `rest`: each level costs
numpy calls, and a foreign file may hold one stack of a million frames."""

REST = Frame("(too narrow to draw)", "", Kind.REST)
DEEPER = Frame("(deeper)", "", Kind.REST)

ROOT_ID = 0xCBF29CE484222325
"""FNV-1a's offset basis: the id of the root."""
_FNV_PRIME = np.uint64(0x100000001B3)


Number = TypeVar("Number", np.int64, np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class FlameGraph:
    """Nodes in preorder. `total` and `self` count in `unit`, `samples` is the total in samples."""

    unit: str
    frames: tuple[Frame, ...]
    frame: Indices
    """Index into `frames`."""
    depth: Indices
    """0 for the root."""
    parent: Indices
    """Index of the parent; the root's is itself."""
    end: Indices
    """Index just past the node's subtree."""
    total: Integers
    self: Integers
    samples: Integers
    cut_nodes: int = 0
    """How many boxes were summed into nodes of kind `rest`, without what stands on them."""
    cut_total: int = 0

    def __len__(self) -> int:
        return len(self.frame)

    def subtree(self, node: int) -> "FlameGraph":
        """Return the graph whose root is `node`."""
        nodes = slice(node, int(self.end[node]))
        return FlameGraph(
            unit=self.unit,
            frames=self.frames,
            frame=self.frame[nodes],
            depth=self.depth[nodes] - self.depth[node],
            parent=np.maximum(self.parent[nodes] - node, 0),
            end=self.end[nodes] - node,
            total=self.total[nodes],
            self=self.self[nodes],
            samples=self.samples[nodes],
        )

    def prune(self, width_px: float, least_px: float = 0.5) -> "FlameGraph":
        """Cut what is narrower than `least_px` when the root is `width_px` wide.

        Per parent, the cut children are summed into one node of kind `rest`, however narrow.
        """
        keep = self.total * width_px >= self.total[0] * least_px
        keep[0] = True
        cut = np.flatnonzero(~keep & keep[self.parent])
        if len(cut) == 0:
            return self
        kept = np.flatnonzero(keep)
        parents, which = np.unique(self.parent[cut], return_inverse=True)
        rest_total = sum_by(which, self.total[cut], len(parents))
        rest_samples = sum_by(which, self.samples[cut], len(parents))
        rest_frame = np.full(len(parents), len(self.frames), dtype=np.int32)
        # A rest stands where its parent's subtree ends, before the node that follows there; of
        # several that end at one place the deepest comes first.
        places = np.concatenate([kept, self.end[parents]])
        is_kept = np.repeat([1, 0], [len(kept), len(parents)])
        depth = np.concatenate([self.depth[kept], self.depth[parents] + 1])
        order = np.lexsort((-depth, is_kept, places))
        position = np.empty(len(order), dtype=np.int32)
        position[order] = np.arange(len(order), dtype=np.int32)
        new_index = np.zeros(len(self), dtype=np.int32)
        new_index[kept] = position[: len(kept)]
        depth = depth[order]
        parent = new_index[np.concatenate([self.parent[kept], parents])][order]
        used, frame = np.unique(
            np.concatenate([self.frame[kept], rest_frame])[order], return_inverse=True
        )
        frames = (*self.frames, REST)
        return FlameGraph(
            unit=self.unit,
            frames=tuple(frames[i] for i in used.tolist()),
            frame=frame.astype(np.int32),
            depth=depth,
            parent=parent,
            end=_ends(depth, parent),
            total=np.concatenate([self.total[kept], rest_total])[order],
            self=np.concatenate([self.self[kept], rest_total])[order],
            samples=np.concatenate([self.samples[kept], rest_samples])[order],
            cut_nodes=self.cut_nodes + len(cut),
            cut_total=self.cut_total + int(rest_total.sum()),
        )

    def ids(self, root_id: int = ROOT_ID) -> npt.NDArray[np.uint64]:
        """Return each node's stable id, the same for the same path in any data.

        FNV-1a 64 over the root-first keys (function NUL module NUL kind, joined by 0x01), without
        the root, whose id is FNV's offset basis; that of a subtree's root must be told.
        """
        keys = [f"{f.function}\0{f.module}\0{f.kind}".encode() for f in self.frames]
        lengths = np.fromiter(map(len, keys), np.int64, len(keys))
        starts = np.cumsum(lengths) - lengths
        text = np.frombuffer(b"".join(keys), dtype=np.uint8).astype(np.uint64)
        ids = np.full(len(self), root_id, dtype=np.uint64)
        for depth, nodes in enumerate(_levels(self.depth)):
            if depth == 0:
                continue
            state = ids[self.parent[nodes]]
            if depth > 1 or root_id != ROOT_ID:
                state = (state ^ np.uint64(1)) * _FNV_PRIME
            # Longest keys first: then the nodes that still have a byte left are always a prefix.
            order = np.argsort(-lengths[self.frame[nodes]], kind="stable")
            frames = self.frame[nodes][order]
            state = state[order]
            left = np.searchsorted(-lengths[frames], -np.arange(1, lengths[frames[0]] + 1), "right")
            for i, count in enumerate(left.tolist()):
                state[:count] = (state[:count] ^ text[starts[frames[:count]] + i]) * _FNV_PRIME
            ids[nodes[order]] = state
        return ids

    def left(self) -> Integers:
        """Return where each node starts, in the unit of the totals; siblings stand side by side.

        A node's own self lies right of its children.
        """
        return lefts(self.depth, self.parent, self.total)

    def path(self, node: int) -> tuple[Frame, ...]:
        """Return the frames from below the root down to `node`."""
        frames = []
        while node:
            frames.append(self.frames[self.frame[node]])
            node = int(self.parent[node])
        return tuple(reversed(frames))

    def path_to(
        self, node: int, ids: npt.NDArray[np.uint64], numbers: Mapping[Frame, int]
    ) -> list[tuple[int, int]] | None:
        """Return ids and frame numbers from below the root down to the node of an id.

        None if there is no such node, or if it is a sum of what is too narrow to be drawn, whose
        frame has no number.
        """
        for found in np.flatnonzero(ids == np.uint64(node)).tolist():
            path, at = [], found
            while at:
                path.append((int(ids[at]), numbers.get(self.frames[self.frame[at]], -1)))
                at = int(self.parent[at])
            if all(number >= 0 for _, number in path):
                return path[::-1]
        return None


def lefts(depth: Indices, parent: Indices, width: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """Return where each of nodes in preorder starts when siblings stand side by side."""
    left = np.zeros_like(width)
    for nodes in _levels(depth)[1:]:
        before = np.cumsum(width[nodes]) - width[nodes]
        parents = parent[nodes]
        is_first = np.diff(parents, prepend=-1) != 0
        of_first = before[is_first][np.cumsum(is_first) - 1]
        left[nodes] = left[parents] + before - of_first
    return left


class Screen(NamedTuple):
    """How wide the root is drawn, and how wide a box must be to be drawn at all."""

    width_px: float
    least_px: float = 0.5


def build(
    profile: Columns,
    by: Sequence[str] = (),
    group: Group = Group.FUNCTION,
    invert: bool = False,
    screen: Screen | None = None,
) -> FlameGraph:
    """Draw a profile as a tree, with the labels in `by` as frames of kind `label` at the top.

    `invert` grows it from the leaves: below each function stand its callers.
    """
    paths = Paths.of(profile, by, group)
    return draw(paths.inverted() if invert else paths, screen)


def draw(paths: Paths, screen: Screen | None = None) -> FlameGraph:
    """Draw paths as a tree. With a screen the result equals `prune`, in a fraction of the time."""
    tree = grow(paths, (paths.values, paths.samples), lambda totals: totals[0], screen)
    return FlameGraph(
        unit=paths.unit,
        frames=tree.frames,
        frame=tree.frame,
        depth=tree.depth,
        parent=tree.parent,
        end=tree.end,
        total=tree.totals[0],
        self=tree.selves[0],
        samples=tree.totals[1],
        cut_nodes=tree.cut_nodes,
        cut_total=tree.cut[0],
    )


Widths = Callable[[Sequence[Integers]], Integers | npt.NDArray[np.float64]]
"""Gives how wide boxes are from the totals of their columns."""


class Tree(NamedTuple):
    """Nodes in preorder as those of a FlameGraph, with any columns of counts."""

    frames: tuple[Frame, ...]
    frame: Indices
    depth: Indices
    parent: Indices
    end: Indices
    totals: tuple[Integers, ...]
    selves: tuple[Integers, ...]
    positions: Integers
    """By node, counted level by level: its number here. The last one is for those without."""
    numbers: Callable[[], Integers]
    """Gives for each path the node at which it ends, counted level by level; -1: there is none."""
    cut_nodes: int
    cut: tuple[int, ...]
    """The totals of what was cut."""

    def nodes(self) -> Integers:
        """Return by path the node at which it ends, or that of a wanted depth, or -1."""
        return self.positions.take(self.numbers())


def grow(
    paths: Paths,
    columns: tuple[Integers, ...],
    widths: Widths,
    screen: Screen | None = None,
    depth: int | None = None,
) -> Tree:
    """Make the tree of paths. Each column has a count by path; `widths` order and cut boxes.

    With a `depth` it returns the node of that depth that each path goes through, not where it ends.
    """
    root = len(paths.frames)
    deeper, rest = root + 1, root + 2
    whole = float(widths([column.sum(keepdims=True) for column in columns])[0])
    shape = paths.shape
    if not shape.is_walkable(DEPTH_LIMIT if depth is None else min(depth, DEPTH_LIMIT)):
        shape = shape.lists
    rows = _Rows(
        counters=tuple(shape.counter(column) for column in columns),
        widths=widths,
        rest=rest,
        least=screen.least_px * whole / screen.width_px if screen else 0.0,
    )
    zero = np.zeros(1, np.int64)
    levels = [_Level(zero, zero + root, tuple(zero + column.sum() for column in columns))]
    # The node of each place: its number when they are counted level by level.
    number = np.full(shape.slots, 0 if depth == 0 else -1, dtype=np.int32)
    count = 1
    alive = shape.first()
    node = np.zeros(len(alive), dtype=np.int64)
    for i in range(DEPTH_LIMIT):
        if len(alive) == 0:
            break
        boxes = shape.boxes_at(alive, i).astype(np.int64)
        if i == DEPTH_LIMIT - 1:
            boxes[shape.next(alive, i)[1]] = deeper
        level, node = _Level.below(rows, alive, node, boxes)
        levels.append(level)
        if depth in (None, i + 1):
            number[shape.slots_of(alive)] = np.where(node >= 0, count + node, -1)
        count += len(level.parent)
        is_drawn = node >= 0
        alive, above = shape.next(alive[is_drawn], i)
        node = node[is_drawn][above]
    of_empty = 0 if depth in (None, 0) else -1
    frames = (*paths.frames, paths.root, DEEPER, REST)
    return _lay_out(frames, levels, functools.partial(shape.by_path, number, of_empty))


def top_functions(profile: Columns, group: Group = Group.FUNCTION) -> list[FunctionRow]:
    """Return the table of functions, largest self first. Recursion is counted once in the total."""
    return Paths.of(profile, (), group).functions()


def fields_of_graph(profile: Columns, graph: FlameGraph, query: str = "") -> dict[str, object]:
    """Return the JSON shape that the page and `.json` exports share; times out are Unix ms."""
    accounting = profile.accounting
    return {
        "schema": 1,
        "type": profile.type,
        "unit": profile.unit,
        "window": {
            "from_ms": profile.window.start_ns // 1_000_000,
            "until_ms": profile.window.end_ns // 1_000_000,
        },
        "query": query,
        "total": int(graph.total[0]),
        "samples": int(graph.samples[0]),
        "host_seconds": accounting.profiled_ns / 1e9,
        "coverage": {
            "hosts": len(accounting.hosts),
            "ticks": accounting.ticks,
            "idle": accounting.idle,
            "filtered": accounting.filtered,
            "stored": accounting.stored,
            "lost": dict(accounting.lost),
            "stops": dict(accounting.stops),
            "skipped": [],
        },
        "frames": [list(frame) for frame in graph.frames],
        "nodes": {"frame": graph.frame, "depth": graph.depth, "total": graph.total},
        "rest": {"nodes": graph.cut_nodes, "total": graph.cut_total},
    }


class _Rows(NamedTuple):
    """What gives the counts of places, and how small ones are drawn."""

    counters: tuple[Callable[[Integers], Integers], ...]
    widths: Widths
    rest: int
    """The box of what is less than `least`."""
    least: float


class _Level(NamedTuple):
    """The nodes of one depth, by parent, widest first, what was cut last."""

    parent: Integers
    """Number within the level above."""
    frame: Integers
    totals: tuple[Integers, ...]
    cut_nodes: int = 0
    cut: tuple[int, ...] = ()

    @classmethod
    def below(
        cls,
        rows: _Rows,
        alive: Integers,
        node: Integers,
        boxes: Integers,
    ) -> tuple["_Level", Integers]:
        """Return the next level, and the number in it of the node of each place that is alive.

        `node` says in which node of the level above each of these places stands, `boxes` which box
        comes next. What is too narrow becomes a box of kind `rest`, whose places are in node -1.
        """
        rest = rows.rest
        width = rest + 1
        key = node * width + boxes
        order = np.argsort(key, kind="stable")
        ordered = key[order]
        is_first = np.ones(len(ordered), dtype=bool)
        is_first[1:] = ordered[1:] != ordered[:-1]
        firsts = np.flatnonzero(is_first)
        chosen = alive[order]
        totals = [
            np.add.reduceat(count(chosen), firsts) if len(firsts) else firsts
            for count in rows.counters
        ]
        parent, frame = np.divmod(ordered[firsts], width)
        is_kept = rows.widths(totals) >= rows.least
        cut_nodes, cut = 0, tuple(0 for _ in totals)
        rank = np.full(len(firsts), -1, dtype=np.int64)
        if not is_kept.all():
            lost = np.flatnonzero(~is_kept)
            cut_nodes, cut = len(lost), tuple(int(total[lost].sum()) for total in totals)
            parents, which = np.unique(parent[lost], return_inverse=True)
            totals = [
                np.concatenate([total[is_kept], sum_by(which, total[lost], len(parents))])
                for total in totals
            ]
            parent = np.concatenate([parent[is_kept], parents])
            frame = np.concatenate([frame[is_kept], np.full(len(parents), rest)])
        # Boxes are numbered by name, so equal ones stay in the order of their names.
        by_size = np.lexsort((-rows.widths(totals), frame == rest, parent))
        place = np.empty(len(by_size), dtype=np.int64)
        place[by_size] = np.arange(len(by_size))
        rank[is_kept] = place[: len(rank) - cut_nodes]
        numbers = np.empty(len(key), dtype=np.int64)
        numbers[order] = rank[np.cumsum(is_first) - 1]
        level = cls(
            parent=parent[by_size],
            frame=frame[by_size],
            totals=tuple(total[by_size] for total in totals),
            cut_nodes=cut_nodes,
            cut=cut,
        )
        return level, numbers


def _lay_out(
    frames: tuple[Frame, ...], levels: list[_Level], numbers: Callable[[], Integers]
) -> Tree:
    """Put levels into preorder: subtree sizes from the bottom up, positions from the top down."""
    sizes = [np.ones(len(level.parent), dtype=np.int64) for level in levels]
    selves = [[total.copy() for total in level.totals] for level in levels]
    for i in range(len(levels) - 1, 0, -1):
        # Children of a parent stand together: add them up from each first one to the next.
        firsts = np.flatnonzero(np.diff(levels[i].parent, prepend=-1))
        if len(firsts):
            above = levels[i].parent[firsts]
            sizes[i - 1][above] += np.add.reduceat(sizes[i], firsts)
            for own, total in zip(selves[i - 1], levels[i].totals, strict=True):
                own[above] -= np.add.reduceat(total, firsts)
    positions = [np.zeros(1, dtype=np.int64)]
    for level, size in zip(levels[1:], sizes[1:], strict=True):
        before = np.cumsum(size) - size
        # Siblings stand side by side; `before` counts from the level's start, so take off what
        # the first sibling has before it.
        is_first = np.diff(level.parent, prepend=-1) != 0
        of_first = before[is_first][np.cumsum(is_first) - 1]
        positions.append(positions[-1][level.parent] + 1 + before - of_first)
    count = sum(map(len, positions))
    totals = tuple(np.empty(count, np.int64) for _ in levels[0].totals)
    own_totals = tuple(np.empty(count, np.int64) for _ in totals)
    frame, depth, parent, end = (np.empty(count, np.int32) for _ in range(4))
    for i, (level, position) in enumerate(zip(levels, positions, strict=True)):
        frame[position] = level.frame
        depth[position] = i
        parent[position] = positions[max(i - 1, 0)][level.parent]
        end[position] = position + sizes[i]
        for columns, parts in ((totals, level.totals), (own_totals, selves[i])):
            for column, part in zip(columns, parts, strict=True):
                column[position] = part
    is_used = np.zeros(len(frames), dtype=bool)
    is_used[frame] = True
    return Tree(
        frames=tuple(frames[i] for i in np.flatnonzero(is_used).tolist()),
        frame=(np.cumsum(is_used, dtype=np.int32) - 1)[frame],
        depth=depth,
        parent=parent,
        end=end,
        totals=totals,
        selves=own_totals,
        positions=np.append(np.concatenate(positions), -1),
        numbers=numbers,
        cut_nodes=sum(level.cut_nodes for level in levels),
        cut=tuple(sum(level.cut[i] for level in levels[1:]) for i in range(len(totals))),
    )


def _ends(depth: Indices, parent: Indices) -> Indices:
    """Return the index just past each subtree of nodes in preorder."""
    size = np.ones(len(depth), dtype=np.int32)
    for nodes in reversed(_levels(depth)[1:]):
        np.add.at(size, parent[nodes], size[nodes])
    return np.arange(len(depth), dtype=np.int32) + size


def _levels(depth: Indices) -> list[Integers]:
    """Return the nodes of each depth, in preorder."""
    order = np.argsort(depth, kind="stable")
    return np.split(order, np.cumsum(np.bincount(depth))[:-1])
