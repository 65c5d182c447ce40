"""Watch: follows the deployments of a store, and calls when one becomes a regression.

A deployment is told when it is found and whenever its verdict changes. Each caller is called once
for each deployment and kind of regression, provisional or not. What has been told and called is
kept in a small file, so that a restart repeats nothing; a call that failed is made again at the
next look.
"""

import contextlib
import fcntl
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal
from urllib.parse import urlencode

import msgspec
import orjson
from msgspec import Meta

from profiler.comparison.deployment_verdicts import DeploymentVerdicts, judge_all
from profiler.comparison.deployments import DeploymentVerdict, deployments_in
from profiler.comparison.matching import Match
from profiler.comparison.rollouts import PAUSE_NS, Deployment
from profiler.service.verdicts import LIMIT_S
from profiler.service.webhook import Call, Caller
from profiler.text import fit
from profiler.times import parse_window, whole_second
from storage.objects.keys import StoreError
from storage.objects.tenant import TenantStore
from storage.query.query import Query
from storage.selector import EMPTY, Selector

EVERY_S = 60.0
LOOKBACK = "now-1d"
_REGRESSION = "regression"
_TOLD = "told"
"""Stands for the line, among the names of callers."""
_NAME_CELLS = 200
_END_WITHIN_S = 2.0
_STATE_LIMIT_BYTES = 16 << 20
_MOST_REMEMBERED = 10_000
_PAUSE_MS = PAUSE_NS // 1_000_000
_DAY_MS = 86_400_000

log = logging.getLogger(__name__)


class WatchError(Exception):
    """A watch cannot begin. The message says what to do."""


class _EndedError(Exception):
    """The watch ends."""


@dataclass
class _Remembered:
    """A deployment, and what has been told of it."""

    service: str
    version: str
    first_ms: int
    told: str
    """The verdict that was told last."""
    reports: list[str]
    """`webhook regression`: who was told which regression."""


@dataclass
class _State:
    schema: Literal[1]
    deployments: Annotated[list[_Remembered], Meta(max_length=_MOST_REMEMBERED)]


class StateFile:
    """What a watch has told. No other watch can use the file at the same time."""

    def __init__(self, path: Path, remedy: str = "name another file with --state") -> None:
        """Open the file and read it; it need not exist. `remedy` ends messages of errors.

        Raises:
            WatchError: another watch uses it, or it cannot be made.
        """
        self._path = path
        self._lock = _locked(path, remedy)
        try:
            self._deployments = self._read()
        except WatchError:
            self._lock.close()
            raise

    def of(self, deployment: Deployment, found: Sequence[Deployment]) -> _Remembered:
        """Return what is remembered of a deployment, one of all that were `found`.

        An announcement may move its begin a little, but not to that of another one.
        """
        first_ms = _first_ms(deployment)
        taken = {_first_ms(each) for each in found if _name(each) == _name(deployment)} - {first_ms}
        near = [
            each
            for each in self._deployments
            if (each.service, each.version) == _name(deployment)
            and abs(each.first_ms - first_ms) <= _PAUSE_MS
            and each.first_ms not in taken
        ]
        if near:
            nearest = min(near, key=lambda each: abs(each.first_ms - first_ms))
            nearest.first_ms = first_ms
            return nearest
        made = _Remembered(*_name(deployment), first_ms, "", [])
        self._deployments.append(made)
        return made

    def forget_before(self, at_ms: int) -> None:
        kept = sorted(self._deployments, key=lambda each: each.first_ms)[-_MOST_REMEMBERED:]
        self._deployments = [each for each in kept if each.first_ms >= at_ms]

    def save(self) -> None:
        """Write what is remembered. A failure is logged: then a restart may repeat it."""
        content = orjson.dumps(_State(1, self._deployments[-_MOST_REMEMBERED:]))
        new = self._path.with_name(f"{self._path.name}.new")
        try:
            new.write_bytes(content)
            new.replace(self._path)
        except OSError as error:
            log.warning("cannot write %s: %s", self._path, error.strerror)

    def close(self) -> None:
        self._lock.close()

    def _read(self) -> list[_Remembered]:
        try:
            with self._path.open("rb") as file:
                content = file.read(_STATE_LIMIT_BYTES)
            return msgspec.json.decode(content, type=_State).deployments
        except FileNotFoundError:
            return []
        except OSError as error:
            raise WatchError(f"cannot read {self._path}: {error.strerror}") from error
        except (msgspec.MsgspecError, RecursionError):
            log.warning("%s is damaged: deployments may be told again", self._path)
            return []


