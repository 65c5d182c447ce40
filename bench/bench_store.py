"""Questions to the compacted store of a fleet over HTTP, from a bucket of SeaweedFS: against aims.

Workload: compacted_fleet.py. `one`: a service with 500,000 stacks on 1,000 hosts, for as many days
as asked, the last hour in windows of a minute; `fifty` services of 6,000 stacks, two on each host,
for a day. The parts are made once and kept in the folder; from there they are copied into a bucket
and compacted by `everflame compact`, whose rollups are those of 1,000 hosts. With `--again` that is
done anew, as after a change of what compaction writes.

Each question goes to `everflame serve`'s real process. Cold: a new process with an empty cache.
Restarted: a new process over the files that the first one has fetched. Again: the same process is
asked once more. Medians of several runs; requests and bytes are those that the server counted for
the cold one. Server, service and client share this machine's CPUs; the server's files are in the
page cache. The samples of whole windows must be those that were made, and nothing may be left out.

The peak of memory is that of one process that was asked all of it, one after the other.

Run: `python bench/bench_store.py --folder FOLDER [--hosts 1000] [--days 7] [--runs 3] [--again]
[--only NAME ...]`. With `--prepare` the stores are made and nothing is asked.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import compacted_fleet
import costs
import fleet
import numpy as np
from bench_cost import cpu_seconds
from bucket import Bucket, bucket_in
from serving import EVERFLAME, Reply, Row, Serving, all_pids, pss_mb, rss_mb, serving, show

from storage.blocks.manifest import File, Manifests
from storage.blocks.retention import LEVELS
from storage.blocks.schema import DETAIL
from storage.objects.directory import DirectoryStore
from storage.objects.keys import CPU, DEFAULT_TENANT, NS_PER_S, ObjectStore, hour_of
from storage.objects.open import open_store

DAY_S, MINUTE_S = 86_400, 60
END_S = fleet.DAY_NS // NS_PER_S + DAY_S
FOREVER = ",".join(f"{level}=9000d" for level in LEVELS)
"""The fleet's days are long ago: nothing of them may expire at once."""
RSS_MB, AT_REST_MB = 600.0, 2.0


class Question(NamedTuple):
    """What is asked, of which fleet and window, and the most seconds that it may take."""

    name: str
    layout: str
    path: str
    start_s: int
    end_s: int
    parameters: Mapping[str, object]
    cold_s: float | None = None
    restarted_s: float | None = None
    is_whole: bool = False
    """Whether its samples are all of the window, which begins and ends with hours."""


def questions(days: int) -> list[Question]:
    day, week = END_S - DAY_S, END_S - 7 * DAY_S
    width = {"width": 1200}
    service = {"query": '{service="search"}', **width}
    host = {"query": '{host="node-00017"}', **width}
    shift_s = 10 * MINUTE_S
    found = [
        Question("flame graph, 24 h", "one", "flamegraph", day, END_S, width, 1.0, 0.4, True),
        Question("flame graph, 24 h of a service", "one", "flamegraph", day, END_S, service, 1.0,
                 0.4),
        Question("timeline, 24 h", "one", "timeline", day, END_S, {}, 0.3, None, True),
        Question("one host's last 15 min", "one", "flamegraph", END_S - 15 * MINUTE_S, END_S,
                 host, 0.3),
        Question("fleet top, 24 h", "fifty", "fleet/top", day, END_S, {}, 0.5, None, True),
        Question("services of the fleet, 24 h", "fifty", "fleet/services", day, END_S, {}, 0.5,
                 None, True),
        Question("table of functions, 24 h", "one", "top", day, END_S, {}, None, None, True),
        Question("flame graph, 24 h of 50 services", "fifty", "flamegraph", day, END_S, width,
                 None, None, True),
    ]  # fmt: skip
    if days > 1:
        found += [
            Question("flame graph, 24 h that begin inside an hour", "one", "flamegraph",
                     day - shift_s, END_S - shift_s, width, 1.0, 0.4),
            Question("comparison of two times 24 h", "one", "diff", day, END_S, width, 1.5),
            Question("its table of functions", "one", "diff/top", day, END_S, {}),
        ]  # fmt: skip
    if days >= 7:
        found += [
            Question("flame graph, 7 d", "one", "flamegraph", week, END_S, width, 1.5, None, True),
            Question("timeline, 7 d", "one", "timeline", week, END_S, {}, None, None, True),
        ]
    return found


