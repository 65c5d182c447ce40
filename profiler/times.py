"""Times as people write them: `now-1h`, RFC 3339, Unix seconds or milliseconds.

Everywhere else a time is an integer of nanoseconds since 1970 UTC, and a window is half-open.
"""

import re
from datetime import UTC, datetime, timedelta

from storage.profile import Window

NS_PER_S = 1_000_000_000
_NS_PER_UNIT = {
    "ms": 1_000_000,
    "s": NS_PER_S,
    "m": 60 * NS_PER_S,
    "h": 3600 * NS_PER_S,
    "d": 86400 * NS_PER_S,
    "w": 7 * 86400 * NS_PER_S,
}
_LATEST_NS = 2**63 - 1
_FIRST_MILLISECONDS = 10**11
"""From here on a plain number is milliseconds: as seconds it would be the year 5138."""

_RELATIVE = re.compile(r"now(?:(?P<sign>[+-])(?P<parts>(?:\d{1,9}(?:ms|s|m|h|d|w))+))?", re.ASCII)
_PART = re.compile(r"(\d+)(ms|s|m|h|d|w)", re.ASCII)
_RFC3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?([Zz]|[+-]\d\d:\d\d)?", re.ASCII
)
_UNIX = re.compile(r"(\d{1,13})(?:\.(\d{1,9}))?", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class TimeError(ValueError):
    """Text that is not a time, or two times that do not make a window."""


def parse_time(text: str, now_ns: int) -> int:
    """Return the ns since 1970 that the text names.

    Raises:
        TimeError: it is not a time; the message says what is accepted.
    """
    stripped = text.strip()
    if match := _RELATIVE.fullmatch(stripped):
        offset = sum(
            int(number) * _NS_PER_UNIT[unit] for number, unit in _PART.findall(match["parts"] or "")
        )
        return _checked(now_ns - offset if match["sign"] == "-" else now_ns + offset, text)
    if match := _UNIX.fullmatch(stripped):
        scale = 1_000_000 if int(match[1]) >= _FIRST_MILLISECONDS else NS_PER_S
        fraction = int((match[2] or "").ljust(9, "0")) * scale // NS_PER_S
        return _checked(int(match[1]) * scale + fraction, text)
    if match := _RFC3339.fullmatch(stripped):
        date, clock, fraction_digits, zone = match.groups()
        if zone is None:
            raise TimeError(f"{text!r} has no time zone: add Z for UTC, or an offset as +01:00")
        try:
            at = datetime.fromisoformat(f"{date}T{clock}{zone.upper()}")
        except ValueError as error:
            raise TimeError(
                f"{text!r} is not a time: this day, time of day or offset does not exist"
            ) from error
        seconds = (at - _EPOCH) // timedelta(seconds=1)
        return _checked(seconds * NS_PER_S + int((fraction_digits or "").ljust(9, "0")), text)
    raise TimeError(
        f"{text!r} is not a time"
        " (try now-1h, 2026-01-31T09:00:00Z, or Unix seconds or milliseconds)"
    )


def parse_window(start: str, end: str, now_ns: int) -> Window:
    """Return the half-open window between two times.

    Raises:
        TimeError: one is not a time, or they are not in order.
    """
    window = Window(parse_time(start, now_ns), parse_time(end, now_ns))
    if window.start_ns >= window.end_ns:
        raise TimeError(
            f"the window from {start} until {end} is empty: it must end after it starts"
        )
    return window


def rfc3339(at_ns: int) -> str:
    """Return a time as RFC 3339 in UTC, with as many digits of a second as it has."""
    seconds, fraction = divmod(at_ns, NS_PER_S)
    text = (_EPOCH + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S")
    digits = f".{fraction:09d}".rstrip("0").rstrip(".") if fraction else ""
    return f"{text}{digits}Z"


def whole_second(at_ns: int) -> str:
    """Return a time as RFC 3339 in UTC, to the second before it."""
    return rfc3339(at_ns - at_ns % NS_PER_S)


def from_until(window: Window) -> str:
    """Return `FROM until UNTIL`, both to the second before."""
    return f"{whole_second(window.start_ns)} until {whole_second(window.end_ns)}"


def _checked(at_ns: int, text: str) -> int:
    if not 0 <= at_ns <= _LATEST_NS:
        raise TimeError(f"{text!r} is not a time between 1970 and 2262")
    return at_ns


def length_text(span_ns: int) -> str:
    """Return a duration with its two largest parts: `2 h 6 min`, `40 s`."""
    parts = []
    for unit, name in (("d", "d"), ("h", "h"), ("m", "min"), ("s", "s")):
        number, span_ns = divmod(span_ns, _NS_PER_UNIT[unit])
        if number:
            parts.append(f"{number} {name}")
    return " ".join(parts[:2]) or "0 s"
