"""Verdicts in the background: each deployment of an answer gets one, and no answer waits for it.

What an answer lacks is computed afterwards, the newest deployment first, by one thread that rests
as long as it has worked and begins no comparison while a panel is being computed. The thread ends
when nothing is left to do. Whoever asks again finds what is ready so far.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from profiler.comparison.deployment_verdicts import (
    MOST_JUDGED,
    NOT_JUDGED,
    DeploymentVerdicts,
)
from profiler.comparison.deployments import DeploymentVerdict, FoundDeployments
from profiler.comparison.matching import Match
from profiler.comparison.rollouts import Deployment
from storage.objects.keys import StoreError

_BELIEVED_S = 60.0
"""For so long nobody looks whether the objects of a verdict's windows have changed."""
LIMIT_S = 60.0
"""A comparison that takes longer is given up, and tried again after as long as it is believed."""
_POLITE_S = 5.0
"""For so long a comparison waits for panels; then it begins beside them."""
_POLL_S = 0.05
_MOST_WANTED = 4 * MOST_JUDGED
"""Of several answers; the oldest deployments beyond it are left out until somebody asks again."""
_KEPT = 1_000

log = logging.getLogger(__name__)


class _EndedError(Exception):
    """The service ends."""


@dataclass(frozen=True, slots=True)
class _Answer:
    verdict: DeploymentVerdict
    made_s: float


@dataclass(frozen=True, slots=True)
class _Wanted:
    deployment: Deployment
    match: Match


class BackgroundVerdicts:
    """Verdicts of the deployments of answers, computed by a thread of its own."""

    def __init__(
        self,
        verdicts: DeploymentVerdicts,
        is_busy: Callable[[], bool],
        limit_s: float = LIMIT_S,
    ) -> None:
        self._verdicts = verdicts
        self._is_busy = is_busy
        self._limit_s = limit_s
        self._answers: OrderedDict[str, _Answer] = OrderedDict()
        """By the windows that are compared."""
        self._latest: OrderedDict[str, DeploymentVerdict] = OrderedDict()
        """By deployment: a verdict is shown until that of longer windows is ready."""
        self._wanted: dict[str, _Wanted] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def of(self, found: FoundDeployments) -> list[DeploymentVerdict]:
        """Return what is known of each deployment now, and compute the rest."""
        pairs = zip(found.deployments, found.matches, strict=True)
        with self._lock:
            verdicts = [
                self._known(deployment, match) if i < MOST_JUDGED else NOT_JUDGED
                for i, (deployment, match) in enumerate(pairs)
            ]
            self._drop_oldest()
            if self._wanted and self._thread is None and not self._ended.is_set():
                self._thread = threading.Thread(target=self._work, name="verdicts", daemon=True)
                self._thread.start()
        return verdicts

    def end(self) -> None:
        """Let the comparison end that is being made, and begin no other."""
        self._ended.set()

    def wait(self, within_s: float) -> bool:
        """Return whether the thread has ended within a time."""
        thread = self._thread
        if thread is not None:
            thread.join(max(0.0, within_s))
        return thread is None or not thread.is_alive()

    def _known(self, deployment: Deployment, match: Match) -> DeploymentVerdict:
        if match.before is None:
            return DeploymentVerdict(reason=match.reason)
        windows = _windows(match)
        answer = self._answers.get(windows)
        if answer is None or answer.made_s < time.monotonic() - _BELIEVED_S:
            self._wanted.setdefault(windows, _Wanted(deployment, match))
        if answer is not None:
            return answer.verdict
        latest = self._latest.get(_name(deployment, match), DeploymentVerdict())
        return replace(latest, is_pending=True)

    def _drop_oldest(self) -> None:
        by_age = sorted(self._wanted, key=lambda each: self._wanted[each].deployment.first_ns)
        for windows in by_age[: max(0, len(by_age) - _MOST_WANTED)]:
            del self._wanted[windows]

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted or self._ended.is_set():
                    self._thread = None
                    return
                windows, wanted = max(
                    self._wanted.items(), key=lambda each: each[1].deployment.first_ns
                )
            self._wait_for_panels()
            begun_s = time.monotonic()
            verdict = self._verdict(wanted)
            with self._lock:
                self._wanted.pop(windows, None)
                if verdict is not None:
                    self._keep(windows, wanted, verdict)
            self._ended.wait(time.monotonic() - begun_s)

    def _wait_for_panels(self) -> None:
        until_s = time.monotonic() + _POLITE_S
        while self._is_busy() and time.monotonic() < until_s:
            if self._ended.wait(_POLL_S):
                return

    def _verdict(self, wanted: _Wanted) -> DeploymentVerdict | None:
        """Return a verdict or why there is none; None if the service ends."""

        def check() -> None:
            if self._ended.is_set():
                raise _EndedError

        service = wanted.deployment.service
        try:
            return self._verdicts.of(service, wanted.match, check, self._limit_s)
        except _EndedError:
            return None
        except StoreError as error:
            return DeploymentVerdict(reason=str(error))
        except Exception:  # the outermost place of this thread: others wait for their verdicts
            log.exception("failed to compare deployment=%s", wanted.deployment.version)
            return DeploymentVerdict(reason="a bug in the service: its log has the details")

    def _keep(self, windows: str, wanted: _Wanted, verdict: DeploymentVerdict) -> None:
        self._answers[windows] = _Answer(verdict, time.monotonic())
        self._answers.move_to_end(windows)
        if verdict.word:
            name = _name(wanted.deployment, wanted.match)
            self._latest[name] = verdict
            self._latest.move_to_end(name)
        for kept in (self._answers, self._latest):
            while len(kept) > _KEPT:
                kept.popitem(last=False)


def _windows(match: Match) -> str:
    return f"{match.before} {match.after}"


def _name(deployment: Deployment, match: Match) -> str:
    assert match.after is not None
    assert match.before is not None
    return f"{deployment.first_ns} {match.before.selector} {match.after.selector}"
