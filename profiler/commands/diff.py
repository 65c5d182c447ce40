"""`everflame diff`: what costs more than before, for people, programs and pipelines.

Each side is some files, which are replicates where they are several, or a window of a store,
`{selector}@FROM..UNTIL`. A gate says which changes fail a pipeline; only what costs more can.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from profiler.commands import deployments
from profiler.commands.selection import NothingSelectedError, Selection, query_of
from profiler.comparison.comparison import (
    Comparison,
    ComparisonError,
    EmptySideError,
    Operand,
    calibrate,
    of_profiles,
    of_store,
)
from profiler.comparison.deployments import deployments_in
from profiler.comparison.gate import Gate, verdict_of
from profiler.comparison.report import NAME_WIDTH, as_json, as_markdown, as_text
from profiler.flamegraph.differential import Pair, only_hosts
from profiler.formats import export
from profiler.text import counted, fit, listed
from profiler.times import parse_window, rfc3339, whole_second
from storage.objects.open import open_tenant
from storage.profile import merge
from storage.query.query import Query
from storage.selector import Selector

_SHOWN_MOVED = 5


@dataclass(frozen=True, slots=True)
class Options:
    store: str
    endpoint: str
    gate: Gate
    strict: bool = False
    last_deploy: Selection | None = None
    """Compare over the matched windows of the last deployment in it; without operands."""
    as_json: bool = False
    as_markdown: bool = False
    calibrate: bool = False
    output: str = ""
    """A file for the graph of both sides; `-` is standard output, which then has nothing else."""


def run(before: Sequence[str], after: Sequence[str], options: Options, now_ns: int) -> int:
    """Compare, print, and return the exit code.

    Raises:
        ComparisonError: there is nothing to compare.
        ValueError: an operand, a time or a selector cannot be read.
    """
    if options.calibrate:
        return _calibrate(before, after, options, now_ns)
    if options.output:
        export.pair_ending(options.output)
        export.check_folder(options.output)
    found = compare(before, after, options, now_ns)
    verdict = verdict_of(found, options.gate, is_strict=options.strict)
    moved: list[str] = []
    if options.output:
        pair = _pair(found, before, after, options)
        moved = sorted(function for function, *_ in pair.moved)
        record = orjson.loads(as_json(found, verdict, options.gate))
        record.pop("functions")
        export.put(export.encode_pair(pair, options.output, record=record), options.output)
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


def compare(
    before: Sequence[str], after: Sequence[str], options: Options, now_ns: int
) -> Comparison:
    if options.last_deploy:
        return _of_store(before, after, options, now_ns)
    sides = [before, after]
    in_store = [[_is_selection(each) for each in side] for side in sides]
    if all(map(all, in_store)):
        return _of_store(before, after, options, now_ns)
    if any(map(any, in_store)):
        raise ComparisonError("give files on both sides, or a window of the store on both")
    return of_profiles(list(map(export.read, before)), list(map(export.read, after)))


def _of_store(
    before: Sequence[str], after: Sequence[str], options: Options, now_ns: int
) -> Comparison:
    try:
        return of_store(*_in_store(before, after, options, now_ns))
    except EmptySideError as error:
        store = open_tenant(options.store, options.endpoint or None)
        selection = Selection(store, error.operand.window, error.operand.selector)
        try:
            selection.answer()
        except NothingSelectedError as nothing:  # it says where the nearest data are
            raise ComparisonError(f"{error.name} side: {nothing}") from error
        raise


def _pair(found: Comparison, before: Sequence[str], after: Sequence[str], options: Options) -> Pair:
    """Read the stacks of both sides, where the verdict took only sums of functions."""
    if found.before.coverage is not None:
        query = query_of(open_tenant(options.store, options.endpoint or None))
        profiles = [
            only_hosts(query.profile(side.window, Selector.parse(side.query)).profile, side.hosts)
            for side in (found.before, found.after)
        ]
    else:
        profiles = [merge(map(export.read, side)) for side in (before, after)]
    units = [profile.unit for profile in profiles]
    if units[0] != units[1]:
        raise ComparisonError(f"cannot draw both sides: one counts {units[0]}, one {units[1]}")
    return Pair(found, before=profiles[0], after=profiles[1])


def _in_store(
    before: Sequence[str], after: Sequence[str], options: Options, now_ns: int
) -> tuple[Query, Operand, Operand, Sequence[int]]:
    if options.last_deploy:
        return _last_deploy(options.last_deploy)
    if len(before) > 1 or len(after) > 1:
        raise ComparisonError("give one window a side: hosts are its replicates")
    query = query_of(open_tenant(options.store, options.endpoint or None))
    return query, _operand(before[0], now_ns), _operand(after[0], now_ns), ()


def _last_deploy(selection: Selection) -> tuple[Query, Operand, Operand, Sequence[int]]:
    """Find the last deployment that is asked for, and its matched windows."""
    query = selection.query()
    found = deployments_in(selection.store, query, selection.window, selection.selector)
    if not found.deployments:
        raise ComparisonError(deployments.explain(selection, found))
    last, match = found.deployments[0], found.matches[0]
    services = sorted({each.service for each in found.deployments})
    if len(services) > 1:
        raise ComparisonError(
            f"{counted(len(services), 'service')} were deployed: {', '.join(services[:8])};"
            f" say which one: -q '{{service=\"{last.service}\"}}'"
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
    """Say how often the same rule is wrong about the service's unchanged past."""
    found = calibrate(*_in_store(before, after, options, now_ns))
    if options.as_json:
        sys.stdout.buffer.write(orjson.dumps({"schema": 1, **found._asdict()}) + b"\n")
    else:
        print(
            f"{found.alarms} of {counted(found.pairs, 'unchanged pair')} of windows would have"
            f" alarmed: {found.alarms / found.pairs:.1%}"
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
            f"{text!r} names no window (try '{{service=\"api\"}}@now-2h..now-1h')"
        )
    return Operand(Selector.parse(selector), parse_window(start, end or "now", now_ns))
