"""The table of `everflame status`: one of a thing is singular."""

from profiler.commands.status import table

ONE_OF_EACH = {
    "pid": 7,
    "host": "web-1",
    "uptime_s": 61.0,
    "interval_s": 60,
    "frequency_hz": 99,
    "windows": 1,
    "faults": 1,
    "alarm": False,
    "ticks": 12,
    "idle": 1,
    "filtered": 0,
    "stored": 10,
    "lost": {"spool_full": 1},
    "stops": {"complete": 1},
    "complete": 1,
    "cpu_ns": {"drain": 20_000_000, "bpf": 61_000_000, "sampler": 122_000_000},
    "bpf_ns_per_tick": 1,
    "sampler": {"pid": 7, "rss_bytes": 1},
    "uploader": {
        "pid": 8,
        "starts": 1,
        "store": "/store",
        "last_upload_ns": 0,
        "failed": 1,
        "damaged": 1,
        "uploaded": 1,
        "uploaded_bytes": 1,
        "expired": 1,
        "last_error": "",
    },
    "spool": {
        "profiles": 1,
        "size_bytes": 1,
        "limit_bytes": 1,
        "given_up": 1,
        "lost_samples": 1,
        "damaged": 1,
        "unwritten_ticks": 1,
        "last_error": "No space left on device",
    },
    "unwinding": {
        "processes": 1,
        "tables": 1,
        "tables_waiting": 0,
        "tables_evicted": 0,
        "kernel_bytes": 1,
        "builds_interrupted": 1,
        "mappings_without_number": 2,
    },
    "files": {"files": 40, "pending": 1, "failed": 2, "mounts_hung": 1},
    "mappings": {"snapshots": 9, "gaps": 0, "degraded": 1, "log_bytes": 100},
    "labels": {"instances_uncounted": 1, "processes_awaited": 3},
    "readers": {"children": 2, "answered": 9, "left_behind": 1, "failed_too_slow": 3},
    "service": {"pid": 9, "starts": 1, "failed_starts": 2},
    "slowest_binaries": [],
}


def test_one_of_a_thing_is_singular():
    """A window, a fault, a process, a table, an attempt and a file."""
    lines = dict(line.split("  ", 1) for line in table(ONE_OF_EACH).splitlines() if line[0] != " ")
    shown = {name: text.strip() for name, text in lines.items()}

    assert shown["sampling"] == "99 Hz, a window every 60 s, 1 window closed, 1 fault"
    assert shown["spool"].startswith("1 window waiting, ")
    assert shown["unwinding"].startswith("1 process, 1 unwind table in ")
    assert shown["uploader"] == "pid 8, started 1 time"
    whole = table(ONE_OF_EACH)
    assert "the stacks of 1 window, 1 sample, were dropped" in whole
    assert "1 window, 0.0 MB; 1 attempt failed, 1 file damaged" in whole
    assert "1 old window\n" in f"{whole}\n"


def test_what_the_sampler_took_is_said_before_its_parts():
    """The parts are in the whole: nobody adds them up twice."""
    lines = table(ONE_OF_EACH).splitlines()

    start = next(i for i, line in enumerate(lines) if line.startswith("cpu, "))
    shown = [" ".join(line.split()) for line in lines[start : start + 4]]
    assert shown == [
        "cpu, sampler 0.12 s, 0.20 % of one CPU",
        "drain 0.02 s, 0.03 % of one CPU",
        "cpu, bpf 0.06 s, 0.10 % of one CPU",
        "cpu, uploader 0.00 s, 0.00 % of one CPU",
    ]


def test_every_counter_of_what_went_wrong_is_said_in_words():
    """Only those that are not 0; one that is not known yet by its name."""
    lines = [" ".join(line.split()) for line in table(ONE_OF_EACH).splitlines()]

    assert set(lines) >= {
        "missed 1 build of an unwind table interrupted; 2 mappings without room for unwinding",
        "labels 1 service instance without time of presence",
        "readers 1 reader left behind: a file system does not answer; 3 failed too slow",
        "files 2 files that could not be read; 1 file system that did not answer",
        "mappings 1 process with too many mappings to be followed",
        "service 2 starts failed",
        "damaged 1 file moved away: not as written",
        "unwritten 1 tick in memory only (No space left on device)",
    }
    sound = ONE_OF_EACH | {"labels": {"instances_uncounted": 0}, "readers": {}, "service": {}}
    names = [line.split()[0] for line in table(sound).splitlines()]
    assert not {"labels", "readers", "service"} & set(names)


def test_code_of_compilers_is_said_with_what_became_of_its_maps():
    """Nothing is said where no such code was sampled."""
    parts = {
        "jit_locations": {"processes": 2, "ranges": 9, "named": 1200, "unnamed": 34},
        "perf_map": {"asked": 7, "read": 4, "other_owner": 3},
        "jitdump": {"asked": 0},
    }
    lines = [" ".join(line.split()) for line in table(ONE_OF_EACH | parts).splitlines()]

    assert "jit 1,200 of 1,234 locations named" in lines
    assert "perf maps 4 read, 3 other owner" in lines
    assert not any(line.startswith("jitdumps") for line in lines)
    assert "jit" not in table(ONE_OF_EACH)


def test_threads_of_python_are_counted_with_why_some_have_no_names():
    threads = {"processes": 3, "threads": 52, "asked": 9, "read": 5, "no_module": 1, "exited": 1}
    told = {"thread_names": {**threads, "unreadable": 1, "failed_hung": 1}}
    lines = [" ".join(line.split()) for line in table(ONE_OF_EACH | told).splitlines()]

    assert "threads 52 threads named as Python does" in lines
    assert "not read threads of processes: 1 unreadable, 1 failed hung" in lines
    assert "not read" not in table(ONE_OF_EACH | {"thread_names": threads})
