"""Keys of objects, the interface of object stores, and their errors.

A profile is written once and never changed: `put` does nothing if the key exists, so a retry
neither loses nor duplicates anything. What must change is replaced only by whoever has seen its
last content (`replace`). Keys are paths of plain segments, sorted by their bytes.

The key of a profile says what was measured, when and where, so a window is found by listing alone:

    v1/{tenant}/l0/{type}/{hour}/{host_id}/{start_s}-{length_s}-{content16}.pb.gz

`type` is the profile's, so that profiles of other events are never listed with those of `cpu`. Keys
written until November 2026 have no `{type}/` and are of `cpu`; they are still read. `hour` is that
of the window's start (UTC, `2026-01-31T09`); hours sort as time does. Windows are at most one hour
long. `content16` is the start of the content's SHA-256: it distinguishes two profiles of one
window, and a complete file from a damaged one.
"""

import re
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from symbolizer.digest import sha256

if TYPE_CHECKING:  # the uploader needs no numpy, which is a third of its memory
    from storage.profile import Profile

NS_PER_S = 1_000_000_000
LONGEST_WINDOW_S = 3600
"""An object belongs to the hour of its start, so readers look back one hour and no further."""

LARGEST_OBJECT_BYTES = 64 * 1024 * 1024

DEFAULT_TENANT = "default"
_TENANT = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
CPU = "cpu"
"""The type of profiles of CPU time, and of those whose keys name no type."""

_KEY_LIMIT_BYTES = 1024  # S3's own limit
_SEGMENT_LIMIT_BYTES = 255  # NAME_MAX of Linux file systems


class StoreError(Exception):
    """An object store could not do what was asked.

    StoreError
    ├── StoreUnavailable
    ├── StoreRefused
    ├── ObjectMissing
    ├── ObjectTooLarge
    └── DamagedObject
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a worker process raise it: it is made again without its own constructor."""
        return _made_again, (type(self), self.args, self.__dict__)


def _made_again(
    kind: type[StoreError], arguments: tuple[Any, ...], state: dict[str, Any]
) -> StoreError:
    error = kind.__new__(kind)
    error.args = arguments
    error.__dict__.update(state)
    return error


class StoreUnavailable(StoreError):  # noqa: N818 - names what happened, as the two below do
    """The store cannot be reached, is full or is too slow now: a retry may succeed."""


class StoreRefused(StoreError):  # noqa: N818
    """The store will refuse until somebody does what `remedy` says."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem} ({remedy})")
        self.problem = problem
        self.remedy = remedy


class ObjectMissing(StoreError):  # noqa: N818
    """There is no object of this key."""


class ObjectTooLarge(StoreError):  # noqa: N818
    """The object has more bytes than its reader takes."""

    def __init__(self, key: str, limit_bytes: int = LARGEST_OBJECT_BYTES) -> None:
        super().__init__(f"{key!r} has more than {limit_bytes} bytes")


class DamagedObject(StoreError):  # noqa: N818
    """The object's content is not the one that its key names."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the object {key!r} is damaged: its content does not match its name")


class StoredObject(NamedTuple):
    key: str
    size_bytes: int
    modified_ns: int
    """When the object was written, by the store's clock; S3 rounds to seconds."""
    tag: str = ""
    """The tag of its content: see `ObjectStore.replace`."""


