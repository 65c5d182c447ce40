"""How much CPU time readers may use: in all, and for what one owner has.

Files and processes of one user can be made so that each takes all the time that one item may have,
and there can be as many as he likes. So the budget as a whole is small beside a CPU, and none but
root on the host itself, of whom most services are, has more than a part of it.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from profiler.processes.generations import living_thread

Place: TypeAlias = tuple[str, str]
"""A mount namespace, and a root in it."""

_WHOLE_S, _WHOLE_SHARE = 30.0, 0.05
"""CPU time that may be used at once, and the share of one CPU by which it grows again."""
_PART_S, _PART_SHARE = 6.0, 0.01
_MAX_OWNERS = 1024


class Owners:
    """Whose budget something is charged to: '' for what root on the host itself has."""

    def __init__(self) -> None:
        self.own_place = place_of(os.getpid()) or ("", "")

    def of_user(self, user: int, place: Place) -> str:
        return "" if user == 0 and place == self.own_place else f"user {user} {place[0]}"

    def of_process(self, pid: int) -> str:
        user, place = _user_of(pid), place_of(pid)
        return "" if user is None or place is None else self.of_user(user, place)

    def of_any(self, pids: Iterable[int], place: Place) -> str:
        """Return the owner of what these processes have mapped: root, if one of them is root's."""
        users = [user for pid in pids if (user := _user_of(pid)) is not None]
        return self.of_user(0 if 0 in users else users[0], place) if users else ""


def place_of(pid: int) -> Place | None:
    """Return the mount namespace and the root of a process: two links, which never wait."""
    for _ in range(2):
        try:
            return os.readlink(f"/proc/{pid}/ns/mnt"), os.readlink(f"/proc/{pid}/root")  # noqa: PTH115
        except OSError:
            pid = living_thread(pid)  # the first one may have exited, and has no links then
    return None


def _user_of(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid  # noqa: PTH116 - for each file
    except OSError:
        return None


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
