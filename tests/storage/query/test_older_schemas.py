"""Stores that older versions compacted: answers are level 0's, and newer parts go beside them."""

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from profiler.commands.verify import verify_store
from storage.blocks.compactor import Compactor
from storage.blocks.day import renew_day
from storage.blocks.merges import merge, roll_up
from storage.blocks.schema import SCHEMA
from storage.formats import pprof
from storage.objects.directory import DirectoryStore
from storage.objects.keys import CPU, DEFAULT_TENANT
from storage.objects.tenant import TenantStore
from storage.profile import ALWAYS, Window
from storage.query import blocks
from storage.query.query import Query
from storage.selector import EMPTY, Selector
from tests.storage.query.test_compacted import by_service, check_equal
from tests.support.compaction import DAY_START_S, HOUR_S, NS, compactor_of, hour_name, profile

GOLDEN = Path(__file__).parents[2] / "golden"
HOURS = (3, 4, 9)
DAY = hour_name(DAY_START_S)[:10]
SELECTORS = (EMPTY, Selector.parse('{host="host-2"}'), Selector.parse('{service=~"s.*"}'))


def window(first: float, last: float) -> Window:
    """A window between two hours of the day."""
    return Window(*(round((DAY_START_S + hour * HOUR_S) * NS) for hour in (first, last)))


WINDOWS = (window(3, 10), window(3, 5), window(3.2, 4.4), window(9, 9.5))


class Older:
    """What schema 1 compacted: three hours, the first in two parts, and a day of two of them."""

    def __init__(self, folder: Path) -> None:
        shutil.unpack_archive(GOLDEN / "schema-1.zip", folder / "store")
        self.store, self.plain = (DirectoryStore(folder / name) for name in ("store", "plain"))
        key = f"v1/{DEFAULT_TENANT}/key"
        self.plain.put(key, self.store.get(key))
        self.folder = folder
        number = 0
        for hour, count in zip(HOURS, (6, 3, 3), strict=True):
            for _ in range(count):
                self.put(hour, number, self.plain)
                number += 1

    def put(self, hour: int, number: int, *stores: DirectoryStore) -> None:
        start_s = DAY_START_S + hour * HOUR_S + 420 * (number % 8)
        made = profile(start_s, 1 + number % 3, number)
        for store in stores:
            TenantStore(store).put_profile(made, pprof.encode(made))

    def compactor(self) -> Compactor:
        return compactor_of(self.store, self.folder / "work", DAY_START_S + 10 * HOUR_S + 600)

    def check(self, name: str, windows: Sequence[Window] = WINDOWS[1:3]) -> None:
        """Compare answers from detail and from rollups with those of the objects."""
        plain, query = (
            Query(TenantStore(each), self.folder / f"{name}-{each.root.name}")
            for each in (self.plain, self.store)
        )
        for asked, selector in zip(windows, itertools.cycle(SELECTORS), strict=False):
            check_equal(plain, query, asked, selector)
            answers = [
                each.profile(asked, labels=frozenset({"service"})) for each in (plain, query)
            ]
            assert by_service(answers[1].profile) == by_service(answers[0].profile)
        assert verify_store(TenantStore(self.store), ALWAYS).is_ok


@pytest.fixture
def older(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "_MANY_ROWS", 0)  # rollups are read of small stores, too
    return Older(tmp_path)


def test_what_schema_1_compacted_is_read(older):
    """From detail, rollups of ten minutes and hours, and from the day."""
    older.check("as it was", WINDOWS)


def test_what_schema_1_compacted_is_merged_with_newer_parts(older):
    """Late objects of each hour make parts of this version: read beside older ones, then merged."""
    for number, hour in enumerate(HOURS, 20):
        older.put(hour, number, older.plain, older.store)
        older.compactor().fold(hour_name(DAY_START_S + hour * HOUR_S))
    older.check("beside")

    compactor = older.compactor()
    for name in map(hour_name, (DAY_START_S + hour * HOUR_S for hour in HOURS)):
        merge(compactor, name)
        assert roll_up(compactor, name)
    older.check("merged")
    assert renew_day(compactor, DAY)
    older.check("in the day")
    assert SCHEMA > 1
    assert compactor.manifests.list().days[DAY].hours.keys() == {f"{hour:02}" for hour in HOURS}
    assert compactor.type == CPU
