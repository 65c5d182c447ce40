"""Status: what this service, its store and the agent of its host are."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from profiler.agent import status
from profiler.service.responses import SCHEMA, Count, WindowMs
from storage.profile import Window
from storage.query.listing import HOUR_NS
from storage.query.query import Query


@dataclass(frozen=True, slots=True)
class About:
    """What the service says about itself."""

    store: str
    run_folder: Path
    keep_s: int = 0
    keep_bytes: int = 0


@dataclass(frozen=True)
class Retention:
    seconds: Count
    bytes: Count


@dataclass(frozen=True)
class PrefetchProgress:
    """Objects decoded before they were asked for, since the start."""

    decoded: Count
    waiting: Count
    cpu_ns: Count
    at_ms: Count
    error: str


@dataclass(frozen=True)
class Status:
    schema: Literal[1]
    version: str
    store: str
    type: str
    now_ms: Count
    started_ms: Count
    keep: Retention | None
    data: WindowMs | None
    hosts: Sequence[str]
    agent: Annotated[dict[str, Any] | None, Meta(description="as everflame status --json")]
    ahead: PrefetchProgress | None


def service_status(
    query: Query, about: About, started_ns: int, now_ns: int, prefetched: Mapping[str, Any]
) -> Status:
    """Return the status of the service. The store is asked through `query`."""
    span = query.span()
    agent: dict[str, Any] | None = None
    with contextlib.suppress(status.NoAgentError):
        agent = status.ask(about.run_folder)
    return Status(
        schema=SCHEMA,
        version=version("everflame"),
        store=about.store,
        type="cpu",
        now_ms=now_ns // 1_000_000,
        started_ms=started_ns // 1_000_000,
        keep=Retention(about.keep_s, about.keep_bytes) if about.keep_s else None,
        data=WindowMs.of(span) if span else None,
        hosts=_latest_hosts(query, span),
        agent=agent,
        ahead=msgspec.convert(prefetched, PrefetchProgress) if prefetched else None,
    )


def _latest_hosts(query: Query, span: Window | None) -> list[str]:
    """Return the hosts of the last hour that has data."""
    if span is None:
        return []
    last = Window(max(span.start_ns, span.end_ns - HOUR_NS), span.end_ns)
    return sorted(query.label_values(last, "host"))
