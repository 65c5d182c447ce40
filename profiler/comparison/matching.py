"""Matched windows: the two windows over which a deployment is compared.

Both are equally long, an hour at most. The one before ends when the first host changed; the one
after begins two windows after the last host changed. Neither contains another deployment of the
service. If the past is short, the windows are shorter, so that there are enough earlier positions
to estimate the noise from. If it is too short for that as well, they are two minutes long, or as
much as a third of the past, so that the rest of it tells how functions vary; the verdict is
provisional then.

A canary is compared with the other hosts at the same time, if the past or the number of hosts tells
how these differ from each other. Otherwise its hosts are compared with themselves, as before it was
known to be a canary: so a verdict never recedes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from profiler.comparison.noise import GRIDS_NS, HISTORY_NS, MINUTE_NS
from profiler.comparison.rollouts import SETTLED_WINDOWS, Deployment, DeploymentKind
from profiler.comparison.sides import Operand
from profiler.comparison.verdict import MIN_HOSTS, MIN_POSITIONS, MIN_REPLICATES
from profiler.times import NS_PER_S, rfc3339
from storage.profile import Window
from storage.query.listing import HOUR_NS
from storage.query.presence import ServicePresence
from storage.selector import Matcher, Operator, Selector

_GRID_NS = GRIDS_NS[0][1]
"""Longer windows are aligned to it, because their past is then read faster."""
_LEAST_WINDOWS = 5
"""Windows are not made shorter than this to get more positions."""
_PROVISIONAL_NS = 2 * MINUTE_NS
_PARTS_OF_PAST = 3
"""A window takes no more of a short past, but for its first two minutes."""
_MOST_SPOILED = 3
"""Windows are made shorter for so many deployments of the past; for more they get too short."""
_PROBES = (24, 15, 10, 7, 4, 2)
"""Hours before the windows at which the store is probed for data."""


class Match(NamedTuple):
    """Two windows to compare, or the reason why there are none."""

    before: Operand | None
    after: Operand | None
    reason: str

    def as_json(self) -> dict[str, Any]:
        sides = {"before": self.before, "after": self.after}
        compare = {
            name: {
                "query": str(side.selector),
                "from_ms": side.window.start_ns // 1_000_000,
                "until_ms": side.window.end_ns // 1_000_000,
            }
            for name, side in sides.items()
            if side is not None
        }
        return {"compare": compare or None, "compare_reason": self.reason}


def service_spans(presence: ServicePresence) -> dict[str, Window]:
    """Return the time from the first to the last window of each service."""
    numbers = presence.rows[:, 0]
    found: dict[str, Window] = {}
    for i, labels in enumerate(presence.label_sets):
        times = presence.objects[numbers[(presence.rows[:, 1] == i) & (presence.rows[:, 2] > 0)]]
        if len(times):
            service = dict(labels).get("service", "")
            span = Window(int(times[:, 0].min()), int(times[:, 1].max()))
            found[service] = span.union(found.get(service, span))
    return found


def match(
    deployment: Deployment,
    of_service: Sequence[Deployment],
    selector: Selector,
    span: Window | None,
    has_data: Callable[[Window], bool],
) -> Match:
    """Choose the windows. `of_service` are all deployments of the same service, earliest first.

    `span` is the time in which the service ran; `has_data` tells whether a window has data.
    """
    if span is None:
        return _none(f"{deployment.service} was not profiled around it")
    window_ns = max(NS_PER_S, (deployment.settled_ns - deployment.last_ns) // SETTLED_WINDOWS)
    earlier = [each for each in of_service if each.first_ns < deployment.first_ns]
    later = [each for each in of_service if each.first_ns > deployment.first_ns]
    end_ns = min([span.end_ns, *(each.first_ns for each in later[:1])])
    after_ns = (end_ns - deployment.settled_ns) // window_ns * window_ns
    if after_ns < window_ns:
        if later and later[0].first_ns <= deployment.settled_ns:
            return _none(f"{_name(later[0])} came before it had settled")
        return _none(
            f"it has settled only at {rfc3339(deployment.settled_ns)}, and there are no later data"
            " yet: wait for a few windows"
        )
    first_ns = deployment.first_ns // window_ns * window_ns
    gap_ns = deployment.settled_ns - first_ns
    if deployment.kind is DeploymentKind.CANARY and not _is_on_one_host(deployment):
        length_ns = min(HOUR_NS, after_ns)
        if not _has_replicates(deployment):
            past_ns = _past_ns(first_ns, span, has_data)
            room = _Room(past_ns - gap_ns, 0, 1, window_ns, len(earlier))
            length_ns = min(length_ns, _fitting(room))
        if length_ns:
            both = Window(deployment.settled_ns, deployment.settled_ns + length_ns)
            return _match(deployment, selector, both, both)
    begin_ns = max([span.start_ns, *(each.settled_ns for each in earlier[-1:])])
    before_ns = (first_ns - begin_ns) // window_ns * window_ns
    if before_ns < window_ns:
        return _none(
            f"{_name(earlier[-1])} had not settled before it"
            if earlier and earlier[-1].settled_ns > span.start_ns
            else "there are no data from before it"
        )
    length_ns = min(HOUR_NS, after_ns, before_ns)
    if len(deployment.hosts) < MIN_HOSTS:
        past_ns = _past_ns(first_ns, span, has_data)
        length_ns = _shortened(length_ns, _Room(past_ns, gap_ns, 2, window_ns, len(earlier)))
    before = Window(first_ns - length_ns, first_ns)
    after = Window(deployment.settled_ns, deployment.settled_ns + length_ns)
    return _match(deployment, selector, *_aligned(before, after, begin_ns, end_ns))


def _none(reason: str) -> Match:
    return Match(None, None, f"not comparable: {reason}")


def _name(deployment: Deployment) -> str:
    return f"{deployment.version} ({deployment.kind} at {rfc3339(deployment.first_ns)})"


def _match(deployment: Deployment, selector: Selector, before: Window, after: Window) -> Match:
    kept = [each for each in selector.matchers if each.name not in {"service", "version"}]
    service = Matcher("service", Operator.EQUAL, deployment.service)

    def operand(version: str, window: Window) -> Operand:
        of_version = [Matcher("version", Operator.EQUAL, version)] if version else []
        return Operand(Selector((service, *of_version, *kept)), window)

    # If a service has no label version, an announced version does not select its windows.
    version = deployment.version if deployment.hosts else ""
    return Match(operand(deployment.previous, before), operand(version, after), "")


def _past_ns(until_ns: int, span: Window, has_data: Callable[[Window], bool]) -> int:
    """Return how long before a time there are data, up to the history that is used."""
    known_ns = until_ns - span.start_ns
    for hours in _PROBES:
        hour_ns = (until_ns // HOUR_NS - hours) * HOUR_NS
        if hours * HOUR_NS <= known_ns:
            break
        if hour_ns >= 0 and has_data(Window(hour_ns, hour_ns + HOUR_NS)):
            return hours * HOUR_NS
    return min(known_ns, HISTORY_NS)


class _Room(NamedTuple):
    """The length of the past, and what a position needs: its windows and the time between."""

    past_ns: int
    gap_ns: int
    windows: int
    window_ns: int
    earlier: int
    """Deployments in the past: each may invalidate two positions."""


def _is_on_one_host(canary: Deployment) -> bool:
    """Return whether a host runs both versions: it cannot be compared with itself at one time."""
    return not set(canary.hosts).isdisjoint(canary.hosts_before)


def _has_replicates(canary: Deployment) -> bool:
    """Return whether hosts alone tell the noise."""
    hosts = len(canary.hosts), len(canary.hosts_before)
    return min(hosts) >= MIN_REPLICATES and sum(hosts) >= MIN_HOSTS


def _fitting(room: _Room) -> int:
    """Return a length for which there are enough positions; 0 if the past is too short for any."""
    fits_ns, positions = 0, MIN_POSITIONS + 2 * min(room.earlier, _MOST_SPOILED)
    for least_ns, grid_ns in GRIDS_NS:
        between_ns = positions * (room.gap_ns + grid_ns)
        # The side before is itself a window of the past.
        fits_ns = (room.past_ns - between_ns) // (room.windows * positions + 1)
        fits_ns -= fits_ns % room.window_ns
        if room.windows * fits_ns + room.gap_ns >= least_ns:
            break
    return fits_ns if fits_ns >= max(_LEAST_WINDOWS * room.window_ns, MINUTE_NS) else 0


def _shortened(length_ns: int, room: _Room) -> int:
    """Return a length for which there are enough positions, or one that leaves some past."""
    fits_ns = _fitting(room)
    if not fits_ns:
        fits_ns = max(_PROVISIONAL_NS, room.past_ns // _PARTS_OF_PAST, room.window_ns)
        fits_ns -= fits_ns % room.window_ns
    return min(length_ns, fits_ns)


def _aligned(before: Window, after: Window, begin_ns: int, end_ns: int) -> tuple[Window, Window]:
    """Align long windows to ten minutes, by moving them apart as far as there is room."""
    length_ns = (after.end_ns - after.start_ns) // _GRID_NS * _GRID_NS
    if length_ns < 3 * _GRID_NS:
        return before, after
    until_ns = before.end_ns // _GRID_NS * _GRID_NS
    from_ns = -(-after.start_ns // _GRID_NS) * _GRID_NS
    if until_ns - length_ns < begin_ns or from_ns + length_ns > end_ns:
        length_ns -= _GRID_NS
    return Window(until_ns - length_ns, until_ns), Window(from_ns, from_ns + length_ns)
