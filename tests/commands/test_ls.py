"""ls and exports of a store: what is there, where the nearest data are, equal counts everywhere."""

import dataclasses
import io
from collections import Counter
from pathlib import Path

import orjson
import pytest

from profiler import cli
from profiler.commands import ls
from profiler.commands import selection as selections
from profiler.commands.selection import Decoding, NothingSelectedError, Selection
from profiler.formats.reading import read
from profiler.times import rfc3339
from storage.columns import Columns
from storage.formats import folded
from storage.objects.directory import DirectoryStore
from storage.objects.tenant import TenantStore
from storage.query.query import Query
from storage.selector import Selector
from tests.support import profiles as some
from tests.support.compacted import compact, delete, level0
from tests.support.stores import START_NS, at, directory, minutes, put

BETWEEN = minutes(30, 40)
"""No object of the store is in it."""


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Two hosts: web-1 for three minutes, web-2 for one; their services differ in time."""
    monkeypatch.setenv("EVERFLAME_CACHE", str(tmp_path / "cache"))
    old = some.build([({"service": "old", "version": "1", "comm": "old"}, [some.MAIN], 2)])
    store = directory(
        tmp_path / "store",
        at(old, 0),
        at(some.sample_profile(), 1),
        at(some.sample_profile(), 2),
        at(some.sample_profile(), 61, "web-2", "ff00000000000000"),
    )
    monkeypatch.setenv("EVERFLAME_STORE", str(store.root))
    return store


def listed(capfd, *arguments):
    assert cli.main(["ls", "--json", *arguments]) == 0
    return orjson.loads(capfd.readouterr().out)


def test_hosts_are_listed_with_their_windows_and_sizes(store, capfd):
    """Everything there is; names and services from each host's latest object."""
    found = listed(capfd)

    sizes = {each.key: each.size_bytes for each in store.list("")}
    assert found["objects"] == 4
    assert found["bytes"] == sum(sizes.values())
    assert found["services_of"] == "latest"
    assert [(host["host"], host["objects"]) for host in found["hosts"]] == [
        ("web-1", 3), ("web-2", 1),
    ]  # fmt: skip
    first = found["hosts"][0]
    assert first["from_ms"] == minutes(0, 3).start_ns // 1_000_000
    assert first["until_ms"] == minutes(0, 3).end_ns // 1_000_000
    assert first["services"] == [
        {"service": "api", "version": "", "samples": 11},
        {"service": "jobs", "version": "", "samples": 5},
    ]


def test_a_window_lists_what_was_sampled_in_it(store, capfd):
    """Services of the whole window, not of the latest object alone."""
    found = listed(capfd, "--from", rfc3339(START_NS), "--until", rfc3339(minutes(0, 3).end_ns))

    (host,) = found["hosts"]
    assert found["services_of"] == "window"
    assert {(each["service"], each["version"]): each["samples"] for each in host["services"]} == {
        ("api", ""): 22, ("jobs", ""): 10, ("old", "1"): 2,
    }  # fmt: skip


def test_a_selector_lists_the_hosts_that_have_it(store, capfd):
    """The others are left out."""
    found = listed(capfd, "-q", '{service="old"}')

    assert [host["host"] for host in found["hosts"]] == ["web-1"]


def test_as_little_as_possible_is_read(store):
    """One object per host, whatever there is."""
    fetched: Counter[str] = Counter()

    class Counting(DirectoryStore):
        def get(self, key: str) -> bytes:
            fetched[key] += 1
            return super().get(key)

    selection = Selection.parse(str(store.root))
    ls.list_hosts(dataclasses.replace(selection, store=TenantStore(Counting(store.root))))

    assert sorted(fetched.values()) == [1, 1]


def test_the_table_names_services_and_says_where_they_are_from(store, capfd):
    """For people: names, sizes with units, times as RFC 3339."""
    assert cli.main(["ls"]) == 0

    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["HOST", "OBJECTS", "SIZE", "FROM", "UNTIL"]
    assert lines[1].startswith("web-1  3 ")
    assert "    api  11 samples" in lines
    assert lines[-1].startswith("4 objects, ")


