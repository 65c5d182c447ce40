"""Fleet: what the functions, modules and services of all hosts cost, and how that has changed.

Cores are CPU seconds per second of the time that data cover. The trend compares them with those of
the same time a week before.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from profiler.times import NS_PER_S
from storage.profile import Integers, Labels, Window
from storage.query.coverage import Coverage
from storage.query.function_totals import FunctionTotals, fold
from storage.query.query import Query
from storage.query.timeline import cover
from storage.selector import Selector

Group = Literal["function", "module", "service"]
GROUPS: tuple[Group, ...] = ("function", "module", "service")

Order = Literal["self", "total", "growth", "hosts", "name"]
"""`self`, `total`: most CPU time first; `growth`: most cores more than a week before first."""

_WEEK_NS = 7 * 86_400 * NS_PER_S
_LEAST_COVERED = 0.5
"""A week before there must be data for so much of the time, or there is no trend."""
_LINE_WORDS, _NAME_WORDS = 4, 12
"""What a line and a name of it take, in words of 12 to 20 bytes."""


class Name(NamedTuple):
    """What a line stands for beside its labels: a module has no function, a service none of it."""

    function: str = ""
    module: str = ""
    kind: str = ""


class Spread(NamedTuple):
    """On how many hosts a service ran, and the CPU time in ns of its versions, largest first."""

    hosts: int
    versions: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """What ran in a window, and for how many ns of it there are data.

    `lines` are (label set, name), each once, in an order that is the same however the data were
    read: of equal lines a table shows the same ones first. `counts` has the CPU time in ns of each:
    itself, and with all that it calls, which is zero where it is not known.
    """

    window: Window
    covered_ns: int
    coverage: Coverage
    unit: str
    whole: int
    samples: int
    label_sets: tuple[Labels, ...]
    keys: tuple[Any, ...]
    """By name, what stands for it in other windows too: numbers or texts, which can be sorted."""
    names: Callable[[Integers], list[Name]]
    lines: Integers
    counts: Integers
    has_totals: bool = False
    spreads: tuple[Spread, ...] = ()
    """Of services, by line."""

    @property
    def is_covered(self) -> bool:
        length_ns = self.window.end_ns - self.window.start_ns
        return self.covered_ns >= _LEAST_COVERED * length_ns

    @property
    def words(self) -> int:
        """The room that it takes in memory."""
        return _LINE_WORDS * len(self.lines) + _NAME_WORDS * len(self.keys)

    def cores(self, value: int) -> float:
        return value / max(1, self.covered_ns)

    def self_of(self, other: "Costs") -> Integers:
        """Return by line of other costs what it cost here, 0 where it did not run."""
        sets = {labels: i for i, labels in enumerate(self.label_sets)}
        keys = {key: i for i, key in enumerate(self.keys)}
        mine = np.array([sets.get(labels, -1) for labels in other.label_sets], dtype=np.int64)
        names = np.array([keys.get(key, -1) for key in other.keys], dtype=np.int64)
        found = np.zeros(len(other.lines), dtype=np.int64)
        if not len(self.lines) or not len(other.lines):
            return found
        wanted = np.stack([mine[other.lines[:, 0]], names[other.lines[:, 1]]], axis=1)
        width = (len(keys), 1)
        places = self.lines @ width
        order = np.argsort(places)
        at = np.searchsorted(places, wanted @ width, sorter=order).clip(max=len(places) - 1)
        at = order[at]
        is_here = (wanted >= 0).all(axis=1) & (places[at] == wanted @ width)
        found[is_here] = self.counts[at[is_here], 0]
        return found


class Line(NamedTuple):
    """One line of the table. `cores_week_before` is None if there is no trend."""

    labels: Labels
    name: Name
    self_ns: int
    total_ns: int | None
    cores: float
    share: float
    cores_week_before: float | None
    spread: Spread | None

    @property
    def trend(self) -> float | None:
        """By which part the cores have grown in a week, infinity if there were none, else None."""
        if self.cores_week_before is None:
            return None
        if not self.cores_week_before:
            return float("inf") if self.self_ns else None
        return self.cores / self.cores_week_before - 1


@dataclass(frozen=True, slots=True)
class FleetTop:
    """The costs of a window, and those of a week before if there are enough data of it."""

    now: Costs
    before: Costs | None

    def lines(
        self, order: Order = "self", limit: int | None = None, search: str = ""
    ) -> tuple[list[Line], int]:
        """Return the first lines in an order, and how many there are.

        `search` is a part of a function, module or label that the lines have, in any case.
        """
        now = self.now
        earlier = None if self.before is None else self.before.self_of(now)
        chosen = np.arange(len(now.lines)) if not search else self._matching(search.casefold())
        chosen = chosen[self._ranks(order, chosen, earlier)]
        shown = chosen[:limit]
        names = now.names(now.lines[shown, 1])
        lines = [
            self._line(int(at), name, None if earlier is None else int(earlier[at]))
            for at, name in zip(shown, names, strict=True)
        ]
        return lines, len(chosen)

    def _line(self, at: int, name: Name, earlier_ns: int | None) -> Line:
        now, before = self.now, self.before
        self_ns, total_ns = now.counts[at].tolist()
        return Line(
            labels=now.label_sets[now.lines[at, 0]],
            name=name,
            self_ns=self_ns,
            total_ns=total_ns if now.has_totals else None,
            cores=now.cores(self_ns),
            share=self_ns / max(1, now.whole),
            cores_week_before=before.cores(earlier_ns)
            if before and earlier_ns is not None
            else None,
            spread=now.spreads[at] if now.spreads else None,
        )

    def _matching(self, text: str) -> Integers:
        now = self.now
        every = now.names(np.arange(len(now.keys)))
        names = [
            text in each.function.casefold() or text in each.module.casefold() for each in every
        ]
        labels = [any(text in value.casefold() for _, value in labels) for labels in now.label_sets]
        is_named, is_labelled = np.array(names, dtype=bool), np.array(labels, dtype=bool)
        return np.flatnonzero(is_named[now.lines[:, 1]] | is_labelled[now.lines[:, 0]])

    def _ranks(self, order: Order, chosen: Integers, earlier: Integers | None) -> Integers:
        """Return the order of some lines; equal ones are largest first."""
        now = self.now
        own, total = -now.counts[chosen].T
        if order == "name":
            names = now.names(now.lines[chosen, 1])
            sets = [now.label_sets[i] for i in now.lines[chosen, 0].tolist()]
            texts = [
                (*(part.casefold() for part in name), [value.casefold() for _, value in labels])
                for name, labels in zip(names, sets, strict=True)
            ]
            return np.array(sorted(range(len(texts)), key=texts.__getitem__), dtype=np.int64)
        if order == "growth" and self.before is not None and earlier is not None:
            gone = earlier[chosen] / max(1, self.before.covered_ns)
            return np.lexsort((own, gone + own / max(1, now.covered_ns)))
        if order == "hosts" and now.spreads:
            return np.lexsort((own, [-now.spreads[i].hosts for i in chosen.tolist()]))
        return np.lexsort((own, total) if order == "total" else (total, own))


def read_top(
    query: Query, window: Window, selector: Selector, group: Group, by: Sequence[str]
) -> FleetTop:
    """Read the costs of a window and of the same time a week before, told apart by labels `by`."""
    now = read_costs(query, window, selector, group, by)
    earlier = week_before(query, window) if now.whole else None
    before = None if earlier is None else read_costs(query, earlier, selector, group, by)
    return FleetTop(now, before if before is not None and before.is_covered else None)


def week_before(query: Query, window: Window) -> Window | None:
    """Return the same time a week before; None if there are no data of it."""
    if window.start_ns < _WEEK_NS:
        return None
    earlier = Window(*(at - _WEEK_NS for at in window))
    return earlier if query.has_data(earlier) else None


def read_costs(
    query: Query,
    window: Window,
    selector: Selector,
    group: Group,
    by: Sequence[str] = (),
    *,
    type: str = "cpu",  # noqa: A002 - the field's word
) -> Costs:
    """Read what each function, module or service cost in a window, told apart by labels `by`.

    A service is told apart by the label `service`, whatever `by` is.
    """
    if group == "service":
        return _in_order(_services(query, window, selector, by, type))
    totals, coverage = query.function_totals(window, selector, by, type)
    if totals is None:
        return _nothing(window, coverage, 0, type)
    costs = _nothing(window, coverage, cover(totals.objects), type)
    samples, whole = totals.time_counts.sum(axis=0).tolist()
    costs = replace(costs, unit=totals.unit, whole=whole, samples=samples)
    of_group = _modules if group == "module" else _functions
    return _in_order(of_group(costs, totals))


def _in_order(costs: Costs) -> Costs:
    """Return the same, with lines sorted by labels and keys."""
    ranks = []
    for values in (costs.label_sets, costs.keys):
        sorted_ = sorted(range(len(values)), key=values.__getitem__)
        ranks.append(np.argsort(np.array(sorted_, dtype=np.int64)))
    sets, names = ranks
    order = np.lexsort((names[costs.lines[:, 1]], sets[costs.lines[:, 0]]))
    spreads = tuple(costs.spreads[at] for at in order) if costs.spreads else ()
    return replace(costs, lines=costs.lines[order], counts=costs.counts[order], spreads=spreads)


def _nothing(window: Window, coverage: Coverage, covered_ns: int, type_: str) -> Costs:
    return Costs(
        window=window,
        covered_ns=covered_ns,
        coverage=coverage,
        unit="nanoseconds" if type_ == "cpu" else "count",
        whole=0,
        samples=0,
        label_sets=(),
        keys=(),
        names=_names_of(()),
        lines=np.zeros((0, 2), dtype=np.int64),
        counts=np.zeros((0, 2), dtype=np.int64),
    )


def _functions(costs: Costs, totals: FunctionTotals) -> Costs:
    # The times of every object are as large as the functions, and not needed any more.
    none = totals.times[:0]
    totals = replace(
        totals, objects=totals.objects[:0], times=none, time_counts=totals.time_counts[:0]
    )
    ran = totals.counts[:, 1] > 0

    def names(numbers: Integers) -> list[Name]:
        return [Name(each.function, each.module, str(each.kind)) for each in totals.frames(numbers)]

    return replace(
        costs,
        label_sets=totals.service_sets,
        keys=tuple(totals.function_hashes.tolist()),
        names=names,
        lines=totals.rows[ran].astype(np.int64),
        counts=totals.counts[ran, :2].astype(np.int64),
        has_totals=True,
    )


def _modules(costs: Costs, totals: FunctionTotals) -> Costs:
    modules, kinds = (totals.texts.take(totals.functions[:, i]) for i in (1, 2))
    numbers: dict[tuple[bytes, bytes], int] = {}
    pairs = zip(modules, kinds, strict=True)
    of_function = np.array([numbers.setdefault(pair, len(numbers)) for pair in pairs], np.int64)
    ran = totals.counts[:, 0] > 0
    rows = totals.rows[ran]
    own = totals.counts[ran, :1] * (1, 0)
    lines, counts = fold(rows[:, 0], of_function[rows[:, 1]], own)
    names = tuple(Name("", module.decode(), kind.decode()) for module, kind in numbers)
    return replace(
        costs,
        label_sets=totals.service_sets,
        keys=names,
        names=_names_of(names),
        lines=lines,
        counts=counts,
    )


def _services(
    query: Query, window: Window, selector: Selector, by: Sequence[str], type_: str
) -> Costs:
    own = {"service", *by}
    length_ns = window.end_ns - window.start_ns
    labels = tuple(sorted(own | {"version", "host"}))
    found = query.timeline(window, selector, step_ns=length_ns, by=labels, type=type_)
    cpu_ns: Counter[Labels] = Counter()
    hosts: defaultdict[Labels, set[str]] = defaultdict(set)
    versions: defaultdict[Labels, Counter[str]] = defaultdict(Counter)
    samples = 0
    for each in found.series:
        key = tuple(pair for pair in each.labels if pair[0] in own)
        value, known = int(each.values.sum()), dict(each.labels)
        samples += int(each.samples.sum())
        cpu_ns[key] += value
        hosts[key].add(known.get("host", ""))
        if "version" in known:
            versions[key][known["version"]] += value
    costs = _nothing(window, found.coverage, int(found.covered_ns.sum()), type_)
    if not cpu_ns:
        return costs
    name = (Name(),)
    values = np.array(list(cpu_ns.values()), dtype=np.int64)
    return replace(
        costs,
        unit=found.unit,
        whole=int(values.sum()),
        samples=samples,
        label_sets=tuple(cpu_ns),
        keys=name,
        names=_names_of(name),
        lines=np.arange(len(cpu_ns))[:, None] * (1, 0),
        counts=values[:, None] * (1, 0),
        spreads=tuple(
            Spread(len(hosts[key]), tuple(versions[key].most_common())) for key in cpu_ns
        ),
    )


def _names_of(every: tuple[Name, ...]) -> Callable[[Integers], list[Name]]:
    return lambda numbers: [every[number] for number in numbers.tolist()]
