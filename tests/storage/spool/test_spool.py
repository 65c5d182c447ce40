"""The spool: closed profiles are kept within a bound, and those given up are still counted."""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given

from storage.formats import pprof
from storage.objects.keys import ObjectKey
from storage.profile import Host, Profile
from storage.spool.spool import Spool, tombstone
from storage.spool.upload_queue import UploadQueue, usage
from tests.support.file_systems import fill, small
from tests.support.profiles import profiles
from tests.support.windows import SIZE_BYTES, START_S, minutes, once, window


def contents(folder: Path) -> list[Profile]:
    """Return the waiting profiles of a spool, oldest first."""
    queue = UploadQueue(folder)
    waiting = queue.pending(1_000_000)
    found = [queue.read(each) for each in waiting]
    return [pprof.decode(content) for content in found if content is not None]


def test_a_profile_is_spooled_as_it_was_given(tmp_path: Path) -> None:
    spool = Spool(tmp_path)

    spool.add(window(7))

    assert contents(tmp_path) == [window(7)]


def test_the_oldest_profile_is_first_whatever_came_first(tmp_path: Path) -> None:
    """Also over several hours."""
    spool = Spool(tmp_path)
    for number in (200, 3, 61, 0, 119):
        spool.add(window(number))

    pending = UploadQueue(tmp_path).pending(3)

    assert [each.key.start_s for each in pending] == [START_S + 60 * n for n in (0, 3, 61)]


def test_the_same_profile_twice_is_one(tmp_path: Path) -> None:
    spool = Spool(tmp_path)

    spool.add(window(1))
    spool.add(window(1))

    assert spool.status().profiles == 1


def test_a_profile_that_an_earlier_version_has_spooled_keeps_its_key(tmp_path: Path) -> None:
    """That version may have stored it under this key already; the key had no type."""
    spool, queue = Spool(tmp_path), UploadQueue(tmp_path)
    spool.add(window(1))
    (spooled,) = queue.pending(1)
    untyped = spooled.key._replace(has_type=False)
    spooled.path.rename(tmp_path / "waiting" / untyped.text.replace("/", "+"))

    (found,) = queue.pending(1)

    assert "+cpu+" in spooled.path.name
    assert "+cpu+" not in found.path.name
    assert found.key.text == untyped.text
    assert queue.read(found) is not None


def test_a_claimed_profile_comes_first_and_is_claimed_once(tmp_path: Path) -> None:
    """The store may have it already: that is settled before anything else."""
    spool, queue = Spool(tmp_path), UploadQueue(tmp_path)
    for number in range(4):
        spool.add(window(number))
    third = queue.pending(3)[2]

    claimed = queue.claim(third)

    assert claimed is not None
    assert queue.claim(claimed) == claimed
    assert queue.claim(third) is None
    assert [each.key.start_s - START_S for each in queue.pending(2)] == [120, 0]


@given(profiles())
def test_a_tombstone_keeps_every_count_but_the_stacks(profile: Profile) -> None:
    """Stored samples become lost to the full spool; the law of conservation holds."""
    before, after = profile.accounting, tombstone(profile).accounting

    assert after.mismatch == before.mismatch
    assert after.lost.get("spool_full", 0) - before.lost.get("spool_full", 0) == before.stored
    assert (after.stored, after.stops, after.misses) == (0, {}, {})
    assert (after.ticks, after.services, after.hosts) == (
        before.ticks,
        before.services,
        before.hosts,
    )
    assert tombstone(profile).total_samples == 0


def test_a_full_spool_gives_up_the_oldest_and_counts_it(tmp_path: Path) -> None:
    """The newest keep their stacks, and the bound holds at every moment."""
    limit_bytes = 12 * SIZE_BYTES
    spool = Spool(tmp_path, limit_bytes)

    for number in range(50):
        spool.add(window(number))
        assert usage(tmp_path)[1] <= limit_bytes

    found = contents(tmp_path)
    whole = [profile for profile in found if profile.total_samples]
    assert minutes(found) == once(*range(50))
    assert [*whole] == [window(number) for number in range(50 - len(whole), 50)]
    assert len(whole) >= 9
    assert spool.status().given_up == 50 - len(whole)
    given_up = [window(number) for number in range(50 - len(whole))]
    assert spool.status().lost_samples == sum(each.total_samples for each in given_up)


def test_samples_of_an_earlier_process_are_not_lost_by_this_one(tmp_path: Path) -> None:
    """They were never counted as stored by it."""
    for number in range(3):
        Spool(tmp_path, 5 * SIZE_BYTES).add(window(number))
    spool = Spool(tmp_path, 5 * SIZE_BYTES)

    for number in range(3, 12):
        spool.add(window(number))

    whole = sum(profile.total_samples > 0 for profile in contents(tmp_path))
    given_up = [window(number) for number in range(3, 12 - whole)]
    assert spool.status().given_up == 3 + len(given_up)
    assert spool.status().lost_samples == sum(each.total_samples for each in given_up) > 0


