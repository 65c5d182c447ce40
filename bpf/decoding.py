"""Read what the maps and the ring hold, by the layouts of samples.py, into samples and copies."""

from typing import Any, NamedTuple, Self

import numpy as np

from bpf.interpreters import ChainEnd
from bpf.samples import (
    COPY,
    COUNT,
    COUNT_KEY,
    MAX_NATIVE_WORDS,
    MAX_SHORT_WORDS,
    TAG_SHIFT,
    CopiedStack,
    RawSample,
    StopReason,
    Tag,
    Words,
)

assert COPY.fields
GENERATION_AT: int = COPY.fields["generation"][1]
"""Where a record of the ring has its map generation: a byte, as there are two."""

_COPY_NAMES = [name for name in COPY.names or () if name not in ("key", "registers", "unused")]
_COUNT_HEAD = [name for name in COUNT.names or () if name != "words"]
_USER_STACK_AT = (COUNT_KEY.names or ()).index("user_stack")
_NO_WORDS: Words = np.empty(0, np.uint64)
_CUT_OFF = Tag.REASON << TAG_SHIFT | ChainEnd.TRUNCATED
"""The last word of a stack that has more interpreter frames than there is room for."""
_STOP_LABELS = {reason.value: reason.label for reason in StopReason}


class KernelStacks(NamedTuple):
    """Kernel stacks by their hashes: their words, and why those that are not whole are not."""

    words: dict[int, Words]
    stops: dict[int, str]

    @classmethod
    def of(cls, keys: np.ndarray, values: np.ndarray) -> Self:
        """Read the entries of a map of kernel stacks."""
        words = {key: _as_lookups(stack) for key, stack in _stacks(keys, values).items()}
        return cls(words, _stops(keys, values))


def read_samples(
    keys: np.ndarray,
    counts: np.ndarray,
    long: tuple[np.ndarray, np.ndarray],
    deep: tuple[np.ndarray, np.ndarray],
    kernel: KernelStacks,
) -> list[RawSample]:
    """Return a sample for each entry of the counts map.

    `long` and `deep` are the maps of user stacks that do not stand with their counts.
    """
    apart = _stacks(*long) | _stacks(*deep)
    short, heads = _words_and_heads(counts)
    samples = []
    for i, (key, head) in enumerate(zip(keys.tolist(), heads, strict=True)):
        number, first_ns, last_ns, leader_comm, length, stop = head
        user = short[i, :length] if length <= MAX_SHORT_WORDS else apart[key[_USER_STACK_AT]]
        if length > MAX_NATIVE_WORDS and user[-1] == _CUT_OFF:
            stop = StopReason.TRUNCATED
        samples.append(_sample(key, leader_comm, first_ns, last_ns, number, stop, user, kernel))
    return samples


def read_copy(record: bytes, kernel: KernelStacks) -> CopiedStack:
    """Return the copied stack of a record of the ring."""
    head = np.frombuffer(record, COPY, 1)[0]
    first_ns, pc, start, leader_comm, size, unreadable, length, stop, _, is_return, is_cut = head[
        _COPY_NAMES
    ].tolist()
    size &= ~7
    user = np.frombuffer(record, np.uint64, length, COPY.itemsize + size)
    return CopiedStack(
        walked=_sample(
            head["key"].tolist(), leader_comm, first_ns, first_ns, 1, stop, user, kernel
        ),
        registers=head["registers"],
        pc=pc,
        is_return_address=bool(is_return),
        start=start,
        memory=np.frombuffer(record, np.uint64, size // 8, COPY.itemsize),
        unreadable=unreadable,
        is_cut=bool(is_cut),
    )


def _sample(  # noqa: PLR0917 - what a record of either kind has
    key: tuple[Any, ...],
    leader_comm: bytes,
    first_ns: int,
    last_ns: int,
    samples: int,
    stop: int,
    user: Words,
    kernel: KernelStacks,
) -> RawSample:
    """Return a sample by its key in the counts map. By keyword it would take twice as long."""
    start_ns, _, kernel_hash, cgroup_id, pid, tid, exec_id, comm = key
    return RawSample(
        pid,
        tid,
        start_ns,
        exec_id,
        cgroup_id,
        comm,
        leader_comm,
        first_ns,
        last_ns,
        samples,
        _STOP_LABELS[stop],
        user,
        kernel.words[kernel_hash] if kernel_hash else _NO_WORDS,
        kernel.stops.get(kernel_hash, ""),
    )


def _words_and_heads(counts: np.ndarray) -> tuple[np.ndarray, list[tuple[Any, ...]]]:
    return counts["words"], counts[_COUNT_HEAD].tolist()


def _stacks(keys: np.ndarray, values: np.ndarray) -> dict[int, Words]:
    lengths, words = values["length"].tolist(), values["words"]
    return {key: words[i, : lengths[i]] for i, key in enumerate(keys.tolist())}


def _stops(keys: np.ndarray, values: np.ndarray) -> dict[int, str]:
    """Return why stacks are not whole, by their keys."""
    stops = zip(keys.tolist(), values["stop"].tolist(), strict=True)
    return {key: _STOP_LABELS[stop] for key, stop in stops if stop}


def _as_lookups(kernel_words: Words) -> Words:
    """Move callers into their call instruction; the leaf is where the tick fell."""
    lookups = kernel_words.copy()
    lookups[1:] -= np.uint64(1)
    return lookups
