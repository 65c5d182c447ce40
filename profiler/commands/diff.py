"""`everflame diff`: which functions cost more than before, as text, JSON or Markdown.

Each side is one or more files (several are replicates) or a window of a store,
`{selector}@FROM..UNTIL`. The gate says which changes fail a pipeline; only growth can.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from profiler.commands import arguments, deployments
from profiler.commands.files import FILE_HELP, add_reading_options, read_file, reading_options
from profiler.commands.selection import (
    NothingSelectedError,
    Selection,
    in_cluster,
    query_of,
    selected,
)
from profiler.comparison.comparison import Comparison, calibrate, of_profiles, of_store
from profiler.comparison.deployments import announced_ns, deployments_in
from profiler.comparison.gate import DEFAULT_GATE, Gate, verdict_of
from profiler.comparison.report import NAME_WIDTH, as_json, as_markdown, as_text
from profiler.comparison.sides import ComparisonError, EmptySideError, Operand
from profiler.flamegraph.differential import Pair
from profiler.flamegraph.views import View, only_hosts
from profiler.formats import export
from profiler.formats.reading import OneSideError, ReadOptions
from profiler.text import counted, fit, listed, path_text
from profiler.times import parse_window, rfc3339, whole_second
from storage.columns import Columns
from storage.merging import merge_columns
from storage.objects.open import open_tenant
from storage.query.query import Query
from storage.selector import Selector

_SHOWN_MOVED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  everflame diff '{service=\"api\"}@now-3h..now-2h' -- '{service=\"api\"}@now-1h..now'\n"
        "  everflame diff old-*.pb.gz -- new-*.pb.gz --markdown\n"
        "  everflame diff --last-deploy -q '{service=\"api\"}'\n\n"
        "The noise of a window is estimated from the same service in the day before. With less\n"
        "past it is estimated from the minutes around the windows and from other services; then\n"
        "the verdict is provisional: more data may change it. The noise of files is estimated\n"
        "from those of one side, of which there must be three or more.\n"
        "The exit status is 0 without a regression, 1 with one, provisional or not, and 2 if\n"
        "there is nothing to compare. With --strict it is 3 if the verdict is provisional,\n"
        "whatever it says, or if there is too little data for one."
    )
    parser.usage = (
        "everflame diff [OPTIONS] BEFORE... -- AFTER...\n"
        "       everflame diff [OPTIONS] FILE-OF-BOTH-SIDES\n"
        "       everflame diff [OPTIONS] --last-deploy -q SELECTOR"
    )
    parser.add_argument(
        "before",
        metavar="BEFORE",
        nargs="*",
        help=f"a file ({FILE_HELP}), or a window of the store: {{selector}}@FROM..UNTIL; a file"
        " that holds both sides, such as that of difffolded.pl, is given alone",
    )
    parser.add_argument(
        "--last-deploy",
        action="store_true",
        help="compare the time before and after the last deployment that -q, --from and --until"
        " select (default: in the last 7 days)",
    )
    arguments.add_query(parser)
    arguments.add_window(parser)
    parser.add_argument("--after", nargs="+", default=[], help=argparse.SUPPRESS)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        default="",
        help="also write a differential flame graph; the ending selects the format: .svg,"
        " .folded (as difffolded.pl), .speedscope.json or .json; - writes folded stacks to stdout",
    )
    arguments.add_python_native(
        parser, " in the graph; functions are compared without them in any case"
    )
    arguments.add_json(parser)
    parser.add_argument(
        "--markdown", action="store_true", help="print Markdown, for a merge request"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="report how often the test raises a false alarm on the service's unchanged past",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="exit with 3 if there is too little data, or the verdict is provisional",
    )
    parser.add_argument(
        "--fail-over",
        metavar="GATE",
        default=DEFAULT_GATE,
        help="fail if a function grew by at least this ratio and by this many percentage points of"
        " the total (default %(default)s)",
    )
    arguments.add_store(parser)
    arguments.add_cluster(parser)
    add_reading_options(parser, has_sides=False)


def split_arguments(given: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Replace the dashes of `BEFORE... -- AFTER...` by an option: other options may follow."""
    arguments_read = list(given)
    if "--" in given:
        arguments_read[given.index("--")] = "--after"
    return arguments_read, {}