def _locked(path: Path, remedy: str) -> BinaryIO:
    """Return a file beside a state that is locked as long as it is open.

    Raises:
        WatchError: another watch has locked it, or it cannot be made.
    """
    lock = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f"{path.name}.lock").open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if lock is not None:
            lock.close()
        if isinstance(error, BlockingIOError):
            raise WatchError(f"another watch uses {path}: end it, or {remedy}") from error
        raise WatchError(
            f"cannot keep what was told in {path}: {error.strerror} ({remedy})"
        ) from error
    return lock


def _name(deployment: Deployment) -> tuple[str, str]:
    return deployment.service, deployment.version


def _first_ms(deployment: Deployment) -> int:
    return deployment.first_ns // 1_000_000


def state_path(
    folder: Path, store: TenantStore, selector: Selector, callers: Sequence[str]
) -> Path:
    """Return the default file of a watch: one for each store, selector and set of callers."""
    parts = [str(store.store), store.tenant, str(selector), *callers]
    name = hashlib.blake2b("\0".join(parts).encode(errors="replace"), digest_size=8).hexdigest()
    return folder / "watch" / f"{name}.json"


@dataclass(slots=True)
class Watch:
    """Follows the deployments that a selector chooses in a store."""

    store: TenantStore
    query: Query
    verdicts: DeploymentVerdicts
    state: StateFile
    selector: Selector = EMPTY
    callers: Sequence[Caller] = ()
    lookback: str = LOOKBACK
    page: str = ""
    """The address of the page; empty if calls have no link."""
    has_provisional: bool = True
    """Whether provisional regressions are called, too."""
    tell: Callable[[str], None] = log.info
    ended: threading.Event = field(default_factory=threading.Event)

    def look(self) -> bool:
        """Look once; return whether a regression was told that had not been told before.

        Raises:
            StoreError: the store cannot be read.
        """
        window = parse_window(self.lookback, "now", time.time_ns())
        query = self.query.interruptible(self._check)
        found = deployments_in(self.store, query, window, self.selector, self._check)
        for key, reason in found.skipped:
            log.debug("skipped %s: %s", key, reason)
        judged = judge_all(self.verdicts, found, self._check, limit_s=LIMIT_S)
        triples = list(zip(found.deployments, found.matches, judged, strict=True))
        away: set[str] = set()
        is_new = False
        for deployment, match, verdict in reversed(triples):
            self._check()
            seen = self.state.of(deployment, found.deployments)
            if self._told(seen, deployment, verdict):
                is_new |= not _was_told(seen, _TOLD, verdict.text)
                self._call(seen, call_of(deployment, match, verdict, self.page), verdict.text, away)
        self.state.forget_before(window.start_ns // 1_000_000 - _DAY_MS)
        self.state.save()
        return is_new

    def follow(self, every_s: float) -> None:
        """Look until the watch is ended. A store that cannot be read is logged."""
        with contextlib.suppress(_EndedError):
            while True:
                try:
                    self.look()
                except StoreError as error:
                    log.warning("cannot look for deployments: %s", error)
                if self.ended.wait(every_s):
                    return

    def look_once(self) -> bool:
        """Look once, unless the watch is ended meanwhile.

        Raises:
            StoreError: the store cannot be read.
        """
        try:
            return self.look()
        except _EndedError:
            return False

    def _check(self) -> None:
        if self.ended.is_set():
            raise _EndedError

    def _told(self, seen: _Remembered, deployment: Deployment, verdict: DeploymentVerdict) -> bool:
        """Tell a verdict if it is new, and return whether it is a regression to be called."""
        text = verdict.text or "none"
        if seen.told != text:
            self.tell(line_of(deployment, verdict))
            seen.told = text
            self.state.save()
        is_called = self.has_provisional or not verdict.is_provisional
        return verdict.word == _REGRESSION and is_called

    def _call(self, seen: _Remembered, call: Call, text: str, away: set[str]) -> None:
        """Make the calls of a regression that were not made; callers that fail become `away`."""
        if not _was_told(seen, _TOLD, text):
            seen.reports.append(f"{_TOLD} {text}")
        for caller in self.callers:
            if caller.name in away or _was_told(seen, caller.name, text):
                continue
            if caller.call(call, self.ended):
                seen.reports.append(f"{caller.name} {text}")
                self.state.save()
            else:
                away.add(caller.name)


@contextlib.contextmanager
def watching(watch: Watch, every_s: float = EVERY_S) -> Iterator[None]:
    """Follow deployments in a thread for the length of the block."""

    def follow() -> None:
        while not watch.ended.is_set():
            try:
                watch.follow(every_s)
            except Exception:  # the outermost place of this thread: the next look may succeed
                if not watch.ended.is_set():  # at the end, what it reads with is ended as well
                    log.exception("failed to look for deployments")
                watch.ended.wait(every_s)

    # A daemon: it may hang in a request to the store.
    thread = threading.Thread(target=follow, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watch.ended.set()
        thread.join(_END_WITHIN_S)


def _was_told(seen: _Remembered, name: str, text: str) -> bool:
    """Return whether this regression was told; one for sure covers a provisional one."""
    return bool({f"{name} {text}", f"{name} {_REGRESSION}"} & {*seen.reports})


def line_of(deployment: Deployment, verdict: DeploymentVerdict) -> str:
    """Return `2026-01-31T09:00:00Z api 1.6 (previously 1.5), rollout: regression: parse +52%`."""
    before = f" (previously {deployment.previous})" if deployment.previous else ""
    name = f"{whole_second(deployment.first_ns)} {deployment.service} {deployment.version}{before}"
    said = [verdict.text or f"no verdict: {verdict.reason}"]
    if verdict.functions:
        said.append("; ".join(each.text() for each in verdict.functions))
    return f"{name}, {deployment.kind}: {': '.join(said)}"


def call_of(deployment: Deployment, match: Match, verdict: DeploymentVerdict, page: str) -> Call:
    """Return what callers get: JSON, and the same for an environment. Names are cut."""
    names = {
        name: fit(getattr(deployment, name), _NAME_CELLS)
        for name in ("service", "version", "previous")
    }
    link = link_of(page, match) if page else ""
    record: dict[str, Any] = {
        "schema": 1,
        **names,
        "kind": deployment.kind,
        "first_ms": _first_ms(deployment),
        "verdict": verdict.word,
        "provisional": verdict.is_provisional,
        "functions": [each._asdict() for each in verdict.functions],
        **({"link": link} if link else {}),
    }
    environment = {
        **names,
        "verdict": verdict.word,
        "provisional": str(int(verdict.is_provisional)),
        "functions": "\n".join(each.text() for each in verdict.functions),
        "link": link,
    }
    return Call(
        orjson.dumps(record),
        {f"EVERFLAME_{name.upper()}": value for name, value in environment.items()},
    )


def link_of(page: str, match: Match) -> str:
    """Return the address of the page with a deployment compared, as `state.js` reads it."""
    before, after = match.before, match.after
    assert before is not None
    assert after is not None
    shown = {
        "q": str(after.selector),
        "from": after.window.start_ns // 1_000_000,
        "until": after.window.end_ns // 1_000_000,
        "mode": "compare",
        "before_query": str(before.selector),
        "before_from": before.window.start_ns // 1_000_000,
        "before_until": before.window.end_ns // 1_000_000,
    }
    return f"{page.rstrip('/')}/?{urlencode(shown)}"
