"""Selection: the part of a store that `--store`, `--from`, `--until` and `-q` select."""

import argparse
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TextIO

from profiler.cluster import ClusterExecutor
from profiler.text import StatusLine, counted
from profiler.times import from_until, parse_window
from storage.objects.directory import DirectoryStore
from storage.objects.keys import ObjectKey, ObjectStore, StoredObject
from storage.objects.open import open_tenant
from storage.objects.tenant import TenantStore
from storage.profile import ALWAYS, Window
from storage.query.cache import default_folder
from storage.query.coverage import Skipped
from storage.query.query import Answer, Query
from storage.query.workers import Workers
from storage.selector import Selector

_SHOWN_AFTER_S, _EVERY_S = 1.0, 0.2


class NothingSelectedError(ValueError):
    """No sample of the store is selected. The message says where the nearest data are."""


@dataclass(frozen=True, slots=True)
class Selection:
    store: TenantStore
    window: Window
    selector: Selector
    executor: Executor | None = None
    """Whose workers read wide windows."""

    @classmethod
    def parse(
        cls,
        store: str,
        endpoint: str = "",
        *,
        tenant: str = "",
        start: str | None = None,
        end: str | None = None,
        query: str = "",
        now_ns: int | None = None,
    ) -> "Selection":
        """Parse the options of a command line; without times it is the whole store.

        Raises:
            ValueError: a time or the selector cannot be read.
            StoreError: the URL names no store, or the tenant's name cannot be one.
        """
        now_ns = time.time_ns() if now_ns is None else now_ns
        window = ALWAYS
        if start or end:
            window = parse_window(start or "0", end or "now", now_ns)
        opened = open_tenant(store, endpoint or None, tenant)
        return cls(opened, window, Selector.parse(query))

    def query(self) -> Query:
        return query_of(self.store, self.executor)

    def objects(self) -> Iterator[tuple[ObjectKey, StoredObject]]:
        """Return the objects that start inside the window; none is read."""
        for key, stored in self.store.list_window(self.window):
            if self.window.start_ns <= key.start_ns < self.window.end_ns:
                yield key, stored

    def answer(self) -> Answer:
        """Merge what is asked for.

        Raises:
            NothingSelectedError: there is none.
        """
        answer = self.query().profile(self.window, self.selector)
        if answer.profile.total_samples == 0:
            coverage = answer.coverage
            raise NothingSelectedError(self.why_nothing(coverage.skipped, coverage.objects))
        return answer

    def why_nothing(self, skipped: Sequence[Skipped] = (), objects: int = 0) -> str:
        """Say why nothing is selected and what there is instead, of so many readable objects."""
        text = f"nothing selected: no sample from {_shown(self.window)}"
        if self.selector.matchers:
            text += f" matches {self.selector}"
        if skipped:
            key, reason = skipped[0]
            more = len(skipped) - 1
            also = f" and {more} more" if more else ""
            text += f" (skipped {key}{also}: {reason})"
        if objects or (self.selector.matchers and self.query().has_data(self.window)):
            services = self.query().label_values(self.window, "service")
            listed = ", ".join(list(services)[:8]) or "none"
            return f"{text}; services there: {listed}"
        return f"{text}; {self.where_data_are()}"

    def where_data_are(self) -> str:
        """Say where the nearest data are, or that there are none in the store."""
        nearest = [from_until(each) for each in self.query().nearest(self.window)]
        if nearest:
            return f"the nearest data are from {' and '.join(nearest)}"
        return f"the store {self.store} is empty{why_empty(self.store.store)}"


def is_missing(store: ObjectStore) -> bool:
    """Return whether a store is a folder that nobody has created."""
    return isinstance(store, DirectoryStore) and not store.root.exists()


def why_empty(store: ObjectStore) -> str:
    """Return what is to be added where an empty store is named."""
    return " (the folder does not exist)" if is_missing(store) else ""


def _shown(window: Window) -> str:
    if window == ALWAYS:
        return "any time"
    return from_until(window)


@contextlib.contextmanager
def in_cluster(options: argparse.Namespace) -> Iterator[Executor | None]:
    """Return the workers that `--cluster` names for the length of the block, None if it does not.

    Raises:
        ClusterError: the cluster cannot be used.
    """
    if not options.cluster:
        yield None
        return
    executor = ClusterExecutor(options.cluster)
    try:
        yield executor
    finally:
        executor.shutdown()


def selected(
    options: argparse.Namespace, start: str | None = None, executor: Executor | None = None
) -> Selection:
    """Return what `--store`, `--from`, `--until` and `-q` select; `start` is the default `--from`.

    Raises:
        ValueError: a time or the selector cannot be read.
        StoreError: the URL names no store.
    """
    selection = Selection.parse(
        options.store,
        options.s3_endpoint,
        tenant=options.tenant,
        start=options.start or start,
        end=options.end,
        query=getattr(options, "query", ""),
    )
    return replace(selection, executor=executor)


def opened(options: argparse.Namespace) -> TenantStore:
    """Return what `--store`, `--s3-endpoint` and `--tenant` name.

    Raises:
        StoreError: the URL names no store, or the tenant's name cannot be one.
    """
    return open_tenant(options.store, options.s3_endpoint or None, options.tenant)


def query_of(store: TenantStore, executor: Executor | None = None) -> Query:
    """Return a query for a command, which shows its progress on the terminal."""
    workers = Workers(min(4, os.cpu_count() or 1))
    query = Query(store, default_folder(), workers=workers, executor=executor)
    return query.watched(Decoding(sys.stderr))


class Decoding:
    """Shows the progress of reading the store, once it takes longer than a second."""

    def __init__(self, out: TextIO) -> None:
        self._line = StatusLine(out)
        self._lock = threading.Lock()
        self._objects = 0
        self._begun_s = time.monotonic()
        self._next_s = self._begun_s + _SHOWN_AFTER_S

    def __call__(self, objects: int) -> None:
        """Count decoded objects; 0 clears the line, because other output follows."""
        now_s = time.monotonic()
        with self._lock:
            self._objects += objects
            if not objects:
                self._line.clear()
            elif now_s >= self._next_s:
                what = counted(self._objects, "object")
                self._line.show(f"reading the store: {what}, {now_s - self._begun_s:.0f} s")
                self._next_s = now_s + _EVERY_S