def test_an_object_that_cannot_be_read_is_named(store, capfd):
    """The host is listed by its id then."""
    store.put(f"v1/default/l0/2026-05-28T20/{'e' * 16}/1780000000-60-{'0' * 16}.pb.gz", b"?")

    assert cli.main(["ls"]) == 0

    output = capfd.readouterr()
    assert "eeeeeeeeeeeeeeee  1" in output.out
    assert "skipped v1/default/l0/2026-05-28T20/eeee" in output.err


def test_an_empty_store_is_said(tmp_path, monkeypatch, capfd):
    """Exit status 2, one line, and whether there is a folder at all."""
    (tmp_path / "empty").mkdir()
    for name, reason in (("empty", ""), ("none", " (the folder does not exist)")):
        assert cli.main(["ls", "--store", str(tmp_path / name)]) == 2
        store = tmp_path / name
        assert capfd.readouterr().err == f"everflame: nothing in the store {store}{reason}\n"


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (
            [f"--from={rfc3339(BETWEEN.start_ns)}", f"--until={rfc3339(BETWEEN.end_ns)}"],
            [rfc3339(minutes(2, 3).start_ns), rfc3339(minutes(61, 62).start_ns)],
        ),
        (["-q", '{service="x"}'], ["services there: api, jobs, old"]),
    ],
)
def test_a_listing_of_nothing_says_what_there_is_instead(store, capfd, options, texts):
    """Exit status 2, and the nearest data or the services, as other commands say."""
    assert cli.main(["ls", *options]) == 2

    message = capfd.readouterr().err
    assert message.startswith("everflame: nothing selected: no sample from ")
    assert all(text in message for text in texts)


@pytest.mark.parametrize("ending", ["pb.gz", "folded", "speedscope.json", "json"])
def test_an_export_holds_the_sum_of_its_objects(store, tmp_path, ending):
    """Every format, to the last count."""
    file = str(tmp_path / f"all.{ending}")
    window = ["--from", rfc3339(START_NS), "--until", rfc3339(minutes(0, 120).end_ns)]

    assert cli.main(["export", "-o", file, *window]) == 0

    expected = 2 + 3 * some.sample_profile().total_samples
    if ending == "json":
        assert orjson.loads(Path(file).read_bytes())["samples"] == expected
    else:
        assert read(file).profile.total_samples == expected


def test_an_export_of_a_selection_equals_filtering_by_hand(store, capfdbinary):
    """Folded text of one service equals that of the objects, merged and filtered."""
    window = ["--from", rfc3339(START_NS), "--until", rfc3339(minutes(0, 60).end_ns)]

    assert cli.main(["export", "-o", "-", "-q", '{service="api"}', *window]) == 0

    merged = some.merge([some.sample_profile(), some.sample_profile()])
    by_hand = some.having(merged, lambda labels: labels["service"] == "api")
    assert capfdbinary.readouterr().out == folded.encode(Columns.of(by_hand))


def test_nothing_selected_says_where_the_nearest_data_are(store, capfd, tmp_path):
    """Exit status 2, and either the services there or the windows before and behind."""
    file = str(tmp_path / "none.svg")
    between = [
        "--from",
        rfc3339(minutes(30, 0).start_ns),
        "--until",
        rfc3339(minutes(40, 0).start_ns),
    ]

    assert cli.main(["export", "-o", file, *between]) == 2
    message = capfd.readouterr().err
    assert "nothing selected" in message
    assert rfc3339(minutes(2, 3).start_ns) in message
    assert rfc3339(minutes(61, 62).start_ns) in message
    assert cli.main(["export", "-o", file, "-q", '{service="x"}', "--from", "0"]) == 2
    assert "services there: api, jobs, old" in capfd.readouterr().err


