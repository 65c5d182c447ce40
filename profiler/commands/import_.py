"""`everflame import`: profiles of other tools into a store, one object per file.

What a file is, its content says (`profiler.formats.reading`). A file says little about itself: its
window, host and labels are given on the command line where it has none. Samples of unknown length
count as ticks of a given rate, so that they merge with ours.
"""

import argparse
import dataclasses
import hashlib
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from profiler.commands import arguments
from profiler.commands.files import FILE_HELP, add_reading_options, reading_options
from profiler.commands.selection import opened
from profiler.formats.reading import Reading, ReadOptions, read
from profiler.text import counted, limit_of, quantity
from profiler.times import NS_PER_S, TimeError, parse_time
from storage.formats import pprof, pprof_arrays
from storage.formats.limits import COUNT_LIMIT
from storage.hashing import Hasher
from storage.objects.keys import LONGEST_WINDOW_S
from storage.objects.tenant import TenantStore
from storage.objects.tenant_key import make_tenant_key
from storage.profile import Host, Profile, ProfileError, Window, make_labels
from storage.query.decoding import check_counts
from storage.query.function_totals import PROCESS_LABELS
from symbolizer.text import readable

DEFAULT_HOST = "imported"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  everflame import cpu.pb.gz --host web-1 --label service=api\n"
        "  perf script -F +pid > p.txt && everflame import p.txt --window 2026-01-31T09:00:00Z\n"
        "  everflame import out.folded --window now-5m..now -F 49\n\n"
        "The exit status is 2 if a file cannot be imported or contains no samples; the other\n"
        "files are imported."
    )
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help=f"{FILE_HELP}; each becomes one object"
    )
    arguments.add_store(parser)
    parser.add_argument(
        "--window",
        default="",
        metavar="START..END",
        help="time range of files that do not contain it; START alone if they contain a duration",
    )
    parser.add_argument("--host", default="", help="host of the profile (default imported)")
    parser.add_argument(
        "--label",
        dest="labels",
        type=label_pair,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="label to set on all samples; may be repeated",
    )
    parser.add_argument(
        "-F",
        "--frequency",
        type=rate_hz,
        default=99,
        metavar="HZ",
        help="samples per second on each CPU, for files that do not contain it (default 99)",
    )
    add_reading_options(parser)


def label_pair(text: str) -> tuple[str, str]:
    name, is_pair, value = text.partition("=")
    if not is_pair or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not a label (try service=api)")
    return name, value


