"""Profiles of minutes that stay distinct, also once they are tombstones."""

from collections.abc import Iterable
from dataclasses import replace

from storage.formats import pprof
from storage.profile import Accounting, Host, Profile, Window, make_labels
from storage.spool.upload_queue import allocated
from tests.support.profiles import synthetic

HOST = Host("web-1", "00112233445566aa")
START_S = 1_780_000_200 // 3600 * 3600
STACKS = synthetic(60, 20, 300)


def window(number: int, host: Host = HOST, stacks: Profile = STACKS) -> Profile:
    """Return the profile of a minute, whose accounting says which minute it was, for ever."""
    start_ns = (START_S + 60 * number) * 1_000_000_000
    stored = stacks.total_samples
    accounting = Accounting(
        hosts=(host,),
        ticks=stored + number,
        idle=number,
        stored=stored,
        stops={"complete": stored},
        services={make_labels({"service": f"minute-{number}"}): 1},
    )
    bounds = Window(start_ns, start_ns + 60_000_000_000)
    return replace(stacks, window=bounds, accounting=accounting)


SIZE_BYTES = allocated(len(pprof.encode(window(0))))


def minutes(found: Iterable[Profile]) -> dict[str, int]:
    """Return how often each minute is counted in some profiles."""
    counts: dict[str, int] = {}
    for profile in found:
        assert profile.accounting.mismatch == 0
        assert profile.total_samples == profile.accounting.stored
        for labels, present_ns in profile.accounting.services.items():
            name = dict(labels)["service"]
            counts[name] = counts.get(name, 0) + present_ns
    return counts


def once(*numbers: int) -> dict[str, int]:
    return {f"minute-{number}": 1 for number in numbers}
