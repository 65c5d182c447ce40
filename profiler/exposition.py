"""Exposition: figures in Prometheus' text format 0.0.4, and the addresses where they are served.

The client library of Prometheus would cost each uploader 1 MB of memory; all that is needed of it
are these lines.
"""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


Kind = Literal["counter", "gauge"]


class AddressError(ValueError):
    """It is not an address; the message says what one looks like."""


class Metric(NamedTuple):
    """A metric and its values by the values of its labels."""

    name: str
    kind: Kind
    values: Mapping[tuple[str, ...], float]
    labels: tuple[str, ...] = ()
    """Their names."""


def single(name: str, kind: Kind, value: float) -> Metric:
    """Return a metric without labels."""
    return Metric(name, kind, {(): value})


def labelled(name: str, kind: Kind, label: str, values: Mapping[str, float]) -> Metric:
    """Return a metric with one label."""
    return Metric(name, kind, {(each,): value for each, value in values.items()}, (label,))


def parse_address(text: str) -> tuple[str, int]:
    """Parse HOST:PORT, `[::1]:9100` or `:9100`, which is loopback.

    Raises:
        AddressError: it is none of these.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise AddressError(f"cannot listen on {text!r}: give HOST:PORT, as 127.0.0.1:9100")
    return host.strip("[]") or "127.0.0.1", int(port)


def encode(metrics: Iterable[Metric]) -> bytes:
    """Return metrics in their order as text, their values by labels."""
    lines = []
    for metric in metrics:
        lines.append(f"# TYPE {metric.name} {metric.kind}")
        for values, number in sorted(metric.values.items()):
            pairs = zip(metric.labels, values, strict=True)
            text = ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in pairs)
            lines.append(f"{metric.name}{{{text}}} {number}" if text else f"{metric.name} {number}")
    return "\n".join([*lines, ""]).encode()
