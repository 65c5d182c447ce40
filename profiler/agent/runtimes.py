"""Runtimes: which interpreters the kernel knows, and how it finds their frames in a process.

What is known of an interpreter's file (`symbolizer.runtimes`) comes with its unwind table. In a
process it is loaded somewhere; that is all that differs from one process to another.
"""

import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection

from bpf.interpreters import (
    INTERPRETERS_CAPACITY,
    LAYOUT_FIELDS,
    NO_PROGRAM,
    Program,
    Runtime,
    StatePlace,
)
from bpf.sampler import Sampler
from profiler.agent.mapped_files import MappedFile
from profiler.agent.python_code import Interpreter
from symbolizer.maps import Mapping
from symbolizer.runtimes.image import NONE, Image, Layout

_MAX_FRAME_BYTES, _MAX_CODE_BYTES = 120, 248
"""What the programs in the kernel read of a frame, and of a code object, at once."""
_MINOR_BITS = 20
_MAX_IMAGES = 4096
"""Beyond it those go that were unused for longest. Anybody can make files that look like one."""


class Runtimes:
    """Not to be used from several threads at once.

    Attributes:
        interpreters: by their numbers in the kernel.
        refused: files of interpreters whose frames cannot be read, by the reason.
    """

    def __init__(self, sampler: Sampler, in_use: Callable[[], Collection[int]]) -> None:
        """`in_use` returns the numbers of the interpreters that processes have now."""
        self.interpreters: dict[int, Interpreter] = {}
        self.refused: Counter[str] = Counter()
        self._in_use = in_use
        self._known = sampler.interpreters
        self._programs = sampler.known_programs
        self._images: OrderedDict[str, Image] = OrderedDict()
        """The longest unused first."""
        self._numbers: dict[str, int] = {}
        """Of those that the kernel knows."""
        self._places: dict[int, set[tuple[int, int]]] = {}
        """Devices and inodes of known programs, by their interpreter."""

    def status(self) -> dict[str, int]:
        """Return what the agent's status shows of it: files of interpreters."""
        refused = {
            f"refused_{reason.replace(' ', '_')}": number for reason, number in self.refused.items()
        }
        return {"interpreters": len(self.interpreters), **refused}

    def take(self, key: str, image: Image) -> None:
        """Take in an interpreter's image, by the key of its file's table."""
        if key in self._images:
            return
        self._images[key] = image
        if image.layout is None:
            self.refused[str(image.refusal)] += 1
        elif _fields_of(image.layout)["frame_bytes"] > _MAX_FRAME_BYTES:
            self.refused["unknown layout"] += 1
            self._images[key] = image._replace(layout=None)
        if len(self._images) > _MAX_IMAGES:
            del self._images[next(each for each in self._images if each not in self._numbers)]

    def knows(self, key: str) -> bool:
        """Return whether the frames of this file's interpreter can be read."""
        return bool(self._numbers.get(key))

    def runtime(self, key: str, mapping: Mapping) -> Runtime | None:
        """Return the runtime of a process in which `mapping` is of the file with a table's key.

        None if that is no interpreter, if the mapping does not hold its code, or if its frames
        cannot be read.
        """
        image = self._images.get(key)
        if image is None or image.layout is None:
            return None
        bias = mapping.start - mapping.file_offset - image.code_shift
        loop = image.evaluation[0][0] + bias
        if not mapping.start <= loop < mapping.end:
            return None
        number = self._number(key, image)
        return Runtime(number, bias) if number else None

    def add_program(self, key: str, file: MappedFile, program: MappedFile | None = None) -> None:
        """Let the frames of a program be found before its processes are known.

        The file with a table's key is the program itself, or a library that `program` loads.
        """
        image = self._images.get(key)
        program = program or file
        device, inode = program.inode
        if image is None or not program.segments or not inode:
            return
        number = self._number(key, image)
        if not number:
            return
        place = (os.major(device) << _MINOR_BITS | os.minor(device), inode)
        start_code = min(segment.p_vaddr for segment in program.segments)
        library = (0, 0) if program is file else (program.dynamic.debug, file.dynamic.address)
        self._programs.put(*place, Program(number, start_code, *library))
        self._places.setdefault(number, set()).add(place)

    def _number(self, key: str, image: Image) -> int:
        """Return the number of an image in the kernel, which learns of it now if need be.

        0 if its frames cannot be read, or if all numbers are of interpreters that are in use.
        """
        self._images.move_to_end(key)
        number = self._numbers.get(key, 0)
        if number or image.layout is None:
            return number
        number = self._free_number()
        if not number:
            self.refused["too many interpreters"] += 1
            return 0
        self._known.put(
            number,
            _fields_of(image.layout),
            StatePlace(image.state_kind, image.state_address, image.state_offset),
            StatePlace(image.detached_kind, image.detached_address, image.detached_offset),
            image.code_type,
        )
        self._numbers[key] = number
        self.interpreters[number] = Interpreter(
            image.version, image.layout, image.is_split, image.runtime
        )
        return number

    def _free_number(self) -> int:
        """Return a number that nobody has; the interpreter goes that was unused for longest."""
        if len(self._numbers) < INTERPRETERS_CAPACITY - 1:
            return next(n for n in range(1, INTERPRETERS_CAPACITY) if n not in self.interpreters)
        in_use = frozenset(self._in_use())
        for key in self._images:
            number = self._numbers.get(key, 0)
            if number and number not in in_use:
                self._forget(key)
                return number
        return 0

    def _forget(self, key: str) -> None:
        number = self._numbers.pop(key)
        del self.interpreters[number]
        for place in self._places.pop(number, ()):
            self._programs.put(*place, NO_PROGRAM)


def _fields_of(layout: Layout) -> dict[str, int]:
    known = layout._asdict()
    offsets = [
        layout.frame_code,
        layout.frame_previous,
        layout.frame_instruction,
        layout.frame_entry,
        layout.frame_tlbc,
    ]
    known["frame_bytes"] = max(((each | 7) + 1 for each in offsets if each != NONE), default=0)
    known["code_bytes"] = min(layout.code_bytes, _MAX_CODE_BYTES)
    return {name: known[name] for name in LAYOUT_FIELDS}
