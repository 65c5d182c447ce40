"""Mapped files: what is behind the mappings of processes, known without opening anything here.

A file is first seen as the kernel describes it: a path in some mount namespace with a build id, or
with device and inode. That is its key, so 65,000 mappings of a file are one MappedFile. Readers
open it by a living process that has the mapping, and answer what it holds. Until then it is
pending; nothing waits for it. A file that cannot be reached is asked for again as soon as another
living process has it, one that failed otherwise after a while, and only a few times.

A file whose build id another content has already is known by its own content (build_ids.py).
"""

import logging
import os
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from functools import partial
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, WeakValueDictionary, ref

from profiler.agent.build_ids import BuildIds
from profiler.agent.reader_budget import Owners, Place, place_of
from profiler.agent.reader_child import Answer, Failure
from profiler.agent.readers import Readers
from profiler.processes.address_spaces import AddressSpaces
from symbolizer import maps
from symbolizer.location import NOT_DYNAMIC, Dynamic, ElfAddress, FileOffset, Miss, Segment
from symbolizer.maps import MappingTable, is_anonymous

log = logging.getLogger(__name__)

_MAX_FILES = 16_384
"""Files in use at a time. Others have no identity, and are counted."""
_MAX_FILES_OF_TABLE = 2_048
"""Files of one process. Real ones have a few hundred at most."""
_MAX_RECENT = 1_024
"""Files that are remembered though nothing has them mapped now."""
_MAX_PIDS = 4
_MAX_TRIES = 3
_WAIT_S = 30.0
"""After so long a file is asked for again that took a reader too much."""
_ASIDE_S = 60.0
"""After so long a file system that does not answer is tried again."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 60.0
"""Between tries to reach a file by other processes."""
_SEEN_AGAIN_S = 60.0
_SEEN_AGAIN_WITHOUT_BUILD_ID_S = 1.0
"""A known file is looked at again, when another process maps it, if that is longer ago: it may
have been written again under the same name. One with a build id only when stacks go through it."""
_MAX_HUNG_MOUNTS = 256

_OUT_OF_REACH = {Miss.NO_FILE, Miss.FILE_REPLACED, Miss.NOT_PERMITTED}
_MISSES = {
    Failure.HUNG: Miss.NO_ANSWER,
    Failure.SET_ASIDE: Miss.NO_ANSWER,
    Failure.ERROR: Miss.DAMAGED,
}
_COSTLY = {Failure.MEMORY, Failure.TIME, Failure.CRASHED}


class State(Enum):
    """What is known of a file."""

    PENDING = "pending"
    IDENTIFIED = "identified"
    FAILED = "failed"


class FileKey(NamedTuple):
    """A file as the kernel describes it, without a look at the file itself."""

    place: Place
    build_id: str
    device: tuple[int, int]
    inode: int
    path: bytes


class MappedFile:
    """One file. Equal only to itself.

    Attributes:
        state: PENDING, IDENTIFIED or FAILED; a failed one may be asked for again.
        miss: why it is FAILED; NOT_READ as long as it is PENDING.
        build_id: identity of its locations: the file's build id, or `hash-` and a hash. While it is
            not IDENTIFIED: what the kernel says, else empty.
        code_key, table_key, content_key: see `symbolizer.identify`; empty until it is IDENTIFIED.
        segments: its executable segments.
        dynamic: what the dynamic loader knows it by.
        has_symbols: whether it has a symbol table of its own.
        owner: the user id of its owner.
        inode: its device, as stat(2) has it, and inode. The kernel's records of files with a build
            id do not say.
        has_table: whether its unwind table was in the cache when it was identified.
        is_mapped_again: whether another address space has it since it was asked for.
    """

    __slots__ = (
        "__weakref__",
        "asked_s",
        "build_id",
        "code_key",
        "content_key",
        "dynamic",
        "has_symbols",
        "has_table",
        "inode",
        "is_asked",
        "is_mapped_again",
        "is_wanted",
        "key",
        "miss",
        "owner",
        "pause_s",
        "segments",
        "state",
        "table_key",
        "tables",
        "tries",
    )

    def __init__(self, key: FileKey) -> None:
        self.key = key
        self.state = State.PENDING
        self.miss: Miss | None = Miss.NOT_READ
        self.build_id = key.build_id
        self.code_key = self.table_key = self.content_key = ""
        self.segments: tuple[Segment, ...] = ()
        self.dynamic = NOT_DYNAMIC
        self.has_symbols = self.has_table = False
        self.owner = 0
        self.inode = (0, 0)
        self.tables: deque[tuple[ReferenceType[_Table], maps.Mapping]] = deque(maxlen=_MAX_PIDS)
        """The last address spaces that have it, with a mapping of it in each."""
        self.is_asked = self.is_wanted = self.is_mapped_again = False
        self.asked_s = -_SEEN_AGAIN_S
        self.pause_s = _FIRST_PAUSE_S
        self.tries = 0

    @property
    def is_program(self) -> bool:
        """Whether it is no library: it was identified."""
        return bool(self.dynamic.debug) or not self.dynamic.address


class _Table:
    """What is known of a MappingTable: where its paths lead, who has it, and its files by place."""

    __slots__ = ("__weakref__", "by_key", "files", "is_certain", "mappings", "pids", "place")

    def __init__(self, mappings: MappingTable) -> None:
        self.mappings = ref(mappings)
        self.place: Place = ("", "")
        self.is_certain = False
        self.pids: deque[int] = deque(maxlen=_MAX_PIDS)
        self.files: dict[int, MappedFile | None] = {}
        self.by_key: dict[FileKey, MappedFile] = {}


class MappedFiles:
    """Knows the files of all processes. Not to be used from several threads at once."""

    def __init__(self, readers: Readers, address_spaces: AddressSpaces) -> None:
        self._readers = readers
        self._address_spaces = address_spaces
        self._tables: WeakKeyDictionary[MappingTable, _Table] = WeakKeyDictionary()
        self._files: WeakValueDictionary[FileKey, MappedFile] = WeakValueDictionary()
        self._recent: OrderedDict[FileKey, MappedFile] = OrderedDict()
        self._unfinished: dict[MappedFile, float] = {}  # those to ask again, and not before when
        self._build_ids = BuildIds()
        self._changed: dict[MappedFile, None] = {}
        self._hung: dict[tuple[Place, bytes], float] = {}
        self.owners = Owners()
        self._beyond = MappedFile(FileKey(("", ""), "", (0, 0), 0, b""))
        self._beyond.state, self._beyond.miss = State.FAILED, Miss.TOO_COSTLY
        self.unnumbered = 0
        """How many mappings got no file of their own: there were too many."""
        self.interrupted = 0
        """How often a reader was killed or crashed while it identified a file."""

    def status(self) -> dict[str, int]:
        """Return what the agent's status shows of them."""
        states = Counter(file.state for file in self._files.values())
        return {
            "files": len(self._files),
            "pending": states[State.PENDING],
            "failed": states[State.FAILED],
            "beyond_limit": self.unnumbered,
            "misclaimed_build_ids": self._build_ids.misclaimed,
            "mounts_hung": len(self._hung),
        }

    def note(self, mappings: MappingTable, pid: int) -> None:
        """Take note of a process that has these mappings: it may be asked for their files."""
        table = self._tables.get(mappings)
        if table is None:
            table = self._tables[mappings] = _Table(mappings)
        if not table.is_certain:
            self._find_place(table, pid)
        if pid not in table.pids:
            table.pids.append(pid)

    def file(self, mappings: MappingTable, number: int, pid: int) -> MappedFile | None:
        """Return the file of a process's mapping, asking for it when it is new.

        None for memory without a file, and for the kernel's own besides the vDSO.
        """
        table = self._tables.get(mappings)
        if table is None:
            self.note(mappings, pid)
            table = self._tables[mappings]
        if number in table.files:
            return table.files[number]
        file = table.files[number] = self._find(table, mappings.mappings[number], pid)
        return file

    def want(self, file: MappedFile) -> None:
        """Ask first for a file that stacks go through: most that are mapped are never seen on CPU.

        One that is still among the others then is read twice, which takes some milliseconds.
        """
        if file.state == State.PENDING and not file.is_wanted:
            file.is_wanted = True
            self._ask(file)

    def note_use(self, files: Iterable[MappedFile]) -> None:
        """Look again at files that stacks go through, where others have mapped them since."""
        until_s = time.monotonic() - _SEEN_AGAIN_S
        for file in files:
            if file.is_mapped_again and not file.is_asked and file.asked_s <= until_s:
                self._ask(file, turn=2)

    def ask_for_all(self, pids: Iterable[int]) -> set[MappedFile]:
        """Ask for all files of processes that run, and return them."""
        now_ns = time.monotonic_ns()
        files: set[MappedFile | None] = set()
        for pid in pids:
            mappings = self._address_spaces.mappings(pid, now_ns)
            places = range(min(len(mappings.mappings), _MAX_FILES_OF_TABLE))
            files.update(self.file(mappings, place, pid) for place in places)
        return {file for file in files if file is not None}

    def request(self, file: MappedFile) -> dict[str, Any]:
        """Return what a reader needs to open a file, as `Identifier.opened` takes it."""
        pids: dict[int, maps.Mapping] = {}
        for reference, mapping in reversed(file.tables):
            table = reference()
            if table is not None:
                pids.update((pid, mapping) for pid in self._living(table))
        mapping = next(iter(pids.values()), None) or file.tables[-1][1]
        return {
            "pids": [pid for pid, its in pids.items() if its is mapping][:_MAX_PIDS]
            + [pid for pid, its in pids.items() if its is not mapping][:1],
            "start": mapping.start,
            "end": mapping.end,
            "offset": mapping.file_offset,
            "path": os.fsdecode(mapping.path),
            "device": list(mapping.device),
            "inode": mapping.inode,
            "build_id": mapping.build_id,
        }

    def group(self, file: MappedFile) -> str:
        """Return the group for `Readers.ask`: files that are likely to hang together."""
        mount = self._hung_mount(file) or file.key.path.rpartition(b"/")[0]
        return f"{file.key.place[0]} {os.fsdecode(mount)}"

    def owner(self, file: MappedFile) -> str:
        """Return whose file it is, for `Readers.ask`; empty for those of root on the host itself.

        It has been identified. A user may have mapped it first, but cannot have made it.
        """
        return self.owners.of_user(file.owner, file.key.place)

    def changed(self) -> list[MappedFile]:
        """Return the files of which more, or something else, is known since the last call."""
        changed, self._changed = self._changed, {}
        return list(changed)

    def ask_again(self) -> None:
        """Ask for what may have become possible. To be called about once a second, or more."""
        now_s = time.monotonic()
        if not self._readers.left_behind:  # else a reader still waits for its answer
            self._hung = {m: until_s for m, until_s in self._hung.items() if until_s > now_s}
        for file, from_s in list(self._unfinished.items()):
            if file.state != State.PENDING and not _is_mapped(file):
                del self._unfinished[file]
            elif from_s <= now_s and not file.is_asked:
                del self._unfinished[file]
                self._ask(file, turn=2 if file.state == State.IDENTIFIED else 0)

    def _find_place(self, table: _Table, pid: int) -> None:
        """Find out in which namespace and root a process's paths are, or those of its parent."""
        candidates = (pid, *self._parents(pid))
        for nth, candidate in enumerate(candidates):
            place = place_of(candidate)
            if place is not None:
                table.place, table.is_certain = place, nth == 0
                return
        table.place = table.place if table.place != ("", "") else self.owners.own_place

    def _parents(self, pid: int) -> Iterator[int]:
        for _ in range(2):
            parent = self._address_spaces.parent_of(pid)
            if parent is None or parent == pid:
                return
            yield parent
            pid = parent

    def _living(self, table: _Table) -> list[int]:
        """Return processes that have, or whose children had, these mappings, and still run."""
        mappings = table.mappings()
        pids = dict.fromkeys(self._address_spaces.living(mappings) if mappings else ())
        pids.update(dict.fromkeys(reversed(table.pids)))
        for pid in list(pids):
            pids.update(dict.fromkeys(self._parents(pid)))
        return [pid for pid in pids if _is_there(pid)]

    def _find(self, table: _Table, mapping: maps.Mapping, pid: int) -> MappedFile | None:
        path = mapping.path
        if is_anonymous(path) or (path.startswith(b"[") and path != b"[vdso]"):
            return None
        key = FileKey(
            table.place, mapping.build_id, mapping.device, mapping.inode, mapping.file_path
        )
        if path == b"[vdso]":  # one image for all processes of a size
            key = FileKey(("", ""), "", (0, 0), mapping.end - mapping.start, path)
        file = table.by_key.get(key)
        if file is not None:
            return file
        file = self._files.get(key)
        if file is not None and self._may_be_another(file, pid):
            file = None
        if file is None:
            if len(self._files) >= _MAX_FILES or len(table.by_key) >= _MAX_FILES_OF_TABLE:
                self.unnumbered += 1
                return self._beyond
            file = self._files[key] = MappedFile(key)
        file.tables.append((ref(table), mapping))
        table.by_key[key] = file
        self._recent[key] = file
        self._recent.move_to_end(key)
        if len(self._recent) > _MAX_RECENT:
            self._recent.popitem(last=False)
        self._look_at(file)
        return file

    def _may_be_another(self, file: MappedFile, pid: int) -> bool:
        """Return whether a later file may have this one's inode and name: no process has it now."""
        if file.key.build_id or file.key.path == b"[vdso]":
            return False
        return not any(
            other != pid and _is_there(other)
            for reference, _ in file.tables
            if (table := reference()) is not None
            for other in table.pids
        )

    def _look_at(self, file: MappedFile) -> None:
        """Ask for a file that another address space has now, if that may tell something new."""
        now_s = time.monotonic()
        if file.state == State.IDENTIFIED:
            if file.key.path == b"[vdso]":
                return
            if file.key.build_id:
                file.is_mapped_again = True
            else:
                from_s = file.asked_s + _SEEN_AGAIN_WITHOUT_BUILD_ID_S
                self._unfinished.setdefault(file, from_s)
        elif file.state == State.PENDING:
            if not file.is_asked:
                self._ask(file, turn=1)
        elif file.miss in _OUT_OF_REACH:
            self._unfinished.setdefault(file, max(now_s, file.asked_s + file.pause_s))

    def _ask(self, file: MappedFile, turn: int = 0) -> None:
        if self._hung_mount(file):
            if file.state != State.IDENTIFIED:
                self._fail(file, Miss.NO_ANSWER)
                self._unfinished[file] = time.monotonic() + _ASIDE_S
            return
        file.is_asked, file.is_mapped_again = True, False
        file.asked_s = time.monotonic()
        request = self.request(file)
        self._readers.ask(
            *("file", request, partial(self._take, file)),
            turn=turn,
            group=self.group(file),
            owner=self.owners.of_any(request["pids"], file.key.place),
        )

    def _take(self, file: MappedFile, answer: Answer) -> None:
        file.is_asked = False
        if answer.failure is None:
            try:
                self._take_result(file, answer.result)
            except (ArithmeticError, KeyError, TypeError, ValueError):
                # A reader that its file has taken over.
                self._fail(file, Miss.DAMAGED)
            return
        if answer.failure in _COSTLY:
            self.interrupted += 1
        if answer.failure == Failure.HUNG:
            self.interrupted += 1
            self._find_mount(file)
        if file.state == State.IDENTIFIED:  # what was read before still holds
            return
        if answer.failure == Failure.BUDGET:  # others who map it may ask at once
            self._unfinished[file] = time.monotonic() + _WAIT_S
            return
        file.tries += 1
        self._fail(file, _MISSES.get(answer.failure, Miss.TOO_COSTLY))
        if answer.failure in _COSTLY and file.tries < _MAX_TRIES:
            self._unfinished[file] = time.monotonic() + _WAIT_S
        elif file.miss == Miss.NO_ANSWER:
            self._unfinished[file] = time.monotonic() + min(_ASIDE_S * file.tries, 3600.0)

    def _take_result(self, file: MappedFile, result: Mapping[str, Any]) -> None:
        if "miss" in result:
            miss = Miss(result["miss"])
            if file.state == State.IDENTIFIED:
                return
            file.build_id = file.key.build_id or str(result["build_id"])
            self._fail(file, miss)
            if miss in _OUT_OF_REACH:
                self._try_another(file)
            return
        device, inode = result["inode"]
        file.inode = int(device), int(inode)
        if file.state == State.IDENTIFIED and file.content_key == result["content_key"]:
            return
        segments = tuple(
            Segment(ElfAddress(int(address)), FileOffset(int(offset)), int(size))
            for address, offset, size in result["segments"]
        )
        file.build_id = self._build_ids.of(result)
        file.code_key, file.table_key = str(result["code_key"]), str(result["table_key"])
        file.content_key = str(result["content_key"])
        file.segments = segments
        file.dynamic = Dynamic(*map(int, result["dynamic"]))
        file.has_symbols, file.has_table = bool(result["has_symbols"]), bool(result["has_table"])
        file.owner = int(result["owner"])
        file.state, file.miss, file.tries = State.IDENTIFIED, None, 0
        self._changed[file] = None

    def _fail(self, file: MappedFile, miss: Miss) -> None:
        file.state, file.miss = State.FAILED, miss
        self._changed[file] = None

    def _try_another(self, file: MappedFile) -> None:
        """Ask again by a process that was not asked, or that has it by then, in a while."""
        file.pause_s = min(2 * file.pause_s, _LONGEST_PAUSE_S)
        self._unfinished[file] = time.monotonic() + file.pause_s

    def _hung_mount(self, file: MappedFile) -> bytes:
        """Return the mount that a file is on, if that does not answer."""
        if not self._hung:
            return b""
        place, path = file.key.place, file.key.path
        return next((m for where, m in self._hung if where == place and _is_below(path, m)), b"")

    def _find_mount(self, file: MappedFile) -> None:
        """Ask which mount does not answer, so that none of its files is asked for in a while."""

        def take(answer: Answer) -> None:
            mount = os.fsencode(answer.result) if isinstance(answer.result, str) else b""
            if mount not in (b"", b"/") and len(self._hung) < _MAX_HUNG_MOUNTS:
                log.warning("a file system does not answer mount=%r", mount)
                self._hung[file.key.place, mount] = time.monotonic() + _ASIDE_S

        asked = self.request(file)
        values = {"pids": asked["pids"], "path": asked["path"]}
        self._readers.ask("mount", values, take, turn=0)


def _is_mapped(file: MappedFile) -> bool:
    """Return whether a table that has the file is still in use."""
    return any(reference() is not None for reference, _ in file.tables)


def _is_there(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")  # noqa: PTH110 - a thousand times a second


def _is_below(path: bytes, mount: bytes) -> bool:
    return path == mount or path.startswith(mount.rstrip(b"/") + b"/")
