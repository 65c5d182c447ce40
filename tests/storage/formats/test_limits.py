"""Limits: hostile objects are refused before they cost memory, and real ones are within them."""

import dataclasses
import functools
import multiprocessing
import random
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from storage.formats import pprof, pprof_arrays, pprof_head
from storage.formats.limits import OBJECT, Limits, exhaustion_named
from storage.formats.pprof_message import check_parts, decompress
from storage.hashing import Hasher
from storage.profile import ProfileError
from tests.support import hostile_objects
from tests.support import profiles as some

SCALE = 10
"""The limits are made smaller by so much, and what exceeds them as well."""
OBJECT_BYTES = hostile_objects.ROOM_BYTES // SCALE
SMALLER = Limits(
    **{each.name: getattr(OBJECT, each.name) // SCALE for each in dataclasses.fields(Limits)}
)
MEMORY_BYTES = 68 << 20
"""What a reader may take to refuse an object of the smaller limits, and the test to make it."""

REASONS = (
    "it holds more than",
    "nested",
    "damaged",
    "unexpected bytes after the gzip",
    "end too early",
    "has no string number",
)


def limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES, used + MEMORY_BYTES))


def refusal(read: str, kind: str) -> str:
    readers = {
        "objects": lambda content: pprof_arrays.decode(content, Hasher(b"k" * 32), SMALLER),
        "heads": lambda content: pprof_head.read_head(content, SMALLER),
        "files": lambda content: pprof.decode(content, SMALLER),
    }
    try:
        readers[read](hostile_objects.KINDS[kind](OBJECT_BYTES))
    except ProfileError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def bounded_process():
    """A process of little memory that tells why it refuses an object."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=limit_memory) as pool:
        pool.submit(refusal, "objects", "gzip in gzip").result()
        yield pool


@pytest.mark.parametrize("kind", hostile_objects.KINDS)
def test_an_object_that_costs_more_than_it_weighs_is_refused(bounded_process, kind):
    """The reason says what there is too much of; no memory is taken for it first."""
    reason = bounded_process.submit(refusal, "objects", kind).result(timeout=100)

    assert any(words in reason for words in REASONS), reason
    assert "memory" not in reason


@pytest.mark.parametrize("read", ["heads", "files"])
@pytest.mark.parametrize("kind", ["empty samples", "packed comments", "a deep comment"])
def test_every_reader_of_objects_has_the_limits(bounded_process, read, kind):
    """The spool reads heads, and commands read files."""
    assert "it holds more than" in bounded_process.submit(refusal, read, kind).result(timeout=100)


@pytest.mark.parametrize("name", ["samples", "locations", "functions", "mappings", "strings"])
def test_as_many_as_the_limit_are_read_and_one_more_is_not(name):
    """Each limit is on what it names."""
    pieces = {"samples": 2, "mappings": 3, "locations": 4, "functions": 5, "strings": 6}
    content = hostile_objects.field(pieces[name], b"\x08\x01") * 100_000
    wide = dict.fromkeys(pieces, 2_000_000)

    check_parts(content, Limits(**{**wide, name: 100_000}))

    with pytest.raises(ProfileError, match=f"more than 99,999 {name}"):
        check_parts(content, Limits(**{**wide, name: 99_999}))


def test_a_large_profile_of_ours_is_within_the_limits():
    """A hundred thousand stacks of thirty frames, as on a host of many CPUs."""
    places = [some.native(some.LIBC, 0x1000 + 16 * i) for i in range(2_000)]
    rows = [({}, [places[(i * j) % 2_000] for j in range(1, 31)], 1) for i in range(1, 20_001)]
    content = pprof.encode(some.build(rows, {}))

    check_parts(decompress(content), OBJECT)
    assert pprof_arrays.decode(content, Hasher(b"k" * 32)).total_samples == 20_000


@pytest.mark.parametrize(
    ("error", "reason"), [(MemoryError, "more memory than"), (RecursionError, "nested too deeply")]
)
def test_what_exhausts_python_is_a_damaged_profile(error, reason):
    """No caller has to know Python's own errors."""
    with pytest.raises(ProfileError, match=reason), exhaustion_named():
        raise error


def damaged(content: bytearray, chance: random.Random) -> None:
    """Flip a bit of a profile, or cut, double, move or make up a piece of it."""
    at, length = chance.randrange(len(content)), chance.choice((1, 4, 100, 1000))
    piece = content[at : at + length]
    to = chance.randrange(len(content))
    match chance.randrange(5):
        case 0:
            content[at] ^= 1 << chance.randrange(8)
        case 1:
            content[at : at + length] = b"\0"
        case 2:
            content[to:to] = piece * chance.choice((1, 2, 2000 // len(piece) + 1))
        case 3:
            content[at : at + length] = chance.randbytes(len(piece))
        case _:
            content[at : at + 1] = hostile_objects.varint(chance.getrandbits(64))


def other_errors(seed: int) -> list[str]:
    """Read fifty damaged copies of a real profile; return what else than a ProfileError came."""
    chance = random.Random(seed)
    plain = decompress(pprof.encode(some.hostile_profile()))
    decode_arrays = functools.partial(pprof_arrays.decode, hasher=Hasher(b"k" * 32))
    found = []
    for number in range(50):
        content = bytearray(plain)
        for _ in range(chance.choice((1, 1, 3, 30))):
            damaged(content, chance)
        for read in (pprof.decode, pprof_head.read_head, decode_arrays):
            try:
                read(bytes(content))
            except ProfileError:
                pass
            except Exception as error:  # noqa: BLE001 - that there is none is the rule
                found.append(f"{seed}/{number}: {error!r}")
    return found


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_profile_is_read_or_refused(bounded_process, seed):
    """Bits flipped, pieces cut, doubled, moved and made up: nothing but a ProfileError comes."""
    assert bounded_process.submit(other_errors, seed).result(timeout=100) == []
