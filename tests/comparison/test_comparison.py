"""Comparisons: two windows of a store and two sets of files, from real objects to an exit code."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest

from profiler.comparison import comparison
from profiler.comparison.gate import Gate
from profiler.comparison.sides import ComparisonError, Operand
from profiler.comparison.verdict import Change, NoiseSource
from storage.formats import pprof
from storage.objects.tenant import TenantStore
from storage.profile import Window
from storage.query.query import Query
from storage.selector import Selector
from tests.support import profiles as some
from tests.support.stores import START_NS, at, directory, minutes
from tests.support.varying import FUNCTIONS, minute

EVERFLAME = Path(sys.executable).with_name("everflame")
API = Selector.parse('{service="api"}')
LENGTH = 4


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two hosts for 80 minutes; in the last ones function_3 takes half as long again."""
    rng = np.random.default_rng(5)
    found = []
    for number in range(80):
        is_new = number >= 80 - LENGTH
        for host in range(2):
            factors = {3: 1.5} if is_new else {}
            found.append(minute(rng, number, host, "2" if is_new else "1", factors))
    return directory(tmp_path_factory.mktemp("store"), *found)


@pytest.fixture(scope="module")
def query(store, tmp_path_factory):
    """A query of the store, which decodes each object once for all tests."""
    return Query(TenantStore(store), tmp_path_factory.mktemp("cache"))


def last(length: int, before: int) -> Operand:
    """Return a window of so many minutes that ends so many minutes before the end."""
    return Operand(API, minutes(80 - before - length, 80 - before))


def changes(found: comparison.Comparison) -> dict[str, Change]:
    return {each.frame.function: each.change for each in comparison.changed(found.functions)}


def test_what_a_new_version_made_slower_is_named_and_nothing_else(query):
    found = comparison.of_store(query, last(LENGTH, LENGTH), last(LENGTH, 0))

    assert found.source == NoiseSource.HISTORY
    assert found.positions >= 6
    assert changes(found) == {"function_3": Change.MORE}
    slower = found.functions[0]
    assert slower.relative[1] < 0.5 < slower.relative[2]
    assert (found.before.versions, found.after.versions) == (("1",), ("2",))
    assert found.common.change == Change.UNCHANGED


def test_the_other_way_round_it_became_faster(query):
    found = comparison.of_store(query, last(LENGTH, 0), last(LENGTH, LENGTH))

    assert changes(found) == {"function_3": Change.LESS}


def test_a_service_that_stayed_as_it_was_is_unchanged(query):
    found = comparison.of_store(query, last(LENGTH, 3 * LENGTH), last(LENGTH, 2 * LENGTH))

    assert found.source == NoiseSource.HISTORY
    assert not changes(found)


def test_the_rule_is_tried_on_the_unchanged_past(query):
    found = comparison.calibrate(query, last(2, 6), last(2, 4))

    assert found.pairs >= 12
    assert found.alarms <= 3
    assert found.low <= found.alarms / found.pairs <= found.high
    with pytest.raises(ComparisonError, match="cannot calibrate: 7 earlier positions"):
        comparison.calibrate(query, Operand(API, minutes(4, 6)), Operand(API, minutes(6, 8)))


def test_code_without_a_name_raises_no_false_alarm(tmp_path):
    """It takes ten times as long in one minute of the past, and is never called changed."""
    labels = {"service": "api", "comm": "api"}
    profiles = []
    for number in range(40):
        stacks = [(labels, [some.named(f"function_{i}")], 800) for i in range(12)]
        stacks.append((labels, [some.STRIPPED], 4000 if number == 21 else 400))
        profiles.append(at(some.build(stacks), number, "web-0", "f".rjust(16, "0")))
    query = Query(TenantStore(directory(tmp_path / "store", *profiles)), tmp_path / "cache")

    before, after = minutes(36, 38), minutes(38, 40)
    found = comparison.calibrate(query, Operand(API, before), Operand(API, after))

    assert (found.alarms, found.pairs) == (0, 9)


def test_of_less_than_a_minute_there_is_no_verdict(query):
    begin_ns = START_NS + 4 * 60 * 10**9
    half = Operand(API, Window(begin_ns, begin_ns + 30 * 10**9))
    found = comparison.of_store(query, Operand(API, minutes(0, 4)), half)

    assert (found.source, changes(found)) == (NoiseSource.NONE, {})
    assert {each.change for each in found.functions} == {Change.TOO_LITTLE}
    assert "it takes windows of 1 min or more" in found.warnings[-1]
    assert "must change by" in found.warnings[-1]


def test_an_empty_side_is_named(query):
    with pytest.raises(ComparisonError, match=r"the after side .* has no samples"):
        comparison.of_store(query, last(4, 4), Operand(API, minutes(500, 504)))