class Made(NamedTuple):
    """A layout's store, in a bucket and with all of its rollups."""

    url: str
    samples: dict[str, int]
    """By hour."""

    def between(self, start_s: int, end_s: int) -> int:
        first, last = hour_of(start_s), hour_of(end_s - 1)
        return sum(count for hour, count in self.samples.items() if first <= hour <= last)


def prepare(
    folder: Path, bucket: Bucket, layout: str, options: argparse.Namespace
) -> Iterator[Row]:
    """Make the parts of a layout where they are missing, and compact a copy of them."""
    days = options.days if layout == "one" else 1
    parts, compacted = folder / layout / "parts", folder / layout / f"compacted-{days}"
    started = time.monotonic()
    made = compacted_fleet.fill(
        lambda: compacted_fleet.make_fleet(layout, options.hosts, options.stacks),
        str(parts),
        scratch=folder / "scratch",
        days=days,
        detail_minutes=options.detail_minutes if layout == "one" else 0,
    )
    if made.hours:
        yield f"{layout}: hours made", made.hours, "hours", None
        yield f"{layout}: all of them", time.monotonic() - started, "s", None
    if compacted.exists():
        return
    url = bucket.url(layout)
    store = open_store(url, bucket.endpoint)
    for stored in store.list("v1/"):
        store.delete(stored.key)
    copy(DirectoryStore(parts), store)
    before, started = bucket.counts(), time.monotonic()
    used = compact(url, bucket.endpoint, folder / "scratch")
    requests = bucket.counts() - before
    hours = len(samples_of(store))
    yield f"{layout}: rollups of all, CPU an hour of the fleet", used.cpu_s / hours, "s", None
    yield f"{layout}: the same, time", (time.monotonic() - started) / hours, "s", None
    yield f"{layout}: peak memory of all processes, PSS", used.peak_mb, "MB", 1000.0
    for kind in ("GET", "PUT", "LIST"):
        yield f"{layout}: {kind} requests an hour of the fleet", requests[kind] / hours, "", None
    compacted.touch()


def copy(source: ObjectStore, target: ObjectStore) -> None:
    for stored in source.list("v1/"):
        target.put(stored.key, source.get(stored.key))


class Used(NamedTuple):
    cpu_s: float
    peak_mb: float


