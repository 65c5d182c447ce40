"""What is read of a fleet: the coarsest files that answer; as if all hours were large."""

from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from storage.blocks.compactor import Compactor
from storage.blocks.day import renew_day
from storage.blocks.manifest import DayManifest, Manifests
from storage.blocks.merges import roll_up
from storage.objects.directory import DirectoryStore
from storage.objects.keys import DEFAULT_TENANT
from storage.objects.tenant import TenantStore
from storage.objects.tenant_key import KEY_BYTES
from storage.profile import Window
from storage.query import blocks
from storage.query.query import Query
from storage.selector import Selector
from tests.support import profiles as some
from tests.support.stores import MINUTE_NS, START_NS, at, minutes, put

DAY_NS = 86400 * 10**9
DAY = Window(START_NS // DAY_NS * DAY_NS, (START_NS // DAY_NS + 1) * DAY_NS)
MADE = {0: 3, 20: 4, 70: 5, 130: 6}
"""Samples by minute, of three hours."""
TOTAL = sum(MADE.values())
OF_SERVICE = frozenset({"service"})


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A day of which all is compacted and rolled up, and nothing is left at level 0."""
    monkeypatch.setattr(blocks, "_MANY_ROWS", -1)
    monkeypatch.setattr(blocks, "_MANY_HEADS", -1)
    made = DirectoryStore(tmp_path / "store")
    made.put(f"v1/{DEFAULT_TENANT}/key", b"k" * KEY_BYTES)
    keys = []
    for minute, samples in MADE.items():
        labels = {"service": "api", "version": f"1.{minute % 3}", "comm": "c"}
        rows = [(labels, [some.MAIN, some.WORK], samples)]
        keys.append(put(made, at(some.build(rows, some.NAMES), minute, f"web-{minute % 4}")))
    with ThreadPoolExecutor(1) as executor:
        compactor = Compactor(TenantStore(made), tmp_path / "work", executor)
        for hour in list(compactor.occupied_hours()):
            compactor.fold(hour)
            assert roll_up(compactor, hour)
        assert renew_day(compactor, hour[:10])
    for key in keys:
        made.delete(key.text)
    return made


def ask(store, folder):
    return Query(TenantStore(store), folder / "cache")


def remove(store, *patterns):
    """Remove files; some hour has each of them."""
    for pattern in patterns:
        found = list(store.root.rglob(pattern))
        assert found, pattern
        for path in found:
            path.unlink()


def by_step(query, window, step_ns):
    (series,) = query.timeline(window, step_ns=step_ns, by=("service",), is_aligned=True).series
    return [each for each in series.samples.tolist() if each]


def test_a_whole_day_is_read_from_its_own_files(store, tmp_path):
    """Nothing of its hours is fetched: neither samples nor what is known of their objects."""
    hour = START_NS // (60 * MINUTE_NS) % 24
    for each in range(hour, hour + 3):
        remove(store, f"{each:02}-*.parquet")
    query = ask(store, tmp_path)

    answer = query.profile(DAY, labels=OF_SERVICE)

    assert answer.coverage.skipped == ()
    assert (answer.profile.total_samples, answer.coverage.objects) == (TOTAL, len(MADE))
    assert by_step(query, DAY, 10 * MINUTE_NS) == list(MADE.values())
    assert query.labels(DAY)["host"] == {"web-0": 7, "web-2": 11}
    two = query.profile(minutes(0, 120), Selector.parse('{version="1.0"}'), labels=OF_SERVICE)
    assert two.profile.total_samples == 3
    assert two.coverage.skipped == ()


@pytest.mark.parametrize("table", ["samples_1d", "stacks", "objects_10m", "label_sets"])
def test_hours_answer_where_their_day_cannot_be_read(store, tmp_path, table):
    """Each from its own files, with the same result."""
    for path in store.root.rglob(f"dd-{table}-*.parquet"):
        path.write_bytes(b"damaged")
    query = ask(store, tmp_path)

    answer = query.profile(DAY, labels=OF_SERVICE)

    assert answer.coverage.skipped == ()
    assert (answer.profile.total_samples, answer.coverage.objects) == (TOTAL, len(MADE))
    assert by_step(query, DAY, 10 * MINUTE_NS) == list(MADE.values())


def test_a_day_is_read_from_lists_where_its_tree_cannot_be_read(store, tmp_path):
    """Also if nothing else is left of its hours."""
    for path in store.root.rglob("manifests/cpu/*T*.json"):
        path.unlink()
    remove(store, "*-stack_tree-*.parquet")

    answer = ask(store, tmp_path).profile(DAY, labels=OF_SERVICE)

    assert not answer.coverage.skipped
    assert answer.profile.total_samples == TOTAL


def test_a_single_hour_is_read_from_its_own_files_where_its_day_cannot_be_read(store, tmp_path):
    remove(store, "dd-samples_1h-*.parquet", "dd-times_10m-*.parquet")
    query, samples = ask(store, tmp_path), MADE[0] + MADE[20]

    answer = query.profile(minutes(0, 60), labels=OF_SERVICE)

    assert not answer.coverage.skipped
    assert answer.profile.total_samples == samples
    assert sum(by_step(query, minutes(0, 60), 10 * MINUTE_NS)) == samples


def test_edges_are_read_from_ten_minutes(store, tmp_path):
    """Where they are aligned, detail is not fetched; elsewhere it is."""
    remove(store, "*-samples_detail-*")
    query = ask(store, tmp_path)

    aligned = query.profile(minutes(20, 80), labels=OF_SERVICE)
    ragged = query.profile(minutes(11, 75), labels=OF_SERVICE)

    assert aligned.coverage.skipped == ()
    assert aligned.profile.total_samples == 4 + 5
    assert "there is no object" in ragged.coverage.skipped[0].reason


@pytest.mark.parametrize("edge", [120, 125])
def test_presence_has_a_line_for_each_host_between_edges(store, tmp_path, edge):
    """On both sides of an edge if a host has objects there, also inside of ten minutes."""
    query = ask(store, tmp_path)

    whole = query.presence_by_host(DAY)
    cut = query.presence_by_host(DAY, edges_ns=[minutes(edge, 180).start_ns])

    assert len(whole.objects) == 2
    assert len(cut.objects) == 3
    assert sorted(start - START_NS for start, _ in cut.objects.tolist()) == [
        minute * MINUTE_NS for minute in (0, 70, 130)
    ]
    for each in (whole, cut):
        assert each.coverage.objects == len(MADE)
        assert {dict(labels)["host"] for labels in each.label_sets} == {"web-0", "web-2"}
        assert each.rows[:, 2].sum() == sum(each.coverage.accounting.services.values()) > 0


def test_days_whose_hours_have_expired_show(store, tmp_path):
    """First by hour, then as a whole; timelines, labels and where data are stay exact."""
    manifests = Manifests(store, DEFAULT_TENANT, "cpu")
    listed = manifests.list()
    for name in listed.hours:
        manifests.delete(name)
        remove(store, f"{name[-2:]}-*.parquet")
    (day,) = listed.days
    by_hour = ask(store, tmp_path).profile(minutes(60, 180), labels=OF_SERVICE)

    def without_hours(manifest: DayManifest) -> DayManifest:
        kept = tuple(file for file in manifest.files if file.table != "samples_1h")
        return msgspec.structs.replace(manifest, files=kept)

    manifests.change_day(day, without_hours)
    query = ask(store, tmp_path / "empty")
    answers = [query.profile(DAY), query.profile(DAY, labels=OF_SERVICE)]
    late = query.profile(minutes(60, 180), labels=OF_SERVICE)

    assert (by_hour.profile.total_samples, by_hour.coverage.skipped) == (11, ())
    for answer in answers:
        assert answer.coverage.skipped == ()
        assert (answer.profile.total_samples, answer.coverage.objects) == (TOTAL, len(MADE))
    assert late.profile.total_samples == 0
    assert "steps of 1440 minutes" in late.coverage.skipped[0].reason
    assert by_step(query, DAY, 60 * MINUTE_NS) == [7, 5, 6]
    assert query.labels(DAY)["service"] == {"api": TOTAL}
    assert query.has_data(DAY)
    assert not query.has_data(minutes(140, 150))
    assert query.span() == minutes(0, 180)
    assert query.nearest(minutes(-30, -10)) == [minutes(0, 10)]


def test_a_profile_that_was_kept_is_not_read_again(store, tmp_path):
    """By another process, over the same cache."""
    first = ask(store, tmp_path).profile(DAY, labels=OF_SERVICE)
    remove(store, "dd-stacks-*.parquet")

    again = ask(store, tmp_path).profile(DAY, labels=OF_SERVICE)

    assert again.coverage == first.coverage
    assert again.profile.total_samples == TOTAL
