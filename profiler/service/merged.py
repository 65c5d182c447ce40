"""Merged profiles: what is kept of them, so that every zoom, search and table starts from memory.

A merged profile is kept as arrays for as long as there is room, under the names of its objects, so
that a change in the store is never missed. What was made of it is kept with it: the paths of a few
views, the graphs drawn of them, and the services selected from it.
"""

import copy
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from profiler.flamegraph.flamegraph import ROOT_ID, FlameGraph, Screen, draw
from profiler.flamegraph.paths import Paths
from profiler.flamegraph.stacks import Group, Stacks
from profiler.flamegraph.views import NoSuchNodeError, View
from storage.blocks.block import DROPPED_LABELS
from storage.columns import Columns
from storage.objects.tenant import TenantStore
from storage.profile import Window
from storage.query.query import Answer, Query
from storage.query.threads import Turns
from storage.selector import EMPTY, Selector
from storage.stack_tree import StackTree
from symbolizer.location import Frame

KEPT_WORDS = 6_000_000
"""Boxes of all stacks of the merged profiles that are kept, 12 to 20 bytes each with all that is
made of them: four hours of a host. The last one used is kept whatever its size."""
_NODE_WORDS = 3
"""What a node takes of stacks that are a tree: 12 bytes, and 16 in each view with labels."""
_ROW_WORDS = 6
"""What a row takes of these: 44 bytes, and 24 in each view."""
_LOCATION_WORDS = 30
"""What a location takes with its names and its box: 530 bytes each in a profile of a million."""
KEPT_VIEWS = 3
"""Paths kept per merged profile: each is as large as it."""
KEPT_GRAPHS = 16
"""Drawn graphs kept per view, some hundred kB each: many people look at one hour, and a zoom into a
box that was drawn is not searched for."""
_KEPT_SELECTIONS = 16
_BELIEVED_S = 0.5
"""A listing of the store is reused for so long: as long as the panels of a page take to ask."""
_FINER = (1, 30, 1000)
"""How much finer than the screen the tree is drawn, step by step, to find a node by its id."""

FunctionRow = tuple[Frame, tuple[int, int, int, int]]
"""A function with its self, total, and both in samples."""

Check = Callable[[], None]
"""Called between steps of long work; what it raises ends the work."""

PathToNode = list[tuple[int, int]]
"""Ids and boxes that lead from below the root to a node."""


_Key = TypeVar("_Key", bound=Hashable)


class _Sized(Protocol):
    @property
    def words(self) -> int: ...


_Value = TypeVar("_Value", bound=_Sized)