def compact(
    url: str, endpoint: str, scratch: Path, *options: str, beside: Sequence[int] = ()
) -> Used:
    """Run `everflame compact` once, so that it does all that is due.

    Memory is that of its processes, and of those that work for it `beside` them.
    """
    command = [EVERFLAME, "compact", f"--store={url}", f"--s3-endpoint={endpoint}", "--json"]
    command += [f"--keep={FOREVER}", *options]
    environment = {**os.environ, "EVERFLAME_CACHE": str(scratch / "compact")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as running:
        peak_mb = 0.0
        while running.poll() is None:
            pids = [pid for root in (running.pid, *beside) for pid in all_pids(root)]
            peak_mb = max(peak_mb, sum(map(pss_mb, pids)))
            time.sleep(0.2)
        assert running.stdout is not None
        report = json.loads(running.stdout.read())
    shutil.rmtree(scratch / "compact", ignore_errors=True)
    assert running.returncode == 0, report
    assert not report["unreadable"]
    assert not report["problems"]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Used(sum(after[:2]) - sum(before[:2]), peak_mb)


def samples_of(store: ObjectStore) -> dict[str, int]:
    """Return the samples of each hour by its manifest."""
    hours = Manifests(store, DEFAULT_TENANT, CPU).list().hours
    return {name: sum(part.samples for part in each.parts) for name, each in hours.items()}


def at_rest(store: ObjectStore, hosts: int, figures: Path | None) -> Iterator[Row]:
    """Show what a day of the fleet of one service takes, by the level whose retention it has.

    By host and object there are rows of each window only in the last hour: these are taken for all
    hours, in proportion to samples.
    """
    day = hour_of(END_S - 1)[:10]
    listed = Manifests(store, DEFAULT_TENANT, CPU).list(day, day + "T99")
    hours = list(listed.hours.values())
    last = listed.hours[hour_of(END_S - 1)]
    samples = {hour.hour: sum(part.samples for part in hour.parts) for hour in hours}
    times = sum(samples.values()) / samples[last.hour]

    def size(files: Iterable[File], tables: Collection[str]) -> float:
        return float(sum(file.bytes for file in files if file.table in tables))

    by_object = ("objects", "times", "presence")
    of_parts = [file for hour in hours for part in hour.parts for file in part.files]
    of_last = [file for part in last.parts for file in part.files]
    of_hours = [file for hour in hours if hour.hourly for file in hour.hourly.files]
    of_day = listed.days[day].files if day in listed.days else ()
    shared = {file.table for file in of_parts} - {DETAIL, *by_object}
    levels = {
        "detail": times * size(of_last, [DETAIL]),
        "10m": times * size(of_last, by_object) + size(of_parts, shared),
        "1h": size(of_hours, {file.table for file in of_hours}),
        "1d": size(of_day, {file.table for file in of_day}),
    }
    core_days = sum(samples.values()) / 99 / DAY_S
    rows = sum(file.rows for file in of_last if file.table == DETAIL)
    yield "detail", size(of_last, [DETAIL]) / rows, "bytes a row", None
    for level, size_bytes in levels.items():
        yield f"a day at rest, {level}", size_bytes / 1e6, "MB", None
        yield "    of a core busy all day", size_bytes / 1e6 / core_days, "MB", None
    whole_mb = sum(levels.values()) / 1e6
    yield "a day at rest, all levels", whole_mb, "MB", None
    yield "    of a core busy all day", whole_mb / core_days, "MB", AT_REST_MB
    yield "    of one of the hosts' CPUs", whole_mb / hosts / fleet.CPUS, "MB", AT_REST_MB
    costs.keep(figures, {f"{level}_bytes": each / hosts for level, each in levels.items()})


class UnansweredError(Exception):
    """The service says why, such as that an answer took too long."""


def ask(service: Serving, question: Question, made: Made) -> Reply:
    """Ask; fail if anything is left out or does not add up."""
    window = {"from": question.start_s * 1000, "until": question.end_s * 1000}
    reply = service.get(f"/api/v1/{question.path}", **window, **question.parameters)
    if reply.status != 200:
        raise UnansweredError(json.loads(reply.body).get("detail", ""))
    answer = json.loads(reply.plain)
    text = json.dumps(answer)
    assert '"skipped": []' in text or '"skipped"' not in text, text[:2000]
    if question.is_whole:
        expected = made.between(question.start_s, question.end_s)
        counts = answer.get("samples") or [each["samples"] for each in answer["series"]]
        assert np.sum(counts) == expected, (np.sum(counts), expected)
    return reply


def time_question(
    question: Question, made: Made, bucket: Bucket, runs: int, arguments: list[str]
) -> Iterator[Row]:
    cold, restarted, again, memory, used_s = [], [], [], [], []
    requests: Counter[str] = Counter()
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as name:
            cache = Path(name)
            with serving(made.url, cache, *arguments) as service:
                before, started_s = bucket.counts(), cpu_seconds(all_pids(service.pid))
                cold.append(ask(service, question, made))
                requests = bucket.counts() - before
                used_s.append(cpu_seconds(all_pids(service.pid)) - started_s)
                again.append(ask(service, question, made).took_s)
                memory.append(rss_mb(service.pid, "VmHWM"))
            with serving(made.url, cache, *arguments) as service:
                restarted.append(ask(service, question, made).took_s)
    yield question.name + ", cold", statistics.median(r.took_s for r in cold), "s", question.cold_s
    yield "    CPU time of the service and its processes", statistics.median(used_s), "s", None
    yield "    restarted", statistics.median(restarted), "s", question.restarted_s
    yield "    again", statistics.median(again), "s", None
    yield "    peak RSS of the service", max(memory), "MB", RSS_MB
    yield "    GET requests, cold", requests["GET"], "", None
    yield "    LIST requests, cold", requests["LIST"], "", None
    yield "    read from the bucket", requests["bytes"] / 1e6, "MB", None
    yield "    the answer", len(cold[-1].body) / 1e3, "kB", None


def time_command(made: Made, bucket: Bucket) -> Iterator[Row]:
    """Run the command that prints the fleet's functions, from its start to its end."""
    command = [EVERFLAME, "top", f"--store={made.url}", f"--s3-endpoint={bucket.endpoint}"]
    command += [f"--from={END_S - DAY_S}", f"--until={END_S}", "--by=service", "--json"]
    with tempfile.TemporaryDirectory() as name:
        environment = {**os.environ, "EVERFLAME_CACHE": name}
        for what in ("nothing cached", "again"):
            started = time.perf_counter()
            printed = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE)
            yield (
                f"everflame top, 24 h of 50 services, {what}",
                time.perf_counter() - started,
                "s",
                None,
            )
            assert json.loads(printed.stdout)


