"""Answers: what the service says to a question about its store, in the shapes of its API.

A merged profile is kept as arrays for as long as there is room, under the names of its objects, so
that what changes in the store is never missed and every zoom, search and table starts from it. Only
what a screen shows is drawn and sent; the rest is summed in boxes of kind `rest`.

Times in are ns, times out are Unix milliseconds. All answers are dicts that orjson can write.
"""

import functools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from profiler.flamegraph import ROOT_ID, FlameGraph, Screen, draw
from profiler.paths import Group, Paths, Stacks
from profiler.selection import nearest_objects
from storage.objects import ObjectStore
from storage.profile import GOOD_STOPS, Profile, Window
from storage.query import HOUR_NS, Answer, Coverage, Functions, Query
from storage.selector import Selector
from symbolizer.location import Frame

SCHEMA = 1

_KEPT_WORDS = 30_000_000
"""Boxes of all stacks of the merged profiles that are kept, 12 bytes each with all that is made of
them; the last one asked for is kept whatever its size."""
_NAMED_HOSTS = 100
_NAMED_MODULES = 1_000
_KEPT_NODES = 200_000
"""Nodes remembered per merged profile, so that a zoom into one that was drawn is not searched."""
_KEPT_VIEWS = 3
"""Paths kept per merged profile: each is as large as it."""
_KEPT_GRAPHS = 16
"""Drawn graphs kept per merged profile, some hundred kB each: many people look at one hour."""
_BELIEVED_S = 0.5
"""A listing of the store is believed for so long: as long as the panels of a page take to ask."""
_FINER = (1, 30, 1000)
"""How much finer than the screen the tree is drawn, step by step, to find a node by its id."""
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)
"""Lengths in seconds that a timeline's step has when nobody asks for one."""
_WANTED_STEPS = 180
MOST_STEPS = 5_000

_Row = tuple[Frame, tuple[int, int, int, int]]
"""A function with its self, total, and both in samples."""

Check = Callable[[], None]
"""Called between steps of long work; what it raises ends the work."""


class NoSuchNodeError(LookupError):
    """The node of a link is not among the stacks that are asked for."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about: the part of the store, and how its stacks are looked at."""

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

    @property
    def view(self) -> tuple[object, ...]:
        """What the paths depend on, but for the node that is zoomed into."""
        return (self.by, self.group, self.invert, self.callers, self.focus, self.hide)

    @property
    def is_plain(self) -> bool:
        """Tell whether sums of functions answer it without any stack."""
        looks = (self.invert, self.callers, self.focus, self.hide)
        return not any(looks) and self.node == ROOT_ID and self.group is Group.FUNCTION


