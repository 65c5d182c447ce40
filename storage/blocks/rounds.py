"""Rounds: what a compactor does in a store from time to time, newest hours first.

Each round lists the level-0 objects of the hour that goes on and of the last one, and of older
hours less and less often, as late objects become rarer. Which older hours have any at all is looked
up every ten minutes. What fails of an hour is named, and does not stop others.
"""

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from pathlib import Path

import duckdb

from storage.blocks.compactor import SETTLED_NS, Compactor, Report
from storage.blocks.day import renew_day
from storage.blocks.manifest import HourManifest, Listed, end_ns_of, manifest_types
from storage.blocks.merges import is_rolled_up, merge, roll_up
from storage.blocks.retention import Keep, collect_garbage, expire, is_in_rollup
from storage.blocks.work import clean
from storage.objects.keys import (
    CPU,
    NS_PER_S,
    DamagedObject,
    ObjectMissing,
    ObjectTooLarge,
    hour_of,
)
from storage.objects.tenant import HOUR_NS, TenantStore
from storage.profile import ProfileError
from storage.query.threads import map_ahead
from storage.query.workers import NoWorkersError

LATE_NS = 7 * 24 * HOUR_NS
"""Objects may be so late. Those that come still later stay at level 0, where readers see them."""
_DAY_NS = 24 * HOUR_NS
_LOOKED_UP_EVERY_S = 600.0
_CLEANED_EVERY_S = 3600.0

log = logging.getLogger(__name__)


class Rounds:
    """Does all that is due in a store, whenever `run_once` is called.

    `make` returns the compactor of a type, which is kept: it remembers what it has read. If its
    compactors are patient, not all is looked at in each round. When what has expired was last
    deleted of this tenant is kept in the folder, as a process may make a single round.
    """

    def __init__(
        self,
        store: TenantStore,
        folder: Path,
        make: Callable[[str], Compactor],
        keep: Keep,
        *,
        hours_at_once: int = 4,
    ) -> None:
        self._store = store
        self._folder = folder
        self._make = make
        self._keep = keep
        self._hours_at_once = hours_at_once
        self._compactors: dict[str, Compactor] = {}
        self._occupied: dict[str, set[str]] = {}
        self._looked_up_s = float("-inf")

    def run_once(self) -> Report:
        """Do what is due; return what was done.

        Raises:
            StoreError: the store cannot be reached, or refuses.
        """
        report = Report()
        clean(self._folder)
        types = sorted({CPU, *self._store.types(), *manifest_types(self._store)})
        for type_ in types:
            if type_ not in self._compactors:
                self._compactors[type_] = self._make(type_)
        chosen = [self._compactors[type_] for type_ in types]
        is_patient = all(compactor.patience_s for compactor in chosen)
        now_s = time.monotonic()
        is_looked_up = not is_patient or now_s >= self._looked_up_s + _LOOKED_UP_EVERY_S
        is_cleaned = not is_patient or self._is_cleaning_due()
        for compactor in chosen:
            compactor.report = report
            self._compact(compactor, is_looked_up=is_looked_up)
            if is_cleaned:
                expire(compactor, self._keep)
                collect_garbage(compactor)
        if is_looked_up:
            self._looked_up_s = now_s
        if is_cleaned and is_patient:
            self._cleaned.touch()
        return report

    @property
    def _cleaned(self) -> Path:
        place = f"{self._store.store}\0{self._store.tenant}".encode()
        return self._folder / f"cleaned-{hashlib.blake2b(place, digest_size=8).hexdigest()}"

    def _is_cleaning_due(self) -> bool:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            age_s = time.time() - self._cleaned.stat().st_mtime
        except FileNotFoundError:
            return True
        return not 0 <= age_s < _CLEANED_EVERY_S

    def _compact(self, compactor: Compactor, *, is_looked_up: bool) -> None:
        now_ns = compactor.now_ns()
        first = hour_of((now_ns - LATE_NS - _DAY_NS) // NS_PER_S)[:10]
        if not compactor.patience_s:
            first = ""
        known = compactor.manifests.list(first)
        if is_looked_up:
            occupied = self._occupied[compactor.type] = set(compactor.occupied_hours())
            for day in sorted({hour[:10] for hour in occupied if hour < first}):
                known.add(compactor.manifests.list(day, day))
        else:
            since_ns = (now_ns - SETTLED_NS) // HOUR_NS * HOUR_NS - HOUR_NS
            occupied = {hour for hour in self._occupied.get(compactor.type, ()) if hour >= first}
            occupied |= set(compactor.occupied_hours(since_ns))
        for name, problem in known.problems.items():
            compactor.report.problems[name] = str(problem)
        listed = {
            hour
            for hour in occupied - known.problems.keys()
            if _is_due(compactor, hour, known, now_ns)
        }
        unfinished = {
            name for name, hour in known.hours.items() if hour.parts and not is_rolled_up(hour)
        }

        def compact(hour: str) -> None:
            with _naming_problems(compactor, hour):
                if hour in listed:
                    compactor.fold(hour)
                merge(compactor, hour)
                roll_up(compactor, hour)

        # Newest first: they are what most people look at.
        hours = sorted(listed | unfinished, reverse=True)
        with ThreadPoolExecutor(self._hours_at_once, "hour") as pool:
            try:
                for _ in map_ahead(pool, compact, hours, self._hours_at_once):
                    pass
            except KeyboardInterrupt:
                # Or it would end only once all is done for the hours that have begun.
                compactor.end()
                raise
        days = {hour[:10] for hour in (*known.hours, *hours)}
        known = compactor.manifests.list(first)
        for day in sorted(days):
            with _naming_problems(compactor, day):
                renew_day(compactor, day, known if day >= first else None)


def _is_due(compactor: Compactor, hour: str, known: Listed, now_ns: int) -> bool:
    """Return whether the level-0 objects of an hour are to be listed."""
    manifest: HourManifest | None = known.hours.get(hour)
    over_for_ns = now_ns - end_ns_of(hour)
    if manifest is None:
        # An hour that has expired, and is only in the rollup of its day, is not begun again.
        return not is_in_rollup(known, hour)
    if over_for_ns < SETTLED_NS or not compactor.patience_s:
        return True
    return over_for_ns < LATE_NS and compactor.is_time_again(hour, manifest.listed_ns)


@contextlib.contextmanager
def _naming_problems(compactor: Compactor, name: str) -> Iterator[None]:
    """Note what goes wrong with an hour or a day, and let the others go on.

    Raises:
        StoreError: it would be the same with all others.
    """
    try:
        yield
    except (
        ProfileError,
        ObjectMissing,
        DamagedObject,
        ObjectTooLarge,
        OSError,
        MemoryError,
        BrokenExecutor,
        NoWorkersError,
        duckdb.Error,
    ) as error:
        reason = str(error) or type(error).__name__
        log.warning("cannot compact hour=%s: %s", name, reason)
        compactor.report.problems[name] = reason