class Kept(Generic[_Key, _Value]):
    """The values used last, at least one, of so many words. Safe to use from several threads."""

    def __init__(self, limit_words: int = KEPT_WORDS) -> None:
        self._limit_words = limit_words
        self._values: OrderedDict[_Key, _Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: _Key) -> _Value | None:
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def put(self, key: _Key, value: _Value) -> None:
        """Keep a value, and drop those used longest ago that it leaves no room for."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            words = sum(each.words for each in self._values.values())
            while words > self._limit_words and len(self._values) > 1:
                _, oldest = self._values.popitem(last=False)
                words -= oldest.words


@dataclass(frozen=True, slots=True)
class PanelRequest:
    """What a panel is to show: the part of the store, and how its stacks are looked at."""

    window: Window
    selector: Selector
    type: str = "cpu"
    by: tuple[str, ...] = ()
    group: Group = Group.FUNCTION
    invert: bool = False
    callers: str = ""
    focus: tuple[str, ...] = ()
    hide: tuple[str, ...] = ()
    node: int = ROOT_ID
    search: str = ""
    width_px: float = 1200.0
    python_native: bool = False

    @property
    def view(self) -> View:
        """What the paths depend on, except the node that is zoomed into."""
        return View(
            self.by,
            self.group,
            self.invert,
            self.callers,
            self.focus,
            self.hide,
            self.python_native,
        )

    @property
    def labels(self) -> frozenset[str]:
        """The labels of rows that are looked at."""
        return frozenset((*self.by, *self.selector.names))

    @property
    def needs_no_stacks(self) -> bool:
        """Return whether the totals of functions are enough to answer it."""
        return self.view.is_whole and self.node == ROOT_ID and not self.python_native


@dataclass(slots=True)
class DrawnGraph:
    """A graph that was drawn, and the path to its root."""

    path: PathToNode
    graph: FlameGraph
    ids: npt.NDArray[np.uint64] | None = None
    """Of its nodes: computed at the first zoom, if there is one."""

    def path_to(self, node: int, numbers: Mapping[Frame, int]) -> PathToNode | None:
        """Return the path to a node, None if it was not drawn here."""
        graph = self.graph
        if self.ids is None:
            self.ids = graph.ids(self.path[-1][0] if self.path else ROOT_ID)
        below = graph.path_to(node, self.ids, numbers)
        return None if below is None else [*self.path, *below]


@dataclass(slots=True)
class ProfileView:
    """The paths of a profile, looked at in one way, and what was made of them so far."""

    paths: Paths
    numbers: dict[Frame, int] | None = None
    """Of the boxes: made at the first zoom, if there is one."""
    table: list[FunctionRow] | None = None
    """The functions, largest self first."""
    drawn: OrderedDict[tuple[int, float], DrawnGraph] = field(default_factory=OrderedDict)
    """By node and width; the last one used is at the end."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self, request: PanelRequest, path: PathToNode) -> FlameGraph:
        """Return the graph above the node that a path leads to, cut for the request's width."""
        key = (request.node, request.width_px)
        with self.lock:
            if key in self.drawn:
                self.drawn.move_to_end(key)
                return self.drawn[key].graph
        graph = draw(self.paths.below([box for _, box in path]), Screen(request.width_px))
        with self.lock:
            self.drawn[key] = DrawnGraph(path, graph)
            while len(self.drawn) > KEPT_GRAPHS:
                self.drawn.popitem(last=False)
        return graph

    def rows(self) -> list[FunctionRow]:
        """Return the table of functions. Callers must not change it."""
        if self.table is None:
            self.table = [(row.frame, row[1:]) for row in self.paths.functions() if row.total]
        return self.table

    def path_to(self, request: PanelRequest) -> PathToNode:
        """Return the path to the request's node.

        Raises:
            NoSuchNodeError: no stack goes there.
        """
        if request.node == ROOT_ID:
            return []
        with self.lock:
            drawn = list(reversed(self.drawn.values()))
        if self.numbers is None:
            self.numbers = {frame: i for i, frame in enumerate(self.paths.frames)}
        finer = (Screen(request.width_px * times) for times in _FINER)
        searched = (DrawnGraph([], draw(self.paths, screen)) for screen in (*finer, None))
        for each in itertools.chain(drawn, searched):
            found = each.path_to(request.node, self.numbers)
            if found is not None:
                return found
        raise NoSuchNodeError(f"{request.node:016x}")


