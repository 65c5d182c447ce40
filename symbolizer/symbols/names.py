"""Turn file offsets into frames. Names are read, demangled and made readable once, then kept."""

from collections import Counter

import numpy as np

from symbolizer.integers import Wide
from symbolizer.location import FileOffset, Frame, Miss, Module, bounded
from symbolizer.symbols.demangle import Demangler
from symbolizer.symbols.modules import Modules
from symbolizer.symbols.table import SymbolTable
from symbolizer.text import readable

# Resolved names, some 300 bytes each with their text: 5 MB.
_MAX_NAMES = 16_384


class Names:
    """The frames of functions met so far.

    Attributes:
        misses: how many offsets had no name, by Miss; each offset once per call.
    """

    def __init__(self, modules: Modules) -> None:
        self.misses: Counter[str] = Counter()
        self._modules = modules
        self._frames: dict[str, dict[int, tuple[Frame, ...]]] = {}
        self._named = 0
        self._demangler = Demangler()

    def find(self, build_id: str, offsets: Wide) -> list[tuple[Frame, ...]]:
        """Return the frames of each offset, innermost first; () if it has no name."""
        found = self._modules.named(build_id)
        if found is None:
            self.misses[self._modules.why_absent(build_id).value] += len(np.unique(offsets))
            return [()] * len(offsets)
        module, table = found
        numbers = table.find(offsets)
        missing = numbers < 0
        # A function that is known only by its FDE range has a frame, but is a miss all the same.
        missing[~missing] = table.unnamed_starts(numbers[~missing]) >= 0
        if missing.any():
            reason = Miss.NO_SYMBOL if table.has_names else Miss.STRIPPED
            self.misses[reason.value] += len(set(offsets[missing].tolist()))
        wanted = numbers.tolist()
        frames = self._resolve(module, table, wanted)
        return [frames[number] for number in wanted]

    def close(self) -> None:
        self._demangler.close()
        self._frames.clear()

    def _resolve(
        self, module: Module, table: SymbolTable, numbers: list[int]
    ) -> dict[int, tuple[Frame, ...]]:
        """Return frames by function number; read and demangle names at first use."""
        new = set(numbers) - self._frames.get(module.build_id, {-1: ()}).keys()
        if self._named + len(new) > _MAX_NAMES:
            self._frames.clear()
            self._named = 0
            new = set(numbers)
        frames = self._frames.setdefault(module.build_id, {-1: ()})
        order = sorted(new - {-1})
        starts = table.unnamed_starts(np.array(order, dtype=np.int64)).tolist()
        names = self._demangler.demangle([table.name(number) for number in order])
        for number, name, start in zip(order, names, starts, strict=True):
            file, line = table.place(number)
            frame = Frame(readable(name), module.name, module.kind, readable(file), line)
            frames[number] = (frame,) if name else ()
            if start >= 0:
                address = module.elf_address(FileOffset(start))
                frames[number] = (bounded(module.name, module.kind, address),)
        self._named += len(order)
        return frames
