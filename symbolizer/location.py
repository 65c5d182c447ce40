"""What a sampled address is (Location), and how it is shown (Frame).

A Location is identity: profiles of different processes, hosts and days are merged by it, so it
holds nothing that may improve later. A Frame is a view of a Location, kept in a table beside the
stacks: better names replace worse ones without changing a count.
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
    """The kind of code that a frame runs; it sets the box's colour and is part of its identity."""

    KERNEL = "kernel"
    NATIVE = "native"
    INLINED = "inlined"
    PYTHON = "python"
    JIT = "jit"
    GO = "go"
    LABEL = "label"
    """A label drawn as a frame above the root."""
    REST = "rest"
    """Everything too narrow to draw, summed into one visible node."""


class Miss(StrEnum):
    """Why an address has no name. The list is closed: a new cause needs a new reason."""

    NO_SYMBOL = "no symbol"
    """The file has symbols, but none covers the address."""
    STRIPPED = "no symbol table"
    NO_FILE = "file not found"
    """Deleted, not reachable, or lost with its process before it was opened."""
    FILE_REPLACED = "file replaced"
    """Another file is now at the path of the mapped one."""
    NOT_PERMITTED = "file not permitted"
    NOT_REGULAR = "not a regular file"
    NOT_ELF = "not an ELF file"
    UNSUPPORTED = "unsupported ELF file"
    """Big-endian."""
    DAMAGED = "damaged ELF file"
    TOO_LARGE = "too many symbols"
    """Beyond the limits that bound the profiler's memory."""
    NO_ANSWER = "file system does not answer"
    TOO_COSTLY = "file takes too much to read"
    """Beyond the memory or the time that reading one file may take."""
    NOT_READ = "not read yet"
    NO_MAPPING = "no mapping"
    EXITED = "process exited"
    """It exited before its mappings were read."""
    ANONYMOUS = "anonymous memory"
    """Code without a file: of just-in-time compilers that write no map of it, or trampolines."""
    NOT_IN_MAP = "not in the perf map"
    """The process has written a perf map or a jitdump, and the code is not in it."""
    MAP_REFUSED = "perf map refused"
    """It is another user's, no regular file, or older than what the process runs."""
    NO_CODE_KNOWN = "pseudo file"
    """The kernel's own mappings without symbols, such as [vsyscall]."""
    KERNEL_HIDDEN = "kernel addresses hidden"
    """kallsyms shows only zeros: kernel.kptr_restrict is set, or CAP_SYSLOG is missing."""
    KERNEL_UNKNOWN = "unknown kernel code"
    NOT_KEPT = "symbols no longer kept"
    """They were read, and have since been evicted."""


class Segment(NamedTuple):
    """An executable PT_LOAD: where it is linked and where it lies in the file (ELF gABI)."""

    p_vaddr: ElfAddress
    p_offset: FileOffset
    p_filesz: int


class Dynamic(NamedTuple):
    """What the dynamic loader knows a file by (gABI, "Dynamic Section").

    Attributes:
        address: of the dynamic section.
        debug: where the loader puts the address of its list of files (DT_DEBUG); 0 in libraries.
    """

    address: int
    debug: int


NOT_DYNAMIC = Dynamic(0, 0)


@dataclass(frozen=True, slots=True)
class Module:
    """The file behind a mapping, known by its build id.

    Attributes:
        build_id: hex of the GNU build id; `hash-` and hex of (size, 64 blocks of 4 KiB spread
            over the file) for a file without one; a name in brackets if there is no file, such as
            `[exited]`.
        path: to show, already readable (`/usr/lib/…`, `[kernel.kallsyms]`, `[vdso]`).
        segments: executable segments in file order; empty if unknown, and then addresses are shown
            as file offsets.
    """

    build_id: str
    path: str
    kind: Kind = Kind.NATIVE
    segments: tuple[Segment, ...] = ()

    @property
    def name(self) -> str:
        """The last part of the path, as boxes and tables show it."""
        return self.path.rpartition("/")[2] or self.path

    def elf_address(self, offset: FileOffset) -> ElfAddress:
        """Translate a file offset into the address the file was linked at.

        Uses the executable PT_LOAD that holds the offset (ELF gABI, "Program Header"). An offset
        outside all of them is returned unchanged.
        """
        for segment in self.segments:
            if segment.p_offset <= offset < segment.p_offset + segment.p_filesz:
                return ElfAddress(offset - segment.p_offset + segment.p_vaddr)
        return ElfAddress(int(offset))


