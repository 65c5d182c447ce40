"""Rollouts: deployments found from sightings, that is which version ran on which host and when.

Nobody has to announce them: every window of every host says which services ran, in which version.
A host *changes* when it runs another version than the last time, however long it was off between,
or when it is new and runs a version that no other host runs. Changes to one version that follow
each other are one deployment:

- `rollout`: to a version that is newer than the one before it
- `rollback`: to one that was there before that
- `canary`: some hosts stayed on the version before for longer than a rollout takes

A version that a host runs for a single window does not count, nor does one that is back after a
restart. A version that runs when the data begin is not a deployment, because the one before it is
not known.

Pipelines may announce deployments (`profiler.comparison.announcements`): that gives the exact start
of one that was found, or announces one that cannot be detected because the service has no version.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy as np

from profiler.comparison.announcements import Announcement
from profiler.times import NS_PER_S
from storage.profile import Integers
from storage.query.presence import ServicePresence

PAUSE_NS = 1800 * NS_PER_S
"""The longest pause inside a rollout: hosts that change later are another deployment, and those
that have not changed by then stay on the version before."""
SETTLED_WINDOWS = 2
_FEWEST_WINDOWS = 2
"""A version seen in fewer windows does not count; one missing in fewer still ran."""
_USUAL_WINDOW_NS = 60 * NS_PER_S
_LATEST_NS = 2**63 - 1


class DeploymentKind(StrEnum):
    ROLLOUT = "rollout"
    ROLLBACK = "rollback"
    CANARY = "canary"


class DeploymentSource(StrEnum):
    FOUND = "found"
    ANNOUNCED = "announced"


@dataclass(frozen=True, slots=True)
class Deployment:
    """A service that began to run a version. Times are those of windows, unless it was announced.

    One that is only announced has no hosts and no previous version.
    """

    service: str
    version: str
    previous: str
    """Empty if it is not known."""
    first_ns: int
    """The start of the first window with the version, or the time that was announced."""
    last_ns: int
    """The end of the window in which the last host changed."""
    settled_ns: int
    """Two windows later: the comparison begins here."""
    hosts: tuple[str, ...]
    """Those that changed, by name."""
    hosts_before: tuple[str, ...]
    """Those that still ran the previous version when the last host had changed. One that runs both,
    in several processes, is also in `hosts`."""
    kind: DeploymentKind = DeploymentKind.ROLLOUT
    source: DeploymentSource = DeploymentSource.FOUND

    def as_json(self) -> dict[str, Any]:
        return {
            "service": self.service,
            "version": self.version,
            "previous": self.previous,
            "first_ms": self.first_ns // 1_000_000,
            "last_ms": self.last_ns // 1_000_000,
            "settled_ms": self.settled_ns // 1_000_000,
            "hosts": list(self.hosts),
            "hosts_before": list(self.hosts_before),
            "kind": self.kind,
            "source": self.source,
        }


class Instance(NamedTuple):
    """A version of a service on a host."""

    service: str
    version: str
    host: str


@dataclass(frozen=True, slots=True)
class Sightings:
    """Which instance ran when: a line of `rows` is (start_ns, end_ns, instance) of one window."""

    instances: tuple[Instance, ...]
    rows: Integers

    @classmethod
    def of(cls, presence: ServicePresence) -> "Sightings":
        """Return those instances of the presence that have a service and a version."""
        numbers: dict[Instance, int] = {}
        of_set = []
        for labels in map(dict, presence.label_sets):
            instance = Instance(*(labels.get(name, "") for name in Instance._fields))
            is_named = bool(instance.service and instance.version)
            of_set.append(numbers.setdefault(instance, len(numbers)) if is_named else -1)
        number = np.array(of_set, np.int64)[presence.rows[:, 1]]
        kept = np.flatnonzero((number >= 0) & (presence.rows[:, 2] > 0))
        times = presence.objects[presence.rows[kept, 0]]
        return cls(tuple(numbers), np.column_stack([times, number[kept]]))


class _Run(NamedTuple):
    """A version of a service on a host, without a gap of two windows of the service there."""

    start_ns: int
    first_end_ns: int
    """The end of its first window."""
    end_ns: int
    windows_ns: int
    """The length of the longer of its first and its last window."""
    instance: Instance

    @property
    def host(self) -> str:
        return self.instance.host

    @property
    def version(self) -> str:
        return self.instance.version


class _Change(NamedTuple):
    """A host that runs another version than before."""

    run: _Run
    previous: str


def find_deployments(sightings: Sightings) -> list[Deployment]:
    """Return the deployments of all services, earliest first. Pure; rows may be in any order."""
    found: list[Deployment] = []
    runs = sorted(_runs(sightings), key=lambda run: run.instance.service)
    for _, of_service in groupby(runs, key=lambda run: run.instance.service):
        found += _Service(list(of_service)).deployments()
    return sorted(found, key=_order)


def merge_announcements(
    found: Iterable[Deployment], announcements: Iterable[Announcement]
) -> list[Deployment]:
    """Merge found and announced deployments, earliest first.

    An announcement belongs to the nearest deployment of its service and version, up to PAUSE_NS
    away; one after the first window is too late to give the start. An announcement that belongs to
    none becomes a deployment of its own, and repeated ones become one.
    """
    of_version: dict[tuple[str, str], list[Deployment]] = {}
    for each in sorted(found, key=_order):
        of_version.setdefault((each.service, each.version), []).append(each)
    alone: dict[tuple[str, str], list[Deployment]] = {}
    for service, version, at_ns in sorted(announcements, key=lambda each: (each.at_ns, each)):
        known = of_version.get((service, version), [])
        others = alone.setdefault((service, version), [])
        near = [i for i, each in enumerate(known) if _is_near(each, at_ns)]
        if near:
            nearest = min(near, key=lambda i: abs(known[i].first_ns - at_ns))
            known[nearest] = _announced(known[nearest], at_ns)
        elif not (others and _is_near(others[-1], at_ns)):
            settled_ns = at_ns + SETTLED_WINDOWS * _USUAL_WINDOW_NS
            times = (at_ns, at_ns, settled_ns)
            others.append(
                Deployment(service, version, "", *times, (), (), source=DeploymentSource.ANNOUNCED)
            )
    return sorted(chain(*of_version.values(), *alone.values()), key=_order)


def _is_near(deployment: Deployment, at_ns: int) -> bool:
    return deployment.first_ns - PAUSE_NS <= at_ns <= deployment.last_ns + PAUSE_NS


def _announced(deployment: Deployment, at_ns: int) -> Deployment:
    if deployment.source is DeploymentSource.ANNOUNCED:  # the first announcement counts
        return deployment
    window_ns = (deployment.settled_ns - deployment.last_ns) // SETTLED_WINDOWS
    is_begin = at_ns <= deployment.first_ns + window_ns
    first_ns = at_ns if is_begin else deployment.first_ns
    return replace(deployment, first_ns=first_ns, source=DeploymentSource.ANNOUNCED)


def _order(deployment: Deployment) -> tuple[int, str, str, tuple[str, ...]]:
    return deployment.first_ns, deployment.service, deployment.version, deployment.hosts


def _runs(sightings: Sightings) -> Iterator[_Run]:
    """Return the runs of at least two windows, of all services and hosts."""
    instances, rows = sightings.instances, sightings.rows
    if not len(rows):
        return
    places: dict[tuple[str, str], int] = {}
    versions: dict[str, int] = {}
    place_of = [places.setdefault((i.service, i.host), len(places)) for i in instances]
    version_of = [versions.setdefault(i.version, len(versions)) for i in instances]
    number_of = {pair: i for i, pair in enumerate(zip(place_of, version_of, strict=True))}
    starts, step = np.unique(rows[:, 0], return_inverse=True)
    step = step.reshape(-1)
    place = np.array(place_of)[rows[:, 2]]
    version = np.array(version_of)[rows[:, 2]]
    # One number sorts by service and host, then time, then version: no part can overflow it, as
    # none has more values than there are rows.
    keys = (place * len(starts) + step) * len(versions) + version
    order = np.argsort(keys)
    keys = keys[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    ends = np.maximum.reduceat(rows[order, 1], first)
    place_step, version = np.divmod(keys[first], len(versions))
    place, step = np.divmod(place_step, len(starts))
    # Windows of the service on the host, counted: time without any of them does not count.
    window = np.cumsum(np.diff(place_step, prepend=-1) != 0)
    order = np.argsort(place * len(versions) + version, kind="stable")
    place, version, step, ends, window = (
        each[order] for each in (place, version, step, ends, window)
    )
    is_new = (np.diff(place, prepend=-1) != 0) | (np.diff(version, prepend=-1) != 0)
    is_new |= np.diff(window, prepend=-1) > _FEWEST_WINDOWS
    begins = np.flatnonzero(is_new)
    lasts = np.append(begins[1:], len(step)) - 1
    enough = lasts - begins + 1 >= _FEWEST_WINDOWS
    for begin, last in zip(begins[enough].tolist(), lasts[enough].tolist(), strict=True):
        start_ns, last_ns = int(starts[step[begin]]), int(starts[step[last]])
        first_end_ns, end_ns = int(ends[begin]), int(ends[last])
        windows_ns = max(first_end_ns - start_ns, end_ns - last_ns)
        instance = instances[number_of[int(place[begin]), int(version[begin])]]
        yield _Run(start_ns, first_end_ns, end_ns, windows_ns, instance)


class _Service:
    """The runs of one service, in the order of time."""

    def __init__(self, runs: Sequence[_Run]) -> None:
        self._since: dict[str, int] = {}
        """When each version was first seen."""
        for run in runs:
            self._since[run.version] = min(run.start_ns, self._since.get(run.version, _LATEST_NS))
        self._runs = sorted(
            runs,
            key=lambda run: (run.start_ns, self._since[run.version], run.version, run.host),
        )
        self._of_host: dict[str, list[_Run]] = {}
        self._of_version: dict[str, list[_Run]] = {}
        for run in self._runs:
            self._of_host.setdefault(run.host, []).append(run)
            self._of_version.setdefault(run.version, []).append(run)
        self._ends = {host: max(run.end_ns for run in of) for host, of in self._of_host.items()}
        self._window_ns = max(run.windows_ns for run in self._runs)
        self._pause_ns = max(PAUSE_NS, 2 * SETTLED_WINDOWS * self._window_ns)
        self._newest: dict[str, str] = {}
        """The version that each host changed to last."""
        self._reached: dict[str, int] = {}
        """Until when each version is seen in the runs that have begun."""
        self._open: dict[str, list[_Change]] = {}
        """By version, the changes of a rollout that may go on."""

    def deployments(self) -> Iterator[Deployment]:
        done: list[list[_Change]] = []
        for at_ns, group in groupby(self._runs, key=lambda run: run.start_ns):
            runs = list(group)
            changes = [
                _Change(run, previous)
                for run in runs
                if (previous := self._changed_from(run)) is not None
            ]
            hosts = {change.run.host for change in changes}
            for version, rollout in list(self._open.items()):
                is_late = at_ns - rollout[-1].run.start_ns > self._pause_ns
                # A host that leaves the version again ends the rollout to it.
                if is_late or not hosts.isdisjoint(each.run.host for each in rollout):
                    done.append(self._open.pop(version))
            for change in changes:
                self._open.setdefault(change.run.version, []).append(change)
            for run in runs:
                self._newest[run.host] = run.version
                reached_ns = self._reached.get(run.version, 0)
                self._reached[run.version] = max(reached_ns, run.end_ns)
        for changes in (*done, *self._open.values()):
            yield self._deployment(changes)

    def _changed_from(self, run: _Run) -> str | None:
        """Return the version that a host ran before, None where it has not changed."""
        known = self._newest.get(run.host)
        if known is not None:
            return known if known != run.version else None
        # The host is new. Agents do not begin within one window, so neither do the data.
        if run.start_ns <= self._runs[0].start_ns + _FEWEST_WINDOWS * self._window_ns:
            return None
        now_ns = min(run.start_ns, max(self._reached.values()))
        if self._reached.get(run.version, -1) >= now_ns - self._pause_ns:
            # Others run this version already: a new host belongs to their rollout if it goes on.
            rollout = self._open.get(run.version)
            is_going_on = (
                rollout is not None
                and run.start_ns - rollout[-1].run.start_ns <= self._pause_ns
                and any(
                    end_ns > run.start_ns
                    for version, end_ns in self._reached.items()
                    if version != run.version
                )
            )
            if not is_going_on:
                return None
        others = Counter(each for each in self._newest.values() if each != run.version)
        return self._most(others) if others else None

    def _deployment(self, changes: Sequence[_Change]) -> Deployment:
        version = changes[0].run.version
        previous = self._most(Counter(change.previous for change in changes))
        last_ns = max(map(self._changed_ns, changes))
        left = {change.previous for change in changes}
        staying = [
            run
            for each in left
            for run in self._of_version[each]
            if run.start_ns < last_ns < run.end_ns
        ]
        hosts = {change.run.host for change in changes}
        late_ns = last_ns + self._pause_ns
        kind = DeploymentKind.ROLLOUT
        if self._since[version] < self._since[previous]:
            kind = DeploymentKind.ROLLBACK
        elif any(run.end_ns > late_ns for run in staying) and any(
            change.run.end_ns > late_ns for change in changes
        ):
            kind = DeploymentKind.CANARY
        return Deployment(
            service=changes[0].run.instance.service,
            version=version,
            previous=previous,
            first_ns=changes[0].run.start_ns,
            last_ns=last_ns,
            settled_ns=last_ns + SETTLED_WINDOWS * self._window_ns,
            hosts=tuple(sorted(hosts)),
            hosts_before=tuple(sorted({run.host for run in staying})),
            kind=kind,
        )

    def _changed_ns(self, change: _Change) -> int:
        """Return when a host had changed: the previous version may take a while to end."""
        at_ns, host = change.run.start_ns, change.run.host
        ends = [
            run.end_ns
            for run in self._of_host[host]
            if run.version == change.previous
            and run.start_ns <= at_ns
            and run.end_ns <= at_ns + self._pause_ns
            and run.end_ns < self._ends[host]
        ]
        return max([change.run.first_end_ns, *ends])

    def _most(self, counts: Counter[str]) -> str:
        """Return the most frequent version, of several the newest."""
        return max(counts, key=lambda each: (counts[each], self._since[each], each))
