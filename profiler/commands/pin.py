"""`everflame pin`: keep a window of a store from everything that deletes, list and remove pins.

What overlaps a pinned window is kept as it is at that time, whole hours and days of it: see
`storage.objects.pins`.
"""

import argparse
import shlex
import sys
import time
from typing import Any, NamedTuple

import orjson

from profiler.commands import arguments
from profiler.commands.selection import NothingSelectedError, Selection, opened
from profiler.text import counted, in_columns, quantity
from profiler.times import from_until, parse_window, rfc3339, whole_second
from storage.blocks.manifest import DayManifest, HourManifest, Manifests, end_ns_of, start_s_of
from storage.objects.keys import CPU, NS_PER_S, hour_of
from storage.objects.pins import Pin, Pins
from storage.objects.tenant import TenantStore
from storage.profile import Window
from storage.selector import EMPTY


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  everflame pin --from now-2h --until now-1h --name incident-42 --note 'checkout slow'\n"
        "  everflame pin --list\n"
        "  everflame pin --remove incident-42\n\n"
        "A pinned window is kept in all its detail until the pin is removed: from --keep and\n"
        "--keep-bytes of agents, and from compact --keep. Whole hours are kept, and the sums of\n"
        "whole days. One type of profiles is pinned (--type). Lifecycle rules of a bucket ignore\n"
        "pins. The exit status is 2 if there is nothing in the window."
    )
    arguments.add_json(parser)
    arguments.add_store(parser)
    arguments.add_window(parser)
    parser.add_argument(
        "--name", metavar="NAME", help="name of the pin (default: its window and type)"
    )
    parser.add_argument("--note", default="", metavar="TEXT", help="why it is kept")
    parser.add_argument(
        "--type", default=CPU, metavar="TYPE", help="type of the profiles (default cpu)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list the pins, and what they keep")
    what.add_argument("--remove", metavar="NAME", help="remove a pin; what it kept may expire then")


def run(options: argparse.Namespace) -> int:
    """Add, list or remove pins.

    Raises:
        ValueError: the options contradict each other, or there is nothing to pin or to remove.
        StoreError: the store cannot be used.
    """
    has_window = any((options.start, options.end, options.name, options.note))
    if (options.list or options.remove) and has_window:
        raise ValueError("pin: --list and --remove take no --from, --until, --name and --note")
    store = opened(options)
    if options.list:
        return _list(store, as_json=options.json)
    if options.remove:
        return _remove(store, options.remove, as_json=options.json)
    if not options.start:
        raise ValueError("pin: name a window with --from and --until, or use --list or --remove")
    return _add(store, options, time.time_ns())


class Kept(NamedTuple):
    """What a pin keeps, by manifests and keys alone."""

    hours: int
    """Compacted ones."""
    objects: int
    """At level 0, compacted or not."""
    bytes: int

    @property
    def is_empty(self) -> bool:
        return not self.bytes


def kept_by(store: TenantStore, pin: Pin) -> Kept:
    """Return what the store holds of a pin's window: whole hours and days of what is compacted.

    Raises:
        StoreError: it cannot be listed.
    """
    first, last = (hour_of(at_s) for at_s in (pin.start_s, pin.end_s - 1))
    listed = Manifests(store.store, store.tenant, pin.type).list(first[:10], last)

    def is_held(name: str) -> bool:
        return pin.overlaps(start_s_of(name) * NS_PER_S, end_ns_of(name))

    hours = [each for name, each in listed.hours.items() if each.parts and is_held(name)]
    days = [each for name, each in listed.days.items() if is_held(name)]
    manifests: list[HourManifest | DayManifest] = [*hours, *days]
    files_bytes = sum(file.bytes for each in manifests for file in each.files)
    window = Window(pin.start_ns, pin.end_ns)
    objects = [stored.size_bytes for _, stored in store.list_window(window, pin.type)]
    return Kept(len(hours), len(objects), files_bytes + sum(objects))


def as_record(pin: Pin) -> dict[str, Any]:
    """Return a pin as JSON has it everywhere."""
    return {
        "name": pin.name,
        "type": pin.type,
        "from_ms": pin.start_s * 1000,
        "until_ms": pin.end_s * 1000,
        "note": pin.note,
        "created_ms": pin.created_ms,
        "key": pin.key,
        "problem": pin.problem,
    }


