"""Verdicts of deployments: the time before and after each one compared, and kept.

A verdict is kept by the objects of both of its windows. As long as these are the same it is not
computed again; a window that has grown gives another one.
"""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from profiler.comparison.comparison import of_store
from profiler.comparison.deployments import (
    DeploymentVerdict,
    FoundDeployments,
    announced_ns,
    deployment_verdict,
)
from profiler.comparison.gate import DEFAULT_GATE, Gate
from profiler.comparison.matching import Match
from profiler.comparison.sides import ComparisonError, Operand
from profiler.text import limit_of
from storage.objects.tenant import TenantStore
from storage.query.query import Query

MOST_JUDGED = 30
"""Deployments of one answer, the newest first. Each takes up to a few seconds."""
NOT_JUDGED = DeploymentVerdict(
    reason=f"only the newest {MOST_JUDGED} deployments of a time range are compared"
)
_KEPT = 1_000
_WAIT_S = 0.1

_Key = tuple[str, str, str, str]
"""Selector and objects, before and after."""


class _TooLongError(Exception):
    """A comparison takes longer than its limit."""


class DeploymentVerdicts:
    """Compares deployments in one store, one at a time. Safe to use from several threads."""

    def __init__(self, store: TenantStore, query: Query) -> None:
        self._store = store
        self._query = query
        self._gate = Gate.parse(DEFAULT_GATE)
        self._kept: OrderedDict[_Key, DeploymentVerdict] = OrderedDict()
        self._lock = threading.Lock()

    def of(
        self,
        service: str,
        match: Match,
        check: Callable[[], None] = lambda: None,
        limit_s: float = math.inf,
    ) -> DeploymentVerdict:
        """Return the verdict over two windows, or why there is none: it may take too long.

        What `check` raises ends the comparison.

        Raises:
            StoreError: the store cannot be read.
        """
        if match.before is None or match.after is None:
            return DeploymentVerdict(reason=match.reason)
        while not self._lock.acquire(timeout=_WAIT_S):
            check()
        until_s = time.monotonic() + limit_s

        def check_time() -> None:
            check()
            if time.monotonic() > until_s:
                raise _TooLongError

        try:
            return self._verdict(service, match.before, match.after, check_time)
        except _TooLongError:
            return DeploymentVerdict(reason=f"the comparison took longer than {limit_s:g} s")
        except (RecursionError, MemoryError) as error:
            return DeploymentVerdict(reason=f"not comparable: {limit_of(error)}")
        finally:
            self._lock.release()

    def _verdict(
        self, service: str, before: Operand, after: Operand, check: Callable[[], None]
    ) -> DeploymentVerdict:
        query = self._query.interruptible(check)
        key = (
            str(before.selector),
            query.fingerprint(before.window),
            str(after.selector),
            query.fingerprint(after.window),
        )
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]

        def changes_ns() -> tuple[int, ...]:
            return announced_ns(self._store, {service}, before.window, after.window, check)

        try:
            found = of_store(query, before, after, changes_ns)
            verdict = deployment_verdict(found, self._gate)
        except ComparisonError as error:
            verdict = DeploymentVerdict(reason=f"not comparable: {error}")
        self._kept[key] = verdict
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return verdict


def judge_all(
    verdicts: DeploymentVerdicts,
    found: FoundDeployments,
    check: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
    limit_s: float = math.inf,
) -> list[DeploymentVerdict]:
    """Return the verdicts of deployments, newest first as these. Older ones are not compared.

    Each comparison may take `limit_s`. `progress` is called with the number of the deployment that
    is compared next, and of all.
    """
    judged: list[DeploymentVerdict] = []
    shown = min(MOST_JUDGED, len(found.deployments))
    pairs = zip(found.deployments, found.matches, strict=True)
    for i, (deployment, match) in enumerate(pairs):
        if i >= MOST_JUDGED:
            judged.append(NOT_JUDGED)
            continue
        progress(i + 1, shown)
        judged.append(verdicts.of(deployment.service, match, check, limit_s))
    return judged