def rate_hz(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate (1 to 1,000,000 Hz)")
    return int(text)


def run(options: argparse.Namespace) -> int:
    asked = ImportOptions(
        window=options.window,
        host=options.host,
        labels=dict(options.labels),
        frequency_hz=options.frequency,
        reading=reading_options(options),
    )
    store = opened(options)
    return import_files(options.files, store, asked, time.time_ns())


class IncompleteFileError(ValueError):
    """A file that cannot be imported as it was asked for; the message says what to give."""


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What the command line adds to what files say."""

    window: str = ""
    """START..END, or START alone for a file that knows how long it took."""
    host: str = ""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    frequency_hz: int = 99
    reading: ReadOptions = dataclasses.field(default_factory=ReadOptions)


def import_files(
    files: Sequence[str], store: TenantStore, options: ImportOptions, now_ns: int
) -> int:
    """Put each file into the store and print its key; what was left out goes to stderr.

    Returns 2 if a file cannot be imported or holds no sample; it is reported on stderr, and the
    others are stored all the same.

    Raises:
        TimeError: `options.window` is not a time range.
        StoreError: the store did not take it.
    """
    status = 0
    for file in files:
        try:
            reading, profile, content = _read_complete(file, options, now_ns)
        except (ProfileError, IncompleteFileError, OSError) as error:
            print(f"everflame: {error}", file=sys.stderr)
            status = 2
            continue
        except (RecursionError, MemoryError) as error:
            print(f"everflame: {file}: cannot import it: {limit_of(error)}", file=sys.stderr)
            status = 2
            continue
        if profile.total_samples == 0:
            status = 2
            continue
        make_tenant_key(store.store, store.tenant)
        key, is_new = store.put_profile(profile, content)
        print(key.text)
        samples = counted(profile.total_samples, "sample")
        if reading.profile.type == "samples":
            samples += f" of {quantity(profile.period_ns, 'nanoseconds')}"
            samples += f" (-F {options.frequency_hz})" if reading.scale == 1 else ""
        print(f"{file}: {samples}{'' if is_new else ', was there already'}", file=sys.stderr)
        if profile.type != "cpu":
            print(
                f"{file}: its values are {profile.type} in {profile.unit}, not CPU time;"
                " flame graphs of cpu leave it out",
                file=sys.stderr,
            )
    return status


def _read_complete(
    file: str, options: ImportOptions, now_ns: int
) -> tuple[Reading, Profile, bytes]:
    """Return a file as it was read, as it is to be stored, and encoded; empty ones as they are.

    Raises:
        IncompleteFileError: it lacks what the options do not give.
        ProfileError: it is damaged, or of no format that is read.
        OSError: it cannot be read.
    """
    reading = read(file, options.reading)
    for warning in reading.warnings:
        print(f"{file}: {warning}", file=sys.stderr)
    if reading.profile.total_samples == 0:
        return reading, reading.profile, b""
    profile = complete(as_cpu_time(reading, file, options.frequency_hz), file, options, now_ns)
    content = pprof.encode(profile)
    check_readable(profile, content, file)
    return reading, profile, content


def as_cpu_time(reading: Reading, file: str, frequency_hz: int) -> Profile:
    """Return the profile, its samples as ticks of a rate if nothing says how long they are.

    Raises:
        ProfileError: that would be more time than a profile can hold.
    """
    profile = reading.profile
    if profile.type != "samples":
        return profile
    period_ns = NS_PER_S // frequency_hz
    # Fractions were scaled up to whole numbers; the time that they stand for is that of the file.
    if profile.total_samples * period_ns // reading.scale > COUNT_LIMIT:
        raise ProfileError(f"{file}: cannot import it: its samples add up to more than 2^62 ns")
    values = [each * period_ns // reading.scale for each in profile.row_samples.tolist()]
    return dataclasses.replace(
        profile,
        type="cpu",
        unit="nanoseconds",
        period_ns=max(1, period_ns // reading.scale),
        row_values=np.array(values, dtype=np.int64),
    )


def check_readable(profile: Profile, content: bytes, file: str) -> None:
    """Fail before an object is stored that the store's own reader could not read.

    Raises:
        ProfileError: it cannot be read, or is not what was encoded.
    """
    try:
        columns = pprof_arrays.decode(content, Hasher(secrets.token_bytes(32)))
        check_counts(columns)
    except ProfileError as error:
        raise type(error)(f"{file}: cannot be kept as an object: {error}") from error
    sums = columns.counts.sum(axis=0).tolist()
    if sums[:2] != [profile.total_samples, profile.total_value]:
        raise ProfileError(f"{file}: cannot be kept as an object: its counts do not come back")


def complete(profile: Profile, file: str, options: ImportOptions, now_ns: int) -> Profile:
    """Return the profile with the window, host and labels that were asked for.

    Raises:
        IncompleteFileError: it has no window, or one longer than an hour.
        TimeError: the window that was asked for is not a time range.
    """
    window = _window(profile.window, file, options.window, now_ns)
    accounting = profile.accounting
    hosts = accounting.hosts
    if options.host or len(hosts) != 1:
        name = readable(os.fsencode(options.host or DEFAULT_HOST))
        host_id = hashlib.blake2b(name.encode(), digest_size=8, key=b"everflame import")
        hosts = (Host(name, host_id.hexdigest()),)
    added = {
        readable(os.fsencode(name)): readable(os.fsencode(value))
        for name, value in options.labels.items()
    }
    label_sets = tuple(make_labels({**dict(each), **added}) for each in profile.label_sets)
    length_ns = window.end_ns - window.start_ns
    services = {
        tuple(pair for pair in each if pair[0] not in PROCESS_LABELS): length_ns
        for each in label_sets
    }
    labelled = dataclasses.replace(
        profile,
        window=window,
        label_sets=label_sets,
        accounting=dataclasses.replace(
            accounting,
            hosts=hosts,
            profiled_ns=accounting.profiled_ns or length_ns,
            services=accounting.services or services,
        ),
    )
    # Label sets that have become equal are added up.
    every = sorted({name for labels in label_sets for name, _ in labels})
    return labelled.group_by(every)


def _window(window: Window, file: str, asked: str, now_ns: int) -> Window:
    has_start = window.start_ns > 0
    length_ns = window.end_ns - window.start_ns
    start_text, _, end_text = asked.partition("..")
    try:
        if asked:
            start_ns = parse_time(start_text, now_ns)
            end_ns = parse_time(end_text, now_ns) if end_text else start_ns + length_ns
            window = Window(start_ns, end_ns)
    except TimeError as error:
        raise TimeError(f"--window {asked}: {error}") from error
    if not asked and not has_start:
        raise IncompleteFileError(
            f"{file} does not say when it was taken: give --window START..END"
            + (" or --window START" if length_ns else "")
        )
    if window.end_ns <= window.start_ns:
        if asked and end_text:
            raise TimeError(f"--window {asked}: it must end after it starts")
        if asked:
            raise IncompleteFileError(
                f"{file} does not say how long it took: give --window START..END"
            )
        window = Window(window.start_ns, window.start_ns + NS_PER_S)
    if window.end_ns - window.start_ns > LONGEST_WINDOW_S * NS_PER_S:
        what = f"--window {asked}" if asked and end_text else file
        raise IncompleteFileError(
            f"{what} is longer than an hour: give --window START..END, at most an hour"
        )
    return window
