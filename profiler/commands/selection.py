"""Selection: which part of a store a command asks for, from the words of a command line.

The same words mean the same everywhere: `--store`, `--from`, `--until`, `-q`.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

from profiler.text import StatusLine, counted
from profiler.times import from_until, parse_window
from storage.objects.keys import ObjectKey, StoredObject
from storage.objects.open import open_tenant
from storage.objects.tenant import TenantStore
from storage.profile import ALWAYS, Window
from storage.query.cache import default_folder
from storage.query.listing import nearest_objects
from storage.query.query import Answer, Query
from storage.query.workers import Workers
from storage.selector import Selector

_SHOWN_AFTER_S, _EVERY_S = 1.0, 0.2


class NothingSelectedError(ValueError):
    """No sample of the store is asked for. The message says where the nearest data are."""


@dataclass(frozen=True, slots=True)
class Selection:
    store: TenantStore
    window: Window
    selector: Selector

    @classmethod
    def parse(
        cls,
        store: str,
        endpoint: str = "",
        *,
        start: str | None = None,
        end: str | None = None,
        query: str = "",
        now_ns: int | None = None,
    ) -> "Selection":
        """Read the words of a command line; without any times it is all there is.

        Raises:
            ValueError: a time or the selector cannot be read.
            StoreError: the URL names no store.
        """
        now_ns = time.time_ns() if now_ns is None else now_ns
        window = ALWAYS
        if start or end:
            window = parse_window(start or "0", end or "now", now_ns)
        return cls(open_tenant(store, endpoint or None), window, Selector.parse(query))

    def query(self) -> Query:
        return query_of(self.store)

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
            raise NothingSelectedError(self._explain(answer))
        return answer

    def _explain(self, answer: Answer) -> str:
        text = f"nothing selected: no sample from {_shown(self.window)}"
        if self.selector.matchers:
            text += f" is of {self.selector}"
        if answer.coverage.skipped:
            key, reason = answer.coverage.skipped[0]
            more = len(answer.coverage.skipped) - 1
            also = f" and {more} more" if more else ""
            text += f" (skipped {key}{also}: {reason})"
        if answer.coverage.objects or (
            self.selector.matchers and any(True for _ in self.objects())
        ):
            services = self.query().label_values(self.window, "service")
            listed = ", ".join(list(services)[:8]) or "none"
            return f"{text}; services there: {listed}"
        nearest = [
            _shown(Window(key.start_ns, key.end_ns))
            for key in nearest_objects(self.store, self.window)
        ]
        if not nearest:
            return f"{text}; the store {self.store} is empty"
        return f"{text}; the nearest data are from {' and '.join(nearest)}"


def _shown(window: Window) -> str:
    if window == ALWAYS:
        return "any time"
    return from_until(window)


def query_of(store: TenantStore) -> Query:
    """Read a store for a command, with a line on its terminal while much has to be decoded."""
    workers = Workers(min(4, os.cpu_count() or 1))
    return Query(store, default_folder(), workers=workers).watched(Decoding(sys.stderr))


class Decoding:
    """Tells what is waited for, once it is more than a moment."""

    def __init__(self, out: TextIO) -> None:
        self._line = StatusLine(out)
        self._lock = threading.Lock()
        self._objects = 0
        self._begun_s = time.monotonic()
        self._next_s = self._begun_s + _SHOWN_AFTER_S

    def __call__(self, objects: int) -> None:
        """Count objects that were decoded; none of them: other lines follow."""
        now_s = time.monotonic()
        with self._lock:
            self._objects += objects
            if not objects:
                self._line.clear()
            elif now_s >= self._next_s:
                what = counted(self._objects, "object")
                self._line.show(f"reading the store: {what}, {now_s - self._begun_s:.0f} s")
                self._next_s = now_s + _EVERY_S
