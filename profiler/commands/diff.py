"""`everflame diff`: what costs more than before, for people, programs and pipelines.

Each side is some files, which are replicates where they are several, or a window of a store,
`{selector}@FROM..UNTIL`. A gate says which changes fail a pipeline; only what costs more can.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from profiler.commands import deployments
from profiler.commands.selection import NothingSelectedError, Selection, query_of
from profiler.comparison.comparison import (
    Comparison,
    ComparisonError,
    EmptySideError,
    Function,
    Operand,
    Side,
    calibrate,
    changed,
    of_profiles,
    of_store,
)
from profiler.comparison.verdict import Change, Source
from profiler.flamegraph.differential import Pair, only_hosts
from profiler.formats import export
from profiler.text import counted, fit, in_columns, listed
from profiler.times import from_until, parse_window, rfc3339, whole_second
from storage.objects.open import open_store
from storage.profile import merge
from storage.query.query import Query
from storage.selector import Selector

REGRESSION, INCONCLUSIVE = 1, 3
"""Exit codes; the second only with `--strict`."""
DEFAULT_GATE = "relative>=10%,share>=0.5pp"
_WORSE = (Change.MORE, Change.NEW)
_SHOWN = 20
_NAME_WIDTH = 60
_SHOWN_MOVED = 5
_CONDITION = re.compile(r"(relative|share)>=(\d+(?:\.\d+)?)(%|pp)")
_NOISE = {
    Source.HISTORY: "{} earlier positions of the same length, on the same hosts",
    Source.HOSTS: "what differs between {} hosts",
    Source.REPLICATES: "what differs between {} runs",
    Source.NONE: "unknown",
}


class Gate(NamedTuple):
    """What a function that costs more must reach to fail: growth, and points of the total."""

    relative: float
    share: float

    @classmethod
    def parse(cls, text: str) -> "Gate":
        """Read `relative>=10%,share>=0.5pp`, or one of the two.

        Raises:
            ValueError: it says something else.
        """
        least = {"relative": 0.0, "share": 0.0}
        for part in text.replace(" ", "").split(","):
            found = _CONDITION.fullmatch(part)
            if not found or (found[1] == "relative") != (found[3] == "%"):
                raise ValueError(f"{text!r} is no gate (try {DEFAULT_GATE!r})")
            least[found[1]] = float(found[2]) / 100
        return cls(**least)

    def fails(self, function: Function) -> bool:
        is_worse = function.change in _WORSE
        grown = function.change == Change.NEW or function.relative[0] >= self.relative
        return is_worse and grown and function.share[0] >= self.share


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


class Verdict(NamedTuple):
    word: str
    exit_code: int


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
    verdict = verdict_of(found, options)
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
            names = listed([fit(name, _NAME_WIDTH) for name in moved], _SHOWN_MOVED)
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
        store = open_store(options.store, options.endpoint or None)
        selection = Selection(store, error.operand.window, error.operand.selector)
        try:
            selection.answer()
        except NothingSelectedError as nothing:  # it says where the nearest data are
            raise ComparisonError(f"{error.name} side: {nothing}") from error
        raise


def _pair(found: Comparison, before: Sequence[str], after: Sequence[str], options: Options) -> Pair:
    """Read the stacks of both sides, where the verdict took only sums of functions."""
    if found.before.coverage is not None:
        query = query_of(open_store(options.store, options.endpoint or None))
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
    query = query_of(open_store(options.store, options.endpoint or None))
    return query, _operand(before[0], now_ns), _operand(after[0], now_ns), ()


def _last_deploy(selection: Selection) -> tuple[Query, Operand, Operand, Sequence[int]]:
    """Find the last deployment that is asked for, and its matched windows."""
    query = selection.query()
    found = deployments.deployments_in(selection.store, query, selection.window, selection.selector)
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


def verdict_of(found: Comparison, options: Options) -> Verdict:
    if found.source == Source.NONE:
        return Verdict("inconclusive", INCONCLUSIVE if options.strict else 0)
    changes = {function.change for function in found.functions}
    if any(map(options.gate.fails, found.functions)):
        return Verdict("regression", REGRESSION)
    if changes & {Change.LESS, Change.GONE} and not changes & set(_WORSE):
        return Verdict("improvement", 0)
    return Verdict("unchanged", 0)


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


# What is printed.


def as_json(found: Comparison, verdict: Verdict, gate: Gate) -> bytes:
    """Return it as interfaces for programs say: times are Unix ms, shares parts of 1."""
    return orjson.dumps(
        {
            "schema": 1,
            "verdict": verdict.word,
            "exit_code": verdict.exit_code,
            "before": _side_record(found.before),
            "after": _side_record(found.after),
            "noise": {"source": found.source, "positions": found.positions, "df": found.df},
            "common_change": {
                "relative": found.common.relative,
                "low": _finite(found.common.low),
                "high": _finite(found.common.high),
                "verdict": found.common.change,
            },
            "functions": [_function_record(function, gate) for function in found.functions],
            "warnings": found.warnings,
        }
    )


def _side_record(side: Side) -> dict[str, Any]:
    return {
        "query": side.query,
        "window": {
            "from_ms": side.window.start_ns // 1_000_000,
            "until_ms": side.window.end_ns // 1_000_000,
        },
        "versions": side.versions,
        "hosts": side.hosts,
        "samples": round(float(side.samples.sum())),
        "cores": side.cores,
    }


def _function_record(function: Function, gate: Gate) -> dict[str, Any]:
    frame = function.frame
    return {
        "function": frame.function,
        "module": frame.module,
        "kind": frame.kind,
        "self": dict(zip(("before", "after"), function.self, strict=True)),
        "total": dict(zip(("before", "after"), function.total, strict=True)),
        "cores": [_finite(each) for each in function.cores],
        "share": [_finite(each) for each in function.share],
        "relative": [_finite(each) for each in function.relative],
        "p": function.p,
        "q": function.q,
        "verdict": function.change,
        "because": function.because,
        "fails": gate.fails(function),
    }


def _finite(value: float) -> float | None:
    """JSON knows no infinity: an interval without an end has none."""
    return value if abs(value) < 1e300 else None


def as_text(found: Comparison, verdict: Verdict, gate: Gate) -> str:
    lines = [_headline(found, verdict, gate), ""]
    for name, side in (("before", found.before), ("after", found.after)):
        lines.append(f"{name:7} {_side_text(side)}")
    lines.append(f"noise   {_NOISE[found.source].format(found.positions)}")
    lines.append(f"common  {_common_text(found)}")
    lines += [f"warning: {warning}" for warning in found.warnings]
    shown = changed(found.functions)[:_SHOWN] or list(found.functions[:5])
    if shown:
        lines += ["", *_table(found, shown, gate)]
    return "\n".join(lines)


def as_markdown(found: Comparison, verdict: Verdict, gate: Gate) -> str:
    lines = [f"**{_headline(found, verdict, gate)}**", ""]
    shown = changed(found.functions)[:_SHOWN]
    if shown:
        lines += ["| change | growth | of the total | function |", "|---|---|---|---|"]
        for function in shown:
            before, after = _shares(found, function)
            mark = " (fails)" if gate.fails(function) else ""
            lines.append(
                f"| {function.change}{mark} | {_growth(function)}"
                f" | {before:.2%} → {after:.2%} | {_markdown(_name(function))} |"
            )
        lines.append("")
    for name, side in (("Before", found.before), ("After", found.after)):
        lines.append(f"- {name}: {_markdown(_side_text(side))}")
    lines.append(f"- Noise: {_NOISE[found.source].format(found.positions)}")
    lines.append(f"- Common change: {_common_text(found)}")
    lines += [f"- Warning: {_markdown(warning)}" for warning in found.warnings]
    return "\n".join(lines)


def _headline(found: Comparison, verdict: Verdict, gate: Gate) -> str:
    failing = sum(map(gate.fails, found.functions))
    words = {
        "regression": f"regression: {_cost(failing)} more than the gate allows",
        "improvement": f"improvement: {_cost(len(changed(found.functions)))} less",
        "unchanged": "unchanged: nothing costs more than the gate allows",
        "inconclusive": "inconclusive: too little data for a verdict",
    }
    return words[verdict.word]


def _cost(number: int) -> str:
    return f"{counted(number, 'function')} {'costs' if number == 1 else 'cost'}"


def _side_text(side: Side) -> str:
    window = side.window
    parts = [side.query] if side.query else []
    if window.start_ns:
        parts.append(from_until(window))
    rows = "run" if side.hosts and side.hosts[0] == "file 1" else "host"
    parts.append(counted(len(side.hosts), rows))
    if side.versions:
        parts.append(f"version {', '.join(side.versions[:4])}")
    cores = f", {side.cores:.3f} cores" if side.cores else ""
    parts.append(f"{counted(round(float(side.samples.sum())), 'sample')}{cores}")
    return "; ".join(parts)


def _common_text(found: Comparison) -> str:
    common = found.common
    if found.source == Source.NONE:
        return f"{common.relative:+.1%}"
    return f"{common.relative:+.1%} ({common.low:+.1%} to {common.high:+.1%}): {common.change}"


def _shares(found: Comparison, function: Function) -> tuple[float, float]:
    return (
        function.self[0] / max(1.0, found.before.total),
        function.self[1] / max(1.0, found.after.total),
    )


def _growth(function: Function) -> str:
    estimate, low, high = function.relative
    if function.change in (Change.NEW, Change.GONE):
        return str(function.change)
    if _finite(low) is None or _finite(high) is None:
        return f"{estimate:+.0%}"
    return f"{estimate:+.0%} ({low:+.0%} to {high:+.0%})"


def _name(function: Function) -> str:
    module = function.frame.module
    return f"{function.frame.function} ({module})" if module else function.frame.function


def _table(found: Comparison, shown: Sequence[Function], gate: Gate) -> list[str]:
    rows = [("change", "growth", "of the total", "function")]
    for function in shown:
        before, after = _shares(found, function)
        mark = "! " if gate.fails(function) else "  "
        rows.append(
            (
                f"{mark}{function.change}",
                _growth(function),
                f"{before:.2%} → {after:.2%}",
                fit(_name(function), _NAME_WIDTH),
            )
        )
    return in_columns(rows)


def _markdown(text: str) -> str:
    """Names come from outside: nothing in them may be markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", text)
