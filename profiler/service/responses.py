"""Answers: what the service says to a question about its store, in the shapes of its API.

A merged profile is kept as arrays for as long as there is room, under the names of its objects, so
that what changes in the store is never missed and every zoom, search and table starts from it. Only
what a screen shows is drawn and sent; the rest is summed in boxes of kind `rest`.

Times in are ns, times out are Unix milliseconds. All answers are dicts that orjson can write.
"""

import functools
import itertools
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from profiler.comparison.comparison import Function, Operand, of_store
from profiler.comparison.deployments import deployments_in
from profiler.comparison.gate import Gate, verdict_of
from profiler.comparison.report import as_json
from profiler.flamegraph.differential import (
    Pair,
    UnionGraph,
    UnionPaths,
    fields_of_pair,
    only_hosts,
    only_labels,
)
from profiler.flamegraph.flamegraph import ROOT_ID, FlameGraph, Screen, draw
from profiler.flamegraph.paths import Group, Paths, Stacks
from profiler.flamegraph.views import NoSuchNodeError, View, path_to
from profiler.times import from_until
from storage.objects.tenant import TenantStore
from storage.profile import GOOD_STOPS, Profile, Window
from storage.query.coverage import Coverage
from storage.query.listing import HOUR_NS, nearest_objects
from storage.query.query import EMPTY, Answer, Functions, Query
from storage.query.threads import Turns
from storage.selector import Selector
from symbolizer.location import Frame

SCHEMA = 1

_KEPT_WORDS = 6_000_000
"""Boxes of all stacks of the merged profiles that are kept, 12 to 20 bytes each with all that is
made of them: four hours of a host. The last one asked for is kept whatever its size."""
_NAMED_HOSTS = 100
_NAMED_MODULES = 1_000
_NAMED_SERVICES = 50
_MOST_DEPLOYMENTS = 1_000
_KEPT_VIEWS = 3
"""Paths kept per merged profile: each is as large as it."""
_KEPT_SELECTIONS = 16
_KEPT_GRAPHS = 16
"""Drawn graphs kept per view, some hundred kB each: many people look at one hour, and a zoom into a
box that was drawn is not searched for."""
_COMPARED_S = 300.0
"""A comparison is kept for so long: what is new of its sides gives another one at once, but late
objects of the time before may make it more certain."""
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
    def view(self) -> View:
        """What the paths depend on, but for the node that is zoomed into."""
        return View(self.by, self.group, self.invert, self.callers, self.focus, self.hide)

    @property
    def is_plain(self) -> bool:
        """Return whether sums of functions answer it without any stack."""
        return self.view.is_whole and self.node == ROOT_ID


_Path = list[tuple[int, int]]
"""Ids and boxes that lead from below the root to a node."""


@dataclass(slots=True)
class _Drawn:
    """A graph that was drawn, and what leads to its root."""

    path: _Path
    graph: FlameGraph
    ids: npt.NDArray[np.uint64] | None = None
    """Of its nodes: computed when somebody zooms, which is later or never."""

    def path_to(self, node: int, numbers: Mapping[Frame, int]) -> _Path | None:
        """Return what leads to a node, None where it was not drawn here."""
        graph = self.graph
        if self.ids is None:
            self.ids = graph.ids(self.path[-1][0] if self.path else ROOT_ID)
        below = graph.path_to(node, self.ids, numbers)
        return None if below is None else [*self.path, *below]