def run(options: argparse.Namespace) -> int:
    before, after = options.before, options.after
    if not after and len(before) == 2:
        before, after = before[:1], before[1:]
    if options.last_deploy and before:
        raise ValueError("diff: name two sides or use --last-deploy, not both")
    if not options.last_deploy:
        if not after and (len(before) != 1 or _is_selection(before[0])):
            raise ValueError(
                "diff: name both sides: everflame diff BEFORE... -- AFTER... (or --last-deploy)"
            )
        if options.query or options.start or options.end:
            raise ValueError("diff: -q, --from and --until need --last-deploy")
    with in_cluster(options) as executor:
        last = selected(options, "now-7d", executor) if options.last_deploy else None
        settings = Options(
            store=options.store,
            endpoint=options.s3_endpoint,
            tenant=options.tenant,
            gate=Gate.parse(options.fail_over),
            strict=options.strict,
            as_json=options.json,
            as_markdown=options.markdown,
            last_deploy=last,
            calibrate=options.calibrate,
            output=options.output,
            python_native=options.python_native,
            reading=reading_options(options),
            executor=executor,
        )
        return diff(before, after, settings, time.time_ns())


@dataclass(frozen=True, slots=True)
class Options:
    store: str
    endpoint: str
    gate: Gate
    tenant: str = ""
    strict: bool = False
    last_deploy: Selection | None = None
    """Where to look for the last deployment; None if two sides are named."""
    as_json: bool = False
    as_markdown: bool = False
    calibrate: bool = False
    output: str = ""
    """The file of the differential graph; `-` is stdout, and nothing else is printed there."""
    python_native: bool = False
    """Draw what interpreters add to stacks."""
    reading: ReadOptions = field(default_factory=ReadOptions)
    """Which part of files is read."""
    executor: Executor | None = None
    """Whose workers read wide windows."""


def diff(before: Sequence[str], after: Sequence[str], options: Options, now_ns: int) -> int:
    """Compare, print, and return the exit code. Without `after`, `before` is a file of both.

    Raises:
        ComparisonError: there is nothing to compare.
        ValueError: an operand, a time or a selector cannot be read.
    """
    if options.calibrate:
        return _calibrate(before, after, options, now_ns)
    if options.output:
        export.refuse_directory(options.output)
        export.pair_ending(options.output)
        export.check_folder(options.output)
    files = _read_files(before, after, options)
    found = of_profiles(*files) if files else _of_store(before, after, options, now_ns)
    verdict = verdict_of(found, options.gate, is_strict=options.strict)
    moved: list[str] = []
    if options.output:
        pair = _pair(found, files, options)
        moved = sorted(function for function, *_ in pair.moved)
        record = orjson.loads(as_json(found, verdict, options.gate))
        record.pop("functions")
        view = View(export.DEFAULT_BY, python_native=options.python_native)
        content = export.encode_pair(pair, options.output, view, record=record)
        export.put(content, options.output)
    if options.output == export.STDOUT:
        return verdict.exit_code
    if options.as_json:
        sys.stdout.buffer.write(as_json(found, verdict, options.gate) + b"\n")
    elif options.as_markdown:
        print(as_markdown(found, verdict, options.gate))
    else:
        print(as_text(found, verdict, options.gate))
        if moved:
            names = listed([fit(name, NAME_WIDTH) for name in moved], _SHOWN_MOVED)
            print(f"\nmoved   from some callers to others: {names}")
    return verdict.exit_code


def _read_files(
    before: Sequence[str], after: Sequence[str], options: Options
) -> tuple[list[Columns], list[Columns]] | None:
    """Return the profiles of both sides, or None if they are windows of the store."""
    if options.last_deploy:
        return None
    in_store = [_is_selection(each) for each in (*before, *after)]
    if all(in_store):
        return None
    if any(in_store):
        raise ComparisonError(
            "cannot compare files with a window of the store: name the same on both sides"
        )
    if after:
        files = [*before, *after]
        profiles = [Columns.of(read_file(file, options.reading)) for file in files]
        _refuse_other_units(files, profiles)
        return profiles[: len(before)], profiles[len(before) :]
    # What is wrong with a file is said once, although each side is read by itself.
    (file,) = before
    sides = [replace(options.reading, side=side) for side in ("before", "after")]
    try:
        read = read_file(file, sides[0]), read_file(file, sides[1], is_quiet=True)
    except OneSideError as error:
        raise ComparisonError(
            f"{file} holds one side: name both: everflame diff BEFORE... -- AFTER..."
        ) from error
    return [Columns.of(read[0])], [Columns.of(read[1])]


def _refuse_other_units(files: Sequence[str], profiles: Sequence[Columns]) -> None:
    first = profiles[0]
    for file, profile in zip(files, profiles, strict=True):
        if (profile.type, profile.unit) != (first.type, first.unit):
            raise ComparisonError(
                f"cannot compare {path_text(files[0])} ({first.unit} of {first.type}) with"
                f" {path_text(file)} ({profile.unit} of {profile.type}): name files of one kind"
            )


