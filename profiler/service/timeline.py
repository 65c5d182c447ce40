"""The timeline: CPU time per step, one series for each combination of labels."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from profiler.service.merged import Check, MergedProfiles, PanelRequest
from profiler.service.responses import Count, Counts, Panel, panel_fields
from storage.profile import Window

MOST_STEPS = 5_000
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)
"""Lengths in seconds that a timeline's step has when no step is asked for."""
_WANTED_STEPS = 180


@dataclass(frozen=True)
class TimelineSeries:
    labels: Mapping[str, str]
    rest: bool
    values: Counts
    samples: Counts


@dataclass(frozen=True)
class StepTotals:
    profiled_ns: Counts
    nonidle_ns: Counts
    ticks: Counts
    idle: Counts
    filtered: Counts
    stored: Counts
    lost: Counts


@dataclass(frozen=True, kw_only=True)
class TimelinePanel(Panel):
    start_ms: Count
    step_ms: Count
    series: Sequence[TimelineSeries]
    totals: StepTotals
    covered_ns: Counts


def timeline(
    profiles: MergedProfiles, request: PanelRequest, step_ns: int, limit: int, check: Check
) -> TimelinePanel:
    """Return the timeline of a request. Series beyond `limit` are summed in one more, the rest."""
    # Steps begin at multiples of their length, so that the same minute is the same step.
    query = profiles.query.interruptible(check)
    whole = query.timeline(
        request.window,
        request.selector,
        step_ns or functools.partial(default_step_ns, request.window),
        request.by,
        type=request.type,
        is_aligned=True,
    )
    series = [
        # orjson writes contiguous arrays only; these are columns of one.
        TimelineSeries(
            dict(each.labels),
            False,
            np.ascontiguousarray(each.values),
            np.ascontiguousarray(each.samples),
        )
        for each in whole.series[:limit]
    ]
    others = whole.series[limit:]
    if others:
        values = np.sum([each.values for each in others], axis=0)
        samples = np.sum([each.samples for each in others], axis=0)
        series.append(TimelineSeries({}, True, values, samples))
    all_samples = sum(int(each.samples.sum()) for each in whole.series)
    return TimelinePanel(
        **panel_fields(query, request, whole.coverage, whole.unit, all_samples),
        start_ms=whole.start_ns // 1_000_000,
        step_ms=whole.step_ns // 1_000_000,
        series=series,
        totals=StepTotals(*(whole.totals[each.name] for each in fields(StepTotals))),
        covered_ns=whole.covered_ns,
    )


def default_step_ns(window: Window, object_ns: int) -> int:
    """Return the step that cuts a window into a number of steps that a screen can show.

    It is a multiple of the longest object's length: an object counts where it begins, so that
    shorter steps would have gaps. Odd lengths are those of windows that were cut short.
    """
    object_s = max(1, math.ceil(object_ns / 1e9))
    if object_s % _STEPS[2]:
        object_s = next((step for step in _STEPS if step >= object_s), object_s)
    length_s = (window.end_ns - window.start_ns) / 1e9
    fitting = (step for step in _STEPS if length_s / step <= _WANTED_STEPS)
    least = next(fitting, 86400 * (1 + int(length_s / 86400 / _WANTED_STEPS)))
    whole = (step for step in (*_STEPS, least) if step >= least and step % object_s == 0)
    return next(whole, object_s * math.ceil(least / object_s)) * 1_000_000_000
