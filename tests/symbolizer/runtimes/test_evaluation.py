"""The parts of the evaluation loop, in a program whose compiler has moved rare code out of it."""

from pathlib import Path

import pytest

from tests.support.elf_files import build, read_symbols, strip
from tests.support.python_images import imitation, known_image_of
from tests.support.unwind_tables import needs

LOOP = b"_PyEval_EvalFrameDefault"
# Rare code of two functions of the same shape: that of the other is not the loop's.
FUNCTIONS = """
#include <stdlib.h>
__attribute__((cold, noinline)) int report(int n) { return printf("%d", n); }
#define LOOP(name) \\
  __attribute__((noinline)) int name(int n) { \\
    int numbers[64] = {n}, sum = 0; \\
    for (int i = 0; i < n; i++) { \\
      if (__builtin_expect(numbers[i & 63] < 0, 0)) { sum += report(i); sum ^= report(sum); } \\
      numbers[(i * 7) & 63] += sum + i; \\
      sum += printf("%d", numbers[i & 31]); \\
    } \\
    return sum; \\
  }
LOOP(another_loop)
LOOP(_PyEval_EvalFrameDefault)
"""


def compiled(folder: Path, *flags: str) -> Path:
    source = imitation().splitlines()
    lines = [line for line in source if "_PyEval_EvalFrameDefault" not in line]
    return build(
        folder / "library.so",
        "\n".join(lines) + FUNCTIONS,
        *("-O2", "-shared", "-fPIC", "-freorder-blocks-and-partition"),
        *flags,
    )


def named_parts(library: Path) -> tuple[tuple[int, int], ...]:
    parts = [s for s in read_symbols(library) if s.name in (LOOP, LOOP + b".cold")]
    return tuple(sorted({(s.address, s.address + s.size) for s in parts}))


@needs("gcc", "gcc")
@pytest.mark.parametrize("flags", [(), ("-fno-omit-frame-pointer",), ("-fcf-protection",)])
def test_parts_without_names_are_found_by_jumps_there_and_back(flags, tmp_path):
    """The rare code of a function with the same frame is not one of them."""
    library = compiled(tmp_path, *flags)
    parts = named_parts(library)
    with_names, _ = known_image_of(library)

    without_names, _ = known_image_of(strip(library))

    assert len(parts) == 2
    assert with_names.evaluation == parts
    assert without_names == with_names
