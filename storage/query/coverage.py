"""Coverage: which parts of a window an answer is made of, and which objects are missing from it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

from storage.columns import Columns, Times, count_objects
from storage.objects.keys import ObjectKey, StoredObject
from storage.profile import Accounting, Host, Window
from storage.query.function_totals import FunctionTotals
from storage.query.resolve import LocationNames
from storage.query.self_samples import ObjectSelfSamples
from storage.selector import Selector

_MERGED_EARLY_ROWS = 600_000
"""Parts are merged before more are read once they have this many rows: a day of 3 hosts took 810 MB
at once, and takes 280."""

Kept = TypeVar("Kept", Columns, FunctionTotals, LocationNames, Times, ObjectSelfSamples)
"""The kinds of values that are kept of objects and spans."""
Derived = TypeVar("Derived", Columns, FunctionTotals, LocationNames, Times)
_Asked = TypeVar("_Asked", Columns, FunctionTotals, Times)
_Rows = TypeVar("_Rows", Columns, FunctionTotals)


class ListedObject(NamedTuple):
    """A level-0 object of a window."""

    key: ObjectKey
    stored: StoredObject


class Skipped(NamedTuple):
    """An object that is not in the answer, and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """What an answer is made of. The accounting is that of whole objects, whatever the selector."""

    window: Window
    objects: int
    accounting: Accounting
    skipped: tuple[Skipped, ...]
    is_lasting: bool = True
    """Asking again returns the same: nothing was skipped for a reason that may pass."""

    @property
    def hosts(self) -> tuple[Host, ...]:
        return self.accounting.hosts

    def lacking(self, *others: "Coverage") -> "Coverage":
        """Return this with what is skipped in other readings of the window as well."""
        skipped = (each for coverage in (self, *others) for each in coverage.skipped)
        is_lasting = all(coverage.is_lasting for coverage in (self, *others))
        return replace(self, skipped=tuple(dict.fromkeys(skipped)), is_lasting=is_lasting)


@dataclass(frozen=True, slots=True)
class Part(Generic[Kept]):
    """A part of a window: its objects, their value or None, and which of them are skipped."""

    keys: tuple[str, ...]
    value: Kept | None
    skipped: tuple[Skipped, ...] = ()
    is_lasting: bool = True
    """Asking again returns the same: nothing was skipped for a reason that may pass."""
    packed: bytes = b""
    """The value as the cache keeps it, if a worker has packed it."""
    self_samples: ObjectSelfSamples | None = None
    """With Columns: the self samples of each object, which merged Columns no longer tell apart."""

    def derive(self, make: Callable[[Kept], Derived]) -> "Part[Derived]":
        value = None if self.value is None else make(self.value)
        return Part(self.keys, value, self.skipped, self.is_lasting)


def failed_part(key: str, reason: str, is_lasting: bool = True) -> Part[Columns]:
    return Part((key,), None, (Skipped(key, reason),), is_lasting)


def choose_parts(
    parts: Iterable[Part[_Asked]],
    window: Window,
    selector: Selector,
    type_: str,
    merge_early: Callable[[list[_Asked]], list[_Asked]] = list,
) -> tuple[list[_Asked], Coverage]:
    """Return the values that the selector's hosts may be in, and what they cover.

    `merge_early` may merge what was chosen so far, so that a day is not held at once.
    """
    chosen: list[_Asked] = []
    skipped: list[Skipped] = []
    accounting, objects, is_lasting = Accounting(), 0, True
    for part in parts:
        skipped += part.skipped
        is_lasting &= part.is_lasting
        value = part.value
        if value is None or not has_host(value, selector):
            continue
        if value.type != type_:
            reason = f"it is of the type {value.type}, not {type_}"
            skipped += [Skipped(key, reason) for key in part.keys]
            continue
        if chosen and value.unit != chosen[0].unit:  # as two programs may measure one type
            reason = f"it is measured in {value.unit}, others in {chosen[0].unit}"
            skipped += [Skipped(key, reason) for key in part.keys]
            continue
        objects += count_objects(value.objects)
        accounting = accounting.merge(value.accounting)
        chosen.append(value)
        chosen = merge_early(chosen)
    return chosen, Coverage(window, objects, accounting, tuple(skipped), is_lasting)


def merging_early(
    merge: Callable[[Sequence[_Rows]], _Rows], selector: Selector
) -> Callable[[list[_Rows]], list[_Rows]]:
    """Return a function that merges several values once they have many rows."""

    def merge_early(values: list[_Rows]) -> list[_Rows]:
        merged, *others = (len(value.rows) for value in values)
        # At least as many as are merged already: each row is merged a few times at most.
        if sum(others) < max(merged, _MERGED_EARLY_ROWS):
            return values
        return [merge([value.filter(selector) for value in values])]

    return merge_early


def has_host(
    value: Columns | FunctionTotals | Times | ObjectSelfSamples, selector: Selector
) -> bool:
    """Return whether the selector's matchers of `host` accept any host of the objects.

    It is the one of their accounting, or one that rows name themselves, as of imported profiles.
    """
    matchers = tuple(each for each in selector.matchers if each.name == "host")
    hosts = value.accounting.hosts
    if not matchers or len(hosts) != 1:
        return True
    match value:
        case FunctionTotals() | ObjectSelfSamples():
            label_sets = value.service_sets
        case _:
            label_sets = value.label_sets
    own = (dict(labels).get("host", "") for labels in label_sets)
    return any(Selector(matchers).choose({"host": name} for name in {hosts[0].name, *own}))
