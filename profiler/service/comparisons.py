"""Comparisons: two sides compared, kept for a while with the views and graphs made of them."""

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from profiler.comparison.comparison import Function, of_store
from profiler.comparison.deployments import announced_ns
from profiler.comparison.sides import EmptySideError, Operand
from profiler.flamegraph.differential import Pair, Reason, UnionGraph, UnionPaths
from profiler.flamegraph.flamegraph import Screen
from profiler.flamegraph.stacks import Group, PairStacks
from profiler.flamegraph.views import View, only_hosts, path_to
from profiler.service.merged import (
    KEPT_GRAPHS,
    KEPT_VIEWS,
    Check,
    Kept,
    MergedProfiles,
    PanelRequest,
    PathToNode,
    ProfileKey,
    larger_words,
    words_of,
)
from profiler.service.responses import NAMED_SERVICES, Empty
from profiler.times import from_until
from storage.profile import Window
from storage.query.coverage import Coverage
from storage.query.query import Answer, Query
from storage.query.threads import Turns
from storage.selector import Selector

FunctionKey = tuple[str, str, str]
"""Function, module and kind."""
_KEPT_S = 300.0
"""How long a comparison is kept: new objects of its sides lead to another one at once, but late
objects of the time before may make it more certain."""
_LISTED_S = 60.0
"""A comparison is of what was listed when it began, however long it takes."""


class NothingToCompareError(LookupError):
    """A side of a comparison is empty."""

    def __init__(self, detail: str, side: str, empty: Empty, versions: Sequence[str]) -> None:
        super().__init__(f"nothing to compare: the {side} side is empty: {detail}")
        self.side, self.empty, self.versions = side, empty, versions


