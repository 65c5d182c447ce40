"""The head of an encoded profile: its accounting and unit, without its stacks, the costly part."""

from typing import Any, NamedTuple

from google.protobuf import message

from storage.formats.limits import OBJECT, Limits, exhaustion_named
from storage.formats.pprof_comments import Ours, read_comments
from storage.formats.pprof_message import check_parts, decompress, message_class
from storage.profile import ProfileError
from symbolizer.text import readable

_Message: Any = message_class(
    "everflame.head", unread=frozenset({"Sample", "Mapping", "Location", "Function"})
)
"""protobuf makes this class at run time, so it has no type."""


class Head(NamedTuple):
    ours: Ours | None
    """The content of our comments; None in a profile of another program."""
    unit: str
    """What a sample's value counts; empty if the profile does not say."""


def read_head(content: bytes, limits: Limits = OBJECT) -> Head:
    """Return the head of a profile.

    Raises:
        ProfileError: it is damaged, or exceeds a limit.
        SchemaError: a later version of this program wrote it.
    """
    with exhaustion_named():
        return _read_head(content, limits)


def _read_head(content: bytes, limits: Limits) -> Head:
    parsed = _Message()
    plain = decompress(content, limits)
    check_parts(plain, limits)
    try:
        parsed.ParseFromString(plain)
    except message.DecodeError:
        raise ProfileError("it is damaged") from None
    strings = parsed.string_table
    ours = read_comments(strings[i] for i in parsed.comment if 0 < i < len(strings))
    unit = parsed.period_type.unit
    return Head(ours, readable(strings[unit]) if 0 < unit < len(strings) else "")
