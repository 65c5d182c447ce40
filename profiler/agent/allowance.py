"""An allowance: what each of many, such as processes, may take of something."""

import time
from collections.abc import Hashable


class Allowance:
    """What each may still spend: so much at once, and so much per second. Not thread-safe."""

    def __init__(self, burst: float, per_s: float) -> None:
        self._burst, self._per_s = burst, per_s
        self._left: dict[Hashable, float] = {}
        """Of those that have not all."""
        self._refilled_s = time.monotonic()

    def refill(self) -> None:
        now_s = time.monotonic()
        more, self._refilled_s = (now_s - self._refilled_s) * self._per_s, now_s
        self._left = {
            who: left + more for who, left in self._left.items() if left + more < self._burst
        }

    def has(self, who: Hashable, amount: float) -> bool:
        return self._left.get(who, self._burst) >= amount

    def spend(self, who: Hashable, amount: float) -> None:
        self._left[who] = self._left.get(who, self._burst) - amount
