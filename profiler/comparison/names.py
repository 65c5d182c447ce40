"""Names: which samples of both sides have none, and what that leaves undecided.

A build whose symbols were found on one side only looks like one that lost its functions: what was
in them is in the box `[module]` or in `module+0x...`. So boxes without a name are never called
changed, and neither is a function whose change disappears if the samples that its module's nameless
boxes gained or lost were its own; of a function that one side lacks, all that they have there. That
is the worst case for each function, so it needs no limit: the few samples by which nameless boxes
vary anyway change next to nothing.

Addresses without a name are not compared: `module+0x...` is where a function begins in one build,
and another function begins there in the next. Totals of functions do not know builds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from profiler.comparison.verdict import Change, Flags, Floats, Judgement
from profiler.text import listed
from storage.profile import GOOD_STOPS
from symbolizer.location import Frame, Kind, is_nameless

_POINTS = 0.03
"""If the parts of the sides' samples without a name, or of their incomplete stacks, differ by more
than this, a warning says so."""
_SHIFT = 0.05
"""If names lost or gained change the named part of a module by more, and not by chance, its
functions do not count for the common change."""
_CHANCE = 4.0
"""Standard deviations of counting."""
_GUARD = 0.5
_ANYWHERE = ""
"""The module of marks that may stand for code of any: [unknown], [exited], [rest]."""
_LISTED = 3
_OWN_CODE = frozenset({"[vdso]", "[vsyscall]"})
"""Modules in brackets that hold code of their own."""
_TOGETHER = frozenset({Kind.KERNEL, Kind.PYTHON, Kind.JIT})
"""Kinds whose names are lost and gained together: a mark's module is not that of functions."""
_OF_RUNTIMES = frozenset(f"{kind} code" for kind in _TOGETHER)