@dataclass(slots=True)
class _Merged:
    """A merged profile and what was made of it so far."""

    answer: Answer
    stacks: dict[Group, Stacks] = field(default_factory=dict)
    paths: dict[tuple[object, ...], Paths] = field(default_factory=dict)
    tables: dict[tuple[object, ...], list[_Row]] = field(default_factory=dict)
    """By view: the functions, largest self first."""
    graphs: OrderedDict[tuple[object, ...], FlameGraph] = field(default_factory=OrderedDict)
    """By view, node and width."""
    unread: list[tuple[Question, FlameGraph]] = field(default_factory=list)
    """Drawn, and not yet in `nodes`: most are never zoomed into."""
    nodes: dict[tuple[object, ...], dict[int, tuple[int, int]]] = field(default_factory=dict)
    """By view and id: the parent's id and the number of the box."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    nodes_lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def words(self) -> int:
        return len(self.answer.profile.stack_locations)

    def paths_of(self, question: Question) -> Paths:
        """Give the paths of a view. A few views are kept: they are as large as the profile."""
        with self.lock:
            known = self.paths.get(question.view)
            if known is not None:
                return known
            stacks = self.stacks.get(question.group)
            if stacks is None:
                stacks = Stacks.of(self.answer.profile, question.group)
                self.stacks = {question.group: stacks}
            paths = Paths.of_stacks(stacks, self.answer.profile, question.by)
            # In this order stacks can be kept for a function that is then taken out of them.
            for function in question.focus:
                paths = paths.focus(function)
            for function in question.hide:
                paths = paths.hide(function)
            if question.callers:
                paths = paths.callers(question.callers)
            elif question.invert:
                paths = paths.inverted()
            if len(self.paths) >= _KEPT_VIEWS:
                oldest = next(iter(self.paths))
                del self.paths[oldest]
                self.tables.pop(oldest, None)
            self.paths[question.view] = paths
            return paths

    def draw(self, question: Question, paths: Paths, path: Sequence[tuple[int, int]]) -> FlameGraph:
        """Give what stands on a node of the paths, as wide as the question says."""
        key = (question.view, question.node, question.width_px)
        with self.lock:
            if key in self.graphs:
                self.graphs.move_to_end(key)
                return self.graphs[key]
        graph = draw(paths.below([box for _, box in path]), Screen(question.width_px))
        with self.lock:
            self.graphs[key] = graph
            self.unread = [*self.unread[1 - _KEPT_GRAPHS :], (question, graph)]
            while len(self.graphs) > _KEPT_GRAPHS:
                self.graphs.popitem(last=False)
        return graph

    def table(self, question: Question, paths: Paths) -> list[_Row]:
        """Give the functions of a view, largest self first."""
        rows = self.tables.get(question.view)
        if rows is None:
            rows = [(row.frame, row[1:]) for row in paths.functions() if row.total]
            with self.lock:
                if question.view in self.paths:
                    self.tables[question.view] = rows
        return rows

    def _remember(self, question: Question, paths: Paths, graph: FlameGraph) -> None:
        """Note where the nodes of a drawn graph stand, so that their ids lead to them."""
        known = self.nodes.setdefault(question.view, {})
        if len(known) > _KEPT_NODES:
            known.clear()
        number = {frame: i for i, frame in enumerate(paths.frames)}
        boxes = [number.get(frame, -1) for frame in graph.frames]
        ids = graph.ids(question.node).tolist()
        parents, frames = graph.parent.tolist(), graph.frame.tolist()
        for node in range(1, len(ids)):
            box = boxes[frames[node]]
            if box >= 0:
                known.setdefault(ids[node], (ids[parents[node]], box))

    def path_to(self, question: Question, paths: Paths) -> list[tuple[int, int]]:
        """Give the (id, box) that lead from below the root to the node of the question.

        Raises:
            NoSuchNodeError: no stack goes there.
        """
        with self.nodes_lock:
            with self.lock:
                drawn = [each for each in self.unread if each[0].view == question.view]
                self.unread = [each for each in self.unread if each[0].view != question.view]
            for each, graph in drawn:
                self._remember(each, paths, graph)
            known = self.nodes.get(question.view, {})
            for finer in (*_FINER, 0):
                found = _follow(known, question.node)
                if found is not None:
                    return found
                screen = Screen(question.width_px * finer) if finer else None
                self._remember(replace(question, node=ROOT_ID), paths, draw(paths, screen))
                known = self.nodes[question.view]
            found = _follow(known, question.node)
            if found is None:
                raise NoSuchNodeError(f"{question.node:016x}")
            return found


def _follow(known: dict[int, tuple[int, int]], node: int) -> list[tuple[int, int]] | None:
    path: list[tuple[int, int]] = []
    while node != ROOT_ID:
        if node not in known:
            return None
        parent, box = known[node]
        path.append((node, box))
        node = parent
    return path[::-1]


class Answers:
    """Answers questions about one store. Safe to use from several threads."""

    def __init__(self, store: ObjectStore, query: Query) -> None:
        self._store = store
        self._query = query.believing(_BELIEVED_S)
        self._merged: OrderedDict[tuple[str, str, str], _Merged] = OrderedDict()
        self._lock = threading.Lock()
        self._merging: dict[tuple[str, str, str], threading.Lock] = {}

    def flamegraph(self, question: Question, check: Check) -> dict[str, Any]:
        """Answer `flamegraph`.

        Raises:
            NoSuchNodeError: the question's node is not there.
        """
        merged = self._merge(question, check)
        paths = merged.paths_of(question)
        check()
        path = merged.path_to(question, paths) if question.node != ROOT_ID else []
        check()
        graph = merged.draw(question, paths, path)
        check()
        below = paths.below([box for _, box in path]) if question.search else None
        found = below.search(question.search) if below else None
        profile = merged.answer.profile
        above = _ancestors(paths, path)
        modules = {frame[1] for frame in (*graph.frames, *(each["frame"] for each in above))}
        return {
            **self._head(question, merged.answer.coverage),
            "unit": profile.unit,
            "total": profile.total_value,
            "samples": profile.total_samples,
            "frames": [list(frame) for frame in graph.frames],
            "modules": _files_of(profile, modules),
            "nodes": {
                "frame": graph.frame,
                "depth": graph.depth,
                "total": graph.total,
                "self": graph.self,
                "samples": graph.samples,
            },
            "rest": {"nodes": graph.cut_nodes, "total": graph.cut_total},
            "path": above,
            "search": {"text": question.search, **found._asdict()} if found else None,
            "empty": self._empty(question, merged.answer.coverage, profile.total_samples),
        }

    def top(self, question: Question, sort: str, limit: int, check: Check) -> dict[str, Any]:
        """Answer `top`: the table of functions, sorted and filtered from the full data.

        Raises:
            NoSuchNodeError: the question's node is not there.
        """
        is_sorted = False
        if question.is_plain and not self._has(question):
            table = self._query.interruptible(check).functions(
                question.window, question.selector, (), question.type
            )
            rows = _rows_of_sums(table)
            unit, total, samples = table.unit, table.total, table.samples
            coverage = table.coverage
        else:
            merged = self._merge(question, check)
            paths = merged.paths_of(question)
            check()
            if question.node == ROOT_ID:
                rows = merged.table(question, paths)
            else:
                paths = paths.through([box for _, box in merged.path_to(question, paths)])
                rows = [(row.frame, row[1:]) for row in paths.functions() if row.total]
            is_sorted = sort == "self"
            profile, coverage = merged.answer.profile, merged.answer.coverage
            unit, total, samples = profile.unit, profile.total_value, profile.total_samples
        check()
        if question.search:
            wanted = question.search.casefold()
            rows = [
                row
                for row in rows
                if wanted in row[0].function.casefold() or wanted in row[0].module.casefold()
            ]
        if not is_sorted:
            rows = sorted(rows, key=_SORTS[sort])
        return {
            **self._head(question, coverage),
            "unit": unit,
            "total": total,
            "samples": samples,
            "functions": [
                {
                    "function": frame.function,
                    "module": frame.module,
                    "kind": frame.kind,
                    "file": frame.file,
                    "self": counts[0],
                    "total": counts[1],
                    "self_samples": counts[2],
                    "total_samples": counts[3],
                }
                for frame, counts in rows[:limit]
            ],
            "rows": len(rows),
            "empty": self._empty(question, coverage, samples),
        }

    def timeline(
        self, question: Question, step_ns: int, limit: int, check: Check
    ) -> dict[str, Any]:
        """Answer `timeline`. What is beyond `limit` series is one more, marked as the rest."""
        # Steps begin at multiples of their length, so that the same minute is the same step.
        whole = self._query.interruptible(check).timeline(
            question.window,
            question.selector,
            step_ns or functools.partial(usual_step_ns, question.window),
            question.by,
            type=question.type,
            is_aligned=True,
        )
        series = [
            {
                "labels": dict(each.labels),
                "rest": False,
                "values": each.values.tolist(),
                "samples": each.samples.tolist(),
            }
            for each in whole.series[:limit]
        ]
        others = whole.series[limit:]
        if others:
            series.append(
                {
                    "labels": {},
                    "rest": True,
                    "values": np.sum([each.values for each in others], axis=0),
                    "samples": np.sum([each.samples for each in others], axis=0),
                }
            )
        samples = sum(int(each.samples.sum()) for each in whole.series)
        return {
            **self._head(question, whole.coverage),
            "unit": whole.unit,
            "start_ms": whole.start_ns // 1_000_000,
            "step_ms": whole.step_ns // 1_000_000,
            "series": series,
            "totals": {name: whole.totals[name] for name in _TIMELINE_TOTALS},
            "covered_ns": whole.covered_ns,
            "empty": self._empty(question, whole.coverage, samples),
        }

    def labels(self, question: Question, check: Check) -> dict[str, Any]:
        """Answer `labels`: the names there are, how many values and samples each has."""
        found = self._query.interruptible(check).labels(question.window, question.selector)
        names = [
            {"name": name, "values": len(values), "samples": sum(values.values())}
            for name, values in sorted(found.items())
        ]
        return {"schema": SCHEMA, "window": _window(question.window), "labels": names}

    def label_values(self, question: Question, name: str, check: Check) -> dict[str, Any]:
        """Answer `labels/{name}/values`, most samples first."""
        query = self._query.interruptible(check)
        values = query.label_values(question.window, name, question.selector)
        return {
            "schema": SCHEMA,
            "window": _window(question.window),
            "name": name,
            "values": [{"value": value, "samples": count} for value, count in values.items()],
        }

    def profile(self, question: Question, check: Check) -> Answer:
        """Give the merged profile itself, for exports."""
        return self._merge(question, check).answer

    def span(self) -> Window | None:
        """Give when the data of the store begin and end; None if there are none."""
        far = Window(2**62, 2**62 + 1)
        last = nearest_objects(self._store, far)
        first = nearest_objects(self._store, Window(0, 1))
        if not last or not first:
            return None
        return Window(min(key.start_ns for key in first), max(key.end_ns for key in last))

    def hosts(self, span: Window | None) -> list[str]:
        """Give the hosts of the last hour that has data."""
        if span is None:
            return []
        last = Window(max(span.start_ns, span.end_ns - HOUR_NS), span.end_ns)
        return sorted(self._query.label_values(last, "host"))

    def _key(self, question: Question) -> tuple[str, str, str]:
        objects = self._query.fingerprint(question.window)
        return (objects, str(question.selector), question.type)

    def _has(self, question: Question) -> bool:
        """Tell whether the stacks are merged, or are being merged for somebody else."""
        key = self._key(question)
        with self._lock:
            return key in self._merged or key in self._merging

    def _merge(self, question: Question, check: Check) -> _Merged:
        key = self._key(question)
        with self._lock:
            turn = self._merging.setdefault(key, threading.Lock())
        try:
            while not turn.acquire(timeout=0.1):
                check()
            try:
                with self._lock:
                    known = self._merged.get(key)
                    if known is not None:
                        self._merged.move_to_end(key)
                        return known
                query = self._query.interruptible(check)
                answer = query.profile(question.window, question.selector, question.type)
                merged = _Merged(answer)
                if answer.coverage.is_lasting:
                    self._keep(key, merged)
                return merged
            finally:
                turn.release()
        finally:
            with self._lock:
                if not turn.locked():
                    self._merging.pop(key, None)

    def _keep(self, key: tuple[str, str, str], merged: _Merged) -> None:
        with self._lock:
            self._merged[key] = merged
            words = sum(each.words for each in self._merged.values())
            while words > _KEPT_WORDS and len(self._merged) > 1:
                _, oldest = self._merged.popitem(last=False)
                words -= oldest.words

    def _head(self, question: Question, coverage: Coverage) -> dict[str, Any]:
        accounting = coverage.accounting
        stops = dict(accounting.stops)
        good = sum(count for reason, count in stops.items() if reason in GOOD_STOPS)
        ended = sum(stops.values())
        return {
            "schema": SCHEMA,
            "type": question.type,
            "window": _window(question.window),
            "query": str(question.selector) if question.selector.matchers else "",
            "host_seconds": accounting.profiled_ns / 1e9,
            "coverage": {
                "hosts": len(accounting.hosts),
                "host_names": [host.name for host in accounting.hosts[:_NAMED_HOSTS]],
                "objects": coverage.objects,
                "cpus": accounting.cpus,
                "ticks": accounting.ticks,
                "idle": accounting.idle,
                "filtered": accounting.filtered,
                "stored": accounting.stored,
                "lost": dict(accounting.lost),
                "stops": stops,
                "complete": good / ended if ended else None,
                "nonidle_ns": accounting.nonidle_ns,
                "profiled_ns": accounting.profiled_ns,
                "skipped": [{"key": each.key, "reason": each.reason} for each in coverage.skipped],
            },
            "agent": {
                "cpu_ns": accounting.agent_cpu_ns,
                "rss_bytes": accounting.agent_rss_bytes,
            },
        }

    def _empty(self, question: Question, coverage: Coverage, samples: int) -> dict[str, Any] | None:
        if samples:
            return None
        if coverage.objects or (question.selector.matchers and self._any(question.window)):
            services = self._query.label_values(question.window, "service")
            return {"reason": "nothing_matches", "nearest": [], "services": list(services)[:50]}
        nearest = [
            {"from_ms": key.start_ns // 1_000_000, "until_ms": key.end_ns // 1_000_000}
            for key in nearest_objects(self._store, question.window)
        ]
        reason = "no_data_in_range" if nearest else "no_data_ever"
        return {"reason": reason, "nearest": nearest, "services": []}

    def _any(self, window: Window) -> bool:
        return next(iter(self._query.objects(window)), None) is not None


def _files_of(profile: Profile, modules: set[str]) -> list[list[str]]:
    """Give (module, path, build id) of the files behind frames; several may be called the same."""
    files = (file for file in profile.modules.values() if file.name in modules)
    return sorted([file.name, file.path, file.build_id] for file in files)[:_NAMED_MODULES]


def usual_step_ns(window: Window, object_ns: int) -> int:
    """Give the step that cuts a window into a number of steps that a screen can show.

    It is a multiple of the longest object's length: an object counts where it begins, so that
    shorter steps would have gaps. Odd lengths are those of windows that were cut short.
    """
    object_s = max(1, math.ceil(object_ns / 1e9))
    if object_s % _STEPS[2]:
        object_s = next((step for step in _STEPS if step >= object_s), object_s)
    length_s = (window.end_ns - window.start_ns) / 1e9
    fitting = (step for step in _STEPS if length_s / step <= _WANTED_STEPS)
    least = next(fitting, 86400 * (1 + int(length_s / 86400 / _WANTED_STEPS)))
    whole = (step for step in (*_STEPS, least) if step >= least and step % object_s == 0)
    return next(whole, object_s * math.ceil(least / object_s)) * 1_000_000_000


_TIMELINE_TOTALS = ("profiled_ns", "nonidle_ns", "ticks", "idle", "filtered", "stored", "lost")

_SORTS: dict[str, Callable[[_Row], tuple[object, ...]]] = {
    "self": lambda row: (-row[1][0], -row[1][1], row[0]),
    "total": lambda row: (-row[1][1], -row[1][0], row[0]),
    "name": lambda row: (row[0].function.casefold(), row[0]),
    "module": lambda row: (row[0].module.casefold(), -row[1][0], row[0]),
}
SORTS = tuple(_SORTS)


def _rows_of_sums(table: Functions) -> list[_Row]:
    return [
        (row.frame, (row.self, row.total, row.self_samples, row.total_samples))
        for row in table.rows
    ]


def _window(window: Window) -> dict[str, int]:
    return {
        "from_ms": window.start_ns // 1_000_000,
        "until_ms": window.end_ns // 1_000_000,
    }


def _ancestors(paths: Paths, path: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Give the boxes that lead to the zoomed one, itself last, each with what it costs."""
    sums = paths.sums_along([box for _, box in path])
    return [
        {
            "id": f"{node:016x}",
            "frame": list(paths.frames[box]),
            "total": total,
            "samples": samples,
        }
        for (node, box), (total, samples) in zip(path, sums, strict=True)
    ]
