"""View: the part of a profile that is shown on the screen, and the same as a profile for files.

Choosing stacks (`focus`, a node that is zoomed into) keeps them complete, in files too. Changing
the stacks themselves (hidden functions, callers, inversion, other groups than functions) leaves
names, without addresses and build ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from profiler.flamegraph.flamegraph import ROOT_ID, Screen, draw
from profiler.flamegraph.paths import ROOT, Paths, Rows
from profiler.flamegraph.stacks import Group
from storage.columns import Columns
from storage.grouping import ranges
from storage.interpreters import fold_interpreters
from storage.merging import merge_columns
from storage.profile import Integers, Profile
from symbolizer.location import Frame, NamedLocation

_WIDTHS_PX = (1_200, 36_000, 1_200_000)
"""A node is searched for among few boxes first; last, among all."""


class NoSuchNodeError(LookupError):
    """The node of a link is not among the stacks that are asked for."""


@dataclass(frozen=True, slots=True)
class View:
    by: tuple[str, ...] = ()
    group: Group = Group.FUNCTION
    invert: bool = False
    callers: str = ""
    focus: tuple[str, ...] = ()
    hide: tuple[str, ...] = ()
    python_native: bool = False
    """With what interpreters add to stacks (`storage.interpreters`)."""

    @property
    def by_line(self) -> bool:
        """Return whether boxes are lines of functions. They are named after these then."""
        return self.group is Group.LINE

    @property
    def keeps_stacks(self) -> bool:
        """Return whether the stacks that are left can be those that were sampled."""
        changes = (self.invert, self.callers, self.hide)
        return self.group is Group.FUNCTION and not any(changes)

    @property
    def is_whole(self) -> bool:
        return self.keeps_stacks and not self.focus

    def folded(self, profile: Columns) -> Columns:
        """Return a profile without what interpreters add to its stacks, unless that is shown."""
        return profile if self.python_native else fold_interpreters(profile)

    def of(self, paths: Paths) -> Paths:
        """Look at paths that were grouped and labelled as this view says."""
        # In this order stacks can be kept for a function that is then hidden.
        for function in self.focus:
            paths = paths.focus(function)
        for function in self.hide:
            paths = paths.hide(function)
        if self.callers:
            return paths.callers(self.callers)
        return paths.inverted() if self.invert else paths

    def shown(
        self, profile: Columns, node: int = ROOT_ID, check: Callable[[], None] = lambda: None
    ) -> "Shown":
        """Return what this view leaves of a profile, only the stacks that go through a node.

        Stacks that are kept are as they were sampled: `folded` leaves out of them what interpreters
        add, where that is not to be shown.

        Raises:
            NoSuchNodeError: no stack goes there.
        """
        if self.is_whole and node == ROOT_ID:
            return Shown(profile, self.by)
        whole = Paths.of(self.folded(profile), self.by, self.group)
        check()
        # Row numbers in place of samples: so each path that is left knows its row.
        paths = self.of(replace(whole, samples=np.arange(len(whole.samples))))
        check()
        rows = paths.samples
        if node != ROOT_ID:
            rows = paths.through([box for _, box in path_to(paths, node, check)]).samples
        if self.keeps_stacks:
            chosen = profile.with_rows(rows)
        else:
            kept = np.flatnonzero(np.isin(paths.samples, rows))
            chosen = _columns_of(profile, paths, kept, self.group)
        # Callers are of all labels: their graph begins with the function.
        by = () if self.callers else self.by
        # A file has the names of its own stacks alone; merging leaves out all others.
        return Shown(merge_columns([chosen]), by, self.by_line)


@dataclass(frozen=True, slots=True)
class Shown:
    """A profile, the labels that are drawn above its stacks, and what its boxes are."""

    profile: Columns
    by: tuple[str, ...]
    by_line: bool = False
    """Boxes are lines of functions. Those of whole files and modules are functions here."""


def path_to(
    paths: Paths, node: int, check: Callable[[], None] = lambda: None
) -> list[tuple[int, int]]:
    """Return the ids and the boxes that lead from below the root to a node.

    Raises:
        NoSuchNodeError: no stack goes there.
    """
    if node == ROOT_ID:
        return []
    numbers = {frame: i for i, frame in enumerate(paths.frames)}
    for screen in (*map(Screen, _WIDTHS_PX), None):
        check()
        graph = draw(paths, screen)
        path = graph.path_to(node, graph.ids(), numbers)
        if path is not None:
            return path
    raise NoSuchNodeError(f"{node:016x}")


def _columns_of(profile: Columns, paths: Paths, chosen: Integers, group: Group) -> Columns:
    """Return chosen paths as stacks of names, without the labels that they begin with.

    Their samples are the rows of the profile that they come from.
    """
    lists = paths.shape.only(chosen).lists
    frames = (*paths.frames, paths.root)
    first = 0 if paths.root is ROOT else 1
    starts = lists.starts + paths.heads
    lengths = lists.ends - starts + first
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    words = np.full(int(offsets[-1]), len(paths.frames), dtype=np.int32)
    boxes = lists.boxes[ranges(starts, lengths - first)]
    words[ranges(offsets[:-1] + first, lengths - first)] = boxes
    rows = Rows.of(profile.with_rows(paths.samples[chosen]))
    changed = Profile(
        type=profile.type,
        unit=profile.unit,
        period_ns=profile.period_ns,
        window=profile.window,
        accounting=profile.accounting,
        modules={},
        locations=tuple(NamedLocation(*each[:4], *_lines_of(each, group)) for each in frames),
        names=tuple((each,) for each in frames),
        label_sets=profile.label_sets,
        stack_offsets=offsets,
        stack_locations=words,
        row_labels=rows.labels.astype(np.int32),
        row_stacks=np.arange(len(chosen), dtype=np.int32),
        row_samples=rows.samples,
        row_values=rows.values,
    )
    return Columns.of(changed)


def _lines_of(box: Frame, group: Group) -> tuple[int, int]:
    """Return the first line of the function that a box is of, and the box's own."""
    return (0, box.line) if group is Group.LINE else (box.line, 0)


def only_hosts(profile: Columns, hosts: Sequence[str] | None) -> Columns:
    """Return the rows of some hosts, without merging anything again; None: of all."""
    if hosts is None:
        return profile
    wanted = set(hosts)
    is_wanted = [dict(labels).get("host", "") in wanted for labels in profile.label_sets]
    return profile if all(is_wanted) else profile.with_label_sets(is_wanted)
