"""Print what Python says of many code objects as JSON, and wait for the end of the input.

Runs under every supported interpreter, from 3.8 on.
"""

import dis
import json
import sys
import types


def sources():
    """Yield (source, file name) of modules with all that line tables and names may have."""
    yield PLAIN, "plain.py"
    yield "def größe():\n    return [ñ for ñ in (1, 2)]\n", "/tmp/naïve/größe.py"
    yield "def 数():\n    class 量:\n        def 目(self): pass\n    return 量\n", "/tmp/数/量.py"
    yield "def 𐌰𐌱():\n    return 𐌲\n", "/tmp/\U0001f600/𐐀.py"
    yield "pass\n", "/tmp/\udcff\ud800.py"
    yield "pass\n", "/tmp/a\nb\x1b[31m\u202e.py"
    yield (
        "\n" * 70000 + "def far():\n    return (1,\n" + "\n" * 40000 + "       unknown())\n",
        "far.py",
    )
    yield (
        "def long():\n" + "".join(f"    a{k} = f({k},\n  g({k}))\n" for k in range(3000)),
        "long.py",
    )
    yield "def " + "n" * 3000 + "():\n    pass\n", "/" + "d/" * 2000 + "e.py"
    yield "def " + "数" * 1000 + "(): pass\n", "/" + "量/" * 1000 + "e.py"
    yield "", "empty.py"


PLAIN = '''"""Doc."""
import contextlib

first = lambda x: (
    x
    + 1
)


@contextlib.contextmanager
def managed(a, *, b=2):
    """Doc."""
    try:
        yield a
    finally:
        del b


class Outer:
    """Doc."""

    x: int = 1

    class Inner(object):
        @property
        @contextlib.contextmanager
        def value(self):
            return [
                (y, z)
                for y in self
                if y
                for z in {k: v for k, v in y}
            ]

    def method(self):
        def closure():
            nonlocal count
            count += 1
            return sum(i
                       for i in range(count))
        count = 0
        return closure


async def fetch(source):
    async with source as s:
        async for part in s:
            if not part:
                continue
            yield await part
    for i in range(3):
        while i:
            i -= 1
        else:
            break
    try:
        raise ValueError(
            "a",
            call(1,
                 2)(
                 3),
        )
    except (ValueError,
            TypeError) as e:
        print(e)
    except OSError:
        pass
    else:
        assert i, (
            "message")
    return


def generator():
    x = yield
    while True:
        x = yield (x if x else
                   (yield))

def backwards():
    return f(
        1 +
        g(
        ) + h
        , x
    )(
        y
    )
'''


def codes_of(code):
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_of(constant)


def renamed(code):
    """Yield code objects with names that no compiler gives."""
    names = ["", "x\udcffy", "\ud83d\ude00", "a\nb\x00c\u202e", "é" * 600, "😀" * 200]
    for name in names:
        changed = {"co_name": name}
        if hasattr(code, "co_qualname"):
            changed["co_qualname"] = name
        yield code.replace(**changed)


def lines_of(code):
    """Return the line of each instruction, as the interpreter's own modules tell it."""
    size = len(code.co_code)
    if hasattr(code, "co_positions"):
        return [line or 0 for line, *_ in code.co_positions()]
    if hasattr(code, "co_lines"):
        lines = [None] * (size // 2)
        for start, end, line in code.co_lines():
            for k in range(start // 2, min(end, size) // 2):
                lines[k] = line or 0
        return lines
    starts = dict(dis.findlinestarts(code))
    line, lines = code.co_firstlineno, []
    for offset in range(0, size, 2):
        line = starts.get(offset, line)
        lines.append(line)
    return lines


def described(code):
    # As literals: JSON joins two surrogates to one character.
    return {
        "address": id(code),
        "name": ascii(getattr(code, "co_qualname", code.co_name)),
        "file": ascii(code.co_filename),
        "first_line": code.co_firstlineno,
        "lines": lines_of(code),
    }


def main():
    kept = []
    for source, file in sources():
        kept += codes_of(compile(source, file, "exec"))
    kept += renamed(kept[0])
    kept += [json.loads.__code__, json.JSONEncoder.iterencode.__code__, dis.dis.__code__]
    print(json.dumps({"version_hex": sys.hexversion, "codes": [described(code) for code in kept]}))
    sys.stdout.flush()
    sys.stdin.read()


main()