@dataclass(frozen=True, slots=True, eq=False)
class Names:
    """Which functions have no name, and the samples that names lost or gained may have moved.

    `module_of` numbers the modules by function; the first is _ANYWHERE. `own` and `nameless` are
    the samples of each module, before and after: of all functions, and of those without a name.
    """

    modules: tuple[str, ...]
    module_of: npt.NDArray[np.int64]
    is_nameless: Flags
    is_absent: Flags
    """Before and after: the functions without a sample."""
    own: Floats
    nameless: Floats

    @classmethod
    def of(cls, frames: Sequence[Frame], before: Floats, after: Floats) -> "Names":
        """Tell names apart. The samples are those of each function, of all hosts."""
        numbers = {_ANYWHERE: 0}
        module_of = np.array(
            [numbers.setdefault(_module_of(frame), len(numbers)) for frame in frames], np.int64
        )
        nameless = np.array([is_nameless(frame) for frame in frames], np.bool_)
        sides = (before, after)
        size = len(numbers)
        own = [np.bincount(module_of, side, size) for side in sides]
        without = [np.bincount(module_of, side * nameless, size) for side in sides]
        absent = np.array([side == 0 for side in sides])
        return cls(tuple(numbers), module_of, nameless, absent, np.array(own), np.array(without))

    @property
    def steady(self) -> Flags:
        """Return the functions that may count for the common change.

        They have a name and are on both sides, and not many names of their module were lost or
        gained.
        """
        named = self.own - self.nameless + _GUARD
        parts = named / (self.own + 2 * _GUARD)
        shift = np.abs(np.log(parts[1] / parts[0]))
        chance = _CHANCE * np.sqrt(((1 - parts) / named).sum(axis=0))
        is_there = (self.own > 0).all(axis=0)
        is_moved = is_there & (shift > np.maximum(_SHIFT, chance))
        is_on_both = ~self.is_absent.any(axis=0)
        steady: Flags = ~self.is_nameless & is_on_both & ~is_moved[self.module_of]
        return steady

    def withhold(
        self, found: Judgement, samples: tuple[Floats, Floats], scale: float, cells: int
    ) -> tuple[Judgement, dict[int, str]]:
        """Return the judgement without what names cannot decide, and for these functions why not.

        If nothing but the load changed, the after side has `scale` times the samples of the before
        side.
        """
        guard = _GUARD * cells / 2
        changes, reasons = list(found.changes), dict[int, str]()
        for i, change in enumerate(found.changes):
            if change in (Change.UNCHANGED, Change.TOO_LITTLE):
                continue
            if self.is_nameless[i]:
                reasons[i] = "it has no name, so it may be other code on each side"
            elif change in (Change.LESS, Change.GONE):
                moved = np.log1p(self._moved(i, 1, scale) / (samples[1][i] + guard))
                if found.high[i] + moved >= 0:
                    reasons[i] = self._reason(i, "after")
            else:
                moved = np.log1p(self._moved(i, 0, 1 / scale) / (samples[0][i] + guard))
                if found.low[i] - moved <= 0:
                    reasons[i] = self._reason(i, "before")
            if i in reasons:
                changes[i] = Change.TOO_LITTLE
        return found._replace(changes=changes), reasons

    def _moved(self, i: int, side: int, scale: float) -> float:
        """Return the samples of a function that may be among those without a name on a side.

        If the function is not there at all, they may be all that its module has: others that were
        among them on the other side may have got their names.
        """
        here, there = self.nameless[side], self.nameless[1 - side] * scale
        module = self.module_of[i]
        gained = np.maximum(0.0, here - there)
        if not self.is_absent[side][i]:
            return float(gained[module] + (gained[0] if module else 0.0))
        if self.modules[module] in _OF_RUNTIMES:  # without names it is code of the runtime's file
            return float(here[module] + gained.sum() - gained[module])
        return float(here[module] + (gained[0] if module else 0.0))

    def _reason(self, i: int, side: str) -> str:
        module = self.modules[self.module_of[i]]
        where = f"of {module} " if module else ""
        return f"names {where}are missing on the {side} side: it may be that alone"

    def warnings(self) -> list[str]:
        """Say how the parts of the sides without a name differ."""
        wholes = np.maximum(1.0, self.own.sum(axis=1))
        parts = self.nameless.sum(axis=1) / wholes
        if abs(parts[1] - parts[0]) <= _POINTS:
            return []
        more, less = ("after", "before") if parts[1] > parts[0] else ("before", "after")
        by_module = self.nameless / wholes[:, None]
        gain = (by_module[1] - by_module[0]) * np.sign(parts[1] - parts[0])
        largest = [i for i in np.argsort(-gain, kind="stable").tolist() if gain[i] > 0.01]
        where = listed([self.modules[i] or "unknown code" for i in largest], _LISTED)
        text = (
            f"{100 * parts.max():.0f} % of the {more} side's samples have no function name,"
            f" {100 * parts.min():.0f} % of the {less} side's{f' ({where})' if where else ''}:"
            " functions whose names are known on one side only are not called changed"
        )
        return [text]


def stack_warnings(incomplete: Sequence[float | None]) -> list[str]:
    """Say how the parts of the sides' stacks that are incomplete differ; None: not known."""
    before, after = incomplete
    if before is None or after is None or abs(before - after) <= _POINTS:
        return []
    more, less = ("after", "before") if after > before else ("before", "after")
    text = (
        f"{100 * max(before, after):.0f} % of the {more} side's stacks are incomplete,"
        f" {100 * min(before, after):.0f} % of the {less} side's: totals of callers are too low"
        " there; self costs, which decide, are not affected"
    )
    return [text]


def incomplete_part(stops: Mapping[str, int]) -> float | None:
    """Return which part of the stacks ended too early; None if it is not known."""
    stacks = sum(stops.values())
    return 1 - sum(stops.get(each, 0) for each in GOOD_STOPS) / stacks if stacks else None


def _module_of(frame: Frame) -> str:
    """Return what the names of a frame are lost and gained with."""
    module = frame.module
    if frame.kind in _TOGETHER:
        return f"{frame.kind} code"
    return _ANYWHERE if module.startswith("[") and module not in _OWN_CODE else module
