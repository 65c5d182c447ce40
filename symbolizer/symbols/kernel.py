"""Read the running kernel's images and their functions from /proc/kallsyms.

Addresses are randomised at boot, so a location is (build id, offset from the image's start).
kallsyms has no sizes: a function ends where the next one begins. Code made at run time (BPF
programs, trampolines) has no meaningful offset and is known by its name.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from symbolizer.integers import Wide
from symbolizer.symbols.candidates import Candidates, Functions, arrange, name_preferences
from symbolizer.symbols.elf import parse_build_id
from symbolizer.text import readable

KERNEL_NAME = "[kernel.kallsyms]"

_MODULES = Path("/proc/modules")
# Modules and BPF programs are loaded and unloaded; reading kallsyms takes 0.1 s.
_REFRESH_NS = 60 * 10**9

_CHUNK_BYTES = 1 << 16
_MAX_KALLSYMS_BYTES = 256 << 20
_MAX_MODULE_BYTES = 1 << 28
# kallsyms does not say where a BPF program ends.
_MAX_PROGRAM_BYTES = 1 << 16
_PROGRAM_MODULES = ("bpf", "__builtin__ftrace", "__builtin__kprobes")

# Suffixes of names that mark a place in the image. A function at that address is the better name.
_MARKERS = (b"_text", b"_stext", b"_text_start", b"_text_end")

_HEX = np.zeros(256, dtype=np.uint64)
_HEX[list(b"0123456789abcdef")] = np.arange(16)
_RANKS = np.full(256, 4, dtype=np.uint8)
_RANKS[list(b"TWwt")] = 0, 1, 1, 2


@dataclass(frozen=True, slots=True)
class Image:
    """The kernel itself, one of its modules, or a piece of code made at run time.

    Attributes:
        name: in brackets, as shown.
        build_id: hex; the name if there is none.
        program: the name of a piece made at run time, else empty.
    """

    name: str
    build_id: str
    start: int
    end: int
    program: str = ""


@dataclass(frozen=True, slots=True)
class KernelMap:
    """The images, sorted by address, without overlaps.

    Attributes:
        is_hidden: this process may not read the addresses, so there are no images.
    """

    images: tuple[Image, ...]
    starts: Wide
    ends: Wide
    is_hidden: bool = False

    def find(self, addresses: Wide) -> npt.NDArray[np.int64]:
        """Return the index of the image that holds each address, -1 if there is none."""
        if not self.images:
            return np.full(len(addresses), -1, dtype=np.int64)
        found = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        found[(found >= 0) & (addresses >= self.ends[found])] = -1
        return found


@dataclass(slots=True)
class _Part:
    """The symbols of one image, collected while kallsyms is read."""

    addresses: list[Wide] = field(default_factory=list)
    ranks: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    positions: list[npt.NDArray[np.int64]] = field(default_factory=list)
    strings: bytearray = field(default_factory=bytearray)


def read_kernel_map(
    keep: Callable[[Image, Functions, bytes], None],
    kallsyms: Path = Path("/proc/kallsyms"),
    modules: Path = _MODULES,
    sys: Path = Path("/sys"),
) -> KernelMap:
    """Return the images of the kernel: reads 122,000 symbols in 0.1 s.

    `keep` is called for each image with its functions and the strings that hold their names, so
    that they need not all stay in memory. Without privilege all addresses read as zero, and the map
    is empty.
    """
    parts: dict[bytes, _Part] = {}
    for lines in _chunks(kallsyms):
        _read_lines(lines, parts)
    layout = parse_modules(_read(modules))
    images: list[Image] = []
    while parts:
        key, part = parts.popitem()
        name = key.decode("ascii", "replace")
        if name in _PROGRAM_MODULES:
            images += _make_programs(name, part)
        else:
            images += _make_image(name, part, layout, sys, keep)
    images.sort(key=lambda image: image.start)
    starts = np.array([image.start for image in images], dtype=np.uint64)
    ends = np.array([image.end for image in images], dtype=np.uint64)
    ends[:-1] = np.minimum(ends[:-1], starts[1:])
    return KernelMap(tuple(images), starts, ends, is_hidden=not images)


class RunningKernel:
    """The kernel's map, read at first use and again when it may have changed."""

    def __init__(
        self,
        keep: Callable[[Image, Functions, bytes], None],
        monotonic_ns: Callable[[], int],
    ) -> None:
        """Read nothing yet; `keep` is passed to `read_kernel_map`."""
        self._keep = keep
        self._monotonic_ns = monotonic_ns
        self._map: KernelMap | None = None
        self._modules: dict[str, tuple[int, int]] = {}
        self._read_ns = 0

    def find(self, addresses: Wide) -> tuple[KernelMap, npt.NDArray[np.int64]]:
        """Return the map, and the index of the image that holds each address, -1 if none does."""
        kernel = self._map or self._read()
        numbers = kernel.find(addresses)
        images = [kernel.images[n] for n in np.unique(numbers[numbers >= 0]).tolist()]
        if any(image.name != KERNEL_NAME for image in images) or (numbers < 0).any():
            is_passing = (numbers < 0).any() or any(image.program for image in images)
            is_old = self._monotonic_ns() - self._read_ns > _REFRESH_NS
            if (is_passing and is_old) or parse_modules(_read(_MODULES)) != self._modules:
                kernel = self._read()
                numbers = kernel.find(addresses)
        return kernel, numbers

    def _read(self) -> KernelMap:
        self._modules = parse_modules(_read(_MODULES))
        self._read_ns = self._monotonic_ns()
        self._map = read_kernel_map(self._keep)
        return self._map