@dataclass(slots=True)
class MergedProfile:
    """A merged profile and what was made of it so far."""

    answer: Answer
    whole: "MergedProfile | None" = None
    """Of a selection: what it was selected from, which has the same stacks."""
    stacks: tuple[Group, bool, Stacks] | None = None
    """Those of a group, with or without what interpreters add to them."""
    views: OrderedDict[View, ProfileView] = field(default_factory=OrderedDict)
    selections: OrderedDict[str, "MergedProfile"] = field(default_factory=OrderedDict)
    views_words: int = 0
    """What views take that are larger than the profile."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def words(self) -> int:
        of_selections = sum(each.views_words for each in list(self.selections.values()))
        return words_of(self.answer.profile) + self.views_words + of_selections

    def select(self, selector: Selector) -> "MergedProfile":
        """Return the rows that a selector chooses, without reading or merging anything again."""
        with self.lock:
            known = self.selections.get(str(selector))
            if known is None:
                chosen = self.answer.profile.filter(selector)
                known = MergedProfile(replace(self.answer, profile=chosen), self)
                self.selections[str(selector)] = known
                while len(self.selections) > _KEPT_SELECTIONS:
                    self.selections.popitem(last=False)
            self.selections.move_to_end(str(selector))
            return known

    def view(self, request: PanelRequest) -> ProfileView:
        """Return the view that a request asks for. A few are kept: each is as large as this."""
        with self.lock:
            known = self.views.get(request.view)
            if known is None:
                known = self.views[request.view] = ProfileView(self._paths_of(request))
                while len(self.views) > KEPT_VIEWS:
                    self.views.popitem(last=False)
                shown = (view.paths for view in self.views.values())
                self.views_words = larger_words(shown, self.answer.profile)
            self.views.move_to_end(request.view)
            return known

    def _paths_of(self, request: PanelRequest) -> Paths:
        view, profile = request.view, self.answer.profile
        return view.of(Paths.of_stacks(self._stacks_of(view), profile, view.by))

    def _stacks_of(self, view: View) -> Stacks:
        if self.whole is not None:
            with self.whole.lock:
                return self.whole._stacks_of(view)  # noqa: SLF001 - of the same class
        key = (view.group, view.python_native)
        if self.stacks is None or self.stacks[:2] != key:
            self.stacks = (*key, Stacks.of([view.folded(self.answer.profile)], view.group))
        return self.stacks[2]


def words_of(profile: Columns) -> int:
    """Return the room that a profile takes with what is made of it, in words of its stacks."""
    words, stacks = profile.stacks.size, profile.stacks
    if isinstance(stacks, StackTree):
        words += (_NODE_WORDS - 2) * len(stacks.words) + _ROW_WORDS * len(profile.rows)
    return words + _LOCATION_WORDS * len(profile.locations)


def larger_words(views: Iterable[Paths], *profiles: Columns) -> int:
    """Return by how many words views are larger than what they are of.

    A tree has more nodes below labels, if most of its stacks have many of these.
    """
    usual = sum(profile.stacks.size + 2 * len(profile.rows) for profile in profiles)
    return sum(max(0, view.shape.size - usual) for view in views)


ProfileKey = tuple[str, str, str]
"""Names a merged profile: its objects, selector and type."""


class MergedProfiles:
    """Merges the profiles of one store, and keeps some. Safe to use from several threads."""

    def __init__(self, store: TenantStore, query: Query) -> None:
        self.store = store
        self.query = query.believing(_BELIEVED_S)
        self._kept: Kept[ProfileKey, MergedProfile] = Kept()
        self._merging = Turns()

    def believing(self, listing_s: float) -> "MergedProfiles":
        """Return the same, which lists a window again only after so many seconds."""
        other = copy.copy(self)
        other.query = self.query.believing(listing_s)
        return other

    def key(self, request: PanelRequest, labels: frozenset[str] | None = None) -> ProfileKey:
        """Name what a request asks for: as long as it is the same, so is the merged profile.

        `labels` are those that its rows must have, by default those that the request looks at.
        """
        labels = request.labels if labels is None else labels
        objects = self.query.fingerprint(request.window, request.type, labels)
        return (objects, str(request.selector), request.type)

    def has(self, request: PanelRequest) -> bool:
        """Return whether the stacks are merged, or are being merged for another request."""
        key = self.key(request)
        if self._kept.get(key) is not None or self._merging.is_taken(repr(key)):
            return True
        return self._whole_of(request) is not None

    def select(self, request: PanelRequest, check: Check) -> MergedProfile:
        """Return what is asked for, selected from the whole window's profile if that is kept."""
        whole = self._whole_of(request)
        return self.merge(request, check) if whole is None else whole.select(request.selector)

    def merge(self, request: PanelRequest, check: Check) -> MergedProfile:
        """Return what is asked for, merged from the store unless it is kept."""
        key = self.key(request)
        with self._merging.of(repr(key), check):
            known = self._kept.get(key)
            if known is not None:
                return known
            query = self.query.interruptible(check)
            answer = query.profile(request.window, request.selector, request.type, request.labels)
            merged = MergedProfile(answer)
            if answer.coverage.is_lasting:
                self._kept.put(key, merged)
            return merged

    def _whole_of(self, request: PanelRequest) -> MergedProfile | None:
        """Return the profile of the whole window if it is kept and a part of it is asked for.

        Not for a part of the hosts: its accounting is that of its objects. Nor by labels that
        compacted hours do not have: these are skipped then.
        """
        names = request.selector.names
        if not names or "host" in names or DROPPED_LABELS & names:
            return None
        return self._kept.get(self.key(replace(request, selector=EMPTY), request.labels))
