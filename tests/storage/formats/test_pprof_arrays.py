"""The fast reader of our own objects, where its ways differ from those of the thorough one.

That both read the same of any profile, and of damaged ones, is tested in
`tests/storage/query/test_query.py`.
"""

import dataclasses
import itertools

import numpy as np
import pytest

from storage.formats import pprof, pprof_arrays
from storage.formats.pprof_message import ProfileMessage, decompress
from storage.formats.pprof_wire import UnusualError, numbers_at, numbers_in
from storage.hashing import Hasher
from storage.profile import Profile, Window
from symbolizer.location import Frame, Kind
from tests.support import profiles as some

HASHER = Hasher(b"k" * 32)


def fast(plain: bytes) -> Profile:
    return pprof_arrays._decode_ours(plain, HASHER).to_profile()


def test_locations_of_different_depths_keep_their_inlined_calls_in_order():
    """All first lines are read before all second ones; each location has its own all the same."""
    counts = (1, 4, 0, 2, 7, 1, 3)
    places = [some.native(some.API, 0x1040 + 16 * i) for i in range(len(counts))]
    names = {
        place: tuple(
            Frame(f"f{i}_{line}", "api", Kind.NATIVE if line == count - 1 else Kind.INLINED,
                  "api.cc", 10 + line)
            for line in range(count)
        )
        for i, (place, count) in enumerate(zip(places, counts, strict=True))
    }  # fmt: skip
    profile = some.build([({"service": "api"}, places, 3)], names)

    read = fast(decompress(pprof.encode(profile)))

    assert some.named_locations(read) == some.named_locations(profile)


def test_more_inlined_calls_than_are_read_at_once_are_left_to_the_thorough_reader():
    """So a location of a hundred thousand lines takes no more time than it should."""
    limit = pprof_arrays._LINES_LIMIT
    for lines in (limit, limit + 1):
        names = {some.WORK: (Frame("inner", "api", Kind.INLINED),) * lines}
        profile = some.build([({"service": "api"}, [some.MAIN, some.WORK], 3)], names)
        content = pprof.encode(profile)

        if lines > limit:
            with pytest.raises(UnusualError):
                fast(decompress(content))
        else:
            assert fast(decompress(content)) == profile
        read = pprof_arrays.decode(content, HASHER).to_profile()
        assert some.named_locations(read) == some.named_locations(pprof.decode(content))


def test_a_name_that_is_the_comment_is_read_as_the_thorough_reader_reads_it():
    """Comments are not among the texts of the fast reader."""
    message = ProfileMessage()
    message.ParseFromString(decompress(pprof.encode(some.sample_profile())))
    for where, field in (
        (message.function[0], "name"),
        (message.function[0], "filename"),
        (message.sample[0].label[0], "str"),
        (message.sample[0].label[0], "key"),
        (message.mapping[0], "build_id"),
    ):
        kept = getattr(where, field)
        setattr(where, field, message.comment[0])
        content = message.SerializeToString()
        setattr(where, field, kept)

        read, thorough = pprof_arrays.decode(content, HASHER).to_profile(), pprof.decode(content)

        assert read == thorough
        assert some.named_locations(read) == some.named_locations(thorough)


def test_a_stack_of_several_threads_is_there_once_however_it_is_encoded():
    """Equal bytes are one stack; a number of more bytes than it needs is left to the other."""
    rows = [({"thread": str(i)}, [some.MAIN, some.WORK], 1 + i) for i in range(3)]
    content = decompress(pprof.encode(some.build(rows, {})))

    columns = pprof_arrays.decode(content, HASHER)

    assert len(columns.rows) == 3
    assert len(columns.stack_hashes) == 1
    assert fast(content) == pprof.decode(content)
    samples = {each.SerializeToString(): each for each in parsed(content).sample}
    encoded_sample = next(each for each in samples if samples[each].value[0] == 2)
    assert encoded_sample[:2] == b"\x0a\x02"
    longer = b"\x0a\x03" + encoded_sample[2:3] + bytes([encoded_sample[3] | 0x80, 0])
    unusual = content.replace(
        bytes([0x12, len(encoded_sample)]) + encoded_sample,
        bytes([0x12, len(encoded_sample) + 1]) + longer + encoded_sample[4:],
    )
    assert len(unusual) == len(content) + 1
    with pytest.raises(UnusualError):
        fast(unusual)
    assert pprof_arrays.decode(unusual, HASHER).to_profile() == pprof.decode(content)


def test_samples_that_count_nothing_are_left_out():
    """Of our own files, only damaged ones have such."""
    message = parsed(decompress(pprof.encode(some.sample_profile())))
    message.sample[0].value[:] = [0, 0]
    content = message.SerializeToString()

    assert pprof_arrays.decode(content, HASHER).to_profile() == pprof.decode(content)


def parsed(plain: bytes) -> ProfileMessage:
    message = ProfileMessage()
    message.ParseFromString(plain)
    return message


def test_what_is_different_in_every_object_is_not_remembered():
    """A Hasher remembers texts; of a fleet's hour, 60,000 accountings would be among them."""
    hasher = Hasher(b"k" * 32)
    profile = some.sample_profile()
    minutes = [
        dataclasses.replace(profile, window=Window(start_ns, start_ns + 60))
        for start_ns in range(0, 600, 60)
    ]

    sizes = []
    for minute in minutes:
        pprof_arrays.decode(pprof.encode(minute), hasher)
        sizes.append(len(hasher._known))

    assert set(sizes) == {sizes[0]}


def test_numbers_of_one_byte_and_two_are_read_like_longer_ones():
    """They are read by shifting all bytes at once, longer ones one by one."""
    edges = [0, 1, 127, 128, 129, 255, 256, 16_382, 16_383]
    for numbers in ([*pair] for pair in itertools.product(edges, repeat=3)):
        content = np.frombuffer(b"".join(map(encoded, numbers)), np.uint8)

        found, ends = numbers_in(content)

        assert found.tolist() == numbers
        assert found.tolist() == numbers_at(content, ends).tolist()
    long = [*edges, 16_384, 2**31, 2**32, 2**63]
    assert numbers_in(np.frombuffer(b"".join(map(encoded, long)), np.uint8))[0].tolist() == long


def encoded(number: int) -> bytes:
    """Return a variable-length integer (protobuf's "Encoding")."""
    content = []
    while number >= 0x80:
        content.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*content, number])