def test_a_host_on_one_side_only_is_said(store, tmp_path):
    lonely = minute(np.random.default_rng(6), 79, 7, "2", {})
    alone = directory(tmp_path / "alone", lonely)
    for key in store.list(""):
        alone.put(key.key, store.get(key.key))
    found = comparison.of_store(
        Query(TenantStore(alone), tmp_path / "cache"), last(LENGTH, LENGTH), last(LENGTH, 0)
    )

    assert found.after.hosts == ("web-0", "web-1")
    assert "only on the after side: web-7" in " ".join(found.warnings)


def test_with_itself_nothing_has_changed(query):
    found = comparison.of_store(query, last(LENGTH, 0), last(LENGTH, 0))

    assert not changes(found)
    assert {each.relative[0] for each in found.functions} == {0.0}
    assert found.common.relative == 0
    assert "the windows overlap" in found.warnings[-1]


def test_swapping_the_sides_mirrors_every_line(query):
    sides = last(LENGTH, LENGTH), last(LENGTH, 0)
    there, back = comparison.of_store(query, *sides), comparison.of_store(query, *sides[::-1])
    mirrored = {each.frame.function: each for each in back.functions}

    assert len(there.functions) == len(mirrored) == FUNCTIONS + 1
    for one in there.functions:
        other = mirrored[one.frame.function]
        assert (one.p, one.q) == pytest.approx((other.p, other.q))
        for triple in ("cores", "share"):
            estimate, low, high = getattr(other, triple)
            assert getattr(one, triple) == pytest.approx((-estimate, -high, -low))
        estimate, low, high = (1 / (1 + each) - 1 for each in other.relative)
        assert one.relative == pytest.approx((estimate, high, low))


def test_what_always_happens_at_an_hour_is_no_change(tmp_path):
    """A job of the night in function_5: on other days it was there at the same time."""
    rng = np.random.default_rng(11)
    found = []
    for day in range(9):
        for number in range(10):
            factors = {5: 1.6} if number >= 5 else {}
            if day == 8 and number >= 5:
                factors[3] = 1.5
            found.append(minute(rng, 1440 * day + number, 0, "1", factors))
    store = directory(tmp_path / "store", *found)
    begin = 1440 * 8
    sides = (Operand(API, minutes(begin + i, begin + i + 5)) for i in (0, 5))
    compared = comparison.of_store(Query(TenantStore(store), tmp_path / "cache"), *sides)

    assert (compared.source, compared.positions) == (NoiseSource.HISTORY, 8)
    assert changes(compared) == {"function_3": Change.MORE}


def test_windows_of_five_seconds_are_enough(tmp_path):
    """Seven pairs of twenty seconds, objects of five."""
    rng = np.random.default_rng(12)
    found = []
    for number in range(14 * 4):
        profile = minute(rng, 0, 0, "1", {3: 1.5} if number >= 13 * 4 else {})
        start_ns = minutes(0, 1).start_ns + number * 5 * 10**9
        window = Window(start_ns, start_ns + 5 * 10**9)
        found.append(dataclasses.replace(profile, window=window))
    store = directory(tmp_path / "store", *found)
    sides = (Window(found[i].window.start_ns, found[i + 3].window.end_ns) for i in (48, 52))
    operands = (Operand(API, window) for window in sides)
    compared = comparison.of_store(Query(TenantStore(store), tmp_path / "cache"), *operands)

    assert (compared.source, compared.positions) == (NoiseSource.HISTORY, 6)
    assert changes(compared) == {"function_3": Change.MORE}


def test_a_change_that_was_told_is_not_taken_for_the_past(query):
    sides = last(LENGTH, 3 * LENGTH), last(LENGTH, 2 * LENGTH)
    told = [minutes(20, 21).start_ns + 1]
    usual, fewer = (comparison.of_store(query, *sides, each) for each in ((), told))

    assert fewer.positions == usual.positions - 1


def test_unequal_coverage_and_losses_are_said(tmp_path):
    rng = np.random.default_rng(13)
    found = [minute(rng, number, 0, "1", {}) for number in range(8) if number not in {5, 6}]
    accounting = found[-1].accounting
    ticks = accounting.ticks // 10
    lossy = dataclasses.replace(
        accounting, ticks=accounting.ticks + ticks, lost={"map_full": ticks}
    )
    found[-1] = dataclasses.replace(found[-1], accounting=lossy)
    store = directory(tmp_path / "store", *found)
    sides = (Operand(API, minutes(i, i + 4)) for i in (0, 4))
    compared = comparison.of_store(Query(TenantStore(store), tmp_path / "cache"), *sides)

    said = " ".join(compared.warnings)
    assert "100% of the before side's time was profiled, 50% of the after side's" in said
    assert "of the after side's ticks were lost" in said


