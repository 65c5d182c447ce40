"""The timeline: CPU time per step, one series for each combination of labels."""

import functools
import math
from typing import Any

import numpy as np

from profiler.service.merged import Check, MergedProfiles, PanelRequest
from profiler.service.responses import empty_reason, head
from storage.profile import Window

MOST_STEPS = 5_000
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)
"""Lengths in seconds that a timeline's step has when no step is asked for."""
_WANTED_STEPS = 180
_TOTALS = ("profiled_ns", "nonidle_ns", "ticks", "idle", "filtered", "stored", "lost")


def timeline(
    profiles: MergedProfiles, request: PanelRequest, step_ns: int, limit: int, check: Check
) -> dict[str, Any]:
    """Return the response to `timeline`. Series beyond `limit` are summed in one more, the rest."""
    # Steps begin at multiples of their length, so that the same minute is the same step.
    whole = profiles.query.interruptible(check).timeline(
        request.window,
        request.selector,
        step_ns or functools.partial(default_step_ns, request.window),
        request.by,
        type=request.type,
        is_aligned=True,
    )
    series = [
        {
            "labels": dict(each.labels),
            "rest": False,
            "values": each.values.tolist(),
            "samples": each.samples.tolist(),
        }
        for each in whole.series[:limit]
    ]
    others = whole.series[limit:]
    if others:
        series.append(
            {
                "labels": {},
                "rest": True,
                "values": np.sum([each.values for each in others], axis=0),
                "samples": np.sum([each.samples for each in others], axis=0),
            }
        )
    samples = sum(int(each.samples.sum()) for each in whole.series)
    return {
        **head(request, whole.coverage),
        "unit": whole.unit,
        "start_ms": whole.start_ns // 1_000_000,
        "step_ms": whole.step_ns // 1_000_000,
        "series": series,
        "totals": {name: whole.totals[name] for name in _TOTALS},
        "covered_ns": whole.covered_ns,
        "empty": empty_reason(profiles, request, whole.coverage, samples),
    }


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