def peak_memory(
    asked: list[Question], made: Mapping[str, Made], arguments: list[str]
) -> Iterator[Row]:
    """Ask a process for everything about a fleet, one after the other."""
    for layout in sorted({question.layout for question in asked}):
        with (
            tempfile.TemporaryDirectory() as name,
            serving(made[layout].url, Path(name), *arguments) as service,
        ):
            peak_mb = 0.0
            for question in asked:
                if question.layout == layout:
                    ask(service, question, made[layout])
                    peak_mb = max(peak_mb, service.memory_mb()[1])
            yield f"all of {layout}, peak RSS", rss_mb(service.pid, "VmHWM"), "MB", RSS_MB
            yield "    with all its processes, PSS", peak_mb, "MB", None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the stores are kept")
    parser.add_argument("--hosts", type=int, default=1_000)
    parser.add_argument("--days", type=int, default=7, help="of the fleet of one service")
    parser.add_argument("--detail-minutes", type=int, default=60)
    parser.add_argument("--stacks", type=int, default=0, help="of a service")
    parser.add_argument("--figures", type=Path, help="a file for costs.py")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="compact the parts anew")
    parser.add_argument("--prepare", action="store_true", help="make the stores, and ask nothing")
    parser.add_argument("--layouts", nargs="*", default=["one", "fifty"])
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of questions")
    options = parser.parse_args()
    if options.again:
        for marker in options.folder.glob("*/compacted-*"):
            marker.unlink()
    missed = 0
    with bucket_in(options.folder / "weed") as bucket:
        made = {}
        for layout in options.layouts:
            missed += show(prepare(options.folder, bucket, layout, options))
            url = bucket.url(layout)
            made[layout] = Made(url, samples_of(open_store(url, bucket.endpoint)))
        if options.prepare:
            return 0
        if "one" in made and not options.only:
            store = open_store(made["one"].url, bucket.endpoint)
            missed += show(at_rest(store, options.hosts, options.figures))
        arguments = [f"--s3-endpoint={bucket.endpoint}"]
        asked = [
            question
            for question in questions(options.days)
            if question.layout in made
            and (not options.only or any(text in question.name for text in options.only))
        ]
        for question in list(asked):
            rows = time_question(question, made[question.layout], bucket, options.runs, arguments)
            try:
                missed += show(rows)
            except UnansweredError as error:
                missed += 1
                asked.remove(question)
                print(f"{question.name}: MISSED: {error}", flush=True)
        if "fifty" in made:
            missed += show(time_command(made["fifty"], bucket))
        missed += show(peak_memory(asked, made, arguments))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
