"""What is read of one host of many: few of the files, and nothing silently left out."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from storage.blocks import tables
from storage.blocks.checking import check_compacted
from storage.blocks.compactor import Compactor
from storage.blocks.manifest import File, Manifests
from storage.blocks.merges import merge
from storage.blocks.parquet import engine
from storage.blocks.times import having_hosts
from storage.objects.keys import CPU, DEFAULT_TENANT, hour_of
from storage.objects.tenant import TenantStore
from storage.profile import Window
from storage.query import blocks
from storage.selector import Selector
from tests.storage.query.test_compacted import Compacted, counts_of, small
from tests.support.stores import START_NS, at, minutes

HOUR = hour_of(START_NS // 10**9)
HOSTS = 4
ALL = minutes(0, 60)
LATE = minutes(30, 60)


def on(host: int) -> Selector:
    return Selector.parse(f'{{host="web-{host}"}}')


@pytest.fixture(scope="module", params=["folded", "merged"])
def made(tmp_path_factory, request) -> Path:
    """An hour of some hosts in two parts, or one, whose detail is in a file for each host."""
    folder = tmp_path_factory.mktemp("made")
    both = Compacted(folder)
    with mock.patch.object(tables, "_DETAIL_BYTES", 1):
        for minute in (1, 40):
            keys = []
            for host in range(HOSTS):
                profile = at(small(10 * host + minute), minute, f"web-{host}", f"{host:016x}")
                keys.append(both.put(profile))
            both.compact()
            both.expire(keys)
        if request.param == "merged":
            with ThreadPoolExecutor(1) as executor:
                compactor = Compactor(TenantStore(both.store), folder / "work", executor)
                assert merge(compactor, HOUR) == 1
    return folder


@pytest.fixture
def compacted(made, tmp_path) -> Compacted:
    for name in ("plain", "store"):
        shutil.copytree(made / name, tmp_path / name)
    return Compacted(tmp_path)


def manifest_path(both: Compacted) -> Path:
    return next(both.store.root.rglob("manifests/cpu/*.json"))


def parts_of(both: Compacted) -> tuple[Any, ...]:
    return Manifests(both.store, DEFAULT_TENANT, CPU).hour(HOUR).parts


def change_files(both: Compacted, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change what a manifest says of the files of detail, part by part."""
    path = manifest_path(both)
    manifest = json.loads(path.read_bytes())
    for part in manifest["parts"]:
        change([file for file in part["files"] if file["table"] == "samples_detail"])
    path.write_bytes(json.dumps(manifest).encode())


def remove(both: Compacted, files: Iterable[File]) -> None:
    for file in files:
        both.store.delete(file.key)


def details(part: Any) -> list[File]:
    return sorted(part.files_of("samples_detail"), key=lambda file: file.hosts)


def ask(both: Compacted, folder: Path, window: Window, selector: Selector) -> Any:
    return both.queries(folder)[1].profile(window, selector)


def expected(both: Compacted, folder: Path, window: Window, selector: Selector) -> Any:
    return counts_of(both.queries(folder)[0].profile(window, selector).profile)


def test_each_host_is_in_one_file_of_a_part(compacted, tmp_path):
    """Files have successive hosts, and the manifest says which."""
    for part in parts_of(compacted):
        ranges = [file.hosts for file in details(part)]
        assert len(ranges) == HOSTS
        assert all(one[1] < other[0] for one, other in itertools.pairwise(ranges))
    (checked,) = check_compacted(TenantStore(compacted.store), CPU, ALL, tmp_path / "checked")
    assert not checked.unreadable
    assert not checked.mismatches


def test_one_host_is_read_from_its_own_files(compacted, tmp_path):
    """The detail of other hosts may even be missing."""
    wanted = {str(host): expected(compacted, tmp_path, ALL, on(host)) for host in range(HOSTS)}
    read = {}
    first, last = details(parts_of(compacted)[0])[0].hosts
    assert first == last
    for part in parts_of(compacted):
        remove(compacted, [file for file in details(part) if file.hosts != (first, last)])
    for host in range(HOSTS):
        answer = ask(compacted, tmp_path, ALL, on(host))
        read[str(host)] = None if answer.coverage.skipped else counts_of(answer.profile)

    found = {host: counts for host, counts in read.items() if counts is not None}
    assert len(found) == 1
    assert all(counts == wanted[host] for host, counts in found.items())


