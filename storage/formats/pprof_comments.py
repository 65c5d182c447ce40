"""pprof's comments: what pprof has no field for, as JSON, written and read.

`comment[0]` is `everflame ` and the accounting, `comment[1]` `everflame-modules ` and each module's
kind and segments. Other tools ignore comments. What is read is checked: files are foreign input.
"""

import functools
import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import orjson

from storage.formats.limits import COUNT_LIMIT, OBJECT
from storage.profile import (
    Accounting,
    Host,
    Labels,
    Profile,
    ProfileError,
    SchemaError,
    Window,
    make_labels,
)
from symbolizer.location import ElfAddress, FileOffset, Kind, Module, Segment
from symbolizer.text import readable

SCHEMA = 1

_ACCOUNTING = "everflame "
_MODULES = "everflame-modules "
_REMEMBERED_BYTES = 1 << 20
_OURS = (_ACCOUNTING.encode(), _MODULES.encode())


@dataclass(frozen=True, slots=True)
class Ours:
    """The content of our comments: what pprof has no field for."""

    type: str
    period_ns: int
    window: Window
    accounting: Accounting
    modules: dict[str, Module] = field(default_factory=dict)


def accounting_comment(profile: Profile) -> str:
    accounting = profile.accounting
    host = accounting.hosts[0] if len(accounting.hosts) == 1 else Host("", "")
    record = {
        "schema": SCHEMA,
        "producer": _producer(),
        "type": profile.type,
        "window": profile.window,
        "host": host.name,
        "host_id": host.host_id,
        "hosts": accounting.hosts,
        "cpus": accounting.cpus,
        "nonidle_ns": accounting.nonidle_ns,
        "profiled_ns": accounting.profiled_ns,
        "period_ns": profile.period_ns,
        "ticks": accounting.ticks,
        "idle": accounting.idle,
        "filtered": accounting.filtered,
        "stored": accounting.stored,
        "lost": dict(accounting.lost),
        "stops": dict(accounting.stops),
        "uncounted": accounting.uncounted,
        "misses": dict(accounting.misses),
        "services": [
            {"labels": dict(labels), "present_ns": present_ns}
            for labels, present_ns in accounting.services.items()
        ],
        "agent": {"cpu_ns": accounting.agent_cpu_ns, "rss_bytes": accounting.agent_rss_bytes},
    }
    # `default` turns NamedTuples, which orjson does not know, into lists. Keys are sorted so that
    # equal profiles have equal bytes: equal mappings may differ in order.
    return _ACCOUNTING + orjson.dumps(record, default=list, option=orjson.OPT_SORT_KEYS).decode()


def modules_comment(modules: Mapping[str, Module]) -> str:
    records = {
        module.build_id: {"kind": module.kind, "path": module.path, "segments": module.segments}
        for module in modules.values()
    }
    return _MODULES + orjson.dumps(records, default=list).decode()


def read_comments(comments: Iterable[bytes]) -> Ours | None:
    """Return the content of our own comments; None if there are none.

    A file that another tool merged from several of ours has several: they are added up.

    Raises:
        ProfileError: one of ours is damaged.
        SchemaError: a later version of this program wrote them.
    """
    found: list[Ours] = []
    modules: dict[str, Module] = {}
    left, left_bytes = OBJECT.comments, OBJECT.comment_bytes
    for comment in comments:
        left -= 1
        left_bytes -= len(comment) if comment.startswith(_OURS) else 0
        if left < 0 or left_bytes < 0:
            raise ProfileError(
                f"cannot read pprof: it holds more than {OBJECT.comments:,} comments, or ours have"
                f" more than {OBJECT.comment_bytes:,} bytes"
            )
        if comment.startswith(_ACCOUNTING.encode()):
            found.append(_parse_accounting(_parse_json(comment[len(_ACCOUNTING) :])))
        elif comment.startswith(_MODULES.encode()):
            parse = (
                _parse_modules if len(comment) < _REMEMBERED_BYTES else _parse_modules.__wrapped__
            )
            modules.update(parse(comment[len(_MODULES) :]))
    if not found:
        return None
    window, accounting = found[0].window, Accounting()
    for ours in found:
        window = window.union(ours.window)
        accounting = accounting.merge(ours.accounting)
    counts = (getattr(accounting, each.name) for each in fields(accounting))
    if any(isinstance(count, int) and count > COUNT_LIMIT for count in counts):
        raise ProfileError("cannot read pprof: our comments add up to more than 2^62")
    period_ns = min(ours.period_ns for ours in found)
    return Ours(found[0].type, period_ns, window, accounting, modules)


@functools.cache
def _producer() -> str:
    try:
        return f"everflame/{importlib.metadata.version('everflame')}"
    except importlib.metadata.PackageNotFoundError:
        return "everflame"


