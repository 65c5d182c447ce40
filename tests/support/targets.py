"""Programs of ours that spend their time in known functions, compiled when a test asks for them."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "targets"
FRAME_POINTERS = ("-O2", "-fno-omit-frame-pointer", "-mno-omit-leaf-frame-pointer")


def compile_target(source: str, output: Path, *flags: str, compiler: str = "gcc") -> Path:
    """Compile tests/targets/`source`, by default so that frame pointers are kept."""
    command = [compiler, *(flags or FRAME_POINTERS), "-o", output, SOURCES / source]
    subprocess.run(command, check=True, timeout=60)
    return output


def ending_with_us(*command: str | Path, signal: str = "KILL") -> list[str | Path]:
    """Return a command whose process gets a signal when the process that starts it is gone.

    A test run that was killed cannot stop its servers. setpriv is part of util-linux; it becomes
    the command, with the same process id.
    """
    return ["setpriv", "--pdeathsig", signal, *command]


@contextlib.contextmanager
def running(*command: str | Path, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the length of the block, and kill it whatever happened inside."""
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                pipe.close()
