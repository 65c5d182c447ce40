"""Report: a comparison as text, Markdown and JSON."""

import re
from collections.abc import Sequence
from typing import Any

import orjson

from profiler.comparison.comparison import Comparison, Function, changed
from profiler.comparison.gate import Gate, Verdict
from profiler.comparison.sides import Side
from profiler.comparison.verdict import Change, NoiseSource
from profiler.text import counted, fit, in_columns
from profiler.times import from_until

_SHOWN = 20
NAME_WIDTH = 60
_NOISE = {
    NoiseSource.HISTORY: "{} earlier positions of the same length, on the same hosts",
    NoiseSource.WITHIN: "{} comparisons of parts of the time before and after, and of hosts",
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
        "fails": gate.fails(function),
    }


def _finite(value: float) -> float | None:
    """Return None for infinity, which JSON does not have."""
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
    provisional = "provisional: " if verdict.is_provisional else ""
    return provisional + words[verdict.word]


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
    if found.source == NoiseSource.NONE:
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
                fit(_name(function), NAME_WIDTH),
            )
        )
    return in_columns(rows)


def _markdown(text: str) -> str:
    """Escape Markdown in text that contains names from outside."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", text)
