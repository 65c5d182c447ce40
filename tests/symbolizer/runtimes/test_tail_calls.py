"""An evaluation loop that is split into functions, in programs that are built as such a CPython."""

from pathlib import Path

import pytest

from symbolizer.runtimes.cpython import find_loop
from symbolizer.runtimes.evaluation import EVALUATION_LOOP
from symbolizer.runtimes.image import MAX_RANGES
from symbolizer.symbols.elf import FileSource, read_elf
from tests.support.elf_files import Symbol, build, read_symbols, strip
from tests.support.naming import NO_PROCESS, Naming, mapping_of_file
from tests.support.python_images import imitation, known_image_of
from tests.support.unwind_tables import needs

HANDLERS = 100
"""Of 256: the other numbers have no instruction."""
# `errs` is for what goes wrong: only handlers lead to it, and it comes back. `counts` is a function
# as any other, which one handler ends with, and the call of another is only a call.
HANDLING = """
#include <stdlib.h>
typedef long handler(long *frame, long n);
static handler *const table[256];
__attribute__((cold, noinline)) int report(long n) { return printf("%ld", n); }
__attribute__((noinline)) long counts(long *frame, long n) { return printf("%ld %p", n, frame); }
__attribute__((noinline)) static long errs(long *frame, long n)
{
  printf("%ld", frame[0]);
  return table[(n + frame[3]) & 255](frame, n - 1);
}
#define HANDLER(k) \\
  __attribute__((noinline)) static long handle_##k(long *frame, long n) \\
  { \\
    frame[k & 63] += k * n; \\
    if (__builtin_expect(frame[1] < -k, 0)) { frame[2] += report(n); frame[3] ^= report(k); } \\
    if (frame[2] == k) return errs(frame, k + n); \\
    counts(frame, frame[k & 7]); \\
    return table[frame[k & 31] & 255](frame, n); \\
  }
__attribute__((noinline)) static long exits(long *frame, long n) { return frame[n & 63]; }
__attribute__((noinline)) static long ends(long *frame, long n) { return counts(frame, n + 5); }
"""
# As inlined into its callers: what has its name, and two more, calls the first handler.
EVALUATING = """
#define EVALUATES(name) \\
  __attribute__((noinline)) int name(int n) \\
  { \\
    long frame[64] = {n}; \\
    if (n > 1000) return 1 + errs(frame, n); \\
    return table[n & 255](frame, n) + n; \\
  }
EVALUATES(_PyEval_EvalFrameDefault)
EVALUATES(vector)
__attribute__((noinline)) int throws(int n)
{
  long frame[64] = {n};
  return errs(frame, 1) + n;
}
__attribute__((noinline)) int calls_evaluation(int n) { return vector(n) + throws(n) + 1; }
"""
FLAGS = ("-O2", "-freorder-blocks-and-partition", "-fno-ipa-sra", "-fno-ipa-cp")
KINDS = {
    "library": ("-shared", "-fPIC"),
    "library with landing pads": ("-shared", "-fPIC", "-fcf-protection"),
    "library with frame pointers": ("-shared", "-fPIC", "-fno-omit-frame-pointer"),
    "program": ("-no-pie", "-fno-pie", "-rdynamic"),
    "program at any address": ("-pie", "-fPIE", "-rdynamic"),
    "program in two segments": ("-no-pie", "-fno-pie", "-rdynamic", "-z", "noseparate-code"),
}
CALLERS = {b"_PyEval_EvalFrameDefault", b"vector", b"throws"}


def source_of(kind: str, handlers: int = HANDLERS, *, damaged: bool = False) -> str:
    """Return C code; the table of a damaged one has a pointer to the middle of a handler."""
    head = [line for line in imitation().splitlines() if "_PyEval_EvalFrameDefault" not in line]
    names = [f"handle_{k}" for k in range(handlers - 2)]
    kinds = [f"HANDLER({k})" for k in range(handlers - 2)]
    table = ["exits", "ends", *names] + ["exits"] * (256 - handlers)
    if damaged:
        table[5] = "(handler *)((char *)handle_3 + 4)"
    last = "int main(int n) { return calls_evaluation(n); }" if "program" in kind else ""
    entries = f"static handler *const table[256] = {{{', '.join(table)}}};"
    return "\n".join([*head, HANDLING, *kinds, entries, EVALUATING, last])


