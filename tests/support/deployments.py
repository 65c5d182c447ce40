"""A store of services that are deployed: one gets slower, one faster, one stays, one is too new."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from storage.objects.directory import DirectoryStore
from storage.profile import Profile
from tests.support import profiles as some
from tests.support.stores import MINUTE_NS, START_NS, at, directory, minutes

NEW_AT, MINUTES = 120, 136
"""The minute from which on three services run another version, and where the data end."""
ALL = minutes(0, MINUTES + 60)
HOSTILE = '<img src=x onerror="window.hacked = 1">\u202e\x1b[31m'
SHOWN_HOSTILE = '<img src=x onerror="window.hacked = 1">\\u202e\\x1b[31m'
_STEPS = [f"step_{i:02}" for i in range(16)]


def minute_of(rng: np.random.Generator, number: int, host: int = 0, moved: int = 0) -> Profile:
    """Return a minute of all services on a host, so many later; functions vary by 3 %."""
    is_new = number >= NEW_AT
    version = "2.0" if is_new else "1.0"
    stacks: dict[tuple[str, str], dict[str, float]] = {
        ("slower", version): _rates(1.6 if is_new else 1.0) | ({HOSTILE: 120.0} if is_new else {}),
        ("faster", version): _rates(0.5 if is_new else 1.0),
        ("calm", version): _rates(1.0),
        ("fresh", "8" if number >= MINUTES - 2 else "7"): {"wait": 50.0},
    }
    return _profile(rng, number + moved, host, stacks)


def _rates(grown: float) -> dict[str, float]:
    return {name: 900 / (i + 2) for i, name in enumerate(_STEPS)} | {"parse": 600 * grown}


def _profile(
    rng: np.random.Generator,
    number: int,
    host: int,
    stacks: dict[tuple[str, str], dict[str, float]],
) -> Profile:
    rows = []
    for (service, version), rates in stacks.items():
        labels = {"service": service, "version": version, "comm": service}
        for name, rate in rates.items():
            samples = int(rng.poisson(rate * np.exp(rng.normal(0, 0.03))))
            rows.append((labels, [some.named("main"), some.named(name)], samples))
    profile = some.build([row for row in rows if row[2]])
    present = {
        some.make_labels({"service": service, "version": version}): MINUTE_NS
        for service, version in stacks
    }
    accounting = dataclasses.replace(profile.accounting, services=present)
    whole = dataclasses.replace(profile, accounting=accounting)
    return at(whole, number, f"web-{host}", f"{host:016x}")


def fill(folder: Path, until: int = MINUTES, moved: int = 0) -> DirectoryStore:
    """Write the minutes of a host."""
    rng = np.random.default_rng(11)
    made = (minute_of(rng, number, moved=moved) for number in range(until))
    return directory(folder, *made)


def until_now() -> int:
    """Return by how many minutes to move them so that they end a few minutes ago."""
    return (time.time_ns() - START_NS) // MINUTE_NS - MINUTES - 3


def calm_minutes(rng: np.random.Generator, versions: int) -> Iterator[Profile]:
    """Return minutes of a service that gets another version every twelve minutes."""
    for number in range(12 * versions):
        yield _profile(rng, number, 0, {("calm", str(number // 12)): _rates(1.0)})