def test_the_tombstones_of_an_hour_are_one_file(tmp_path: Path) -> None:
    """So an outage of weeks stays within the bound. Hosts and hours are never mixed."""
    spool = Spool(tmp_path, SIZE_BYTES - 1)
    other = Host("web-2", "00112233445566bb")

    for number in range(150):
        spool.add(window(number))
    for number in range(150, 153):
        spool.add(window(number, other))

    found = contents(tmp_path)
    hours = [(p.accounting.hosts, p.window.start_ns // 3_600_000_000_000) for p in found]
    assert minutes(found) == once(*range(153))
    assert len(hours) == len(set(hours)) == 4
    assert all(p.window.end_ns - p.window.start_ns <= 3_600_000_000_000 for p in found)


@pytest.mark.parametrize("step", [-60, 60])
@pytest.mark.parametrize("limit_bytes", [SIZE_BYTES - 1, 8 * SIZE_BYTES, 1000 * SIZE_BYTES])
def test_windows_on_both_sides_of_a_clock_step_are_all_kept(
    tmp_path: Path, step: int, limit_bytes: int
) -> None:
    """The clock was set by an hour: minutes come twice, or are missing; no count is either."""
    spool = Spool(tmp_path, limit_bytes)

    for number in range(0, 120, 4):
        told = window(number + step if number >= 72 else number).window
        spool.add(replace(window(number), window=told))

    found = contents(tmp_path)
    assert minutes(found) == once(*range(0, 120, 4))
    assert all(p.window.end_ns - p.window.start_ns <= 3_600_000_000_000 for p in found)
    assert spool.status().unwritten_ticks == 0


def test_a_profile_larger_than_the_spool_is_counted(tmp_path: Path) -> None:
    spool = Spool(tmp_path, SIZE_BYTES - 1)

    spool.add(window(1))

    (found,) = contents(tmp_path)
    assert found == tombstone(window(1))
    assert spool.status().given_up == 1
    assert spool.status().lost_samples == window(1).total_samples


def test_a_claimed_profile_is_never_given_up(tmp_path: Path) -> None:
    """The store may have it already, and a tombstone would count it again."""
    spool, queue = Spool(tmp_path, 6 * SIZE_BYTES), UploadQueue(tmp_path)
    spool.add(window(0))
    claimed = queue.claim(queue.pending(1)[0])

    for number in range(1, 20):
        spool.add(window(number))

    assert claimed is not None
    content = queue.read(claimed)
    assert content is not None
    assert pprof.decode(content) == window(0)
    assert minutes(contents(tmp_path)) == once(*range(20))


def test_a_tombstone_being_sent_is_not_joined(tmp_path: Path) -> None:
    spool, queue = Spool(tmp_path, 4 * SIZE_BYTES), UploadQueue(tmp_path)
    for number in range(6):
        spool.add(window(number))
    for pending in queue.pending(1):
        queue.claim(pending)

    for number in range(6, 12):
        spool.add(window(number))

    found = contents(tmp_path)
    assert minutes(found) == once(*range(12))
    assert [p.total_samples for p in found].count(0) == 2


def test_a_crash_loses_only_profiles_that_were_not_closed(tmp_path: Path) -> None:
    Spool(tmp_path).add(window(1))
    (tmp_path / "partial" / "v1+half").write_bytes(b"half a profile")

    spool = Spool(tmp_path)

    assert list((tmp_path / "partial").iterdir()) == []
    assert spool.status().profiles == 1


def test_giving_up_is_undone_after_a_crash_before_the_merge(tmp_path: Path) -> None:
    """Without a merged file, its parts count."""
    Spool(tmp_path).add(window(1))
    (waiting,) = (tmp_path / "waiting").iterdir()
    waiting.rename(tmp_path / "giving-up" / waiting.name)

    Spool(tmp_path)

    assert contents(tmp_path) == [window(1)]


def test_giving_up_is_finished_after_a_crash(tmp_path: Path) -> None:
    """Once the merged file exists, it counts, and its parts do not."""
    donor = Spool(tmp_path / "donor", SIZE_BYTES - 1)
    donor.add(window(1))
    (merged,) = (tmp_path / "donor/tombstones").iterdir()
    Spool(tmp_path / "spool").add(window(1))
    (waiting,) = (tmp_path / "spool/waiting").iterdir()
    waiting.rename(tmp_path / "spool/giving-up" / waiting.name)
    merged.rename(tmp_path / "spool/giving-up" / (merged.name + ".merged"))

    Spool(tmp_path / "spool")

    assert contents(tmp_path / "spool") == [tombstone(window(1))]


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[: len(content) // 2], lambda _: b"", lambda _: bytes(20_000)],
    ids=["truncated", "empty", "zeros"],
)
def test_a_damaged_file_is_quarantined_and_counted(tmp_path: Path, damage) -> None:
    """Giving up continues with the next one, and the damaged one is not tried again."""
    spool = Spool(tmp_path, 4 * SIZE_BYTES)
    spool.add(window(0))
    (path,) = (tmp_path / "waiting").iterdir()
    path.write_bytes(damage(path.read_bytes()))

    for number in range(1, 8):
        spool.add(window(number))

    assert spool.status().damaged == 1
    assert [each.name for each in (tmp_path / "damaged").iterdir()] == [path.name]
    assert minutes(contents(tmp_path)) == once(*range(1, 8))


def test_only_the_last_damaged_files_are_kept(tmp_path: Path) -> None:
    spool, queue = Spool(tmp_path), UploadQueue(tmp_path)
    for number in range(30):
        spool.add(window(number))

    for each in queue.pending(30):
        queue.quarantine(each)
        os.utime(tmp_path / "damaged" / each.path.name, (time.time(), each.key.start_s))

    starts = [_start_s(path) for path in (tmp_path / "damaged").iterdir()]
    assert sorted(starts) == [START_S + 60 * number for number in range(14, 30)]


def _start_s(path: Path) -> int:
    key = ObjectKey.parse(path.name.replace("+", "/"))
    assert key is not None
    return key.start_s


@pytest.mark.parametrize(
    "name",
    ["..+..+etc+passwd", "v1+default+l0+x", "+", "notes.txt", "v1+..+l0+2026+a+1-1-0.pb.gz", "\n"],
)
def test_files_with_hostile_names_are_neither_sent_nor_touched(tmp_path: Path, name: str) -> None:
    spool = Spool(tmp_path, 4 * SIZE_BYTES)
    (tmp_path / "waiting" / name).write_text("not a profile")

    for number in range(6):
        spool.add(window(number))

    assert minutes(contents(tmp_path)) == once(*range(6))
    assert (tmp_path / "waiting" / name).read_text() == "not a profile"


def test_the_spool_belongs_to_its_owner_alone(tmp_path: Path) -> None:
    os.umask(0)
    try:
        Spool(tmp_path / "spool").add(window(1))
    finally:
        os.umask(0o022)

    for path in (tmp_path / "spool", *(tmp_path / "spool").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)


def test_a_spool_that_was_removed_is_made_again(tmp_path: Path) -> None:
    """Only what waited in it is gone: the next window is kept with its stacks."""
    spool = Spool(tmp_path / "spool")
    first, second = window(0), window(1)
    spool.add(first)
    shutil.rmtree(tmp_path / "spool")

    spool.add(second)

    assert contents(tmp_path / "spool") == [second]
    assert spool.status().unwritten_ticks == 0
    assert spool.status().last_error == ""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a disk of 512 KB, mounted for the test."""
    with small(tmp_path, 512 << 10) as disk:
        yield disk


@pytest.mark.kernel
def test_a_full_disk_is_like_a_full_spool(small_disk: Path) -> None:
    """Only the spool fills it: the oldest become tombstones, and every tick is accounted for."""
    spool = Spool(small_disk / "spool")

    for number in range(100):
        spool.add(window(number))

    found = contents(small_disk / "spool")
    whole = [profile for profile in found if profile.total_samples]
    assert minutes(found) == once(*range(100))
    assert len(whole) >= 20
    assert whole[-1] == window(99)
    assert spool.status().unwritten_ticks == 0


@pytest.mark.kernel
def test_counts_stay_in_memory_while_others_fill_the_disk(small_disk: Path) -> None:
    """The status says so; once there is space they are written, and none is missing."""
    spool = Spool(small_disk / "spool")
    spool.add(window(0))
    fill(small_disk / "hog")
    for path in (small_disk / "spool/reserve", *(small_disk / "spool/waiting").iterdir()):
        path.unlink()  # and then somebody takes what that has freed
    fill(small_disk / "second hog")

    for number in range(1, 100):
        spool.add(window(number))

    status = spool.status()
    assert status.unwritten_ticks == sum(window(n).accounting.ticks for n in range(1, 100))
    assert "No space left" in status.last_error
    assert contents(small_disk / "spool") == []
    (small_disk / "hog").unlink()

    spool.add(window(100))

    assert minutes(contents(small_disk / "spool")) == once(*range(1, 101))
    assert spool.status().unwritten_ticks == 0
    assert spool.status().last_error == ""
