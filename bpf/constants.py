"""Constants that the programs are compiled with: sizes, limits and enumerations of both sides."""

from bpf import interpreters, tables
from bpf.samples import (
    COPY,
    COUNT,
    COUNT_KEY,
    KERNEL_STACK,
    LONG_STACK,
    MAX_KERNEL_WORDS,
    MAX_LONG_WORDS,
    MAX_NATIVE_WORDS,
    MAX_SHORT_WORDS,
    MAX_USER_WORDS,
    TAG_SHIFT,
    USER_STACK,
    Counter,
    StopReason,
    Tag,
)

_COPY_BYTES = 1 << 16
"""Of one stack: Python's and compilers' may be deep. A power of two."""
_COPY_BURST_NS = 500_000_000
"""A budget that was not used may be saved up for so long: many programs begin at once."""
_GO_ON = 1000  # no StopReason has this number


def kernel_constants() -> dict[str, int]:
    """Return what the programs are compiled with, whatever is sampled."""
    constants = {
        "MAX_USER_WORDS": MAX_USER_WORDS,
        "MAX_NATIVE_WORDS": MAX_NATIVE_WORDS,
        "MAX_LONG_WORDS": MAX_LONG_WORDS,
        "MAX_SHORT_WORDS": MAX_SHORT_WORDS,
        "MAX_KERNEL_WORDS": MAX_KERNEL_WORDS,
        "KERNEL_STACK_BYTES": 8 * MAX_KERNEL_WORDS,
        "COUNT_KEY_SIZE": COUNT_KEY.itemsize,
        "COUNT_SIZE": COUNT.itemsize,
        "USER_STACK_SIZE": USER_STACK.itemsize,
        "LONG_STACK_SIZE": LONG_STACK.itemsize,
        "KERNEL_STACK_SIZE": KERNEL_STACK.itemsize,
        "COUNTERS": len(Counter),
        "COPY_SIZE": COPY.itemsize,
        "COPY_BYTES": _COPY_BYTES,
        "COPY_BURST_NS": _COPY_BURST_NS,
        "TAG_SHIFT": TAG_SHIFT,
    }
    constants |= {f"TAG_{tag.name}": tag.value for tag in Tag}
    constants |= {f"STOP_{reason.name}": reason.value for reason in StopReason}
    constants |= {f"COUNTER_{counter.name}": counter.value for counter in Counter}
    constants |= tables.constants() | interpreters.constants()
    return constants | {"GO_ON": _GO_ON, "FOUND": _GO_ON}
