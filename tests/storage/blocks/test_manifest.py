"""Manifests: what they say is read as it was written, and of two changes none undoes the other."""

import threading

import orjson
import pytest
from msgspec.structs import replace

from storage.blocks.manifest import (
    DayManifest,
    File,
    HourManifest,
    Manifests,
    Part,
    Rollup,
    Unreadable,
    block_key,
    end_ns_of,
    named_by,
    start_s_of,
)
from storage.objects.directory import DirectoryStore
from storage.profile import ProfileError, SchemaError

HOUR = "2026-11-30T09"
KEY = f"v1/default/manifests/cpu/{HOUR}.json"


def a_file(table="samples_detail", name=HOUR, content16="0" * 16):
    return File(table, block_key("default", "cpu", name, table, content16), 10, 2)


def a_part(id_="a", **changes):
    part = Part(id_, objects=1, samples=5, value=50, start_s=0, end_s=60, files=(a_file(),))
    return replace(part, **changes)


def test_what_is_written_is_read_again(either_store):
    """By another process as well, with every field."""
    whole = HourManifest(
        "cpu",
        HOUR,
        unit="nanoseconds",
        listed_ns=7,
        parts=(a_part(),),
        hourly=Rollup(("a",), (a_file("samples_1h"),)),
        unreadable=(Unreadable("k", "it is damaged", "everflame 1", 9),),
    )

    written = Manifests(either_store, "default", "cpu").change_hour(HOUR, lambda _: whole)

    assert Manifests(either_store, "default", "cpu").hour(HOUR) == written
    assert replace(written, producer="") == whole
    assert written.producer.startswith("everflame ")
    assert orjson.loads(either_store.get(KEY))["schema"] == 1


def test_no_change_is_lost_among_several_writers(either_store):
    """Eight writers add five parts each, all at once."""

    def write(number):
        manifests = Manifests(either_store, "default", "cpu")
        for i in range(5):
            part = a_part(f"{number}-{i}")
            manifests.change_hour(HOUR, lambda old, p=part: replace(old, parts=(*old.parts, p)))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    parts = Manifests(either_store, "default", "cpu").hour(HOUR).part_ids
    assert parts == tuple(sorted(f"{number}-{i}" for number in range(8) for i in range(5)))


def test_an_hour_or_day_without_a_manifest_has_no_parts(store):
    """Nothing is written by asking."""
    manifests = Manifests(store, "default", "cpu")

    assert manifests.hour(HOUR) == HourManifest("cpu", HOUR)
    assert manifests.day("2026-11-30") is None
    assert list(store.list("")) == []


@pytest.mark.parametrize(
    ("content", "error", "reason"),
    [
        (b'{"schema":2,"surprise":[1]}', SchemaError, "schema 2"),
        (b"", ProfileError, "damaged"),
        (b"[]", ProfileError, "damaged"),
        (b"\xff\xfe", ProfileError, "damaged"),
        (b"[" * 100_000, ProfileError, "damaged"),
        (b'{"type":"cpu"}', ProfileError, "damaged"),
        (b'{"type":"heap","hour":"2026-11-30T09"}', ProfileError, "something else"),
        (b'{"type":"cpu","hour":"2026-11-30T10"}', ProfileError, "something else"),
        (b'{"type":"cpu","hour":"2026-11-30T09","listed_ns":-1}', ProfileError, "damaged"),
        (
            orjson.dumps(
                {
                    "type": "cpu",
                    "hour": HOUR,
                    "hourly": {
                        "parts": [],
                        "files": [{"table": "t", "key": "v1/x/key", "bytes": 1, "rows": 1}],
                    },
                }
            ),
            ProfileError,
            "not its own",
        ),
    ],
)
def test_what_is_no_manifest_of_this_hour_is_refused_by_name(store, content, error, reason):
    """And no change replaces it: a later version may have written it."""
    store.put(KEY, content)
    manifests = Manifests(store, "default", "cpu")

    with pytest.raises(error, match=reason) as refused:
        manifests.hour(HOUR)
    with pytest.raises(error):
        manifests.change_hour(HOUR, lambda old: replace(old, parts=(a_part(),)))

    assert KEY in str(refused.value)
    assert store.get(KEY) == content
    assert manifests.list().problems.keys() == {HOUR}


def test_unknown_fields_are_ignored(store):
    """A later version may add what earlier ones can do without."""
    store.put(KEY, b'{"type":"cpu","hour":"2026-11-30T09","colour":"red"}')

    assert Manifests(store, "default", "cpu").hour(HOUR).parts == ()


def test_a_listing_reads_only_what_has_changed(tmp_path):
    """Hours and days from the first to the last, each read once until it is replaced."""
    reads: list[str] = []

    class Counting(DirectoryStore):
        def get_tagged(self, key):
            reads.append(key)
            return super().get_tagged(key)

    counting = Counting(tmp_path / "store")
    written = Manifests(counting, "default", "cpu")
    for hour in ("2026-11-29T23", HOUR, "2026-11-30T10", "2026-12-01T00"):
        written.change_hour(hour, lambda old: replace(old, unit="ns"))
    written.change_day("2026-11-30", lambda old: replace(old, unit="ns"))
    manifests = Manifests(counting, "default", "cpu")

    def listed():
        reads.clear()
        found = manifests.list("2026-11-30", "2026-11-30")
        return sorted([*found.hours, *found.days]), len(reads)

    names = ["2026-11-30", HOUR, "2026-11-30T10"]
    assert listed() == (names, 3)
    assert listed() == (names, 0)
    written.change_hour(HOUR, lambda old: replace(old, unit="other"))
    assert listed() == (names, 1)
    assert manifests.list("2026-11-30", "2026-11-30").hours[HOUR].unit == "other"


def test_rollups_are_valid_for_exactly_their_parts():
    """One part more or less, or another one: it does not count."""
    hourly = Rollup(("a", "b"), ())
    hour = HourManifest("cpu", HOUR, parts=(a_part("b"), a_part("a")), hourly=hourly)
    more = replace(hour, parts=(*hour.parts, a_part("c")))
    less = replace(hour, parts=hour.parts[:1])
    day = DayManifest("cpu", "2026-11-30", hours={"09": ("a", "b"), "10": ("d",)})
    ten = HourManifest("cpu", "2026-11-30T10", parts=(a_part("d"),))
    empty = HourManifest("cpu", "2026-11-30T11")
    other = replace(ten, hour="2026-11-30T12")

    assert [each.has_hourly for each in (hour, more, less)] == [True, False, False]
    assert not replace(hour, hourly=None).has_hourly
    assert all(map(day.holds, (hour, ten)))
    assert not any(map(day.holds, (more, less, empty, other)))


def test_names_say_which_time_they_are_of():
    """Of hours and days, and of the files that their manifests name."""
    assert start_s_of("2026-11-30T09") == start_s_of("2026-11-30") + 9 * 3600
    assert end_ns_of("2026-11-30") == (start_s_of("2026-11-30") + 86400) * 10**9
    assert named_by(block_key("default", "cpu", HOUR, "stacks", "0" * 16)) == HOUR
    assert named_by(block_key("default", "cpu", "2026-11-30", "stacks", "0" * 16)) == "2026-11-30"
    assert named_by("v1/default/blocks/cpu/2026-11-30/note.txt") == ""
