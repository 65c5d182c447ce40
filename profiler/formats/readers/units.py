"""Units as profilers write them, and what they are in nanoseconds or bytes."""

_TIMES = {
    1: ("ns", "nanosecond"),
    1_000: ("us", "µs", "μs", "microsecond"),  # the micro sign and the Greek letter
    1_000_000: ("ms", "millisecond"),
    1_000_000_000: ("s", "sec", "second"),
    60_000_000_000: ("min", "minute"),
    3_600_000_000_000: ("h", "hr", "hour"),
}
_SIZES = {
    1: ("b", "byte"),
    2**10: ("kb", "kib", "kbyte", "kilobyte", "kibibyte"),
    2**20: ("mb", "mib", "mbyte", "megabyte", "mebibyte"),
    2**30: ("gb", "gib", "gbyte", "gigabyte", "gibibyte"),
    2**40: ("tb", "tib", "tbyte", "terabyte", "tebibyte"),
}
"""Powers of two, as pprof counts them."""

_SCALES = {
    name: (scale, unit)
    for unit, scales in (("nanoseconds", _TIMES), ("bytes", _SIZES))
    for scale, names in scales.items()
    for name in names
}


def unit_scale(unit: str) -> tuple[int, str]:
    """Return how many nanoseconds or bytes one of a unit is, and `nanoseconds` or `bytes`.

    Any other unit is its own: (1, unit). Spelled as pprof reads them: any case, singular or plural.
    """
    lower = unit.strip().lower()
    for name in (lower, lower.removesuffix("s")):
        if name in _SCALES:
            return _SCALES[name]
    if lower in {"", "count", "counts", "none", "1"}:
        return 1, "count"
    return 1, unit
