"""What is known of the code of a file: for ranges of offsets, which functions are there."""

from bisect import bisect_right
from collections import Counter
from typing import NamedTuple

from symbolizer.location import Frame, Location, Miss, Module, Place


class Code:
    """A file with code, or an image of the kernel, and what readers have said of it.

    Attributes:
        content, code, owner, has_symbols: see `symbolizer.symbols.variants.CodeFile`.
        name: to show in a status.
        asked: the offsets that readers are being asked for.
        named: how many functions its table names, 0 if that is not known.
        failure: why the last answer was none; `failures` is how many were none in a row.
        retry_s: when it may be asked for again (time.monotonic).
        is_new: whether nothing of it has been asked for, or not successfully.
        is_late: whether the last window was closed without an answer.
        used_in: the number of the last window with code of it.
    """

    def __init__(
        self, content: str, code: str, owner: int, name: str, *, has_symbols: bool = True
    ) -> None:
        self.content, self.code, self.owner, self.has_symbols = content, code, owner, has_symbols
        self.name = name
        self.asked: set[int] = set()
        self.named = 0
        self.failure: Miss | None = None
        self.failures = 0
        self.retry_s = 0.0
        self.is_new = True
        self.is_late = False
        self.used_in = 0
        self._starts: list[int] = []
        self._places: list[Place] = []
        self._used_in: list[int] = []

    def find(self, offset: int, window: int) -> Place | None:
        """Return the place of an offset, which a window uses; None if it is not known."""
        self.used_in = window
        number = bisect_right(self._starts, offset) - 1
        if number < 0 or offset >= self._places[number].end:
            return None
        self._used_in[number] = window
        return self._places[number]

    def keep(self, place: Place, window: int) -> int:
        """Add a place, unless it overlaps another one; return how many more there are now."""
        number = bisect_right(self._starts, place.start)
        if number and self._places[number - 1].end > place.start:
            return 0
        if number < len(self._starts) and self._starts[number] < place.end:
            return 0
        self._starts.insert(number, place.start)
        self._places.insert(number, place)
        self._used_in.insert(number, window)
        return 1

    def forget(self, before: float) -> int:
        """Forget the places that were last used before a window; return how many they were."""
        kept = [number for number, used_in in enumerate(self._used_in) if used_in >= before]
        forgotten = len(self._used_in) - len(kept)
        if forgotten:
            self._starts = [self._starts[number] for number in kept]
            self._places = [self._places[number] for number in kept]
            self._used_in = [self._used_in[number] for number in kept]
        return forgotten


class Source(NamedTuple):
    """Where names of a module come from; `miss` is why there are none."""

    module: Module
    code: Code | None
    miss: Miss | None


class Named(NamedTuple):
    """What a closed window's locations are.

    Attributes:
        locations: the final location of each provisional one.
        frames: names of final locations; one may be named several times, by variants of its file.
        modules: by build id.
        misses: how many final locations have no name, by Miss.
    """

    locations: dict[Location, Location]
    frames: list[tuple[Location, tuple[Frame, ...]]]
    modules: dict[str, Module]
    misses: Counter[str]
