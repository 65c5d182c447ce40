"""Read the running kernel's images and their functions from /proc/kallsyms.

Addresses are randomised at boot, so a location is (build id, offset from the image's start).
kallsyms has no sizes: a function ends where the next one begins. Code made at run time (BPF
programs, trampolines) has no meaningful offset and is known by its name.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from symbolizer.integers import Wide
from symbolizer.symbols.candidates import Candidates, Functions, arrange, name_preferences
from symbolizer.symbols.notes import parse_build_id
from symbolizer.text import readable

KERNEL_NAME = "[kernel.kallsyms]"

_KALLSYMS = Path("/proc/kallsyms")
_MODULES = Path("/proc/modules")
_SYS = Path("/sys")
# Where the kernel has code that nobody told of, reading kallsyms again may show it.
_FIRST_PAUSE_NS, _LONGEST_PAUSE_NS = 60 * 10**9, 3600 * 10**9
# Reading all of kallsyms takes 0.1 s and more: at once only when nothing is known yet.
_PIECE_NS = 50_000_000
_MAX_PROGRAMS = 10_000

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


class Program(NamedTuple):
    """Code made at run time, as the kernel records it when it is there."""

    name: str
    start: int
    size: int


def _read_in_pieces(
    keep: Callable[[Image, Functions, bytes], None], kallsyms: Path, modules: Path, sys: Path
) -> Generator[None, None, KernelMap]:
    """Read the images of the kernel, and pause every few ms; 122,000 symbols take 0.1 s in all.

    Without privilege all addresses read as zero, and the map is empty.
    """
    parts: dict[bytes, _Part] = {}
    for lines in _chunks(kallsyms):
        _read_lines(lines, parts)
        yield
    layout = parse_modules(_read(modules))
    images: list[Image] = []
    while parts:
        key, part = parts.popitem()
        name = key.decode("ascii", "replace")
        if name in _PROGRAM_MODULES:
            images += _make_programs(name, part)
        else:
            images += _make_image(name, part, layout, sys, keep)
        yield
    return _arranged(images)


def _arranged(images: Iterable[Image]) -> KernelMap:
    ordered = sorted(images, key=lambda image: image.start)
    starts = np.array([image.start for image in ordered], dtype=np.uint64)
    ends = np.array([image.end for image in ordered], dtype=np.uint64)
    ends[:-1] = np.minimum(ends[:-1], starts[1:])
    return KernelMap(tuple(ordered), starts, ends, is_hidden=not ordered)


class RunningKernel:
    """The kernel's map: read by `read` or at first use, kept up to date by the kernel's records.

    BPF programs and other code made at run time come with `add_programs`. Modules are not recorded:
    /proc/modules is read when a module's code or unknown code was sampled. All is read again, in
    pieces that take no more than 50 ms, if modules have changed; and if code is sampled that is in
    no image, after a minute, and after twice as long each time that this has not helped.
    """

    def __init__(
        self,
        keep: Callable[[Image, Functions, bytes], None],
        monotonic_ns: Callable[[], int],
        kallsyms: Path = _KALLSYMS,
        modules: Path = _MODULES,
        sys: Path = _SYS,
    ) -> None:
        """Read nothing yet.

        `keep` is called for each image with its functions and the strings that hold their names,
        so that they need not all stay in memory.
        """
        self.readings = 0
        """How often all of it was read."""
        self._keep = keep
        self._monotonic_ns = monotonic_ns
        self._paths = (kallsyms, modules, sys)
        self._map: KernelMap | None = None
        self._pieces: Generator[None, None, KernelMap] | None = None
        self._modules: dict[str, tuple[int, int]] = {}
        self._programs: list[Program] = []
        self._pause_ns = _FIRST_PAUSE_NS
        self._resumes_ns = 0

    def read(self) -> bool:
        """Read a piece of what is to be there at the first use; return whether all of it is."""
        if self._map is None:
            if self._pieces is None:
                self._begin()
            self._go_on()
        return self._map is not None

    def find(self, addresses: Wide) -> tuple[KernelMap, npt.NDArray[np.int64]]:
        """Return the map, and the index of the image that holds each address, -1 if none does."""
        if self._map is None and self._pieces is None:
            self._begin()
        self._go_on(to_end=self._map is None)
        assert self._map is not None
        numbers = self._map.find(addresses)
        if self._pieces is None and self._is_outdated(self._map, numbers):
            self._begin()
            self._go_on()
            numbers = self._map.find(addresses)
        return self._map, numbers

    def add_programs(self, programs: Sequence[Program]) -> None:
        """Take in code that was made since the last call. What lay at its addresses is gone.

        Code that is gone is not taken out: nothing is sampled there any more.
        """
        if self._pieces is not None:
            self._programs += programs  # they may come too late for what is being read
        if self._map is None:  # the first reading will show the others
            return
        if len(self._map.images) + len(programs) > _MAX_PROGRAMS:
            self.forget()
            return
        self._map = _with_programs(self._map, programs)

    def forget(self) -> None:
        """Forget the map: it is read at the next use, and all functions are kept again."""
        self._map = self._pieces = None
        self._programs = []

    def _is_outdated(self, kernel: KernelMap, numbers: npt.NDArray[np.int64]) -> bool:
        is_unknown = bool((numbers < 0).any())
        images = [kernel.images[n] for n in sorted(set(numbers[numbers >= 0].tolist()))]
        if not is_unknown and not any(
            image.name != KERNEL_NAME and not image.program for image in images
        ):
            return False
        if parse_modules(_read(self._paths[1])) != self._modules:
            return True
        now_ns = self._monotonic_ns()
        if not is_unknown or now_ns < self._resumes_ns:
            return False
        self._pause_ns = min(2 * self._pause_ns, _LONGEST_PAUSE_NS)
        return True

    def _begin(self) -> None:
        self.readings += 1
        self._modules = parse_modules(_read(self._paths[1]))
        self._pieces = _read_in_pieces(self._keep, *self._paths)
        self._programs = []

    def _go_on(self, *, to_end: bool = False) -> None:
        """Read on, for a while or `to_end`."""
        if self._pieces is None:
            return
        until_ns = self._monotonic_ns() + _PIECE_NS
        try:
            while to_end or self._monotonic_ns() < until_ns:
                next(self._pieces)
        except StopIteration as end:
            self._pieces = None
            self._map = _with_programs(end.value, self._programs)
            self._programs = []
            self._resumes_ns = self._monotonic_ns() + self._pause_ns


def _with_programs(kernel: KernelMap, programs: Sequence[Program]) -> KernelMap:
    if not programs or kernel.is_hidden:
        return kernel
    made: dict[int, Image] = {}
    for program in programs:
        made = {
            start: image
            for start, image in made.items()
            if image.end <= program.start or start >= program.start + program.size
        }
        end = program.start + program.size
        made[program.start] = Image("[bpf]", "[bpf]", program.start, end, program.name)
    starts = np.array(sorted(made), dtype=np.uint64)
    ends = np.array([made[start].end for start in sorted(made)], dtype=np.uint64)
    kept = []
    for image in kernel.images:
        # The first new one that ends behind where this one starts.
        at = int(np.searchsorted(ends, np.uint64(image.start), side="right"))
        is_covered = at < len(starts) and int(starts[at]) <= image.start
        if not is_covered:
            kept.append(image)
    return _arranged((*kept, *made.values()))


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
