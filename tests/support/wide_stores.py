"""Wide stores: one that has of everything a wide window can be read from, and all answers of it."""

from pathlib import Path
from typing import Any

import numpy as np

from storage.objects.directory import DirectoryStore
from storage.objects.keys import NS_PER_S
from storage.profile import Profile, Window
from storage.query.listing import HOUR_NS
from storage.query.query import Query
from storage.selector import Selector
from symbolizer.location import ElfAddress, Frame, Kind, bounded
from tests.support import compacted
from tests.support import profiles as some
from tests.support.stores import MINUTE_NS, START_NS, at, put

DAY_NS = 24 * HOUR_NS
DAY = Window(START_NS // DAY_NS * DAY_NS, (START_NS // DAY_NS + 1) * DAY_NS)
"""Most of it is level 0."""
BEFORE = Window(DAY.start_ns - DAY_NS, DAY.start_ns)
"""A day that is summed up, and has nothing left at level 0."""
RAGGED = Window(BEFORE.start_ns + 7 * MINUTE_NS, DAY.start_ns + 17 * HOUR_NS + 13 * MINUTE_NS + 7)
DAMAGED_MINUTE = 405
OBJECTS = 4 * 21 + 2
"""At level 0: the last ones are the late one and the damaged one."""
SELECTORS = [
    Selector.parse(text) for text in ("{}", '{service="api"}', '{host="web-1"}', '{pid="71"}')
]


def minute(number: int, host: int) -> Profile:
    """Return a minute of a host. What it calls a location was not known everywhere, or later."""
    is_named = number > 700 and host == 1
    name = Frame("parse", "api", Kind.NATIVE, "parse.c", number)
    names = name if is_named else bounded("api", Kind.NATIVE, ElfAddress(0x401200))
    rows = [
        ({"service": "api", "version": f"1.{number % 3}", "comm": "api", "pid": f"{70 + host}"},
         [some.MAIN, some.WORK], number % 7 + 1),
        ({"service": "jobs", "comm": "jobs", "pid": str(number % 5)},
         [some.HANDLER, some.named(f"job_{number % 11}"), some.WORK], host + 1),
    ]  # fmt: skip
    profile = some.build(rows, {**some.NAMES, some.WORK: (names,)})
    minutes = (DAY.start_ns - START_NS) // MINUTE_NS + number
    return at(profile, minutes, f"web-{host}", f"{host:016x}")


def fill(root: Path, folder: Path) -> DirectoryStore:
    """Make the store: a day summed up, two hours compacted, 14 of level 0; one object is damaged.

    Two hosts have some objects in each hour; those of level 0 are in spans of two.
    """
    store = DirectoryStore(root)
    for number in (*range(-1440, -1200, 24), *range(0, 120, 24)):
        for host in range(2):
            put(store, minute(number, host))
    compacted.compact(store, folder, has_rollups=True)
    compacted.delete(store, compacted.level0(store))
    for number in range(120, 960, 40):
        for host in range(2):
            put(store, minute(number, host))
            put(store, minute(number + 2, host))
    put(store, minute(30, 2))  # late: its hour is compacted already
    key = put(store, minute(DAMAGED_MINUTE, 1))
    store.delete(key.text)
    store.put(key.text, b"damaged")
    assert len(compacted.level0(store)) == OBJECTS
    return store


def answers(query: Query, window: Window, selector: Selector) -> dict[str, Any]:
    """Return what is known of a window, in forms that can be compared."""
    found = {}
    for labels in (None, frozenset({"service"})):
        answer = query.profile(window, selector, labels=labels)
        found[f"profile {labels}"] = answer.profile.to_profile(), answer.coverage
    line = query.timeline(window, selector, 600 * NS_PER_S, ("service", "host"))
    found["timeline"] = _plain(line)
    for by in (("service",), ("pid",), ("host",)):
        functions = query.functions(window, selector, by)
        found[f"functions by {by}"] = sorted(functions.rows), functions.coverage
    found["labels"] = query.labels(window, selector)
    samples = [
        (number, *map(int, (function, each)))
        for number, part in query.self_samples([window], selector)
        for function, each in zip(part.function_hashes[part.lines[:, 1]], part.samples, strict=True)
    ]
    found["self samples"] = _sum(samples)
    presence = query.presence(window, selector)
    found["presence"] = _plain(presence)
    return found


def _sum(samples: list[tuple[int, int, int]]) -> dict[tuple[int, int], int]:
    sums: dict[tuple[int, int], int] = {}
    for number, function, count in samples:
        sums[number, function] = sums.get((number, function), 0) + count
    return sums


def _plain(value: Any) -> Any:
    """Return a value whose arrays are lists."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if hasattr(value, "__dataclass_fields__"):
        return [(name, _plain(getattr(value, name))) for name in value.__dataclass_fields__]
    return value
