"""Limits: what readers accept of a profile, in one place, so that writers can be held to it.

An encoded profile is foreign input. A few kilobytes of gzip can stand for 31 million samples, and
each takes 25 times its size once it is parsed. So its parts are counted before memory and time are
spent on them (`storage.formats.pprof_message.check_parts`), and a file of more is refused with a
ProfileError that says of what. What is within all limits takes seconds and some hundred megabytes.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from storage.profile import ProfileError

SIZE_LIMIT_BYTES = 64 * 1024 * 1024
"""Decompressed size of an object. 200,000 stacks of 30 frames take 16 MB."""

COUNT_LIMIT = 2**62
"""Sum of a file's samples or values. A larger one is refused: the columns are 64 bits wide."""

OBJECT_COUNT_LIMIT = 2**53
"""The same for an object of a store: a thousand of them add up within 64 bits, and JSON's readers
keep the sum of one exact. In nanoseconds it is an hour of 2,500 CPUs."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that a profile may hold of each kind."""

    size_bytes: int = SIZE_LIMIT_BYTES
    members: int = 10_000
    """Members of its gzip (RFC 1952). Compressed in blocks, as bgzip does, 64 MB have 1,000."""
    samples: int = 500_000
    sample_numbers: int = 16_000_000
    """Numbers in all samples: locations of stacks, values, labels, and their tags and lengths."""
    locations: int = 500_000
    location_numbers: int = 6_000_000
    functions: int = 500_000
    function_numbers: int = 6_000_000
    mappings: int = 100_000
    mapping_numbers: int = 2_000_000
    sample_types: int = 1_000
    strings: int = 1_000_000
    string_bytes: int = 32 * 1024 * 1024
    """Without the comments of ours."""
    comments: int = 1_000
    comment_bytes: int = 4 * 1024 * 1024
    """Of our own comments: the accounting and the modules of a file. A comment that is named twice
    counts twice."""
    others: int = 100_000
    """Fields that are none of the above, of later versions of the format."""

    @property
    def fields(self) -> int:
        """Return how many fields and messages a file within the limits has at most."""
        return (
            self.samples
            + self.locations
            + self.functions
            + self.mappings
            + self.strings
            + self.sample_types
            + self.comments
            + self.others
        )


OBJECT = Limits()
"""What is read of a store, and so what may be written to one."""

FILE = Limits(
    size_bytes=256 * 1024 * 1024,
    samples=4_000_000,
    sample_numbers=128_000_000,
    locations=2_000_000,
    location_numbers=32_000_000,
    functions=2_000_000,
    function_numbers=32_000_000,
    strings=4_000_000,
    string_bytes=128 * 1024 * 1024,
)
"""What is read of a file that somebody names on the command line: they wait for it, and for nobody
else's."""


class OutOfMemoryError(ProfileError):
    """Reading a profile takes more memory than there is, or than the process may take."""


@contextlib.contextmanager
def exhaustion_named() -> Iterator[None]:
    """Turn what Python raises when foreign input exhausts it into a ProfileError that says so.

    Raises:
        OutOfMemoryError: there was no memory left.
        ProfileError: Python's stack was used up.
    """
    try:
        yield
    except MemoryError:
        raise OutOfMemoryError("cannot read it: that takes more memory than there is") from None
    except RecursionError:
        raise ProfileError("cannot read it: it is nested too deeply") from None
