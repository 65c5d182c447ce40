"""Responses: the parts that the responses of several panels have in common.

Times out are Unix milliseconds. All responses are dicts that orjson can write.
"""

from typing import Any

from profiler.service.merged import MergedProfiles, PanelRequest
from storage.profile import GOOD_STOPS, Profile, Window
from storage.query.coverage import Coverage
from storage.query.listing import nearest_objects

SCHEMA = 1

NAMED_SERVICES = 50
_NAMED_HOSTS = 100
_NAMED_MODULES = 1_000


def head(request: PanelRequest, coverage: Coverage) -> dict[str, Any]:
    """Return what every panel says about the part of the store that it shows."""
    accounting = coverage.accounting
    return {
        "schema": SCHEMA,
        "type": request.type,
        "window": window_ms(request.window),
        "query": query_text(request),
        "host_seconds": accounting.profiled_ns / 1e9,
        "coverage": coverage_of(coverage),
        "agent": {
            "cpu_ns": accounting.agent_cpu_ns,
            "rss_bytes": accounting.agent_rss_bytes,
        },
    }


def window_ms(window: Window) -> dict[str, int]:
    return {
        "from_ms": window.start_ns // 1_000_000,
        "until_ms": window.end_ns // 1_000_000,
    }


def query_text(request: PanelRequest) -> str:
    return str(request.selector) if request.selector.matchers else ""


def coverage_of(coverage: Coverage) -> dict[str, Any]:
    accounting = coverage.accounting
    stops = dict(accounting.stops)
    good = sum(count for reason, count in stops.items() if reason in GOOD_STOPS)
    ended = sum(stops.values())
    return {
        "hosts": len(accounting.hosts),
        "host_names": [host.name for host in accounting.hosts[:_NAMED_HOSTS]],
        "objects": coverage.objects,
        "cpus": accounting.cpus,
        "ticks": accounting.ticks,
        "idle": accounting.idle,
        "filtered": accounting.filtered,
        "stored": accounting.stored,
        "lost": dict(accounting.lost),
        "stops": stops,
        "complete": good / ended if ended else None,
        "nonidle_ns": accounting.nonidle_ns,
        "profiled_ns": accounting.profiled_ns,
        "skipped": [{"key": each.key, "reason": each.reason} for each in coverage.skipped],
    }


def empty_reason(
    profiles: MergedProfiles, request: PanelRequest, coverage: Coverage, samples: int
) -> dict[str, Any] | None:
    """Return why there are no samples, and what there is instead; None if there are some."""
    if samples:
        return None
    query = profiles.query
    has_objects = coverage.objects or (
        request.selector.matchers and any(True for _ in query.objects(request.window))
    )
    if has_objects:
        services = query.label_values(request.window, "service")
        return {
            "reason": "nothing_matches",
            "nearest": [],
            "services": list(services)[:NAMED_SERVICES],
        }
    nearest = [
        {"from_ms": key.start_ns // 1_000_000, "until_ms": key.end_ns // 1_000_000}
        for key in nearest_objects(profiles.store, request.window)
    ]
    reason = "no_data_in_range" if nearest else "no_data_ever"
    return {"reason": reason, "nearest": nearest, "services": []}


def files_of(profile: Profile, modules: set[str]) -> list[list[str]]:
    """Return (module, path, build id) of the files behind frames; names may repeat."""
    files = (file for file in profile.modules.values() if file.name in modules)
    return sorted([file.name, file.path, file.build_id] for file in files)[:_NAMED_MODULES]
