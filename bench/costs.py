"""What a fleet's profiles cost in a bucket: arithmetic from what the other benches have measured.

`bench_compact.py --figures FILE` and `bench_store.py --figures FILE` write their figures into one
file; this prints requests, bytes, prices and the compactors' CPUs for fleets of any size.

- Agents put an object a minute. Compactors get each once, and put files at the measured rate.
- Every round, a minute apart, lists the objects of the hour that goes on, half an hour's on
  average, and of the last one for five minutes more; a thousand keys a request.
- Bytes are those of an hour of the measured fleet in proportion to the hosts: dictionaries and
  rollups of a larger fleet are smaller than that, as hosts share their stacks. Levels are kept for
  the default times.
- Prices are S3's list prices of us-east-1, in dollars: requests, and storage of the steady state.
  Answers to people cost next to nothing (some ten requests each), and are left out.

Run: `python bench/costs.py --figures FILE [--hosts 10000 100000]`.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from serving import Row, show

PUT_DOLLARS, GET_DOLLARS = 0.005 / 1000, 0.0004 / 1000
"""A request; a listing costs what a PUT does."""
GB_MONTH_DOLLARS = 0.023
MINUTES_A_DAY, DAYS_A_MONTH = 1440, 30
KEYS_A_LISTING = 1000
LISTED_MINUTES = 30 + 5
KEPT_DAYS = {"level0": 2, "detail": 14, "10m": 30, "1h": 90, "1d": 400}


def keep(file: Path | None, figures: Mapping[str, float]) -> None:
    """Add figures to a file, if one is named."""
    if file is not None:
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | figures, indent=1))


def costs(figures: Mapping[str, float], hosts: int) -> Iterator[Row]:
    """Return what a fleet costs a day or month.

    Of `figures` these are needed: by object its `object_bytes`, and of compaction `compact_ms`,
    `get_an_object` and `put_an_object`; by host and day the bytes of each level of KEPT_DAYS but
    level 0, `detail_bytes` and so on.
    """
    objects = hosts * MINUTES_A_DAY
    puts = objects * figures["put_an_object"]
    gets = objects * figures["get_an_object"]
    lists = MINUTES_A_DAY * hosts * LISTED_MINUTES / KEYS_A_LISTING
    kept_gb = {
        level: days * hosts * _bytes_a_day(figures, level) / 1e9
        for level, days in KEPT_DAYS.items()
    }
    dollars = {
        "agents' PUT requests": objects * PUT_DOLLARS * DAYS_A_MONTH,
        "compactors' requests": DAYS_A_MONTH
        * (puts * PUT_DOLLARS + gets * GET_DOLLARS + lists * PUT_DOLLARS),
        "storage": sum(kept_gb.values()) * GB_MONTH_DOLLARS,
    }
    name = f"{hosts:,} hosts"
    yield f"{name}: objects a day", objects / 1e6, "million", None
    yield "    agents' PUT requests", hosts / 60, "a second", None
    yield "    compactors' GET requests", gets / 86_400, "a second", None
    yield "    compactors' PUT requests", puts / 86_400, "a second", None
    yield "    compactors' LIST requests", lists / 86_400, "a second", None
    yield "    uploaded", objects * figures["object_bytes"] / 1e12, "TB a day", None
    for level, size in kept_gb.items():
        yield f"    kept, {level} ({KEPT_DAYS[level]} d)", size / 1e3, "TB", None
    for what, each in dollars.items():
        yield f"    {what}", each, "dollars a month", None
    yield "    all of it, a host", sum(dollars.values()) / hosts, "dollars a month", None
    busy = objects * figures["compact_ms"] / 1e3 / 86_400
    yield "    compactors", busy, "CPUs", None


def _bytes_a_day(figures: Mapping[str, float], level: str) -> float:
    if level == "level0":
        return MINUTES_A_DAY * figures["object_bytes"]
    return figures[f"{level}_bytes"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", type=Path, required=True)
    parser.add_argument("--hosts", type=int, nargs="*", default=[10_000, 100_000])
    options = parser.parse_args()
    figures = json.loads(options.figures.read_text())
    for hosts in options.hosts:
        show(costs(figures, hosts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