def window_text(pin: Pin) -> str:
    return from_until(Window(pin.start_ns, pin.end_ns))


def pins_in(store: TenantStore, window: Window) -> list[Pin]:
    """Return the pins of a tenant that hold something of a window, by type and start."""
    every = Pins(store.store, store.tenant).every()
    return [pin for pin in every if pin.overlaps(window.start_ns, window.end_ns)]


def _add(store: TenantStore, options: argparse.Namespace, now_ns: int) -> int:
    """Pin a window that has something in it, or has not ended yet."""
    window = parse_window(options.start, options.end or "now", now_ns)
    name = options.name or _name_of(window, options.type)
    pins = Pins(store.store, store.tenant)
    pin = pins.checked(options.type, window.start_ns, window.end_ns, name, options.note)
    kept = kept_by(store, pin)
    if kept.is_empty and window.end_ns <= now_ns:
        if pin.type != CPU:
            raise NothingSelectedError(f"nothing selected: no {pin.type} from {window_text(pin)}")
        raise NothingSelectedError(Selection(store, window, EMPTY).why_nothing())
    pins.add(pin)
    if options.json:
        _print_json({**as_record(pin), **_kept_record(kept)})
        return 0
    print(
        f"everflame: pinned {pin.name} in {store}: {window_text(pin)}, {_kept_text(kept)};"
        f" kept until everflame pin --remove {shlex.quote(pin.name)}",
        file=sys.stderr,
    )
    return 0


def _name_of(window: Window, type_: str) -> str:
    name = f"{whole_second(window.start_ns)}..{whole_second(window.end_ns)}"
    return name if type_ == CPU else f"{name} {type_}"


def _remove(store: TenantStore, name: str, *, as_json: bool) -> int:
    pin = Pins(store.store, store.tenant).remove(name)
    if as_json:
        _print_json(as_record(pin))
    else:
        print(
            f"everflame: removed the pin {pin.name} of {window_text(pin)}; what it kept expires"
            " when it is due",
            file=sys.stderr,
        )
    return 0


def _list(store: TenantStore, *, as_json: bool) -> int:
    """Print all pins and what they keep; there may be none."""
    pins = Pins(store.store, store.tenant)
    every = [(pin, kept_by(store, pin)) for pin in pins.every()]
    strangers = pins.strangers()
    if as_json:
        found = [{**as_record(pin), **_kept_record(kept)} for pin, kept in every]
        _print_json({"pins": found, "unknown": strangers})
    elif every:
        rows = [("NAME", "TYPE", "FROM", "UNTIL", "HOURS", "OBJECTS", "SIZE", "NOTE")]
        rows += [
            (
                pin.name,
                pin.type,
                rfc3339(pin.start_ns),
                rfc3339(pin.end_ns),
                f"{kept.hours:,}",
                f"{kept.objects:,}",
                quantity(kept.bytes, "bytes"),
                pin.note or "-",
            )
            for pin, kept in every
        ]
        print("\n".join(in_columns(rows)))
    else:
        print(f"everflame: no window is pinned in {store}", file=sys.stderr)
    for pin, _ in every:
        if pin.problem:
            print(f"everflame: {pin.key}: {pin.problem}; its window is kept", file=sys.stderr)
    for key in strangers:
        print(f"everflame: {key} is not the name of a pin, and keeps nothing", file=sys.stderr)
    return 0


def _kept_record(kept: Kept) -> dict[str, int]:
    return {"hours": kept.hours, "objects": kept.objects, "bytes": kept.bytes}


def _kept_text(kept: Kept) -> str:
    if kept.is_empty:
        return "where there is nothing yet"
    hours = counted(kept.hours, "compacted hour")
    objects = counted(kept.objects, "object")
    return f"{hours} and {objects}, {quantity(kept.bytes, 'bytes')}"


def _print_json(record: dict[str, Any]) -> None:
    sys.stdout.buffer.write(orjson.dumps({"schema": 1, **record}) + b"\n")