class ObjectStore(Protocol):
    """Objects by key. Every method may raise StoreUnavailable or StoreRefused.

    Safe to use from several threads. A key that `check_key` refuses raises ValueError.
    """

    def put(self, key: str, content: bytes) -> bool:
        """Write an object durably; return False and change nothing if the key exists."""

    def replace(self, key: str, content: bytes, tag: str | None) -> str | None:
        """Write an object durably if it still has this tag; return its new tag.

        The tag None stands for no object. Returns None and changes nothing if the object has
        another tag or, for a tag, does not exist: somebody else was first. Of several writers that
        have seen the same tag, one wins.

        A tag may stand for the content alone: to write the same content again may not change it.

        After StoreUnavailable the object may be the old or the new one, and a writer whose response
        was lost may be told None although it won: read again, and make a change that does no harm
        when it is made twice.
        """

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """Return an object's content, as `get` does, and its tag.

        Raises:
            ObjectMissing: there is no such object.
            ObjectTooLarge: it has more than LARGEST_OBJECT_BYTES.
        """

    def get(self, key: str) -> bytes:
        """Return an object's content.

        Raises:
            ObjectMissing: there is no such object.
            ObjectTooLarge: it has more than LARGEST_OBJECT_BYTES; no more than these were read.
        """

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes from byte `start`, fewer or none if the object ends before.

        Raises:
            ObjectMissing: there is no such object.
        """

    def list(self, prefix: str, start_after: str = "") -> Iterator[StoredObject]:
        """Return the objects whose keys begin with `prefix`, sorted by key, lazily.

        With `start_after` only those after that key. Servers differ in one case: SeaweedFS lists
        all of `a/` before `a-b`. If all names in a folder have the same length, it does not occur.
        """

    def delete(self, key: str) -> None:
        """Remove an object; it is not an error if there is none."""


class ObjectKey(NamedTuple):
    """Where a profile is stored. `start_s` and `length_s` are whole seconds around its window."""

    tenant: str
    host_id: str
    start_s: int
    length_s: int
    content16: str
    ending: str = "pb.gz"
    type: str = CPU
    has_type: bool = True
    """False: the text of the key has no type, as in all keys until November 2026."""

    @classmethod
    def parse(cls, text: str) -> "ObjectKey | None":
        """Return a key; None if the text is not the key of a level-0 profile."""
        match = _KEY_PATTERN.fullmatch(text)
        if match is None:
            return None
        key = cls(
            match["tenant"],
            match["host_id"],
            int(match["start_s"]),
            int(match["length_s"]),
            match["content16"],
            match["ending"],
            match["type"] or CPU,
            has_type=match["type"] is not None,
        )
        # With another hour than that of its start, the window would not be found by its time.
        is_consistent = key.length_s <= LONGEST_WINDOW_S and key.text == text
        return key if is_consistent else None

    @property
    def text(self) -> str:
        type_ = self.type if self.has_type else None
        return (
            f"{hours_prefix(self.tenant, type_)}{hour_of(self.start_s)}/{self.host_id}/"
            f"{self.start_s}-{self.length_s}-{self.content16}.{self.ending}"
        )

    @property
    def start_ns(self) -> int:
        return self.start_s * NS_PER_S

    @property
    def end_ns(self) -> int:
        return (self.start_s + self.length_s) * NS_PER_S


_TYPE = r"[a-z][a-z0-9_]{0,31}"
_KEY_PATTERN = re.compile(
    rf"v1/(?P<tenant>{_TENANT})/l0/"
    rf"(?:(?P<type>{_TYPE})/)?\d{{4}}-\d\d-\d\dT\d\d/"
    r"(?P<host_id>[0-9a-f]{16})/"
    r"(?P<start_s>\d{1,11})-(?P<length_s>\d{1,4})-(?P<content16>[0-9a-f]{16})"
    r"\.(?P<ending>pb\.gz|folded\.zst)",
    re.ASCII,
)
_HOST_ID_PATTERN = re.compile(r"[0-9a-f]{16}")
_PROVED_PATTERN = re.compile(r"-([0-9a-f]{16})\.[^/]+\Z")


def object_key(profile: "Profile", content: bytes, tenant: str) -> ObjectKey:
    """Return the key under which `content`, the encoded profile, is stored.

    A profile of several hosts, or of one without an id of 16 hex digits, gets a hash of their ids.

    Raises:
        ValueError: the window is longer than an hour.
    """
    start_s = profile.window.start_ns // NS_PER_S
    length_s = max(1, -(-profile.window.end_ns // NS_PER_S) - start_s)
    if length_s > LONGEST_WINDOW_S:
        raise ValueError(f"cannot store a window of {length_s} s: it is longer than an hour")
    host_ids = [host.host_id for host in profile.accounting.hosts]
    host_id = host_ids[0] if len(host_ids) == 1 else ""
    if not _HOST_ID_PATTERN.fullmatch(host_id):
        host_id = sha256("\0".join(host_ids).encode()).hexdigest()[:16]
    return ObjectKey(
        tenant, host_id, start_s, length_s, content16(content), type=type_in_key(profile.type)
    )


def content16(content: bytes) -> str:
    # OpenSSL, in a process that has loaded it anyway, needs a sixth of the time.
    loaded = sys.modules.get("_hashlib")
    digest: str = (sha256 if loaded is None else loaded.openssl_sha256)(content).hexdigest()
    return digest[:16]


def content16_in(key: str) -> str | None:
    """Return the content16 by which a key proves its object's content; None if it has none."""
    match = _PROVED_PATTERN.search(key)
    return None if match is None else match[1]


def type_in_key(name: str) -> str:
    """Return a profile's type as its key spells it: at most 32 of a-z, 0-9 and _, a letter first.

    Other programs' profiles may be of any type, as `alloc-space`: other characters become _.
    """
    spelled = re.sub(r"[^a-z0-9_]", "_", name)
    return (spelled if spelled[:1].isalpha() else f"type_{spelled}")[:32]


def is_tenant(name: str) -> bool:
    return re.fullmatch(_TENANT, name, re.ASCII) is not None


def is_type(name: str) -> bool:
    return re.fullmatch(_TYPE, name) is not None


def profiles_prefix(tenant: str) -> str:
    return f"v1/{tenant}/l0/"


def hours_prefix(tenant: str, type_: str | None) -> str:
    """Return what the keys of a type begin with; None: the keys that have no type."""
    return profiles_prefix(tenant) + (f"{type_}/" if type_ else "")


def hour_of(at_s: int) -> str:
    """Return the hour of a time; times before 1970 or after 9999 are in the first or last one."""
    return time.strftime("%Y-%m-%dT%H", time.gmtime(min(max(at_s, 0), 253_402_300_799)))


def check_key(key: str) -> None:
    """Check that a key is a relative path of plain segments, which every store can store.

    Raises:
        ValueError: it is not; the message names the key and the problem.
    """
    problem = problem_of(key)
    if problem:
        raise ValueError(f"cannot use the key {key!r}: {problem}")


def problem_of(key: str) -> str:
    segments = key.split("/")
    try:
        sizes = [len(segment.encode()) for segment in segments]
    except UnicodeEncodeError:
        return "it is not Unicode"
    if any(segment in {"", ".", ".."} for segment in segments):
        return "a segment is empty, . or .."
    if not key.isprintable() or "\\" in key:
        return "it has control characters or backslashes"
    if key.startswith("."):
        return "the first segment begins with a dot"
    if max(sizes) > _SEGMENT_LIMIT_BYTES or sum(sizes) + len(sizes) - 1 > _KEY_LIMIT_BYTES:
        return "it is too long"
    return ""


def check_range(start: int, length: int) -> None:
    if start < 0 or length < 1:
        raise ValueError(f"cannot read {length} bytes from byte {start} on")
