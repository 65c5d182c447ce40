"""Names of the code that is sampled, asked for while its window is open.

The sampler opens no file and parses none. A native address is located as an offset in a mapped
file (`MappedFile`); what file that is, and what is at the offset, readers say a little later. Until
its window closes a location is provisional: its module is a number that stands for the file. Then
it gets the file's own module, by which it is known everywhere and for ever, and its frames.

Readers answer with ranges of offsets, so that a function is asked for once. Answers are kept by the
content of files as long as they are used: a window in which nothing new was sampled asks nothing.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bpf.samples import ProcessGeneration
from profiler.agent.jit_names import JIT, JitNames
from profiler.agent.mapped_files import MappedFile, MappedFiles, State
from profiler.agent.places import Code, Named, Source
from profiler.agent.reader_child import Answer, Failure
from profiler.agent.readers import Readers
from storage.profile import adopt_module
from symbolizer.digest import blake2b
from symbolizer.location import (
    AddressLocation,
    Call,
    FileOffset,
    Kind,
    Location,
    Miss,
    Module,
    NamedLocation,
    Place,
)
from symbolizer.maps import MappingTable, is_of_compiler
from symbolizer.symbols.candidates import Functions
from symbolizer.symbols.kernel import KERNEL_NAME, Image, Program, RunningKernel
from symbolizer.symbols.table import SymbolCache
from symbolizer.text import readable

log = logging.getLogger(__name__)

Words = npt.NDArray[np.uint64]

CACHE_BYTES = 512 << 20
"""Of symbol tables on disk. The longest unused are evicted, and built again when needed."""
_BATCH_OFFSETS = 256
_LAST_TURN = 2
_MAX_PLACES = 16_384
"""Ranges of offsets that are kept, some 400 bytes each with their text."""
_MAX_FILES = 8192
_UNUSED_WINDOWS, _FORGET_EVERY = 60, 10  # windows in which a place was not used, between two looks
_RETRY_S, _LONGEST_RETRY_S = 60.0, 3600.0
_ASK_EVERY_S = 10.0
"""How often names are asked for of files that have a table: few large requests cost less."""
_KERNEL_AGAIN_S = 60.0
_SLOWEST = 5

# Members of an enum are looked up slowly, and these with each wake.
_PENDING, _IDENTIFIED = State.PENDING, State.IDENTIFIED
_PROVISIONAL = "file "
_UNKNOWN_KERNEL = "[kernel]"
_PSEUDO_MISSES = {
    "[exited]": Miss.EXITED,
    "[unknown]": Miss.NO_MAPPING,
    KERNEL_NAME: Miss.KERNEL_HIDDEN,
    _UNKNOWN_KERNEL: Miss.KERNEL_UNKNOWN,
}
_FAILURES = {
    Failure.HUNG: Miss.NO_ANSWER,
    Failure.SET_ASIDE: Miss.NO_ANSWER,
    Failure.ERROR: Miss.DAMAGED,
}
_PASSING = frozenset({Miss.NOT_KEPT, Miss.NO_FILE, Miss.FILE_REPLACED, Miss.NOT_PERMITTED})
"""Reasons that another process with the same file may end."""


class Names:
    """Locates addresses, and names them when their window closes. Not thread-safe."""

    def __init__(
        self,
        readers: Readers,
        files: MappedFiles,
        tables: SymbolCache,
        jit: JitNames,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Read nothing yet; `tables` is where readers find the kernel's symbols."""
        self._readers = readers
        self._files = files
        self._tables = tables
        self.jit = jit
        self._kernel = RunningKernel(self._keep_image, monotonic_ns)
        self._kernel_again_s = 0.0
        self._images: dict[str, tuple[Module, Code]] = {}
        self._codes: dict[tuple[str, int], Code] = {}
        self._numbers: dict[MappedFile, int] = {}
        self._numbered: list[MappedFile] = []
        self._new: dict[MappedFile, set[int]] = {}
        self._new_in_kernel: dict[str, set[int]] = {}
        self._late: set[MappedFile] = set()
        self._next_ask_s = 0.0
        self._best: dict[str, int] = {}
        self._kept = 0
        self._window = 1
        self._slowest: list[tuple[float, str]] = []

    def read_kernel(self) -> bool:
        """Read a piece of the kernel's symbols; return whether all are known."""
        return self._kernel.read()

    def locate(
        self, generation: ProcessGeneration, mappings: MappingTable, addresses: Words
    ) -> list[Location]:
        """Return one Location per user address; those in files and of compilers are provisional.

        Pass the address of the instruction to look up: for a caller, its return address - 1.
        """
        places: dict[int, tuple[str, int, set[int] | None]] = {}
        locations: list[Location] = []
        for address, number in zip(
            addresses.tolist(), mappings.find(addresses).tolist(), strict=True
        ):
            place = places.get(number)
            if place is None:
                place = places[number] = self._place(generation, mappings, number)
            module, start, new = place
            locations.append(AddressLocation(module, FileOffset(address - start)))
            if new is not None:
                new.add(address - start)
        return locations

    def locate_kernel(self, addresses: Words) -> list[Location]:
        """Return one Location per kernel address."""
        if not len(addresses):
            return []
        self._read_kernel_again()
        kernel, numbers = self._kernel.find(addresses)
        locations: list[Location] = []
        unknown = KERNEL_NAME if kernel.is_hidden else _UNKNOWN_KERNEL
        for address, number in zip(addresses.tolist(), numbers.tolist(), strict=True):
            if number < 0:
                locations.append(AddressLocation(unknown, FileOffset(address)))
                continue
            image = kernel.images[number]
            if image.program:
                locations.append(NamedLocation(image.program, image.name, Kind.KERNEL, "", 0, 0))
                continue
            offset = address - image.start
            self._new_in_kernel.setdefault(image.build_id, set()).add(offset)
            locations.append(AddressLocation(image.build_id, FileOffset(offset)))
        return locations

    def add_kernel_programs(self, programs: Sequence[Program]) -> None:
        """Take in code that the kernel has made since the last call."""
        self._kernel.add_programs(programs)

    def ask(self, *, is_due: bool = False) -> None:
        """Ask readers for the names of what was located since the last call.

        Code is asked for at once when it is new: its file may be gone soon. What else is new in it
        is asked for now and then, or when `is_due`.
        """
        self.jit.ask(is_due=is_due)
        now_s = time.monotonic()
        is_due = is_due or now_s >= self._next_ask_s
        if is_due:
            self._next_ask_s = now_s + _ASK_EVERY_S
        for file in list(self._new):
            if file.state is _PENDING:
                continue
            code = self._code_of(file) if file.state is _IDENTIFIED else None
            if code is not None and not is_due and not code.is_new:
                continue
            offsets = self._new.pop(file)
            if code is not None and offsets:
                self._request(code, offsets, file)
        if is_due:
            for build_id, offsets in self._new_in_kernel.items():
                _, code = self._images[build_id]
                self._request(code, offsets, None)
            self._new_in_kernel.clear()

    def name(
        self, locations: Iterable[Location], wait: Callable[[Callable[[], bool]], object]
    ) -> Named:
        """Return what the locations of a window are.

        `wait` polls the readers until what it is passed returns True, or until it is too late. What
        has no answer by then has no name in this window; the next one will not wait for it.
        """
        places = [place for place in locations if isinstance(place, AddressLocation)]
        try:
            self._await_answers(places, wait)
            return self._resolve(places)
        finally:
            self._numbers, self._numbered = {}, []
            self.jit.end_window()
            self._window += 1
            self._forget_unopened()
            self._forget_unused()

    def slowest(self) -> list[dict[str, str | float]]:
        """Return the files whose symbols took longest to read: `path` and `ms`, slowest first."""
        return [{"path": path, "ms": ms} for ms, path in sorted(self._slowest, reverse=True)]

    def _place(
        self, generation: ProcessGeneration, mappings: MappingTable, place: int
    ) -> tuple[str, int, set[int] | None]:
        """Return a module, what to subtract from an address, and where to note what is new."""
        if place < 0:
            return mappings.missing, 0, None
        mapping = mappings.mappings[place]
        if is_of_compiler(mapping.path):
            module, new = self.jit.place(generation, mappings)
            return module, 0, new
        if mapping.path.startswith(b"[") and mapping.path != b"[vdso]":
            return readable(mapping.path), 0, None
        file = self._files.file(mappings, place, generation.pid)
        if file is None:
            return readable(mapping.path), 0, None
        number = self._numbers.get(file)
        if number is None:
            number = self._numbers[file] = len(self._numbered)
            self._numbered.append(file)
        new = self._new.setdefault(file, set())
        return f"{_PROVISIONAL}{number}", mapping.start - mapping.file_offset, new

    # Asking.

    def _code_of(self, file: MappedFile) -> Code:
        # What a table is believed to name depends on the owner of the file.
        key = (file.content_key, file.owner)
        code = self._codes.get(key)
        if code is None:
            code = self._codes[key] = Code(
                *(file.content_key, file.code_key, file.owner, readable(file.key.path)),
                has_symbols=file.has_symbols,
            )
        return code

    def _request(self, code: Code, offsets: Iterable[int], file: MappedFile | None) -> None:
        if code.failure is not None and time.monotonic() < code.retry_s:
            return
        wanted = sorted(
            offset
            for offset in offsets
            if offset not in code.asked and code.find(offset, self._window) is None
        )
        for start in range(0, len(wanted), _BATCH_OFFSETS):
            some = wanted[start : start + _BATCH_OFFSETS]
            code.asked.update(some)
            code.is_new = False
            values = {
                "content": code.content,
                "code": code.code,
                "owner": code.owner,
                "has_symbols": code.has_symbols,
                "offsets": some,
                "mapping": None if file is None else self._files.request(file),
            }
            self._readers.ask(
                "names",
                values,
                lambda answer, some=some: self._take(code, some, answer),  # type: ignore[misc]
                turn=_LAST_TURN,
                group="" if file is None else self._files.group(file),
                owner="" if file is None else self._files.owner(file),
            )

    def _take(self, code: Code, offsets: Sequence[int], answer: Answer) -> None:
        code.asked.difference_update(offsets)
        code.is_late = False
        failure: Miss | None
        if answer.failure is not None:
            failure = _FAILURES.get(answer.failure, Miss.TOO_COSTLY)
        else:
            try:
                failure = self._take_in(code, answer.result)
            except (ArithmeticError, KeyError, TypeError, ValueError):
                failure = Miss.DAMAGED  # a reader that its file has taken over
        if failure is Miss.NOT_KEPT and self._tables.holds(code.content):
            failure = None  # it was stored since this was asked
        code.failure = failure
        code.is_new = failure in _PASSING
        if failure is None:
            code.failures = 0
            return
        code.failures += 1
        pause_s = min(_RETRY_S * 2 ** (code.failures - 1), _LONGEST_RETRY_S)
        code.retry_s = time.monotonic() + (0.0 if failure in _PASSING else pause_s)

    def _take_in(self, code: Code, result: Mapping[str, Any]) -> Miss | None:
        """Keep the places of an answer; return why there is no table."""
        if result["build_ms"]:
            self._slowest.append((float(result["build_ms"]), code.name))
            self._slowest = sorted(self._slowest, reverse=True)[:_SLOWEST]
        if result["failure"] is not None:
            return Miss(result["failure"])
        self._note_quality(code, int(result["named"]))
        for start, end, calls, miss in result["places"]:
            found = tuple(
                Call(_safe(function), int(first), _safe(file), int(line))
                for function, first, file, line in calls
            )
            place = Place(int(start), int(end), found, None if miss is None else Miss(miss))
            self._kept += code.keep(place, self._window)
        return None

    def _note_quality(self, code: Code, named: int) -> None:
        """Ask again for what worse tables of the same code have named."""
        code.named = named
        if not code.code or named <= self._best.get(code.code, 0):
            return
        is_first = code.code not in self._best
        self._best[code.code] = named
        if not is_first:
            for other in self._codes.values():
                if other.code == code.code and other.named < named:
                    self._kept -= other.forget(math.inf)

    # The end of a window.

    def _await_answers(
        self, places: Sequence[AddressLocation], wait: Callable[[Callable[[], bool]], object]
    ) -> None:
        """Wait until everything is answered that was never late and has not failed before."""
        files: set[MappedFile] = set()
        for build_id, offset in places:
            file = self._file_of(build_id)
            if file is not None:
                files.add(file)
                self._new.setdefault(file, set()).add(offset)
            elif build_id in self._images:
                self._new_in_kernel.setdefault(build_id, set()).add(offset)
        waited_for = files - self._late

        def is_done() -> bool:
            self.ask(is_due=True)
            return (
                self.jit.is_complete()
                and not any(file in self._new for file in waited_for)
                and not any(
                    code.asked and not code.is_late and not code.failures
                    for code in self._all_codes()
                )
            )

        wait(is_done)
        self._late = {file for file in self._new if file in files or file in self._late}
        for code in self._all_codes():
            code.is_late = bool(code.asked)

    def _all_codes(self) -> Iterator[Code]:
        yield from self._codes.values()
        for _, code in self._images.values():
            yield code

    def _resolve(self, places: Sequence[AddressLocation]) -> Named:
        known: dict[str, Source] = {}
        modules: dict[str, Module] = {}
        for build_id in dict.fromkeys(place.build_id for place in places):
            source = self._source_of(build_id)
            if source is not None:
                known[build_id] = source
                adopt_module(modules, source.module)
        named = Named({}, [], modules, Counter())
        reasons: dict[Location, Miss | None] = {}
        for place in places:
            source = known.get(place.build_id)
            if source is None:
                continue
            named_alone = self.jit.find(place)
            if named_alone is not None:
                named.locations[place] = named_alone
                continue
            module = modules[source.module.build_id]
            final = AddressLocation(module.build_id, place.offset)
            named.locations[place] = final
            found = source.code.find(place.offset, self._window) if source.code else None
            reason: Miss | None = source.miss or Miss.NOT_READ
            if found is not None:
                reason = found.miss
                if found.calls:
                    named.frames.append((final, found.frames(module)))
            if reason is None:
                reasons.pop(final, None)
            reasons.setdefault(final, reason)
        named.misses.update(str(reason) for reason in reasons.values() if reason is not None)
        return named

    def _source_of(self, build_id: str) -> Source | None:
        """Return the module of a location, what names it, and else why nothing does."""
        file = self._file_of(build_id)
        if file is not None:
            return self._source_of_file(file)
        if build_id in self._images:
            module, code = self._images[build_id]
            return Source(module, code, code.failure)
        if (miss := self.jit.miss_of(build_id)) is not None:
            return Source(JIT, None, miss)
        if not build_id.startswith("["):
            return None
        is_kernel = build_id in (KERNEL_NAME, _UNKNOWN_KERNEL)
        kind = Kind.KERNEL if is_kernel else Kind.NATIVE
        reason = _PSEUDO_MISSES.get(build_id, Miss.NO_CODE_KNOWN)
        return Source(Module(build_id, build_id, kind), None, reason)

    def _source_of_file(self, file: MappedFile) -> Source:
        if file.state == State.FAILED and file.key.path.startswith(b"/memfd:"):
            return Source(JIT, None, Miss.ANONYMOUS)
        path = readable(file.key.path)
        module = Module(file.build_id or f"[{path.strip('[]')}]", path, segments=file.segments)
        if file.state != State.IDENTIFIED:
            return Source(module, None, file.miss)
        code = self._code_of(file)
        return Source(module, code, code.failure)

    def _file_of(self, build_id: str) -> MappedFile | None:
        if not build_id.startswith(_PROVISIONAL):
            return None
        return self._numbered[int(build_id.removeprefix(_PROVISIONAL))]

    def _forget_unopened(self) -> None:
        """Forget what was sampled in files that could not be read: it is not in later windows."""
        unopened = [file for file in self._new if file.state is _PENDING]
        self._new.update((file, set()) for file in unopened)
        for file in unopened[:-_MAX_FILES]:
            del self._new[file]

    def _forget_unused(self) -> None:
        """Keep what the last window used, and before that as much as there is room for."""
        if self._window % _FORGET_EVERY == 0:
            self._forget_places(self._window - _UNUSED_WINDOWS)
        if self._kept > _MAX_PLACES:
            self._forget_places(self._window - 1)
        if self._kept > _MAX_PLACES:
            self._forget_places(math.inf)
        if len(self._codes) > _MAX_FILES:
            for key, code in list(self._codes.items()):
                if code.used_in < self._window - 1 and not code.asked:
                    self._kept -= self._codes.pop(key).forget(math.inf)
        if len(self._best) > _MAX_FILES:
            self._best.clear()

    def _forget_places(self, before: float) -> None:
        self._kept -= sum(code.forget(before) for code in self._all_codes())

    # The kernel.

    def _read_kernel_again(self) -> None:
        """Store the kernel's tables again if readers do not find one, once a minute at most."""
        evicted = [code for _, code in self._images.values() if code.failure == Miss.NOT_KEPT]
        now_s = time.monotonic()
        if evicted and now_s >= self._kernel_again_s:
            self._kernel_again_s = now_s + _KERNEL_AGAIN_S
            self._kernel.forget()
            for code in evicted:
                code.failure = None

    def _keep_image(self, image: Image, functions: Functions, strings: bytes) -> None:
        """Store the functions of an image of the kernel, and know it from now on."""
        key = blake2b(image.build_id.encode(), digest_size=20)
        for column in (functions.starts, functions.ends, functions.names):
            key.update(column.tobytes())
        key.update(strings)
        content = key.hexdigest()
        known = self._images.get(image.build_id)
        if known is None or known[1].content != content:
            module = Module(image.build_id, image.name, Kind.KERNEL)
            if known is not None:
                self._kept -= known[1].forget(math.inf)
            self._images[image.build_id] = module, Code(content, "", 0, image.name)
        if not self._tables.holds(content):
            try:
                self._tables.store(content, functions, (), [strings]).close()
            except OSError as error:
                log.warning("cannot store symbols of %s: %s", image.name, error.strerror)


def _safe(text: Any) -> str:
    """Return a name of an answer; a file may have taken over the reader."""
    return readable(str(text).encode())
