"""`everflame status`: the status of this host's agent, as a table or as JSON."""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from profiler.agent.status import ask, default_run_folder
from profiler.commands import arguments
from profiler.text import counted
from storage.objects.keys import DEFAULT_TENANT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "examples:\n  everflame status\n  everflame status --json"
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the status of this host's agent."""
    status = ask(default_run_folder())
    if options.json:
        sys.stdout.buffer.write(orjson.dumps(status, option=orjson.OPT_INDENT_2) + b"\n")
    else:
        print(table(status))
    return 0


def table(status: Mapping[str, Any]) -> str:
    """Return the status as a table."""
    lost = sum(status["lost"].values())
    upload, spool = status["uploader"], status["spool"]
    rate = f"{status['frequency_hz']} Hz, a window every {status['interval_s']} s"
    windows = counted(status["windows"], "window")
    ticks = f"{status['ticks']:,} = {status['stored']:,} stored + {status['idle']:,} idle"
    own_mb = _megabytes(status["sampler"]["rss_bytes"])
    used_mb, limit_mb = _megabytes(spool["size_bytes"]), _megabytes(spool["limit_bytes"])
    waiting = f"{counted(spool['profiles'], 'window')} waiting, {used_mb} of {limit_mb}"
    tenant = status.get("tenant", DEFAULT_TENANT)
    lines = [
        ("agent", f"pid {status['pid']} on {status['host']}, up {_duration(status['uptime_s'])}"),
        ("sampling", f"{rate}, {windows} closed, {counted(status['faults'], 'fault')}"),
        ("ticks", f"{ticks} + {status['filtered']:,} filtered + {lost:,} lost"),
        *_lost(status["lost"]),
        *_stops(status["stops"], status["complete"]),
        *_costs(status["cpu_ns"], upload.get("cpu_ns", 0), status["uptime_s"]),
        ("bpf", f"{status['bpf_ns_per_tick'] / 1000:.1f} us a tick"),
        *_unwinding(status["unwinding"]),
        *_more("files", status.get("files", {})),
        *_more("mappings", status.get("mappings", {})),
        *_more("labels", status.get("labels", {})),
        *_more("readers", status.get("readers", {})),
        *_python(status.get("cpython", {})),
        *_threads(status.get("thread_names", {})),
        *_jit(status),
        ("memory", f"sampler {own_mb}, uploader {_megabytes(upload.get('rss_bytes', 0))}"),
        ("spool", waiting),
        *([] if tenant == DEFAULT_TENANT else [("tenant", tenant)]),
        *_spool_problems(spool),
        *_upload(upload),
        *_more("service", {"failed_starts": status.get("service", {}).get("failed_starts", 0)}),
    ]
    if status["alarm"]:
        lines.append(("alarm", "ticks and the kernel's own CPU times do not agree"))
    lines += [
        ("slow binary", f"{binary['ms']:.0f} ms  {binary['path']}")
        for binary in status["slowest_binaries"]
    ]
    wide = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{wide}}  {text}".rstrip() for name, text in lines)


