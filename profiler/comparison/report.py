"""Report: a comparison as text, Markdown and JSON."""

import re
from collections.abc import Sequence
from typing import Any

import orjson

from profiler.comparison.comparison import Comparison, Function, changed, uncertain
from profiler.comparison.gate import Gate, Verdict
from profiler.comparison.sides import Side
from profiler.comparison.verdict import Change, NoiseSource
from profiler.text import counted, fit, in_columns
from profiler.times import from_until

_SHOWN = 20
_UNCERTAIN = "largest differences, not certain yet"
NAME_WIDTH = 60
_NOISE = {
    NoiseSource.HISTORY: "{} earlier positions of the same length, on the same hosts",
    NoiseSource.WITHIN: "{} comparisons of parts of the time before and after, and of hosts",
    NoiseSource.FLEET: "what is usual for functions of {} other services on the host",
    NoiseSource.PRIOR: "what is usual for functions of services",
    NoiseSource.HOSTS: "differences between {} hosts",
    NoiseSource.GROUPS: "differences between {} groups of hosts",
    NoiseSource.REPLICATES: "differences between {} runs",
    NoiseSource.NONE: "unknown",
}


def as_json(found: Comparison, verdict: Verdict, gate: Gate) -> bytes:
    """Return the comparison as JSON: times are Unix ms, shares are parts of 1."""
    return orjson.dumps(
        {
            "schema": 1,
            "verdict": verdict.word,
            "provisional": verdict.is_provisional,
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
        "needs": function.needs,
        "fails": gate.fails(function),
    }


def _finite(value: float) -> float | None:
    """Return None for infinity, which JSON does not have."""
    return value if abs(value) < 1e300 else None


def as_text(found: Comparison, verdict: Verdict, gate: Gate) -> str:
    lines = [f"{_word(verdict)}: {_headline(found, verdict, gate)}", ""]
    for name, side in (("before", found.before), ("after", found.after)):
        lines.append(f"{name:7} {_side_text(side)}")
    lines.append(f"noise   {_NOISE[found.source].format(found.positions)}")
    lines.append(f"load    {_load_text(found)}")
    lines += [f"warning: {warning}" for warning in found.warnings]
    shown = changed(found.functions)[:_SHOWN]
    if shown:
        lines += ["", *_table(found, shown, gate)]
    open_ones = uncertain(found.functions)
    if open_ones:
        lines += ["", _UNCERTAIN, *_uncertain_table(found, open_ones)]
    return "\n".join(lines)


def as_markdown(found: Comparison, verdict: Verdict, gate: Gate) -> str:
    lines = [f"**{_word(verdict)}: {_markdown(_headline(found, verdict, gate))}**", ""]
    shown = changed(found.functions)[:_SHOWN]
    if shown:
        lines += ["| change | growth | of the total | function |", "|---|---|---|---|"]
        for function in shown:
            mark = " (fails)" if gate.fails(function) else ""
            name = _markdown(_name(function))
            lines.append(
                f"| {function.change}{mark} | {_growth(function)} | {_both(found, function)}"
                f" | {name} |"
            )
        lines.append("")
    open_ones = uncertain(found.functions)
    if open_ones:
        lines += [
            f"{_UNCERTAIN}:",
            "",
            "| growth | of the total | function | |",
            "|---|---|---|---|",
        ]
        for function in open_ones:
            cells = (_growth(function), _both(found, function), _name(function), function.needs)
            lines.append(f"| ? {' | '.join(map(_markdown, cells))} |")
        lines.append("")
    for name, side in (("Before", found.before), ("After", found.after)):
        lines.append(f"- {name}: {_markdown(_side_text(side))}")
    lines.append(f"- Noise: {_NOISE[found.source].format(found.positions)}")
    lines.append(f"- Load: {_load_text(found)}")
    lines += [f"- Warning: {_markdown(warning)}" for warning in found.warnings]
    return "\n".join(lines)


def _word(verdict: Verdict) -> str:
    return f"{verdict.word} (provisional)" if verdict.is_provisional else verdict.word


def _headline(found: Comparison, verdict: Verdict, gate: Gate) -> str:
    """Return what changed most, and the whole: `main.parse +58 % and 2 more; service +9 % CPU`."""
    failing = [each for each in found.functions if gate.fails(each)]
    text = {
        "regression": _most(failing),
        "improvement": _most(changed(found.functions)),
        "unchanged": "nothing costs more than the gate allows",
        "inconclusive": "too little data for a verdict",
    }[verdict.word]
    return "; ".join(part for part in (text, _whole_text(found)) if part)


def _most(findings: Sequence[Function]) -> str:
    if not findings:
        return ""
    more = f" and {len(findings) - 1:,} more" if len(findings) > 1 else ""
    return f"{fit(findings[0].frame.names()[0], NAME_WIDTH)} {_estimate(findings[0])}{more}"


def _whole_text(found: Comparison) -> str:
    """Return how the CPU time of the service changed, if it is known."""
    before, after = found.before.cores, found.after.cores
    if found.before.is_of_files or not before or not after:
        return ""
    return f"service {_percent(after / before - 1)} CPU"


def _side_text(side: Side) -> str:
    window = side.window
    parts = [side.query] if side.query else []
    if window.start_ns:
        parts.append(from_until(window))
    rows = "run" if side.is_of_files else "host"
    parts.append(counted(len(side.hosts), rows))
    if side.versions:
        parts.append(f"version {', '.join(side.versions[:4])}")
    cores = f", {side.cores:.3f} cores" if side.cores else ""
    parts.append(f"{counted(round(float(side.samples.sum())), 'sample')}{cores}")
    return "; ".join(parts)


def _load_text(found: Comparison) -> str:
    common = found.common
    if found.source == NoiseSource.NONE:
        return f"{_percent(common.relative)}, subtracted from each function"
    interval = f"{_percent(common.low)} to {_percent(common.high)}"
    words = "" if common.is_certain else "; not certain"
    return f"{_percent(common.relative)} ({interval}{words}), subtracted from each function"


def _both(found: Comparison, function: Function) -> str:
    """Return a function's parts of the total before and after."""
    before = function.self[0] / max(1.0, found.before.total)
    after = function.self[1] / max(1.0, found.after.total)
    return f"{100 * before:.2f} → {100 * after:.2f} %"


def _growth(function: Function) -> str:
    _, low, high = function.relative
    has_interval = _finite(low) is not None and _finite(high) is not None
    if function.change in (Change.NEW, Change.GONE) or not has_interval:
        return _estimate(function)
    return f"{_estimate(function)} ({_percent(low)} to {_percent(high)})"


def _estimate(function: Function) -> str:
    if function.change in (Change.NEW, Change.GONE):
        return str(function.change)
    return _percent(function.relative[0])


def _percent(part: float) -> str:
    return f"{100 * part:+,.{0 if abs(part) >= 0.0995 else 1}f} %"


def _name(function: Function) -> str:
    module = function.frame.module
    return f"{function.frame.function} ({module})" if module else function.frame.function


def _table(found: Comparison, shown: Sequence[Function], gate: Gate) -> list[str]:
    rows = [("change", "growth", "of the total", "function")]
    for function in shown:
        mark = "! " if gate.fails(function) else "  "
        name = fit(_name(function), NAME_WIDTH)
        rows.append((f"{mark}{function.change}", _growth(function), _both(found, function), name))
    return in_columns(rows)


def _uncertain_table(found: Comparison, shown: Sequence[Function]) -> list[str]:
    rows = []
    for function in shown:
        name = fit(_name(function), NAME_WIDTH)
        rows.append((f"? {_growth(function)}", _both(found, function), name, function.needs))
    return in_columns(rows)


def _markdown(text: str) -> str:
    """Escape Markdown in text that contains names from outside."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", text)
