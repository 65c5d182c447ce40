"""A program that knows each stack which it may have. For CPython 3.8 and later.

    python_calls.py MODE [--seconds S]   print "ready", then run rounds of a mode
    python_calls.py MODE --tree          print all stacks that a round can have, as JSON
    python_calls.py MODE --park N        stop at the Nth place where a thread would spend time

The tree is what the interpreter itself reports to a hook (`sys.setprofile`) during some rounds:
`functions` is a list of [qualified name, file, first line, lines, is a generator], `nodes` one of
[parent, line of the call in the parent, function], parents first, parent -1 for what has no
caller. A function's last frame may be at any of its lines.

A parked thread prints one line of JSON with its `tid`, its `name` and its `stack`, root first, of
[function, file, line]. It then stays at that place, and uses its CPU in one C function that does
not need the GIL. Exit code 3: there are fewer places.
"""

import argparse
import asyncio
import contextlib
import ctypes
import dis
import functools
import json
import os
import re
import sys
import threading
import time
import zlib
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR

TRACED_ROUNDS = 4
DEPTH, GREAT_DEPTH = 40, 700
WORK = b"everflame" * 400_000


class Clock:
    """Says how long to go on: the same frames for a number of rounds and for a time."""

    def __init__(self, rounds, seconds):
        self.rounds = rounds
        self.end_s = time.monotonic() + seconds

    def goes_on(self):
        self.rounds -= 1
        return self.rounds >= 0 and time.monotonic() < self.end_s


def spin(count):
    """Spend time in byte code alone."""
    total = 0
    for i in range(count):
        total += i & 3
    return total


class Base:
    def method(self):
        return spin(300)


class Shape(Base):
    """All kinds of functions that a class may have."""

    def __init__(self, size):
        self.size = spin(size)

    def __add__(self, other):
        return Shape(spin(100) & 127)

    def __call__(self, count):
        return spin(count)

    def __getattr__(self, name):
        return spin(len(name) * 40)

    def __getitem__(self, index):
        if index > 2:
            raise IndexError(index)
        return spin(200)

    def __lt__(self, other):
        return bool(spin(150))

    def __del__(self):
        spin(100)

    @property
    def area(self):
        return spin(250)

    @classmethod
    def make(cls):
        return cls(120)

    @staticmethod
    def count():
        return spin(220)

    def method(self):
        return super().method() + spin(80)


def doubled(function):
    @functools.wraps(function)
    def twice(*arguments):
        first = function(*arguments)
        return first, function(*arguments)

    return twice


@doubled
def decorated(count):
    return spin(count)


def closures(count):
    def outer(more):
        def inner():
            return spin(count + more)

        return inner()

    return outer(30) + sum(map(lambda more: spin(more + 1), [count]))  # noqa: C417


def methods(clock):
    while clock.goes_on():
        shape = Shape.make()
        shape.method()
        shape(210)
        shape.missing  # noqa: B018
        shape.area  # noqa: B018
        shape + shape
        shape < shape  # noqa: B015, PLR0124
        list(shape)
        Shape.count()
        decorated(170)
        closures(140)
        del shape


def numbers(count):
    for i in range(count):
        yield spin(60) + i


def delegating():
    yield from numbers(2)
    yield spin(90)


def receiving():
    got = 0
    while got is not None:
        got = yield spin(70)


def generators(clock):
    while clock.goes_on():
        [spin(i) for i in numbers(3)]
        {spin(i): [spin(j) for j in range(20, 22)] for i in range(40, 42)}
        {spin(i) for i in range(50, 52)}
        sum(spin(i) for i in delegating())
        receiver = receiving()
        next(receiver)
        receiver.send(1)
        receiver.close()
        _first, *_rest = numbers(2)


def by_key(value):
    return spin(value & 127)


def compare(one, other):
    return spin(30) + one - other


def add(one, other):
    return spin(50) + other


def replace(found):
    return "b" * (spin(130) & 1)


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
def compare_integers(one, other):
    return spin(160) + one[0] - other[0]