def _jit(status: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Return how much code of just-in-time compilers has names, and what came of the files."""
    places = status.get("jit_locations", {})
    sampled = places.get("named", 0) + places.get("unnamed", 0)
    if not sampled:
        return
    yield "jit", f"{places['named']:,} of {sampled:,} locations named"
    for kind, words in (("perf_map", "perf maps"), ("jitdump", "jitdumps")):
        outcomes = {name: number for name, number in status[kind].items() if name != "asked"}
        if outcomes:
            counts = (f"{number:,} {name.replace('_', ' ')}" for name, number in outcomes.items())
            yield f"  {words}", ", ".join(counts)


def _lost(lost: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    for cause, number in lost.items():
        yield f"  {cause}", f"{number:,} lost"


def _spool_problems(spool: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if spool["given_up"]:
        windows = counted(spool["given_up"], "window")
        samples = counted(spool["lost_samples"], "sample")
        yield "  full", f"the stacks of {windows}, {samples}, were dropped (`spool_full` above)"
    if spool["damaged"]:
        yield "  damaged", f"{counted(spool['damaged'], 'file')} moved away: not as written"
    if spool["unwritten_ticks"]:
        reason = f" ({spool['last_error']})" if spool["last_error"] else ""
        yield "  unwritten", f"{counted(spool['unwritten_ticks'], 'tick')} in memory only{reason}"


_IN_WORDS = {
    "builds_interrupted": ("build of an unwind table", "builds of unwind tables", "interrupted"),
    "mappings_without_number": ("mapping", "mappings", "without room for unwinding"),
    "instances_uncounted": ("service instance", "service instances", "without time of presence"),
    "processes_uncounted": ("process", "processes", "without time of presence"),
    "failed": ("file", "files", "that could not be read"),
    "beyond_limit": ("file", "files", "beyond the limit"),
    "misclaimed_build_ids": ("file", "files", "with the build id of another one"),
    "mounts_hung": ("file system", "file systems", "that did not answer"),
    "gaps": ("gap", "gaps", "in the kernel's records of processes"),
    "degraded": ("process", "processes", "with too many mappings to be followed"),
    "doubted": ("process", "processes", "read again: they ran code of which no record had told"),
    "dropped_logs": ("process", "processes", "whose mappings took too much memory"),
    "failed_starts": ("start", "starts", "failed"),
    "left_behind": ("reader", "readers", "left behind: a file system does not answer"),
}
"""What a counter in the status counts: one, several, and what has happened to them."""
_NO_PROBLEMS = frozenset(
    {
        *("children", "waiting", "answered", "cpu_ns", "files", "pending", "snapshots"),
        *("log_bytes", "processes_awaited"),
    }
)


def _more(name: str, state: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Return the counters of what went wrong that are not 0; those not known by their name."""
    told = []
    for counter, number in state.items():
        if not number or counter in _NO_PROBLEMS:
            continue
        one, several, happened = _IN_WORDS.get(counter, (counter.replace("_", " "),) * 2 + ("",))
        told.append(f"{counted(number, one, several)} {happened}".rstrip())
    if told:
        yield name, "; ".join(told)


_NO_REFUSALS = frozenset({"processes", "threads", "asked", "read", "no_module", "exited"})


def _threads(state: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Return how many threads have Python's names, and why others have not."""
    if state.get("threads"):
        yield "threads", f"{counted(state['threads'], 'thread')} named as Python does"
    refused = [
        f"{number:,} {reason.replace('_', ' ')}"
        for reason, number in state.items()
        if reason not in _NO_REFUSALS
    ]
    if refused:
        yield "  not read", f"threads of processes: {', '.join(refused)}"


_PYTHON_ENDS = {
    "no_python": "of threads that run no Python",
    "no_state": "without a thread state",
    "other_thread": "with the state of another thread",
    "unreadable": "with memory that was not there",
    "no_code": "with a frame that is of no code object",
    "truncated": "deeper than a record has room for",
    "other_stack": "with functions of another interpreter or of a greenlet, which are not shown",
    "unknown_interpreter": "in an interpreter that was not known yet",
}


def _python(state: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Return how many samples of interpreters have their frames, and why others have not."""
    if state.get("attempts"):
        frames, samples = state.get("frames", 0), state["attempts"]
        yield "python", f"{counted(frames, 'frame')} in {counted(samples, 'sample')}"
    for reason, words in _PYTHON_ENDS.items():
        if state.get(reason):
            yield f"  {reason}", f"{counted(state[reason], 'sample')} {words}"
    for name, number in state.items():
        if name.startswith("refused_"):
            reason = name.removeprefix("refused_").replace("_", " ")
            yield "  refused", f"{counted(number, 'interpreter')}: {reason}"
    if state.get("frames_unnamed"):
        yield "  unnamed", f"{counted(state['frames_unnamed'], 'frame')} without a code object"


def _upload(upload: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not upload.get("store"):
        yield "uploader", "has not reported yet"
        return
    last_ns = upload["last_upload_ns"]
    last = f"{_duration(time.time() - last_ns / 1e9)} ago" if last_ns else "never"
    yield "uploader", f"pid {upload['pid']}, started {counted(upload['starts'], 'time')}"
    yield "  store", f"{upload['store']}, last upload {last}"
    failed = (
        f"{counted(upload['failed'], 'attempt')} failed,"
        f" {counted(upload['damaged'], 'file')} damaged"
    )
    size_mb = _megabytes(upload["uploaded_bytes"])
    yield "  sent", f"{counted(upload['uploaded'], 'window')}, {size_mb}; {failed}"
    yield from _more("  starts", {"failed_starts": upload.get("failed_starts", 0)})
    if upload["expired"]:
        yield "  removed", counted(upload["expired"], "old window")
    if upload["last_error"]:
        yield "  error", upload["last_error"]


def _unwinding(state: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    processes = (
        f"{counted(state['processes'], 'process', 'processes')},"
        f" {counted(state['tables'], 'unwind table')}"
    )
    waiting = state["tables_waiting"]
    yield (
        "unwinding",
        f"{processes} in {_megabytes(state['kernel_bytes'])} of the kernel's memory,"
        f" {state['tables_evicted']:,} evicted"
        + (f", {waiting:,} waiting for room (see --unwind-memory)" if waiting else ""),
    )
    shown = {"processes", "tables", "tables_waiting", "tables_evicted", "kernel_bytes"}
    yield from _more("  missed", {name: state[name] for name in state if name not in shown})


def _stops(stops: Mapping[str, int], complete: int) -> Iterator[tuple[str, str]]:
    whole = sum(stops.values())
    if whole:
        yield "stacks", f"{complete / whole:.1%} complete"
    for reason, number in sorted(stops.items(), key=lambda item: -item[1]):
        yield f"  {reason}", f"{number / whole:.1%} of stacks end here"


def _costs(
    cpu_ns: Mapping[str, int], uploader_ns: int, uptime_s: float
) -> Iterator[tuple[str, str]]:
    """Return the CPU time of each process and of BPF; the sampler's parts are below it."""
    wholes = {"sampler": cpu_ns["sampler"], "bpf": cpu_ns["bpf"], "uploader": uploader_ns}
    parts = {f"  {part}": ns for part, ns in cpu_ns.items() if part not in wholes}
    for name, spent_ns in wholes.items():
        yield f"cpu, {name}", _share(spent_ns, uptime_s)
        for part, part_ns in parts.items() if name == "sampler" else ():
            yield part, _share(part_ns, uptime_s)


def _share(spent_ns: int, uptime_s: float) -> str:
    return f"{spent_ns / 1e9:.2f} s, {spent_ns / 1e7 / max(uptime_s, 0.001):.2f} % of one CPU"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
