"""What a sampled address is (Location) and how it is shown (Frame).

A Location is identity: it is what profiles of different processes, hosts and days are merged by, so
it holds nothing that may improve later. A Frame is a view of it, kept in a table beside the stacks:
better names replace worse ones without touching a count.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, NewType

ProcessAddress = NewType("ProcessAddress", int)
"""An address as a running process (or the running kernel) uses it."""

FileOffset = NewType("FileOffset", int)
"""A position in an object file, or in the kernel's image counted from its start."""

ElfAddress = NewType("ElfAddress", int)
"""An address as an object file was linked (`p_vaddr`, `st_value`)."""


class Kind(StrEnum):
    """What a frame is made of; decides its colour and is part of a box's identity."""

    KERNEL = "kernel"
    NATIVE = "native"
    INLINED = "inlined"
    PYTHON = "python"
    JIT = "jit"
    GO = "go"
    LABEL = "label"
    """A label drawn as a frame above the root."""
    REST = "rest"
    """What was too narrow to draw, summed into one visible node."""


class Miss(StrEnum):
    """Why an address has no name. A closed list: a new way needs a new reason."""

    NO_SYMBOL = "no symbol"
    """The file has symbols, but none that covers the address."""
    STRIPPED = "no symbol table"
    NO_FILE = "file not found"
    """Deleted, out of reach, or gone with its process before it was opened."""
    FILE_REPLACED = "file replaced"
    """Another file stands where the mapped one was."""
    NOT_PERMITTED = "file not permitted"
    NOT_REGULAR = "not a regular file"
    NOT_ELF = "not an ELF file"
    UNSUPPORTED = "unsupported ELF file"
    """Big-endian."""
    DAMAGED = "damaged ELF file"
    TOO_LARGE = "too many symbols"
    """Beyond the limits that bound the profiler's memory."""
    NO_MAPPING = "no mapping"
    EXITED = "process exited"
    """It was gone before its mappings were seen."""
    ANONYMOUS = "anonymous memory"
    """Code without a file: just-in-time compilers, trampolines."""
    NO_CODE_KNOWN = "pseudo file"
    """Memory of the kernel's own that has no symbols, as [vsyscall]."""
    KERNEL_HIDDEN = "kernel addresses hidden"
    """kallsyms shows zeros: kernel.kptr_restrict, or CAP_SYSLOG is missing."""
    KERNEL_UNKNOWN = "unknown kernel code"
    NOT_KEPT = "symbols no longer kept"
    """They were read, and have made room for others since."""


class Segment(NamedTuple):
    """An executable PT_LOAD: where it is linked and where it lies in the file (ELF gABI)."""

    p_vaddr: ElfAddress
    p_offset: FileOffset
    p_filesz: int


@dataclass(frozen=True, slots=True)
class Module:
    """The file behind a mapping, known by its build id.

    Attributes:
        build_id: hex of the GNU build id; `hash-` and hex of (size, 64 blocks of 4 KiB spread
            over the file) for a file without one; a name in brackets where there is no file, as
            `[exited]`.
        path: what to show, already readable (`/usr/lib/…`, `[kernel.kallsyms]`, `[vdso]`).
        segments: executable segments in file order; empty where they are not known, and then
            addresses are shown as file offsets.
    """

    build_id: str
    path: str
    kind: Kind = Kind.NATIVE
    segments: tuple[Segment, ...] = ()

    @property
    def name(self) -> str:
        """The last part of the path, which is what a box and a table show."""
        return self.path.rpartition("/")[2] or self.path

    def elf_address(self, offset: FileOffset) -> ElfAddress:
        """Translate a file offset into the address the file was linked at.

        Goes through the executable PT_LOAD that holds the offset (ELF gABI, "Program Header"). An
        offset outside of all of them is returned as it is: it is still one place, only unlinked.
        """
        for segment in self.segments:
            if segment.p_offset <= offset < segment.p_offset + segment.p_filesz:
                return ElfAddress(offset - segment.p_offset + segment.p_vaddr)
        return ElfAddress(int(offset))


class AddressLocation(NamedTuple):
    """A place in machine code: native files, the kernel, its modules, the vDSO.

    The offset is that of the instruction to look up: for a caller it lies inside the call, one
    byte before the return address.
    """

    build_id: str
    offset: FileOffset


class NamedLocation(NamedTuple):
    """A place known by its name only: interpreted and JIT code, text formats, foreign profiles."""

    function: str
    module: str
    kind: Kind
    file: str
    first_line: int
    line: int


Location = AddressLocation | NamedLocation


class Frame(NamedTuple):
    """One function as it is shown. `line` is 0 and `file` empty where they are not known."""

    function: str
    module: str
    kind: Kind
    file: str = ""
    line: int = 0


def bounded(module: str, kind: Kind, start: ElfAddress) -> Frame:
    """Return the box of a function that has no name, but is known to begin at an address."""
    return Frame(f"{module}+{start:#x}", module, kind)


def is_bounded(frame: Frame) -> bool:
    """Return whether a frame is such a box, so that a name from elsewhere is better."""
    return frame.function.startswith(f"{frame.module}+0x")


def unnamed(module: str, kind: Kind) -> Frame:
    """Return the one box in which all addresses of a module that have no name are drawn."""
    inner = module.strip("[]") or "unknown"
    return Frame(f"[{inner}]", module, kind)