class Formatted:
    def __format__(self, how):
        return str(spin(180))


LIBC = ctypes.CDLL(None)
INTEGERS = ctypes.c_int * 4


def callbacks(clock):
    values = list(range(60, 64))
    while clock.goes_on():
        sorted(values, key=by_key)
        sorted(values, key=functools.cmp_to_key(compare))
        functools.reduce(add, values)
        functools.partial(by_key, 90)()
        list(map(by_key, values))
        max(values, key=lambda value: spin(value + 1))
        re.sub("a", replace, "aXa")
        LIBC.qsort(INTEGERS(3, 1, 2, 0), 4, 4, compare_integers)
        f"{Formatted():x}"


def descend(depth):
    if depth > 1:
        return descend(depth - 1) + 1
    return spin(2000)


def even(depth):
    return odd(depth - 1) if depth else spin(900)


def odd(depth):
    return sorted([depth], key=even_below)[0] if depth == 3 else even(depth - 1)


def even_below(depth):
    return even(depth - 1)


def recursion(clock):
    while clock.goes_on():
        descend(DEPTH)
        even(10)


def deep(clock):
    sys.setrecursionlimit(2 * GREAT_DEPTH)
    while clock.goes_on():
        descend(GREAT_DEPTH)


MADE = compile(
    "def made(count):\n    return spin(count)\n\nmade(310)\nclass Made:\n    spin(140)\n",
    "<made>",
    "exec",
)


def generated(clock):
    while clock.goes_on():
        exec(MADE, {"spin": spin})
        eval("spin(240)")

        class Body:
            first = spin(190)

            class Inner:
                second = spin(170)


class Guard:
    def __enter__(self):
        return spin(110)

    def __exit__(self, *error):
        spin(120)
        return True


@contextlib.contextmanager
def guarding():
    try:
        yield spin(60)
    finally:
        spin(130)


def failing(depth):
    try:
        if depth == 0:
            raise ValueError(spin(40))
        failing(depth - 1)
    finally:
        spin(50)
        spin(60)


def exceptions(clock):
    while clock.goes_on():
        with Guard():
            failing(3)
        with guarding():
            spin(80)
        try:
            failing(2)
        except ValueError:
            spin(150)
        else:
            spin(1)


class Opened:
    async def __aenter__(self):
        await asyncio.sleep(0)
        return spin(70)

    async def __aexit__(self, *error):
        spin(90)


async def counting():
    for _ in range(2):
        await asyncio.sleep(0)
        yield spin(110)


async def consumer():
    async with Opened():
        async for _ in counting():
            spin(130)
    return [spin(20) async for _ in counting()]


async def step(count):
    await asyncio.sleep(0)
    return spin(count)


async def rounds(clock):
    while clock.goes_on():
        await step(210)
        await asyncio.gather(consumer(), step(240), step(160))


def tasks(clock):
    asyncio.run(rounds(clock))


def turning(clock, count):
    while clock.goes_on():
        spin(count)


def threads(clock):
    started = []
    for name, count in (("loader", 700), ("mixer", 500), ("writer", 300)):
        own = Clock(clock.rounds, clock.end_s - time.monotonic())
        started.append(threading.Thread(target=turning, args=(own, count), name=name))
    for each in started:
        each.start()
    for each in started:
        each.join()


def taking_turns(clock, place):
    turns = (methods, generators, callbacks, recursion, generated, exceptions, tasks)
    while clock.goes_on():
        for turn in turns[place:] + turns[:place]:
            turn(Clock(1, clock.end_s - time.monotonic()))


def parallel(clock):
    """Each function in each thread: without the GIL, each thread has a copy of its bytecode."""
    started = []
    for place in range(4):
        own = Clock(clock.rounds, clock.end_s - time.monotonic())
        started.append(threading.Thread(target=taking_turns, args=(own, place)))
    for each in started:
        each.start()
    for each in started:
        each.join()


# Each has the same loop of its own, so that the shares are known.
def hot(count):
    total = 0
    for i in range(count):
        total += i & 3
    return total


