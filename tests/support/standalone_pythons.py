"""Builds of python-build-standalone, which uv, rye and mise install: clang, LTO, BOLT, stripped.

They come in a module of Go that embeds them into programs, so go fetches them, checks them by its
own sums, and knows where from. The files of the module are compressed one by one; its files.json
says what they are.
"""

import gzip
import json
import shutil
import subprocess
from pathlib import Path

from tests.support.debian_roots import CannotFetchError, fetch_once, run

MODULE = "github.com/kluctl/go-embed-python"
RELEASES = {
    "3.10": "v0.0.0-3.10.16-20241219-1",
    "3.11": "v0.0.0-3.11.11-20241219-1",
    "3.14": "v0.0.0-3.14.6-20260610-1",
}
"""The newest has its handlers of instructions in functions (--with-tail-call-interp)."""
_FILES = "python/internal/data/linux-amd64"
_DOWNLOAD_S, _EMBED_S = 120, 60
_EMBEDDER = """
int Py_BytesMain(int, char **);
int main(int count, char **arguments) { return Py_BytesMain(count, arguments); }
"""


def fetch_standalone(version: str) -> Path:
    """Return the folder of an installation, fetched on the first call of all.

    Its executables are bin/python3 and, with the runtime from libpython, bin/embedded.

    Raises:
        CannotFetchError: it cannot be had here.
    """
    return fetch_once(f"standalone-{version}", lambda folder: _make(folder, RELEASES[version]))


def _make(folder: Path, release: str) -> None:
    unfinished = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    told = json.loads(run(["go", "mod", "download", "-json", f"{MODULE}@{release}"], _DOWNLOAD_S))
    source = Path(told["Dir"], _FILES)
    for file in json.loads((source / "files.json").read_text())["files"]:
        _unpack(source / file["name"], unfinished / file["name"], file)
    _embed(unfinished)
    unfinished.rename(folder)


def _unpack(source: Path, target: Path, file: dict[str, str | int]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if "symlink" in file:
        target.symlink_to(str(file["symlink"]))
        return
    if source.is_dir():
        target.mkdir(exist_ok=True)
        return
    if file.get("compressed"):
        target.write_bytes(gzip.decompress(source.with_name(f"{source.name}.gz").read_bytes()))
    else:
        target.write_bytes(source.read_bytes())
    target.chmod(0o755 if target.parent.name == "bin" else 0o644)


def _embed(folder: Path) -> None:
    library = next(iter((folder / "lib").glob("libpython3.*.so.1.0")))
    try:
        link_embedder(library, folder / "bin/embedded", "-Wl,-rpath,$ORIGIN/../lib")
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotFetchError(f"gcc cannot link {library.name}: {error}") from None


def link_embedder(library: Path, program: Path, *flags: str) -> None:
    """Make a program that has its Python from a library."""
    subprocess.run(
        ["gcc", "-O2", "-x", "c", "-", "-x", "none", library, "-o", program, *flags],
        input=_EMBEDDER.encode(), check=True, capture_output=True, timeout=_EMBED_S,
    )  # fmt: skip
