"""View: the part of a profile that is shown on the screen, and the same as a profile for files.

Choosing stacks (`focus`, a node that is zoomed into) keeps them complete, in files too. Changing
the stacks themselves (hidden functions, callers, inversion, other groups than functions) leaves
names, without addresses and build ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from profiler.flamegraph.flamegraph import ROOT_ID, Screen, draw
from profiler.flamegraph.paths import ROOT, Group, Paths
from storage.profile import Integers, Profile, ProfileBuilder
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

    @property
    def keeps_stacks(self) -> bool:
        """Return whether the stacks that are left are as they were sampled."""
        changes = (self.invert, self.callers, self.hide)
        return self.group is Group.FUNCTION and not any(changes)

    @property
    def is_whole(self) -> bool:
        return self.keeps_stacks and not self.focus

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
        self, profile: Profile, node: int = ROOT_ID, check: Callable[[], None] = lambda: None
    ) -> "Shown":
        """Return what this view leaves of a profile, only the stacks that go through a node.

        Raises:
            NoSuchNodeError: no stack goes there.
        """
        if self.is_whole and node == ROOT_ID:
            return Shown(profile, self.by)
        whole = Paths.of(profile, self.by, self.group)
        check()
        # Row numbers in place of samples: so each path that is left knows its row.
        paths = self.of(replace(whole, samples=np.arange(len(whole.samples))))
        check()
        rows = paths.samples
        if node != ROOT_ID:
            rows = paths.through([box for _, box in path_to(paths, node, check)]).samples
        builder = ProfileBuilder.like(profile)
        if self.keeps_stacks:
            builder.add_rows(profile, rows, profile.label_sets)
        else:
            _add_boxes(builder, profile, paths, np.flatnonzero(np.isin(paths.samples, rows)))
        # Callers are of all labels: their graph begins with the function.
        by = () if self.callers else self.by
        return Shown(builder.build(profile.window, profile.accounting), by)


@dataclass(frozen=True, slots=True)
class Shown:
    """A profile, and the labels that are drawn above its stacks."""

    profile: Profile
    by: tuple[str, ...]


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


def _add_boxes(builder: ProfileBuilder, profile: Profile, paths: Paths, chosen: Integers) -> None:
    """Count chosen paths as stacks of names, without the labels that they begin with.

    Their samples are the rows of the profile that they come from.
    """
    numbers: dict[Frame, int] = {}

    def number(frame: Frame) -> int:
        if frame not in numbers:
            place = NamedLocation(*frame[:4], 0, frame.line)
            numbers[frame] = builder.location(place, (frame,))
        return numbers[frame]

    root = [] if paths.root is ROOT else [number(paths.root)]
    rows = paths.samples[chosen]
    columns = (
        paths.starts[chosen] + paths.heads,
        paths.ends[chosen],
        profile.row_labels[rows],
        profile.row_samples[rows],
        profile.row_values[rows],
    )
    for start, end, labels, samples, value in zip(*(c.tolist() for c in columns), strict=True):
        stack = [number(paths.frames[box]) for box in paths.boxes[start:end].tolist()]
        builder.add(profile.label_sets[labels], [*root, *stack], samples, value)


def only_hosts(profile: Profile, hosts: Sequence[str]) -> Profile:
    """Return the rows of some hosts, without merging anything again."""
    wanted = set(hosts)
    is_wanted = [dict(labels).get("host", "") in wanted for labels in profile.label_sets]
    return profile if all(is_wanted) else only_labels(profile, is_wanted)


def only_labels(profile: Profile, is_wanted: Sequence[bool]) -> Profile:
    """Return the rows with the wanted ones of the label sets."""
    kept = np.flatnonzero(np.array(is_wanted, dtype=bool)[profile.row_labels])
    columns = ("row_labels", "row_stacks", "row_samples", "row_values")
    return replace(profile, **{name: getattr(profile, name)[kept] for name in columns})