def warm(count):
    total = 0
    for i in range(count):
        total += i & 3
    return total


def cool(count):
    total = 0
    for i in range(count):
        total += i & 3
    return total


def split(clock):
    while clock.goes_on():
        hot(60_000)
        warm(30_000)
        cool(10_000)


MODES = {
    each.__name__: each
    for each in (
        methods, generators, callbacks, recursion, deep, generated, exceptions, tasks, threads,
        parallel, split,
    )
}  # fmt: skip


def name_of(code):
    # Before 3.11 a code object does not know where its function is defined.
    return getattr(code, "co_qualname", code.co_name)


def lines_of(code):
    return sorted({line for _, line in dis.findlinestarts(code) if line} | {code.co_firstlineno})


_GENERATORS = CO_GENERATOR | CO_COROUTINE | CO_ASYNC_GENERATOR


class Tree:
    """Every stack that the interpreter's own hook for profilers has told of."""

    def __init__(self):
        self.functions = {}
        self.nodes = {}
        self.lock = threading.Lock()

    def __call__(self, frame, event, _):
        # A generator may be entered by an exception, which some versions do not call a call.
        is_generator = frame.f_code.co_flags & _GENERATORS
        if event == "call" or (event == "return" and is_generator):
            with self.lock:
                self.add(frame)

    def add(self, frame):
        stack = []
        while frame is not None:
            stack.append(frame)
            frame = frame.f_back
        parent, line = -1, 0
        for each in reversed(stack):
            node = (parent, line, self.number_of(each.f_code))
            parent = self.nodes.setdefault(node, len(self.nodes))
            line = each.f_lineno

    def number_of(self, code):
        """Return the number of a function by what it is: class bodies may be made each time."""
        function = (name_of(code), code.co_filename, code.co_firstlineno)
        if function not in self.functions:
            is_generator = bool(code.co_flags & _GENERATORS)
            self.functions[function] = (len(self.functions), lines_of(code), is_generator)
        return self.functions[function][0]

    def write(self):
        functions = [[*function, *more] for function, (_, *more) in self.functions.items()]
        json.dump({"functions": functions, "nodes": list(self.nodes)}, sys.stdout)


class Parking:
    """Stands in for `spin`: stops each thread at its Nth call."""

    def __init__(self, place):
        self.place = place
        self.calls = {}

    def __call__(self, count):
        thread = threading.current_thread()  # numbers of threads are used again
        self.calls[thread] = self.calls.get(thread, 0) + 1
        if self.calls[thread] == self.place:
            stay(sys._getframe())
        return count


def stay(frame):
    # From the moment that the text can be read, this function is in its last line.
    line = max(lines_of(stay.__code__))
    stack = [[name_of(stay.__code__), stay.__code__.co_filename, line]]
    while frame is not None:
        stack.append([name_of(frame.f_code), frame.f_code.co_filename, frame.f_lineno])
        frame = frame.f_back
    thread = threading.current_thread()
    told = {"tid": threading.get_native_id(), "name": thread.name, "stack": stack[::-1]}
    text = json.dumps(told).encode() + b"\n"
    # fmt: off
    while True: text = text and os.write(1, text) and b""; zlib.crc32(WORK)  # noqa: E701, E702
    # fmt: on


def main():
    global spin
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--tree", action="store_true")
    parser.add_argument("--park", type=int)
    options = parser.parse_args()
    sys.setswitchinterval(0.001)
    mode, rounds_left = MODES[options.mode], TRACED_ROUNDS if options.tree else 1 << 60
    clock, tree = Clock(rounds_left, options.seconds), Tree()
    if options.park:
        spin, clock.rounds = Parking(options.park), 1
    elif options.tree:
        threading.setprofile(tree)
        sys.setprofile(tree)
    else:
        print("ready", flush=True)
    mode(clock)
    sys.setprofile(None)
    if options.tree:
        tree.write()
    return 3 if options.park else 0


if __name__ == "__main__":
    sys.exit(main())