def parse_modules(text: bytes) -> dict[str, tuple[int, int]]:
    """Return start and size of the kernel's modules by name, from the text of /proc/modules."""
    layout = {}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 6 and fields[1].isdigit():
            layout[fields[0].decode("ascii", "replace")] = int(fields[5], 16), int(fields[1])
    return layout


def _chunks(path: Path) -> Iterator[bytes]:
    """Return the file in pieces of whole lines."""
    rest = b""
    total = 0
    try:
        with path.open("rb") as file:
            while (chunk := file.read(_CHUNK_BYTES)) and total < _MAX_KALLSYMS_BYTES:
                total += len(chunk)
                lines, newline, tail = chunk.rpartition(b"\n")
                if newline:
                    yield rest + lines + newline
                    rest = tail
                else:
                    rest += tail
    except OSError:  # no /proc/kallsyms in this kernel
        return


def _read_lines(lines: bytes, parts: dict[bytes, _Part]) -> None:
    """Read lines of address, type, name, and perhaps a tab and `[module]`: code symbols only."""
    text = np.frombuffer(lines, dtype=np.uint8)
    ends = np.flatnonzero(text == ord("\n"))
    starts = np.concatenate([[0], ends[:-1] + 1])
    whole = ends - starts > 19
    starts, ends = starts[whole], ends[whole]
    is_code = (_RANKS[text[starts + 17]] < 4) & (text[starts + 16] == ord(" "))
    # The compiler's padding before each function, which is never executed.
    is_padding = np.ones(len(starts), dtype=np.bool_)
    for k, character in enumerate(b"__pfx_"):
        is_padding &= text[np.minimum(starts + 19 + k, len(text) - 1)] == character
    starts, ends = starts[is_code & ~is_padding], ends[is_code & ~is_padding]
    addresses = np.zeros(len(starts), dtype=np.uint64)
    for k in range(16):
        addresses = (addresses << np.uint64(4)) | _HEX[text[starts + k]]
    ranks = _RANKS[text[starts + 17]].copy()
    for marker in _MARKERS:
        ranks[_ends_with(text, ends, marker)] = 3
    tabs = np.flatnonzero(text == ord("\t"))
    owned = np.searchsorted(tabs, starts) != np.searchsorted(tabs, ends)
    core = np.flatnonzero(~owned)
    if len(core):
        part = parts.setdefault(b"", _Part())
        lengths = ends[core] - starts[core] - 18
        part.addresses.append(addresses[core])
        part.ranks.append(ranks[core])
        part.positions.append(np.cumsum(lengths) - lengths + len(part.strings))
        names = zip((starts[core] + 19).tolist(), ends[core].tolist(), strict=True)
        part.strings += b"\0".join([lines[start:end] for start, end in names]) + b"\0"
    for i in np.flatnonzero(owned).tolist():
        name, _, module = lines[starts[i] + 19 : ends[i]].partition(b"\t")
        _add_one(parts.setdefault(module.strip(b"[]"), _Part()), addresses[i], ranks[i], name)


