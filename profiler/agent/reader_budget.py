"""How much CPU time readers may use: in all, and for what one owner has.

Files and processes of one user can be made so that each takes all the time that one item may have,
and there can be as many as he likes. So the budget as a whole is small beside a CPU, and none but
root on the host itself, of whom most services are, has more than a part of it.
"""

from dataclasses import dataclass

_WHOLE_S, _WHOLE_SHARE = 30.0, 0.05
"""CPU time that may be used at once, and the share of one CPU by which it grows again."""
_PART_S, _PART_SHARE = 6.0, 0.01
_MAX_OWNERS = 1024


@dataclass(slots=True)
class _Bucket:
    full_s: float
    share: float
    left_s: float
    at_s: float

    def left(self, now_s: float) -> float:
        grown_s = (now_s - self.at_s) * self.share
        self.left_s, self.at_s = min(self.full_s, self.left_s + grown_s), now_s
        return self.left_s


class ReaderBudget:
    """Times are those of `time.monotonic()`. The owner '' has no part of its own."""

    def __init__(self, now_s: float) -> None:
        self._whole = _Bucket(_WHOLE_S, _WHOLE_SHARE, _WHOLE_S, now_s)
        self._parts: dict[str, _Bucket] = {}

    def spend(self, owner: str, cpu_s: float, now_s: float) -> None:
        self._whole.left_s -= cpu_s
        if not owner:
            return
        part = self._parts.pop(owner, None) or _Bucket(_PART_S, _PART_SHARE, _PART_S, now_s)
        part.left(now_s)
        part.left_s -= cpu_s
        self._parts[owner] = part  # to the end: the first is the one that used nothing for longest
        if len(self._parts) > _MAX_OWNERS:
            del self._parts[next(iter(self._parts))]

    def is_left(self, now_s: float) -> bool:
        return self._whole.left(now_s) > 0

    def is_left_of(self, owner: str, now_s: float) -> bool:
        part = self._parts.get(owner)
        return part is None or part.left(now_s) > 0