@dataclass(slots=True)
class Compared:
    """Two sides compared, and the views of them that were asked for."""

    pair: Pair
    coverages: tuple[Coverage, Coverage]
    made_s: float
    views: OrderedDict[View, UnionPaths] = field(default_factory=OrderedDict)
    drawn: OrderedDict[tuple[View, int, float], tuple[PathToNode, UnionGraph]] = field(
        default_factory=OrderedDict
    )
    views_words: int = 0
    """What views take that are larger than both sides."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def words(self) -> int:
        sides = (self.pair.before, self.pair.after)
        return sum(words_of(each) for each in sides) + self.views_words

    def draw(
        self, request: PanelRequest, check: Check
    ) -> tuple[UnionPaths, PathToNode, UnionGraph]:
        """Return the paths of a view, the path to the request's node, and the graph above it.

        Raises:
            NoSuchNodeError: no stack goes there.
        """
        with self.lock:
            view = request.view
            shown = self.views.get(view)
            if shown is None:
                shown = self.views[view] = self.pair.view(view, check)
            self.views.move_to_end(view)
            while len(self.views) > KEPT_VIEWS:
                self.views.popitem(last=False)
            paths = (each.paths for each in self.views.values())
            self.views_words = larger_words(paths, self.pair.before, self.pair.after)
            check()
            key = (view, request.node, request.width_px)
            if key not in self.drawn:
                path = path_to(shown.paths, request.node, check)
                check()
                boxes = [box for _, box in path]
                graph = self.pair.draw(shown, boxes, Screen(request.width_px))
                self.drawn[key] = path, graph
            self.drawn.move_to_end(key)
            while len(self.drawn) > KEPT_GRAPHS:
                self.drawn.popitem(last=False)
            return shown, *self.drawn[key]

    def reasons(
        self, functions: Sequence[Function]
    ) -> tuple[frozenset[FunctionKey], dict[FunctionKey, tuple[Reason, ...]]]:
        """Return the functions that moved between callers, and what explains changes of some."""
        with self.lock:  # the graph, which is asked for at the same time, takes the same steps
            return self.pair.moved, self.pair.reasons(functions)


class Comparisons:
    """Compares parts of one store, and keeps some. Safe to use from several threads."""

    def __init__(self, profiles: MergedProfiles) -> None:
        self._profiles = profiles
        self._kept: Kept[tuple[ProfileKey, ...], Compared] = Kept()
        self._comparing = Turns()

    def compare(self, request: PanelRequest, before: Operand, check: Check) -> Compared:
        """Return the request's side compared with an earlier one.

        Raises:
            NothingToCompareError: a side is empty.
        """
        profiles = self._profiles
        sides = [replace(request, window=before.window, selector=before.selector), request]
        key = tuple(profiles.key(side) for side in sides)
        with self._comparing.of(repr(key), check):
            known = self._kept.get(key)
            if known is not None and known.made_s > time.monotonic() - _KEPT_S:
                return known
            query = profiles.query.interruptible(check)
            before_side, after_side = (Operand(side.selector, side.window) for side in sides)
            # The verdict needs no stacks: they are merged while its series are read.
            with ThreadPoolExecutor(1, "merge") as pool:
                merging = pool.submit(self._merge, sides, query, check)

                def changes_ns() -> Sequence[int]:
                    return self._announced_ns(sides, merging.result()[0], check)

                try:
                    found = of_store(query, before_side, after_side, changes_ns)
                except EmptySideError:
                    merging.result()  # it knows why
                    raise
                answers, stacks = merging.result()
            check()
            compared = (found.before, found.after)
            before_rows, after_rows = (
                only_hosts(answer.profile, None if side.has_all_hosts else side.hosts)
                for answer, side in zip(answers, compared, strict=True)
            )
            is_all = all(side.has_all_hosts for side in compared)
            pair = Pair(found, before_rows, after_rows, stacks if is_all else None)
            made = Compared(
                pair=pair,
                coverages=(answers[0].coverage, answers[1].coverage),
                made_s=time.monotonic(),
            )
            if all(answer.coverage.is_lasting for answer in answers):
                self._kept.put(key, made)
            return made

    def _merge(
        self, sides: Sequence[PanelRequest], query: Query, check: Check
    ) -> tuple[tuple[Answer, Answer], PairStacks]:
        """Return the profiles of both sides, and their stacks as they are drawn at first.

        Raises:
            NothingToCompareError: one is empty.
        """
        # What is compared has been listed, to see whether that is known.
        profiles = self._profiles.believing(_LISTED_S)
        # One after the other: to read both at once takes 100 MB more.
        before, after = (profiles.select(side, check).answer for side in sides)
        for name, side, answer in zip(("before", "after"), sides, (before, after), strict=True):
            _refuse_empty(query, name, side, answer)
        check()
        stacks = PairStacks(before.profile, after.profile)
        stacks.of_group(Group.FUNCTION)
        return (before, after), stacks

    def _announced_ns(
        self, sides: Sequence[PanelRequest], merged: Sequence[Answer], check: Check
    ) -> Sequence[int]:
        # What is merged already names the services: the store is only listed for this.
        services = {
            value
            for answer in merged
            for labels in answer.profile.label_sets
            for name, value in labels
            if name == "service"
        }
        before, after = (side.window for side in sides)
        return announced_ns(self._profiles.store, services, before, after, check)


def _refuse_empty(query: Query, side: str, request: PanelRequest, answer: Answer) -> None:
    empty = Empty.of(query, request, answer.coverage, answer.profile.total_samples)
    if empty is None:
        return
    span = f"from {from_until(request.window)}"
    if empty.reason == "nothing_matches":
        others = (each for each in request.selector.matchers if each.name != "version")
        versions = query.label_values(request.window, "version", Selector(tuple(others)))
        services = ", ".join(empty.services[:8]) or "none"
        raise NothingToCompareError(
            f"no sample {span} matches {request.selector}; services there: {services}",
            side,
            empty,
            list(versions)[:NAMED_SERVICES],
        )
    nearest = " and ".join(
        from_until(Window(each.from_ms * 10**6, each.until_ms * 10**6)) for each in empty.nearest
    )
    there = f"the nearest data are from {nearest}" if nearest else "the store is empty"
    raise NothingToCompareError(f"there are no data {span}; {there}", side, empty, [])