def test_a_store_without_any_data_is_said(tmp_path, monkeypatch):
    """Not the nearest data, when there are none."""
    monkeypatch.setenv("EVERFLAME_CACHE", str(tmp_path / "cache"))
    selection = Selection(TenantStore(DirectoryStore(tmp_path / "none")), minutes(0, 1), Selector())

    with pytest.raises(NothingSelectedError, match="is empty"):
        selection.answer()


def test_a_file_and_a_store_are_not_both_read(capfd):
    """The words of a store mean nothing for a file."""
    assert cli.main(["export", "x.pb.gz", "-o", "x.svg", "-q", '{service="api"}']) == 2
    assert "not both" in capfd.readouterr().err


def test_skipped_objects_are_named_on_stderr(store, capfd, tmp_path):
    """The export is made of the rest."""
    key = put(store, at(some.sample_profile(), 3))
    (store.root / key.text).write_bytes(b"damaged")

    assert cli.main(["export", "-o", str(tmp_path / "x.pb.gz"), "--from", "0"]) == 0

    assert f"skipped {key.text}: its content is not what its key says" in capfd.readouterr().err


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_takes_long_says_what_it_reads_on_a_terminal_alone(store, tmp_path, monkeypatch):
    """A line that is rewritten, and gone before anything else is written."""
    monkeypatch.setattr(selections, "_SHOWN_AFTER_S", 0.0)
    monkeypatch.setattr(selections, "_EVERY_S", 0.0)
    for number, (out, is_shown) in enumerate(((Screen(), True), (io.StringIO(), False))):
        query = Query(TenantStore(store), tmp_path / f"cache-{number}").watched(Decoding(out))

        query.profile(minutes(0, 120))

        lines = out.getvalue().split("\r\x1b[K")
        assert any(line.startswith("reading the store: 4 objects, ") for line in lines) == is_shown
        assert lines[-1] == ""
        shown = out.getvalue()
        query.profile(minutes(0, 120))  # which is kept by now
        assert out.getvalue() == shown


KNOWN = ("host", "host_id", "objects", "from_ms", "until_ms", "services")


@pytest.mark.parametrize(
    "asked", [(), ("-q", '{service=~"api|jobs"}'), ("--until", rfc3339(minutes(0, 2).end_ns))]
)
def test_compacted_objects_are_listed_once(store, tmp_path, capfd, asked):
    """Whether they are still there or not, and how many they are is said; a late one is none."""

    def of(found):
        return [{name: host[name] for name in KNOWN} for host in found["hosts"]]

    late = at(some.sample_profile(), 63, "web-2", "ff00000000000000")
    put(store, late)
    before = listed(capfd, *asked)
    store.delete(level0(store)[-1].text)
    compact(store, tmp_path / "work", has_rollups=True)
    keys = level0(store)
    put(store, late)

    for gone in ([], keys[::2], keys):
        delete(store, gone)
        found = listed(capfd, *asked)
        assert of(found) == of(before)
        is_late_listed = asked[:1] != ("--until",)
        assert found["compacted"]["objects"] == found["objects"] - is_late_listed
    files = [each for each in store.list("v1/default/blocks/") if "/dd-" not in each.key]
    size_bytes = sum(each.size_bytes for each in files)
    if not asked:
        assert found["compacted"]["bytes"] == size_bytes
        assert found["bytes"] == size_bytes + sum(s.size_bytes for s in store.list("v1/default/l0"))
    assert found["skipped"] == []
    assert cli.main(["ls"]) == 0
    assert "5 objects, 4 of them compacted into" in capfd.readouterr().out


def test_a_compacted_hour_that_cannot_be_read_is_named(store, tmp_path, capfd):
    """What is left of it in level 0 is listed, and the other hours are."""
    compact(store, tmp_path / "work")
    keys = level0(store)
    delete(store, [keys[0], keys[-1]])
    min(store.root.rglob("*-objects-*")).write_bytes(b"?")

    found = listed(capfd)

    assert [(host["host"], host["objects"]) for host in found["hosts"]] == [
        ("web-1", 2), ("web-2", 1),
    ]  # fmt: skip
    assert [each["key"] for each in found["skipped"]] == ["2026-05-28T20"]
