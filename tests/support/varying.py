"""Minutes of a service whose functions vary from one to the next."""

import dataclasses

import numpy as np

from tests.support import profiles as some
from tests.support.stores import at

FUNCTIONS = 24
RATES = 3000 / np.arange(1, FUNCTIONS + 1)


def minute(rng, number: int, host: int, version: str, factors: dict[int, float]):
    """A minute of a service whose functions vary by 5 % and are sampled."""
    rates = RATES * np.exp(rng.normal(0, 0.05, FUNCTIONS))
    for function, factor in factors.items():
        rates[function] *= factor
    labels = {"service": "api", "version": version, "comm": "api"}
    stacks = [
        (labels, [some.named("main"), some.named(f"function_{i}")], int(samples))
        for i, samples in enumerate(rng.poisson(rates))
    ]
    stacks.append(({"service": "jobs", "comm": "jobs"}, [some.named("job")], 500))
    profile = some.build([stack for stack in stacks if stack[2]])
    present = {some.make_labels({"service": "api", "version": version}): 60_000_000_000}
    accounting = dataclasses.replace(profile.accounting, services=present)
    profile = dataclasses.replace(profile, accounting=accounting)
    return at(profile, number, f"web-{host}", f"{host:016x}")
