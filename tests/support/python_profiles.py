"""Stacks of Python programs as the agent stores them: Python frames between the interpreter's own.

A frame is written as its name: `py:Shop.price` is a Python function, `libc.so.6:start_thread` and
`_fast.so:dot` are of other files, all others of the interpreter.
"""

import functools
from collections.abc import Mapping, Sequence

from storage.profile import Profile
from symbolizer.location import (
    AddressLocation,
    ElfAddress,
    FileOffset,
    Frame,
    Kind,
    Location,
    Module,
    NamedLocation,
    Segment,
)
from tests.support.profiles import LIBC, build

CPYTHON = Module(
    "c311",
    "/usr/bin/python3.11",
    Kind.NATIVE,
    (Segment(ElfAddress(0x41F000), FileOffset(0x1F000), 0x300000),),
)
FAST = Module(
    "fa57",
    "/srv/shop/_fast.so",
    Kind.NATIVE,
    (Segment(ElfAddress(0x1000), FileOffset(0x1000), 0x8000),),
)
_MODULES = {module.name: module for module in (CPYTHON, FAST, LIBC)}
MODULES = tuple(_MODULES.values())

LINES = {"<module>": (1, 88), "main": (70, 75), "Shop.price": (20, 27), "Shop.key": (40, 41)}
"""Of Python functions: the first line and that of the sample; others have 1 and 2."""
MAIN = ("_start", "libc.so.6:__libc_start_main", "libc.so.6:", "Py_BytesMain", "PyEval_EvalCode")
CALL = ("_PyEval_EvalFrameDefault", "_PyObject_MakeTpCall", "slot_tp_call")
LOOP = "_PyEval_EvalFrameDefault"


def locations(*names: str) -> list[Location]:
    """Return the locations of a stack, root first."""
    return [_location(name) for name in names]


@functools.cache
def _location(name: str, line: int = 0) -> Location:
    file, colon, function = name.rpartition(":")
    if file == "py":
        first, usual = LINES.get(function, (1, 2))
        path = "/srv/shop/shop.py"
        return NamedLocation(function, "shop.pricing", Kind.PYTHON, path, first, line or usual)
    module = _MODULES[file] if colon else CPYTHON
    start = int(module.segments[0].p_offset)
    offset = start + 16 * (int.from_bytes(name.encode(), "little") % 1987)
    return AddressLocation(module.build_id, FileOffset(offset))


def names_of(stacks: Sequence[Sequence[str]]) -> Mapping[Location, tuple[Frame, ...]]:
    """Return what the addresses in some stacks are named; a file alone has no name."""
    found: dict[Location, tuple[Frame, ...]] = {}
    for name in {name for stack in stacks for name in stack}:
        file, colon, function = name.rpartition(":")
        if function and file != "py":
            module = _MODULES[file] if colon else CPYTHON
            found[_location(name)] = (Frame(function, module.name, Kind.NATIVE),)
    return found


def profile_of(stacks: Sequence[tuple[Sequence[str], int]], **labels: str) -> Profile:
    """Return a profile of stacks, root first, and their samples."""
    rows = [(dict(labels), locations(*names), samples) for names, samples in stacks]
    return build(rows, dict(names_of([names for names, _ in stacks])), MODULES)


PRICE = (*MAIN, LOOP, "py:<module>", "py:main", "py:Shop.price")
SORT = (*MAIN, LOOP, "py:<module>", "py:main", LOOP, "list_sort", "_PyObject_Vectorcall", LOOP)
THREAD = ("libc.so.6:clone3", "libc.so.6:start_thread", "pythread_wrapper", "thread_run", LOOP)
STACKS = (
    (PRICE, 30),
    ((*PRICE, "PyDict_GetItem"), 12),
    ((*PRICE, LOOP), 5),
    ((*PRICE, *CALL, LOOP, "py:Shop.round"), 9),
    ((*SORT, "py:Shop.key", "PyLong_Add"), 8),
    ((*SORT, "py:Shop.key"), 4),
    ((*PRICE, "cfunction_call", "_fast.so:dot", "libc.so.6:memcpy"), 14),
    ((*PRICE, "_fast.so:visit", *CALL, LOOP, "py:Shop.key"), 6),
    ((*THREAD, "py:Thread._bootstrap", "py:Worker.run"), 10),
    ((*MAIN, "Py_FinalizeEx", "_PyGC_CollectNoFail"), 2),
)
"""A shop that sorts and prices, with an extension and a thread, and a collection at its end."""


def shop_profile() -> Profile:
    return profile_of(STACKS, service="shop", comm="python3")