class _Record:
    """A JSON object from outside. Reading a field checks its type; other fields are ignored."""

    def __init__(self, fields: object) -> None:
        if not isinstance(fields, dict):
            raise ProfileError("cannot read pprof: our comment is not a JSON object")
        self._fields: dict[str, object] = fields

    def integer(self, name: str) -> int:
        return _checked_integer(self._fields.get(name, 0), name)

    def text(self, name: str) -> str:
        return _checked_text(self._fields.get(name, ""), name)

    def array(self, name: str) -> list[Any]:
        value = self._fields.get(name, [])
        if not isinstance(value, list):
            raise ProfileError(f"cannot read pprof: {name!r} in our comment is not a list")
        return value

    def record(self, name: str) -> "_Record":
        return _Record(self._fields.get(name, {}))

    def counts(self, name: str) -> dict[str, int]:
        fields = self.record(name)._fields
        return {
            _checked_text(key, name): _checked_integer(count, name) for key, count in fields.items()
        }

    def names(self) -> Iterable[str]:
        return self._fields


def _checked_integer(value: object, name: str, limit: int = COUNT_LIMIT) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise ProfileError(f"cannot read pprof: {name!r} in our comment is not a count")
    return value


def _checked_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ProfileError(f"cannot read pprof: {name!r} in our comment is not text")
    return readable(value.encode())


def _parse_json(content: bytes) -> _Record:
    try:
        return _Record(orjson.loads(content))
    except orjson.JSONDecodeError:
        raise ProfileError("cannot read pprof: our comment is damaged, it is not JSON") from None


def _parse_accounting(record: _Record) -> Ours:
    schema = record.integer("schema")
    if schema > SCHEMA:
        raise SchemaError(
            f"cannot read pprof: it has schema {schema}, this version knows up to {SCHEMA} "
            "(a newer everflame reads it)"
        )
    bounds = [_checked_integer(bound, "window") for bound in record.array("window")]
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise ProfileError("cannot read pprof: the window in our comment is not an interval")
    hosts = [_parse_host(host) for host in record.array("hosts")]
    if not hosts and record.text("host_id"):
        hosts = [Host(record.text("host"), record.text("host_id"))]
    services: dict[Labels, int] = {}
    for described in record.array("services"):
        service = _Record(described)
        labels = service.record("labels")
        key = make_labels({readable(name.encode()): labels.text(name) for name in labels.names()})
        services[key] = services.get(key, 0) + service.integer("present_ns")
    agent = record.record("agent")
    accounting = Accounting(
        hosts=tuple(sorted(hosts)),
        cpus=record.integer("cpus"),
        nonidle_ns=record.integer("nonidle_ns"),
        profiled_ns=record.integer("profiled_ns"),
        ticks=record.integer("ticks"),
        idle=record.integer("idle"),
        filtered=record.integer("filtered"),
        stored=record.integer("stored"),
        lost=record.counts("lost"),
        stops=record.counts("stops"),
        uncounted=record.integer("uncounted"),
        misses=record.counts("misses"),
        services=services,
        agent_cpu_ns=agent.integer("cpu_ns"),
        agent_rss_bytes=agent.integer("rss_bytes"),
    )
    return Ours(
        record.text("type"), max(1, record.integer("period_ns")), Window(*bounds), accounting
    )


def _parse_host(host: object) -> Host:
    if not isinstance(host, list) or len(host) != 2:
        raise ProfileError("cannot read pprof: 'hosts' in our comment is not a list of pairs")
    return Host(_checked_text(host[0], "hosts"), _checked_text(host[1], "hosts"))


@functools.lru_cache(maxsize=16)  # most windows of a host have the same modules
def _parse_modules(content: bytes) -> Mapping[str, Module]:
    records = _parse_json(content)
    modules = {}
    for name in records.names():
        record = records.record(name)
        build_id, kind = readable(name.encode()), record.text("kind")
        segments = []
        for bounds in record.array("segments"):
            if not isinstance(bounds, list) or len(bounds) != 3:
                raise ProfileError("cannot read pprof: a segment in our comment is damaged")
            vaddr, offset, size = (
                _checked_integer(bound, "segments", 2**64 - 1) for bound in bounds
            )
            if max(vaddr, offset) + size > 2**64:
                raise ProfileError("cannot read pprof: a segment in our comment is too long")
            segments.append(Segment(ElfAddress(vaddr), FileOffset(offset), size))
        # Kinds of later versions are drawn like native code.
        known = Kind(kind) if kind in set(Kind) else Kind.NATIVE
        modules[build_id] = Module(build_id, record.text("path"), known, tuple(segments))
    return modules
