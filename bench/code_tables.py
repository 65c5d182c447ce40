"""Code: all functions of a fleet's programs, and every place in them, as arrays.

A place is one of SITES of a function: place p is in function p // SITES. `object_writer` writes
them as pprof, and `Code.columns` returns them as the reader of pprof would.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from binaries import Binary, Function
from call_trees import SITES

from storage.columns import Columns, Texts, rank_names
from storage.formats.pprof_message import ProfileMessage
from storage.grouping import ranges
from storage.hashing import Hasher, Hashes, hash_locations
from storage.profile import Accounting, Integers, Window
from storage.stack_tree import StackLists
from symbolizer.location import FileOffset, Kind, Module

_HASHED_AT_ONCE = 100_000


class _TextNumbers(dict[str, int]):
    def __missing__(self, text: str) -> int:
        number = self[text] = len(self)
        return number


class Code:
    """Grows while binaries are added; its arrays are made when they are first asked for.

    Attributes:
        modules: those of all addresses, by build id.
        texts: every text, in the order of its number.
    """

    def __init__(self) -> None:
        self._functions: list[Function] = []
        self._owners: list[Module] = []
        self._texts = _TextNumbers()
        _ = self.empty

    def __len__(self) -> int:
        return len(self._functions)

    def add(self, binary: Binary) -> Integers:
        """Take in the functions of a binary; return their numbers."""
        first = len(self._functions)
        self._functions += binary.functions
        self._owners += [binary.module] * len(binary.functions)
        return np.arange(first, len(self._functions))

    @cached_property
    def modules(self) -> dict[str, Module]:
        return {each.build_id: each for each in dict.fromkeys(self._owners) if each.build_id}

    @cached_property
    def texts(self) -> list[bytes]:
        _ = self.names, self.files, self._shown
        return [text.encode() for text in self._texts]

    @cached_property
    def names(self) -> Integers:
        """Each function's name: the number of a text, as below."""
        return self._text_numbers([each.name for each in self._functions])

    @cached_property
    def files(self) -> Integers:
        return self._text_numbers([each.file for each in self._functions])

    @cached_property
    def _shown(self) -> Integers:
        """Return build id, module and kind of each function."""
        fields = [(each.build_id, each.name, each.kind) for each in self._owners]
        return np.stack(
            [self._text_numbers([each[i] for each in fields]) for i in range(3)], axis=1
        )

    @property
    def empty(self) -> int:
        """Return the number of the empty text."""
        return self._texts[""]

    def encoded_texts(self, numbers: Integers) -> bytes:
        """Return texts as pprof's table has them."""
        blob, offsets = self._encoded_texts
        sizes = offsets[numbers + 1] - offsets[numbers]
        return blob[ranges(offsets[numbers], sizes)].tobytes()

    @cached_property
    def _encoded_texts(self) -> tuple[np.ndarray, Integers]:
        entries = [
            bytes(ProfileMessage(string_table=[text]).SerializeToString()) for text in self.texts
        ]
        sizes = np.fromiter(map(len, entries), np.int64, len(entries))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        return np.frombuffer(b"".join(entries), np.uint8), offsets

    def _text_numbers(self, texts: Sequence[str]) -> Integers:
        return np.fromiter((self._texts[str(each)] for each in texts), np.int64, len(texts))

    @cached_property
    def is_named(self) -> np.ndarray:
        """Return whether the places of a function have names instead of addresses."""
        return np.array([each.kind is Kind.PYTHON for each in self._owners])

    @cached_property
    def is_bounded(self) -> np.ndarray:
        """Return whether only the first address of a function is known."""
        return np.array(
            [
                function.name.startswith(f"{owner.name}+0x")
                for function, owner in zip(self._functions, self._owners, strict=True)
            ]
        )

    @cached_property
    def first_lines(self) -> Integers:
        lines = np.array([each.line for each in self._functions], dtype=np.int64)
        return np.where(self.is_named, lines, 0)

    @cached_property
    def lines(self) -> Integers:
        """By place: of interpreted code that of the call, of other code that of the function."""
        lines = np.array([each.line for each in self._functions], dtype=np.int64)
        sites = np.arange(len(self) * SITES) % SITES
        return np.repeat(lines, SITES) + np.where(np.repeat(self.is_named, SITES), sites, 0)

    @cached_property
    def offsets(self) -> Integers:
        """By place: its file offset."""
        starts = np.array([each.start for each in self._functions], dtype=np.int64)
        sizes = np.array([each.end for each in self._functions], dtype=np.int64) - starts
        return (starts[:, None] + sizes[:, None] * np.arange(SITES) // SITES).reshape(-1)

    @cached_property
    def addresses(self) -> Integers:
        """By place: its address as linked, which is what pprof has."""
        shifts = [
            module.elf_address(FileOffset(function.start)) - function.start
            for function, module in zip(self._functions, self._owners, strict=True)
        ]
        return self.offsets + np.repeat(np.array(shifts, dtype=np.int64), SITES)

    def owner(self, function: int) -> Module:
        return self._owners[function]

    @cached_property
    def segments(self) -> Integers:
        """Return which segment of its module each function is in, -1 if it has none."""
        found = []
        for function, module in zip(self._functions, self._owners, strict=True):
            inside = [
                i
                for i, (_, offset, size) in enumerate(module.segments)
                if offset <= function.start < offset + size
            ]
            found.append(inside[0] if inside else -1)
        return np.array(found, dtype=np.int64)

    def columns(
        self, places: Integers, offsets: Integers, words: Integers, hasher: Hasher, window: Window
    ) -> Columns:
        """Return some places and stacks of them, root first, as the reader of pprof does; no rows.

        `words` are indices into `places`.
        """
        functions = places // SITES
        named = self.is_named[functions]
        at = np.flatnonzero(named)
        texts = Texts.of(self.texts)
        locations = np.zeros((len(places), 3), dtype=np.uint64)
        locations[:, 0] = self._shown[functions, 0]
        locations[:, 1] = self.offsets[places]
        locations[at, 0] = self.names[functions[at]]
        locations[at, 1] = 0
        locations[at, 2] = np.arange(1, len(at) + 1)
        shown = np.stack(
            [
                self.names[functions],
                self._shown[functions, 1],
                self._shown[functions, 2],
                self.files[functions],
                self.lines[places],
            ],
            axis=1,
        )
        named_lines = np.stack(
            [shown[at, 1], shown[at, 2], shown[at, 3], self.first_lines[functions[at]],
             shown[at, 4]], axis=1,
        )  # fmt: skip
        frame_offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(~named)])
        hashes = hash_locations(self._text_hashes(hasher), locations, named_lines)
        frames = shown[~named]
        ranks, named_s = rank_names(texts, frame_offsets, frames, window)
        stack_hashes = _hash_stacks(hasher, hashes, offsets, words)
        return Columns(
            type="cpu",
            unit="nanoseconds",
            period_ns=1,
            window=window,
            accounting=Accounting(),
            modules=self.modules,
            label_sets=(),
            texts=texts,
            location_hashes=hashes,
            locations=locations,
            named=named_lines,
            frame_offsets=frame_offsets,
            frames=frames,
            name_ranks=ranks,
            named_s=named_s,
            stack_hashes=stack_hashes,
            stacks=StackLists(offsets, words.astype(np.int32, copy=False)),
            rows=np.zeros((0, 2), np.int64),
            counts=np.zeros((0, 2), np.int64),
            objects=np.zeros((0, 10), np.int64),
            times=np.zeros((0, 2), np.int64),
            time_counts=np.zeros((0, 2), np.int64),
            present_sets=(),
            presence=np.zeros((0, 3), np.int64),
        )

    def _text_hashes(self, hasher: Hasher) -> Hashes:
        return hasher.texts(self.texts)


def _hash_stacks(hasher: Hasher, hashes: Hashes, offsets: Integers, words: Integers) -> Hashes:
    """Hash some stacks at a time: all at once take 30 bytes a word."""
    found = [np.zeros(0, np.uint64)]
    for first in range(0, len(offsets) - 1, _HASHED_AT_ONCE):
        mine = offsets[first : first + _HASHED_AT_ONCE + 1]
        found.append(hasher.stacks(hashes, mine - mine[0], words[mine[0] : mine[-1]]))
    return np.concatenate(found)


def root_first(offsets: Integers, words: Integers) -> Integers:
    """Return leaf-first stacks root first."""
    lengths = np.diff(offsets)
    ends = np.repeat(offsets[1:] - 1, lengths)
    within = ranges(np.zeros(len(lengths), np.int64), lengths)
    return words[ends - within]