@dataclass(slots=True)
class _View:
    """The paths of a profile, looked at in one way, and what was made of them so far."""

    paths: Paths
    numbers: dict[Frame, int]
    """Of the boxes."""
    table: list[_Row] | None = None
    """The functions, largest self first."""
    drawn: OrderedDict[tuple[int, float], _Drawn] = field(default_factory=OrderedDict)
    """By node and width; used last stands last."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, paths: Paths) -> "_View":
        return cls(paths, {frame: i for i, frame in enumerate(paths.frames)})

    def draw(self, question: Question, path: _Path) -> FlameGraph:
        """Return what stands on the node that a path leads to, as wide as the question says."""
        key = (question.node, question.width_px)
        with self.lock:
            if key in self.drawn:
                self.drawn.move_to_end(key)
                return self.drawn[key].graph
        graph = draw(self.paths.below([box for _, box in path]), Screen(question.width_px))
        with self.lock:
            self.drawn[key] = _Drawn(path, graph)
            while len(self.drawn) > _KEPT_GRAPHS:
                self.drawn.popitem(last=False)
        return graph

    def rows(self) -> list[_Row]:
        """Return the table of functions, which nobody may change."""
        if self.table is None:
            self.table = [(row.frame, row[1:]) for row in self.paths.functions() if row.total]
        return self.table

    def path_to(self, question: Question) -> _Path:
        """Return what leads to the node of the question.

        Raises:
            NoSuchNodeError: no stack goes there.
        """
        if question.node == ROOT_ID:
            return []
        with self.lock:
            drawn = list(reversed(self.drawn.values()))
        finer = (Screen(question.width_px * times) for times in _FINER)
        searched = (_Drawn([], draw(self.paths, screen)) for screen in (*finer, None))
        for each in itertools.chain(drawn, searched):
            found = each.path_to(question.node, self.numbers)
            if found is not None:
                return found
        raise NoSuchNodeError(f"{question.node:016x}")


@dataclass(slots=True)
class _Merged:
    """A merged profile and what was made of it so far."""

    answer: Answer
    whole: "_Merged | None" = None
    """Where it is a selection: what it was selected from, which has the same stacks."""
    stacks: tuple[Group, Stacks] | None = None
    views: OrderedDict[View, _View] = field(default_factory=OrderedDict)
    selections: OrderedDict[str, "_Merged"] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def words(self) -> int:
        return len(self.answer.profile.stack_locations)

    def select(self, selector: Selector) -> "_Merged":
        """Return the rows that are asked for, without reading or merging anything again."""
        with self.lock:
            known = self.selections.get(str(selector))
            if known is None:
                profile = self.answer.profile
                chosen = list(selector.choose(map(dict, profile.label_sets)))
                known = _Merged(replace(self.answer, profile=only_labels(profile, chosen)), self)
                self.selections[str(selector)] = known
                while len(self.selections) > _KEPT_SELECTIONS:
                    self.selections.popitem(last=False)
            self.selections.move_to_end(str(selector))
            return known

    def view(self, question: Question) -> _View:
        """Look at it as asked. A few views are kept: each is as large as the profile."""
        with self.lock:
            known = self.views.get(question.view)
            if known is None:
                known = self.views[question.view] = _View.of(self._paths_of(question))
                while len(self.views) > _KEPT_VIEWS:
                    self.views.popitem(last=False)
            self.views.move_to_end(question.view)
            return known

    def _paths_of(self, question: Question) -> Paths:
        view, profile = question.view, self.answer.profile
        return view.of(Paths.of_stacks(self._stacks_of(view.group), profile, view.by))

    def _stacks_of(self, group: Group) -> Stacks:
        if self.whole is not None:
            with self.whole.lock:
                return self.whole._stacks_of(group)  # noqa: SLF001 - one like this
        if self.stacks is None or self.stacks[0] is not group:
            self.stacks = (group, Stacks.of(self.answer.profile, group))
        return self.stacks[1]


class NothingToCompareError(LookupError):
    """A side of a comparison is empty."""

    def __init__(self, detail: str, side: str, reason: str, **more: object) -> None:
        super().__init__(detail)
        self.fields = {"side": side, "reason": reason, **more}


@dataclass(slots=True)
class _Compared:
    """Two sides compared, and the views of them that were asked for."""

    pair: Pair
    coverages: tuple[Coverage, Coverage]
    made_s: float
    views: OrderedDict[View, UnionPaths] = field(default_factory=OrderedDict)
    drawn: OrderedDict[tuple[View, int, float], tuple[_Path, UnionGraph]] = field(
        default_factory=OrderedDict
    )
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def words(self) -> int:
        return sum(len(each.stack_locations) for each in (self.pair.before, self.pair.after))

    def draw(self, question: Question, check: Check) -> tuple[UnionPaths, _Path, UnionGraph]:
        """Return the paths of a view, what leads to the question's node, and what stands on it.

        Raises:
            NoSuchNodeError: no stack goes there.
        """
        with self.lock:
            view = question.view
            shown = self.views.get(view)
            if shown is None:
                shown = self.views[view] = self.pair.view(view, check)
            self.views.move_to_end(view)
            while len(self.views) > _KEPT_VIEWS:
                self.views.popitem(last=False)
            check()
            key = (view, question.node, question.width_px)
            if key not in self.drawn:
                path = path_to(shown.paths, question.node, check)
                check()
                boxes = [box for _, box in path]
                graph = self.pair.draw(shown, boxes, Screen(question.width_px))
                self.drawn[key] = path, graph
            self.drawn.move_to_end(key)
            while len(self.drawn) > _KEPT_GRAPHS:
                self.drawn.popitem(last=False)
            return shown, *self.drawn[key]


class Answers:
    """Answers questions about one store. Safe to use from several threads."""

    def __init__(self, store: TenantStore, query: Query) -> None:
        self._store = store
        self._query = query.believing(_BELIEVED_S)
        self._merged: OrderedDict[tuple[str, str, str], _Merged] = OrderedDict()
        self._lock = threading.Lock()
        self._merging: dict[tuple[str, str, str], threading.Lock] = {}
        self._compared: OrderedDict[tuple[tuple[str, str, str], ...], _Compared] = OrderedDict()
        self._comparing = Turns()

    def flamegraph(self, question: Question, check: Check) -> dict[str, Any]:
        """Answer `flamegraph`.

        Raises:
            NoSuchNodeError: the question's node is not there.
        """
        merged = self._select(question, check)
        view = merged.view(question)
        paths = view.paths
        check()
        path = view.path_to(question)
        check()
        graph = view.draw(question, path)
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
            rows = _rows_of_totals(table)
            unit, total, samples = table.unit, table.total, table.samples
            coverage = table.coverage
        else:
            merged = self._select(question, check)
            view = merged.view(question)
            check()
            if question.node == ROOT_ID:
                rows = view.rows()
            else:
                paths = view.paths.through([box for _, box in view.path_to(question)])
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

    def diff(self, question: Question, before: Operand, gate: Gate, check: Check) -> dict[str, Any]:
        """Answer `diff`: the union of the question's graph and the same of an earlier window.

        Raises:
            NoSuchNodeError: the question's node is on neither side.
            NothingToCompareError: a side is empty.
        """
        compared = self._compare(question, before, check)
        pair = compared.pair
        shown, path, graph = compared.draw(question, check)
        check()
        boxes = [box for _, box in path]
        modules = {
            frame.module for frame in (*graph.frames, *map(shown.paths.frames.__getitem__, boxes))
        }
        files = (_files_of(profile, modules) for profile in (pair.before, pair.after))
        head = self._compared_head(compared, gate)
        head.pop("functions")
        return {
            **head,
            **fields_of_pair(pair, graph),
            "modules": sorted({tuple(file): file for side in files for file in side}.values()),
            "path": [
                {"id": f"{node:016x}", "frame": list(shown.paths.frames[box]), **sums}
                for (node, box), sums in zip(path, shown.sums_along(boxes), strict=True)
            ],
        }

    def diff_top(
        self, question: Question, before: Operand, gate: Gate, limit: int, check: Check
    ) -> dict[str, Any]:
        """Answer `diff/top`: the functions of a comparison, what changed first, then by cost.

        Raises:
            NothingToCompareError: a side is empty.
        """
        compared = self._compare(question, before, check)
        pair, wanted = compared.pair, question.search.casefold()
        functions = [
            each
            for each in pair.found.functions
            if wanted in each.frame.function.casefold() or wanted in each.frame.module.casefold()
        ]
        shown = functions[:limit]
        head = self._compared_head(compared, gate, shown)
        check()
        moved, reasons = pair.moved, pair.reasons(shown)
        for function, row in zip(shown, head["functions"], strict=True):
            key = (function.frame.function, function.frame.module, function.frame.kind)
            row["moved"] = key in moved
            row["total"]["because"] = [
                {
                    "function": each.frame.function,
                    "module": each.frame.module,
                    "kind": each.frame.kind,
                    "before": each.before,
                    "after": each.after,
                }
                for each in reasons.get(key, ())
            ]
        return {**head, "rows": len(functions)}

    def compare(self, question: Question, before: Operand, check: Check) -> Pair:
        """Return the comparison itself, for exports.

        Raises:
            NothingToCompareError: a side is empty.
        """
        return self._compare(question, before, check).pair

    def _compared_head(
        self, compared: _Compared, gate: Gate, functions: Sequence[Function] = ()
    ) -> dict[str, Any]:
        """Return what is said of a comparison, and the records of some of its functions."""
        pair = compared.pair
        verdict = verdict_of(pair.found, gate)
        told = replace(pair.found, functions=tuple(functions))
        record: dict[str, Any] = orjson.loads(as_json(told, verdict, gate))
        for name, coverage in zip(("before", "after"), compared.coverages, strict=True):
            record[name]["coverage"] = _coverage(coverage)
            record[name]["host_seconds"] = coverage.accounting.profiled_ns / 1e9
        return {
            **record,
            "type": pair.after.type,
            "unit": pair.after.unit,
            "scale": pair.scale._asdict(),
        }

    def _compare(self, question: Question, before: Operand, check: Check) -> _Compared:
        sides = [replace(question, window=before.window, selector=before.selector), question]
        key = tuple(self._key(side) for side in sides)
        with self._comparing.of(repr(key), check):
            known = self._compared.get(key)
            if known is not None and known.made_s > time.monotonic() - _COMPARED_S:
                self._compared.move_to_end(key)
                return known
            merged = [self._select(side, check).answer for side in sides]
            for name, side, answer in zip(("before", "after"), sides, merged, strict=True):
                self._refuse_empty(name, side, answer)
            operands = [Operand(side.selector, side.window) for side in sides]
            found = of_store(self._query.interruptible(check), operands[0], operands[1])
            check()
            chosen = [
                only_hosts(answer.profile, side.hosts)
                for answer, side in zip(merged, (found.before, found.after), strict=True)
            ]
            made = _Compared(
                pair=Pair(found, before=chosen[0], after=chosen[1]),
                coverages=(merged[0].coverage, merged[1].coverage),
                made_s=time.monotonic(),
            )
            if all(answer.coverage.is_lasting for answer in merged):
                with self._lock:
                    self._compared[key] = made
                    words = sum(each.words for each in self._compared.values())
                    while words > _KEPT_WORDS and len(self._compared) > 1:
                        _, oldest = self._compared.popitem(last=False)
                        words -= oldest.words
            return made

    def _refuse_empty(self, name: str, question: Question, answer: Answer) -> None:
        empty = self._empty(question, answer.coverage, answer.profile.total_samples)
        if empty is None:
            return
        span = f"from {from_until(question.window)}"
        if empty["reason"] == "nothing_matches":
            others = (each for each in question.selector.matchers if each.name != "version")
            versions = self._query.label_values(question.window, "version", Selector(tuple(others)))
            services = ", ".join(empty["services"][:8]) or "none"
            detail = f"no sample {span} is of {question.selector}; services there: {services}"
            raise NothingToCompareError(
                f"nothing to compare: the {name} side is empty: {detail}",
                name,
                **empty,
                versions=list(versions)[:_NAMED_SERVICES],
            )
        nearest = " and ".join(
            from_until(Window(each["from_ms"] * 10**6, each["until_ms"] * 10**6))
            for each in empty["nearest"]
        )
        there = f"the nearest data are from {nearest}" if nearest else "the store is empty"
        raise NothingToCompareError(
            f"nothing to compare: the {name} side is empty: there are no data {span}; {there}",
            name,
            **empty,
            versions=[],
        )

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

    def deployments(self, question: Question, check: Check) -> dict[str, Any]:
        """Answer `deployments`, those that began in the window, newest first."""
        query = self._query.interruptible(check)
        found = deployments_in(self._store, query, question.window, question.selector, check)
        shown = found.records()[:_MOST_DEPLOYMENTS]
        empty = {"reason": found.reason, "services": found.services[:_NAMED_SERVICES]}
        return {
            "schema": SCHEMA,
            "window": _window(question.window),
            "query": str(question.selector) if question.selector.matchers else "",
            "deployments": shown,
            "rest": len(found.deployments) - len(shown),
            "empty": empty if found.reason else None,
            "skipped": [{"key": key, "reason": reason} for key, reason in found.skipped],
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
        """Return the merged profile itself, for exports."""
        return self._merge(question, check).answer

    def span(self) -> Window | None:
        """Return when the data of the store begin and end; None if there are none."""
        far = Window(2**62, 2**62 + 1)
        last = nearest_objects(self._store, far)
        first = nearest_objects(self._store, Window(0, 1))
        if not last or not first:
            return None
        return Window(min(key.start_ns for key in first), max(key.end_ns for key in last))

    def hosts(self, span: Window | None) -> list[str]:
        """Return the hosts of the last hour that has data."""
        if span is None:
            return []
        last = Window(max(span.start_ns, span.end_ns - HOUR_NS), span.end_ns)
        return sorted(self._query.label_values(last, "host"))

    def _key(self, question: Question) -> tuple[str, str, str]:
        objects = self._query.fingerprint(question.window, question.type)
        return (objects, str(question.selector), question.type)

    def _has(self, question: Question) -> bool:
        """Return whether the stacks are merged, or are being merged for somebody else."""
        key = self._key(question)
        with self._lock:
            if key in self._merged or key in self._merging:
                return True
        return self._whole_of(question) is not None

    def _select(self, question: Question, check: Check) -> _Merged:
        """Return what is asked for, from all that is merged where it is."""
        whole = self._whole_of(question)
        return self._merge(question, check) if whole is None else whole.select(question.selector)

    def _whole_of(self, question: Question) -> _Merged | None:
        """Return all of the window where it is merged and a part of it is asked for.

        Not for a part of the hosts: its accounting is that of its objects.
        """
        if not question.selector.matchers or "host" in question.selector.names:
            return None
        key = self._key(replace(question, selector=EMPTY))
        with self._lock:
            whole = self._merged.get(key)
            if whole is not None:
                self._merged.move_to_end(key)
            return whole

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
        return {
            "schema": SCHEMA,
            "type": question.type,
            "window": _window(question.window),
            "query": str(question.selector) if question.selector.matchers else "",
            "host_seconds": accounting.profiled_ns / 1e9,
            "coverage": _coverage(coverage),
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
            return {
                "reason": "nothing_matches",
                "nearest": [],
                "services": list(services)[:_NAMED_SERVICES],
            }
        nearest = [
            {"from_ms": key.start_ns // 1_000_000, "until_ms": key.end_ns // 1_000_000}
            for key in nearest_objects(self._store, question.window)
        ]
        reason = "no_data_in_range" if nearest else "no_data_ever"
        return {"reason": reason, "nearest": nearest, "services": []}

    def _any(self, window: Window) -> bool:
        return next(iter(self._query.objects(window)), None) is not None


def _coverage(coverage: Coverage) -> dict[str, Any]:
    accounting = coverage.accounting
    stops = dict(accounting.stops)
    good = sum(count for reason, count in stops.items() if reason in GOOD_STOPS)
    ended = sum(stops.values())
    return {
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
    }


def _files_of(profile: Profile, modules: set[str]) -> list[list[str]]:
    """Return (module, path, build id) of the files behind frames; names may repeat."""
    files = (file for file in profile.modules.values() if file.name in modules)
    return sorted([file.name, file.path, file.build_id] for file in files)[:_NAMED_MODULES]


def usual_step_ns(window: Window, object_ns: int) -> int:
    """Return the step that cuts a window into a number of steps that a screen can show.

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


def _rows_of_totals(table: Functions) -> list[_Row]:
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
    """Return the boxes that lead to the zoomed one, itself last, each with what it costs."""
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