class AddressLocation(NamedTuple):
    """An address in machine code: native files, the kernel, its modules, the vDSO.

    The offset is that of the instruction to look up: for a caller, one byte before the return
    address, which is inside the call.
    """

    build_id: str
    offset: FileOffset


class NamedLocation(NamedTuple):
    """Code known only by name: interpreted and JIT code, text formats, foreign profiles."""

    function: str
    module: str
    kind: Kind
    file: str
    first_line: int
    line: int


Location = AddressLocation | NamedLocation


class Frame(NamedTuple):
    """One function as it is shown. If unknown, `line` is 0 and `file` is empty."""

    function: str
    module: str
    kind: Kind
    file: str = ""
    line: int = 0

    def names(self, *, with_line: bool = False) -> tuple[str, ...]:
        """Return what it is called where its module does not stand beside it, longest first.

        A Python function is `package.module.qualname`, `module.qualname` or `qualname`, and a
        module's own code, which each has, never without the module. All else has one name: a box
        of a whole file or module, too, which has that for its function.
        """
        name = f"{self.function}:{self.line}" if with_line and self.line else self.function
        module = "" if self.module.startswith("[") else self.module
        if self.kind is not Kind.PYTHON or self.function in {module, self.file} or not module:
            return (name,)
        names = [f"{module}.{name}", f"{module.rpartition('.')[2]}.{name}"]
        if self.function != "<module>":
            names.append(name)
        return tuple(dict.fromkeys(names))

    def has_name(self, name: str) -> bool:
        """Return whether it is called so."""
        return name == self.function or name in self.names()

    def matches(self, text: str) -> bool:
        """Return whether its longest name or its module has `text` in it, which is casefolded."""
        return text in self.names()[0].casefold() or text in self.module.casefold()


def bounded(module: str, kind: Kind, start: ElfAddress) -> Frame:
    """Return the frame of a function that has no name but a known first address."""
    return Frame(f"{module}+{start:#x}", module, kind)


def is_bounded(frame: Frame) -> bool:
    """Return whether a frame was made by `bounded`, so that any real name is better."""
    return frame.function.startswith(f"{frame.module}+0x")


def unnamed(module: str, kind: Kind) -> Frame:
    """Return the frame that all addresses of a module without a name share."""
    inner = module.strip("[]") or "unknown"
    return Frame(f"[{inner}]", module, kind)


def is_nameless(frame: Frame) -> bool:
    """Return whether a frame stands for code without a name.

    That is what `bounded` and `unnamed` make, and marks such as [rest] and [truncated]. Formats of
    text have these without a module.
    """
    function, module = frame.function, frame.module
    if function.startswith("[") and function.endswith("]"):
        return not module or module.startswith("[") or function[1:-1] == module.strip("[]")
    return is_bounded(frame)


REST = "[rest]"
REST_LOCATION = AddressLocation(REST, FileOffset(0))
"""What stands for the part of a stack that is left out, to bound what a profile takes."""
REST_FRAME = Frame(REST, REST, Kind.NATIVE)


class Call(NamedTuple):
    """A function at a place in a file, without what depends on where the file is.

    Attributes:
        function: readable; empty if only its first address is known, by its FDE range.
        start: the file offset of its first address if that is all that is known of it, else -1.
        file, line: of the source; empty and 0 if they are unknown.
    """

    function: str
    start: int = -1
    file: str = ""
    line: int = 0


class Place(NamedTuple):
    """What is at all file offsets of a range.

    Attributes:
        start, end: the range, half-open.
        calls: innermost first; empty if nothing is known.
        miss: why there is no name; also for functions that are known only by their FDE range.
    """

    start: int
    end: int
    calls: tuple[Call, ...] = ()
    miss: Miss | None = None

    def frames(self, module: Module) -> tuple[Frame, ...]:
        """Return the frames, innermost first, of the file that is this module."""
        return tuple(
            Frame(call.function, module.name, module.kind, call.file, call.line)
            if call.start < 0
            else bounded(module.name, module.kind, module.elf_address(FileOffset(call.start)))
            for call in self.calls
        )