def _ends_with(
    text: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64], suffix: bytes
) -> npt.NDArray[np.bool_]:
    """Return which lines end with the suffix. Each has 19 bytes of address and type before it."""
    matches = np.ones(len(ends), dtype=np.bool_)
    for k, character in enumerate(reversed(suffix)):
        matches &= text[ends - 1 - k] == character
    return matches


def _add_one(part: _Part, address: np.uint64, rank: np.uint8, name: bytes) -> None:
    part.addresses.append(np.array([address], dtype=np.uint64))
    part.ranks.append(np.array([rank], dtype=np.uint8))
    part.positions.append(np.array([len(part.strings)], dtype=np.int64))
    part.strings += name + b"\0"


class _Names:
    def __init__(self, strings: bytes) -> None:
        self._strings = strings

    def preferences(self, positions: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
        return name_preferences(self._strings, positions.astype(np.int64))


def _make_programs(name: str, part: _Part) -> Iterator[Image]:
    addresses = np.concatenate(part.addresses).tolist()
    names = bytes(part.strings).split(b"\0")
    for address, program in zip(addresses, names, strict=False):
        if address:
            end = address + _MAX_PROGRAM_BYTES
            yield Image(f"[{name}]", f"[{name}]", address, end, readable(program))


def _make_image(
    name: str,
    part: _Part,
    layout: dict[str, tuple[int, int]],
    sys: Path,
    keep: Callable[[Image, Functions, bytes], None],
) -> Iterator[Image]:
    """Return the image, or nothing if its addresses are hidden."""
    addresses = np.concatenate(part.addresses)
    positions = np.concatenate(part.positions)
    strings = bytes(part.strings)
    start, end = _bounds(name, addresses, positions, strings, layout)
    inside = (addresses >= start) & (addresses < end)
    if not start or not inside.any():
        return
    offsets = (addresses[inside] - np.uint64(start)).astype(np.uint32)
    symbols = Candidates(
        offsets,
        np.full(len(offsets), end - start, dtype=np.uint32),
        positions[inside].astype(np.uint32),
        np.concatenate(part.ranks)[inside],
        np.zeros(len(offsets), dtype=np.bool_),
    )
    shown = f"[{name}]" if name else KERNEL_NAME
    image = Image(shown, _build_id(name, sys) or shown, start, end)
    keep(image, arrange(symbols, _Names(strings), 0), strings)
    yield image


def _bounds(
    name: str,
    addresses: Wide,
    positions: npt.NDArray[np.int64],
    strings: bytes,
    layout: dict[str, tuple[int, int]],
) -> tuple[int, int]:
    """Return start and end of an image's code; zeros if they are hidden."""
    if name:
        start, size = layout.get(name, (0, 0))
        return start, start + min(size, _MAX_MODULE_BYTES)
    return _symbol(b"_text", addresses, positions, strings), _symbol(
        b"_etext", addresses, positions, strings
    )


def _symbol(name: bytes, addresses: Wide, positions: npt.NDArray[np.int64], strings: bytes) -> int:
    place = (b"\0" + strings).find(b"\0" + name + b"\0")
    found = np.flatnonzero(positions == place)
    return int(addresses[found[0]]) if len(found) else 0


def _build_id(name: str, sys: Path) -> str:
    if not name:
        return parse_build_id(_read(sys / "kernel/notes"))
    return parse_build_id(_read(sys / "module" / name / "notes/.note.gnu.build-id"))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
