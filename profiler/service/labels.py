"""Labels: their names, and the values of one, each with its number of samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from profiler.service.merged import Check, MergedProfiles, PanelRequest
from profiler.service.responses import SCHEMA, Count, WindowMs


@dataclass(frozen=True)
class LabelName:
    name: str
    values: Count
    samples: Count


@dataclass(frozen=True)
class Labels:
    schema: Literal[1]
    window: WindowMs
    labels: Sequence[LabelName]


@dataclass(frozen=True)
class LabelValue:
    value: str
    samples: Count


@dataclass(frozen=True)
class LabelValues:
    schema: Literal[1]
    window: WindowMs
    name: str
    values: Sequence[LabelValue]


def label_names(profiles: MergedProfiles, request: PanelRequest, check: Check) -> Labels:
    """Return the names of labels by name, how many values and samples each has."""
    found = profiles.query.interruptible(check).labels(request.window, request.selector)
    names = [
        LabelName(name, len(values), sum(values.values())) for name, values in sorted(found.items())
    ]
    return Labels(SCHEMA, WindowMs.of(request.window), names)


def label_values(
    profiles: MergedProfiles, request: PanelRequest, name: str, check: Check
) -> LabelValues:
    """Return the values of a label, most samples first."""
    query = profiles.query.interruptible(check)
    found = query.label_values(request.window, name, request.selector)
    values = [LabelValue(value, samples) for value, samples in found.items()]
    return LabelValues(SCHEMA, WindowMs.of(request.window), name, values)
