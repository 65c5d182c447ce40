"""Status: what this service, its store and the agent of its host are."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from profiler.agent import status
from profiler.service.responses import SCHEMA, Count, WindowMs
from storage.objects.keys import DEFAULT_TENANT
from storage.profile import Window
from storage.query.hosts import FoundHosts, HostSearch
from storage.query.listing import HOUR_NS
from storage.query.query import Query

_HOSTS_WITHIN_S = 0.5
"""How long the hosts are searched for: the page waits for the status before it asks for the rest.
Two hours of 35 hosts take a fifth of it the first time, while nothing is known."""
_FAR_NS = 2**62


@dataclass(frozen=True, slots=True)
class About:
    """What the service says about itself."""

    store: str
    run_folder: Path
    keep_s: int = 0
    keep_bytes: int = 0
    tenant: str = DEFAULT_TENANT


@dataclass(frozen=True)
class Retention:
    seconds: Count
    bytes: Count


@dataclass(frozen=True)
class Partial:
    """Of what was done in time, how much, and of how much; asking again continues."""

    hosts: tuple[Count, Count]
    hours: tuple[Count, Count]


@dataclass(frozen=True)
class Status:
    schema: Literal[1]
    version: str
    store: str
    tenant: str
    type: str
    now_ms: Count
    started_ms: Count
    keep: Retention | None
    data: WindowMs | None
    hosts: Sequence[str]
    partial: Annotated[
        Partial | None, Meta(description="how many hosts were found in time; null: all of them")
    ]
    agent: Annotated[dict[str, Any] | None, Meta(description="as everflame status --json")]


def service_status(
    query: Query,
    search: HostSearch,
    about: About,
    *,
    started_ns: int,
    now_ns: int,
) -> Status:
    """Return the status of the service. The store is asked through `query` and `search`.

    What is stored does not matter to how long it takes: few keys are listed to find when the data
    begin and end, and the hosts are searched for under a deadline.
    """
    span = query.span()
    found = _latest_hosts(query, search, span, now_ns) if span else None
    agent: dict[str, Any] | None = None
    with contextlib.suppress(status.NoAgentError):
        agent = status.ask(about.run_folder)
    return Status(
        schema=SCHEMA,
        version=version("everflame"),
        store=about.store,
        tenant=about.tenant,
        type="cpu",
        now_ms=now_ns // 1_000_000,
        started_ms=started_ns // 1_000_000,
        keep=Retention(about.keep_s, about.keep_bytes) if about.keep_s else None,
        data=WindowMs.of(span) if span else None,
        hosts=found.names if found else [],
        partial=Partial(found.hosts, found.hours) if found and not found.is_complete else None,
        agent=agent,
    )


def _latest_hosts(query: Query, search: HostSearch, span: Window, now_ns: int) -> FoundHosts:
    """Return the hosts of the last hour that has data."""
    end_ns = span.end_ns
    if end_ns > now_ns + HOUR_NS:  # a host whose clock is ahead does not hide the others
        end_ns = max(
            (each.end_ns for each in query.nearest(Window(now_ns, _FAR_NS))), default=end_ns
        )
    return search.find(max(span.start_ns, end_ns - HOUR_NS), end_ns, _HOSTS_WITHIN_S)