def built(folder: Path, kind: str, source: str) -> tuple[Path, list[Symbol]]:
    """Return a stripped file, and the symbols of its code before."""
    path = build(folder / "interpreter", source, *FLAGS, *KINDS[kind])
    symbols = [each for each in read_symbols(path) if each.size]
    return strip(path), symbols


def loop_of(path: Path) -> tuple[tuple[int, int], ...]:
    with path.open("rb") as file:
        return find_loop(read_elf(FileSource(file.fileno())))


def names_in(ranges: tuple[tuple[int, int], ...], symbols: list[Symbol]) -> set[bytes]:
    return {
        each.name for each in symbols if any(start <= each.address < end for start, end in ranges)
    }


def is_handling(name: bytes) -> bool:
    return name.startswith((b"handle_", b"errs", b"exits", b"ends"))


@needs("gcc", "gcc")
@pytest.mark.parametrize("kind", KINDS)
def test_what_calls_handlers_evaluates_and_handlers_are_the_loop(kind: str, tmp_path: Path) -> None:
    """Handlers, their rare code, and what they jump to and comes back; no other function."""
    path, symbols = built(tmp_path, kind, source_of(kind))

    image, _ = known_image_of(path)
    parts = loop_of(path)

    assert names_in(image.evaluation, symbols) == CALLERS
    handling = {each.name for each in symbols if is_handling(each.name)}
    assert {b"errs", b"handle_7.cold"} <= handling
    assert names_in(parts, symbols) == handling | {EVALUATION_LOOP}


@needs("gcc", "gcc")
def test_handlers_without_names_are_named_as_the_loop(tmp_path: Path) -> None:
    """So their time is that of the Python function; what evaluates keeps its own name."""
    path, symbols = built(tmp_path, "library", source_of("library"))
    image, _ = known_image_of(path)
    naming = Naming(tmp_path / "cache")

    def function_of(name: bytes) -> list[str]:
        address = next(each.address for each in symbols if each.name == name)
        offset = address - image.code_shift + 1
        places = naming.names(NO_PROCESS, mapping_of_file(path), [offset]).places
        return [call.function for place in places for call in place.calls if call.start < 0]

    loop = [EVALUATION_LOOP.decode()]
    handling = (b"handle_9", b"handle_9.cold", b"errs")
    assert [function_of(name) for name in handling] == [loop] * len(handling)
    assert function_of(b"throws") == ["throws"]


@needs("gcc", "gcc")
def test_a_table_is_one_of_functions_only(tmp_path: Path) -> None:
    """A pointer to elsewhere than a function's beginning says that it is something else."""
    path, symbols = built(tmp_path, "library", source_of("library", damaged=True))

    image, _ = known_image_of(path)

    assert names_in(image.evaluation, symbols) == {EVALUATION_LOOP}
    assert names_in(loop_of(path), symbols) == {EVALUATION_LOOP}


@needs("gcc", "gcc")
def test_a_table_of_few_functions_is_none_of_handlers(tmp_path: Path) -> None:
    """Such as one of what bytes mean to a parser."""
    path, symbols = built(tmp_path, "library", source_of("library", handlers=40))

    image, _ = known_image_of(path)

    assert names_in(image.evaluation, symbols) == {EVALUATION_LOOP}


@needs("gcc", "gcc")
def test_of_many_functions_that_evaluate_those_between_are_taken_for_such(tmp_path: Path) -> None:
    """An image has room for so many ranges; to take more for evaluations does no harm."""
    others = [f"EVALUATES(vector_{k})\nint between_{k}(int n) {{ return printf(\"%d {k}\", n); }}"
              for k in range(3 * MAX_RANGES)]  # fmt: skip
    source = "\n".join([source_of("library"), *others])
    path, symbols = built(tmp_path, "library", source)

    image, _ = known_image_of(path)

    assert len(image.evaluation) == MAX_RANGES
    evaluating = {each.name for each in symbols if each.name.startswith(b"vector")}
    assert len(evaluating) > 3 * MAX_RANGES
    assert evaluating | CALLERS <= names_in(image.evaluation, symbols)