def test_parts_of_other_times_are_not_read(compacted, tmp_path):
    """Of a part that ends before the window no file is fetched."""
    wanted = expected(compacted, tmp_path, LATE, on(3))
    early = [part for part in parts_of(compacted) if part.end_s <= LATE.start_ns // 10**9]
    remove(compacted, [file for part in early for file in part.files])
    answer = ask(compacted, tmp_path, LATE, on(3))

    assert not answer.coverage.skipped
    assert counts_of(answer.profile) == wanted


def test_parts_without_the_host_are_not_read(tmp_path):
    """Only of its own part are samples and stacks fetched; heads say which that is."""
    both = Compacted(tmp_path)
    for host in range(3):
        key = both.put(at(small(10 * host), 5, f"web-{host}", f"{host:016x}"))
        both.compact()
        both.expire([key])
    wanted = expected(both, tmp_path, ALL, on(1))
    assert len(parts_of(both)) == 3
    for number, part in enumerate(parts_of(both)):
        if number != 1:
            remove(both, [*part.files_of("samples_detail"), *part.files_of("stacks")])
    answer = ask(both, tmp_path, ALL, on(1))

    assert not answer.coverage.skipped
    assert counts_of(answer.profile) == wanted


@pytest.mark.parametrize("selector", ['{host="web-9"}', '{host=~"web-[24]"}', '{host!="web-0"}'])
def test_any_choice_of_hosts_is_as_at_level_0(compacted, tmp_path, selector):
    """Of none, of some and of all but one."""
    chosen = Selector.parse(selector)
    answer = ask(compacted, tmp_path, ALL, chosen)

    assert not answer.coverage.skipped
    assert counts_of(answer.profile) == expected(compacted, tmp_path, ALL, chosen)


def test_files_that_have_a_host_are_found_whatever_they_are_called(tmp_path):
    """All are looked through at once; hosts may be more than stand in a query."""
    files = []
    for number in range(3):
        folder = tmp_path / f"it's [{number}] *?=5"
        folder.mkdir()
        with engine(folder=folder) as opened:
            row = (
                f"SELECT 1 AS object_id, {number} AS host_id, 1 AS set_id, 1 AS samples, 1 AS value"
            )
            files.append(opened.write("times", row, folder))
    for wanted in ([], [1], [0, 2], [7], [2, *range(9, 200)]):
        expected = {file for number, file in enumerate(files) if number in wanted}
        assert having_hosts(files, np.array(wanted, np.uint64)) == expected


def test_ranges_may_be_missing(compacted, tmp_path):
    """Older versions wrote none: then any file may have the host."""
    change_files(compacted, lambda files: [file.pop("hosts") for file in files])
    answer = ask(compacted, tmp_path, ALL, on(2))

    assert not answer.coverage.skipped
    assert counts_of(answer.profile) == expected(compacted, tmp_path, ALL, on(2))


def swap_hosts(files: list[dict[str, Any]]) -> None:
    """Name the hosts of each file as those of another one."""
    ranges = [file["hosts"] for file in files]
    for file, hosts in zip(files, ranges[1:] + ranges[:1], strict=True):
        file["hosts"] = hosts


def claim_nothing(files: list[dict[str, Any]]) -> None:
    for file in files:
        file["hosts"] = ["0" * 16, "0" * 16]


@pytest.mark.parametrize("change", [swap_hosts, claim_nothing])
def test_wrong_ranges_are_found_out(compacted, tmp_path, change):
    """Never are samples left out silently; and verify names the files."""
    change_files(compacted, change)
    for host in range(HOSTS):
        answer = ask(compacted, tmp_path, ALL, on(host))
        assert "contradict" in answer.coverage.skipped[0].reason
    whole = ask(compacted, tmp_path, ALL, Selector(()))
    (checked,) = check_compacted(TenantStore(compacted.store), CPU, ALL, tmp_path / "checked")

    assert not whole.coverage.skipped  # who asks for all hosts needs no range
    named = {file.key for part in parts_of(compacted) for file in details(part)}
    assert {each.key for each in checked.unreadable} == named
    assert all("other hosts" in each.reason for each in checked.unreadable)


@pytest.mark.parametrize("change", [None, claim_nothing])
def test_what_has_expired_of_other_hosts_does_not_matter(tmp_path, change):
    """The host's own part is exact: nothing is said of steps, and wrong ranges are found out."""
    both = Compacted(tmp_path)
    for host in range(2):
        key = both.put(at(small(host), 12 + host, f"web-{host}", f"{host:016x}"))
        both.compact()
        both.expire([key])
    path = manifest_path(both)
    manifest = json.loads(path.read_bytes())
    first = min(manifest["parts"], key=lambda part: part["start_s"])
    first["files"] = [file for file in first["files"] if file["table"] != "samples_detail"]
    path.write_bytes(json.dumps(manifest).encode())
    if change is not None:
        change_files(both, change)
    inside = Window(minutes(12, 13).start_ns + 5 * 10**9, minutes(0, 20).end_ns)
    answer = ask(both, tmp_path, inside, on(1))

    if change is None:
        assert not answer.coverage.skipped
        assert counts_of(answer.profile) == expected(both, tmp_path, inside, on(1))
    else:
        assert "contradict" in answer.coverage.skipped[0].reason


@pytest.mark.parametrize("hosts", [["x", "y"], ["0" * 16], "0" * 16, [1, 2], ["F" * 16, "F" * 16]])
def test_a_range_that_is_none_is_damage(compacted, tmp_path, hosts):
    """The manifest is named, and nothing is read by half."""
    change_files(compacted, lambda files: files[0].update(hosts=hosts))
    answer = ask(compacted, tmp_path, ALL, on(1))

    assert "damaged" in answer.coverage.skipped[0].reason
    assert answer.profile.total_samples == 0


def test_wrong_times_are_found_by_verify(compacted, tmp_path):
    """A part whose manifest says that it is from earlier would be left out of late windows."""
    path = manifest_path(compacted)
    manifest = json.loads(path.read_bytes())
    manifest["parts"][-1]["end_s"] -= 60
    path.write_bytes(json.dumps(manifest).encode())
    (checked,) = check_compacted(TenantStore(compacted.store), CPU, ALL, tmp_path / "checked")

    assert all("other times" in each.reason for each in checked.unreadable)
    assert len(checked.unreadable) > 1


def test_a_part_inside_counts_from_its_first_bucket(tmp_path, monkeypatch):
    """Buckets of ten minutes begin before a window that has all of their part."""
    monkeypatch.setattr(blocks, "_MANY_ROWS", -1)
    both = Compacted(tmp_path)
    keys = [both.put(at(small(minute), minute)) for minute in (12, 70)]
    both.compact()
    both.expire(keys)
    window = minutes(11, 130)

    plain, query = both.queries(tmp_path)
    one, other = (each.profile(window, labels=frozenset({"service"})) for each in (plain, query))
    assert not other.coverage.skipped
    assert other.profile.total_samples == one.profile.total_samples