def test_profiles_without_word_of_services_count_as_there(tmp_path):
    """What other producers made says nothing of the time that a service lived."""
    rng = np.random.default_rng(14)
    found = []
    for number in range(4):
        profile = minute(rng, number, 0, "1", {})
        bare = dataclasses.replace(profile.accounting, services={})
        found.append(dataclasses.replace(profile, accounting=bare))
    store = directory(tmp_path / "store", *found)
    sides = (Operand(API, minutes(i, i + 2)) for i in (0, 2))
    compared = comparison.of_store(Query(TenantStore(store), tmp_path / "cache"), *sides)

    assert compared.before.present_s.tolist() == [120.0]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Runs of an old and a new version; function_3 is slower, function_5 faster in the new one."""
    rng = np.random.default_rng(7)
    folder = tmp_path_factory.mktemp("files")
    for side, factors in (("old", {}), ("new", {3: 1.6, 5: 0.5}), ("same", {})):
        for i in range(4):
            profile = minute(rng, i, 0, "1", factors)
            (folder / f"{side}-{i}.pb.gz").write_bytes(pprof.encode(profile))
    return folder


def everflame(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [EVERFLAME, "diff", *arguments],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


def side(name: str, runs: int = 4) -> list[str]:
    return [f"{name}-{i}.pb.gz" for i in range(runs)]


def test_a_pipeline_fails_for_what_became_slower_and_for_nothing_else(files):
    worse = everflame(files, *side("old"), "--", *side("new"), "--json")
    better = everflame(files, *side("new"), "--", *side("old"))
    same = everflame(files, *side("old"), "--", *side("same"), "--strict")

    found = orjson.loads(worse.stdout)
    assert (worse.returncode, found["verdict"], found["exit_code"]) == (1, "regression", 1)
    assert found["noise"] == {"source": "replicates", "positions": 8, "df": 6}
    changed = {f["function"]: f for f in found["functions"] if f["verdict"] in ("more", "less")}
    assert {name: (f["verdict"], f["fails"]) for name, f in changed.items()} == {
        "function_3": ("more", True),
        "function_5": ("less", False),
    }
    assert better.returncode == 1  # function_5 is slower this way round
    assert "! more" in better.stdout
    assert (same.returncode, same.stdout.splitlines()[0][:9]) == (0, "unchanged")


def test_files_of_different_kinds_are_not_compared(files, tmp_path):
    folded = tmp_path / "other.folded"
    folded.write_text("main;work 100\n")

    found = everflame(files, "old-0.pb.gz", "--", str(folded))

    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == (
        f"everflame: cannot compare old-0.pb.gz (nanoseconds of cpu) with {folded}"
        " (count of samples): name files of one kind\n"
    )


def test_a_wider_gate_lets_it_through(files):
    found = everflame(files, *side("old"), "--", *side("new"), "--fail-over", "relative>=200%")

    assert found.returncode == 0
    assert "more" in found.stdout


def test_too_few_files_are_inconclusive(files):
    pair = ["old-0.pb.gz", "new-0.pb.gz"]
    lenient, strict = everflame(files, *pair), everflame(files, *pair, "--strict")

    assert (lenient.returncode, strict.returncode) == (0, 3)
    assert lenient.stdout.startswith("inconclusive: too little data")
    assert "3 or more on each side" in lenient.stdout


def test_markdown_shows_names_as_they_are(files, tmp_path):
    rng = np.random.default_rng(8)
    for number in range(6):
        profile = minute(rng, number, 0, "1", {})
        stacks = [({"comm": "api"}, [some.named("<b>|*x*")], 5000 if number > 2 else 900)]
        merged = some.build([*stacks, *([({"comm": "api"}, [some.named("rest")], 9000)])])
        (tmp_path / f"{number}.pb.gz").write_bytes(pprof.encode(merged))
        assert profile.total_samples
    names = [str(tmp_path / f"{number}.pb.gz") for number in range(6)]
    found = everflame(files, *names[:3], "--", *names[3:], "--markdown")

    assert "\\<b\\>\\|\\*x\\*" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["old-0.pb.gz"], "holds one side: name both"),
        (["old-0.pb.gz", "--", "missing.pb.gz"], "missing.pb.gz"),
        (["old-0.pb.gz", "--", "{}@now-1h..now"], "the same on both sides"),
        (["{}", "--", "{}@now-1h..now"], "is not a window"),
        (["{}@now..now-1h", "--", "{}@now-1h..now"], "must end after it starts"),
        (["old-0.pb.gz", "new-0.pb.gz", "--fail-over", "much"], "cannot read the condition 'much'"),
    ],
)
def test_what_cannot_be_compared_is_one_line_that_says_why(files, arguments, complaint):
    found = everflame(files, *arguments)

    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1
    assert complaint in found.stderr


def test_a_window_of_the_store_is_compared_by_its_words(store, tmp_path):
    def words(operand: Operand) -> str:
        start, end = (at_ns // 10**9 for at_ns in operand.window)
        return f"{operand.selector}@{start}..{end}"

    found = subprocess.run(
        [
            *(EVERFLAME, "diff", f"--store={store.root}"),
            *(words(last(LENGTH, LENGTH)), "--", words(last(LENGTH, 0))),
        ],
        check=False,
        env={"EVERFLAME_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert found.returncode == 1, found.stderr
    assert re.match(r"regression: function_3 \+\d\d %; service [+-]\d", found.stdout)
    assert "earlier positions of the same length" in found.stdout
    assert "function_3" in found.stdout


@pytest.mark.parametrize(
    ("side", "complaint"),
    [
        ('{service="api"}@2001-01-01T00:00:00Z..2001-01-01T01:00:00Z', "the nearest data are from"),
        (
            f'{{service="ape"}}@{START_NS // 10**9}..{START_NS // 10**9 + 600}',
            "services there: api",
        ),
    ],
)
def test_an_empty_side_says_what_is_there_instead(store, tmp_path, side, complaint):
    found = subprocess.run(
        [EVERFLAME, "diff", f"--store={store.root}", side, "--", side.replace("ape", "api")],
        check=False,
        env={"EVERFLAME_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1
    assert "before side: nothing selected" in found.stderr
    assert complaint in found.stderr


def test_gates_are_read():
    assert Gate.parse("relative>=10%,share>=0.5pp") == Gate(0.1, 0.005)
    assert Gate.parse(" share >= 2pp ") == Gate(0.0, 0.02)
    for text in ("", "relative>=10pp", "share>=1%", "relative>10%", "cores>=1"):
        with pytest.raises(ValueError, match="cannot read the condition"):
            Gate.parse(text)


def last_deploy(store, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    start, end = (at_ns // 10**9 for at_ns in minutes(0, 600))
    return subprocess.run(
        [
            *(EVERFLAME, "diff", "--last-deploy", f"--store={store.root}"),
            *(f"--from={start}", f"--until={end}", *arguments),
        ],
        check=False,
        env={"EVERFLAME_CACHE": str(cache), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def rolled_out(
    folder: Path, begin: int, end: int, *, factor: float = 1, hosts: int = 2, canary: int = 0
):
    """Make a store of so many minutes in which a version is rolled out from one of them on.

    Each host changes a minute after the one before it; with a canary only the last so many do.
    """
    rng = np.random.default_rng(9)
    found = []
    for number in range(end):
        for host in range(hosts):
            is_new = number >= begin + host and host >= (hosts - canary if canary else 0)
            found.append(
                minute(rng, number, host, "2" if is_new else "1", {3: factor} if is_new else {})
            )
    return directory(folder, *found)


def test_the_last_deployment_is_compared_over_windows_that_match(tmp_path):
    store = rolled_out(tmp_path / "store", 100, 112, factor=1.5)
    found = last_deploy(store, tmp_path, "-q", '{service="api"}', "--json")
    side = orjson.loads(found.stdout)

    assert found.returncode == 1, found.stderr
    assert "rollout of api 1 -> 2" in found.stderr
    # The last host changed in minute 101 and settles for two windows more; 112 is the end.
    for name, version, first, last in (("before", "1", 95, 100), ("after", "2", 104, 109)):
        window = minutes(first, last)
        assert side[name]["versions"] == [version]
        assert side[name]["window"] == {
            "from_ms": window.start_ns // 10**6,
            "until_ms": window.end_ns // 10**6,
        }
    assert side["noise"]["source"] == "history"
    assert [f["function"] for f in side["functions"] if f["fails"]] == ["function_3"]


def test_a_canary_is_compared_with_the_rest_at_the_same_time(tmp_path):
    store = rolled_out(tmp_path / "store", 60, 96, factor=1.5, hosts=4, canary=1)
    found = last_deploy(store, tmp_path, "--json")
    side = orjson.loads(found.stdout)

    assert found.returncode == 1, found.stderr
    assert side["before"]["window"] == side["after"]["window"]
    assert (side["before"]["hosts"], side["after"]["hosts"]) == (
        ["web-0", "web-1", "web-2"],
        ["web-3"],
    )
    assert [f["function"] for f in side["functions"] if f["fails"]] == ["function_3"]


def test_a_deployment_that_has_not_settled_is_no_comparison_yet(tmp_path):
    store = rolled_out(tmp_path / "store", 40, 43)
    found = last_deploy(store, tmp_path)

    assert found.returncode == 2
    assert "not comparable: it has settled only at" in found.stderr


def test_without_a_deployment_there_is_nothing_to_compare(tmp_path):
    store = rolled_out(tmp_path / "store", 40, 20)
    found = last_deploy(store, tmp_path)

    assert found.returncode == 2
    assert "the version of api did not change" in found.stderr