def _of_store(
    before: Sequence[str], after: Sequence[str], options: Options, now_ns: int
) -> Comparison:
    try:
        return of_store(*_in_store(before, after, options, now_ns))
    except EmptySideError as error:
        store = open_tenant(options.store, options.endpoint or None, options.tenant)
        operand = error.operand
        selection = Selection(store, operand.window, operand.selector, options.executor)
        try:
            selection.answer()
        except NothingSelectedError as nothing:  # it says where the nearest data are
            raise ComparisonError(f"{error.name} side: {nothing}") from error
        raise


def _pair(
    found: Comparison, files: tuple[list[Columns], list[Columns]] | None, options: Options
) -> Pair:
    """Read the stacks of both sides; the verdict needed only function totals."""
    if files is None:
        store = open_tenant(options.store, options.endpoint or None, options.tenant)
        query = query_of(store, options.executor)
        profiles = []
        for side in (found.before, found.after):
            labels = frozenset[str]() if side.has_all_hosts else None
            answer = query.profile(side.window, Selector.parse(side.query), labels=labels)
            hosts = None if side.has_all_hosts else side.hosts
            profiles.append(only_hosts(answer.profile, hosts))
    else:
        profiles = [merge_columns(side) for side in files]
    units = [profile.unit for profile in profiles]
    if units[0] != units[1]:
        raise ComparisonError(
            f"cannot draw both sides: their units differ ({units[0]}, {units[1]})"
        )
    return Pair(found, before=profiles[0], after=profiles[1])


def _in_store(
    before: Sequence[str], after: Sequence[str], options: Options, now_ns: int
) -> tuple[Query, Operand, Operand, Sequence[int]]:
    if options.last_deploy:
        return _last_deploy(options.last_deploy)
    if len(before) > 1 or len(after) > 1:
        raise ComparisonError(
            "cannot compare several windows: name one on each side (hosts are its replicates)"
        )
    store = open_tenant(options.store, options.endpoint or None, options.tenant)
    query = query_of(store, options.executor)
    sides = _operand(before[0], now_ns), _operand(after[0], now_ns)
    services = {
        service
        for selector, window in sides
        for service in query.label_values(window, "service", selector)
    }
    changes_ns = announced_ns(store, services, sides[0].window, sides[1].window)
    return query, sides[0], sides[1], changes_ns


def _last_deploy(selection: Selection) -> tuple[Query, Operand, Operand, Sequence[int]]:
    """Find the last selected deployment, and the windows to compare for it."""
    query = selection.query()
    found = deployments_in(selection.store, query, selection.window, selection.selector)
    if not found.deployments:
        raise ComparisonError(deployments.explain(selection, found))
    last, match = found.deployments[0], found.matches[0]
    services = sorted({each.service for each in found.deployments})
    if len(services) > 1:
        raise ComparisonError(
            f"{counted(len(services), 'service')} were deployed: {', '.join(services[:8])};"
            f" select one: -q '{{service=\"{last.service}\"}}'"
        )
    name = f"{last.kind} of {last.service} {last.previous or '?'} -> {last.version}"
    if match.before is None or match.after is None:
        raise ComparisonError(f"{name} at {rfc3339(last.first_ns)} is {match.reason}")
    print(
        f"everflame: {name}, began {whole_second(last.first_ns)},"
        f" settled {whole_second(last.settled_ns)}",
        file=sys.stderr,
    )
    return query, match.before, match.after, found.all_ns


def _calibrate(before: Sequence[str], after: Sequence[str], options: Options, now_ns: int) -> int:
    """Print how often the test raises a false alarm on the service's unchanged past."""
    found = calibrate(*_in_store(before, after, options, now_ns))
    if options.as_json:
        sys.stdout.buffer.write(orjson.dumps({"schema": 1, **found._asdict()}) + b"\n")
    else:
        print(
            f"{found.alarms} of {counted(found.pairs, 'unchanged pair')} of windows would have"
            f" raised an alarm: {found.alarms / found.pairs:.1%}"
            f" (95 % interval {found.low:.1%} to {found.high:.1%})"
        )
    return 0


def _is_selection(operand: str) -> bool:
    return operand.startswith("{") and not Path(operand).exists()


def _operand(text: str, now_ns: int) -> Operand:
    selector, has_window, times = text.rpartition("@")
    start, is_range, end = times.partition("..")
    if not has_window or not is_range:
        raise ComparisonError(
            f"{text!r} is not a window (try '{{service=\"api\"}}@now-2h..now-1h')"
        )
    return Operand(Selector.parse(selector), parse_window(start, end or "now", now_ns))
