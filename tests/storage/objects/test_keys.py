"""Keys of profiles: what they say, and which texts are none."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.formats import pprof
from storage.objects.keys import DEFAULT_TENANT, NS_PER_S, ObjectKey, object_key
from storage.profile import Accounting, Host, Window
from tests.support.profiles import WINDOW, sample_profile

HOUR_S = 3600

segment = st.text("0123456789abcdef", min_size=16, max_size=16)


@given(
    st.integers(0, 99_999_999_999),
    st.integers(1, HOUR_S),
    segment,
    segment,
    st.from_regex("[a-z][a-z0-9_]{0,31}", fullmatch=True),
)
def test_a_key_is_read_back_from_its_text(
    start_s: int, length_s: int, host: str, content: str, type_: str
):
    """Also one of the layout without a type, which is of cpu."""
    key = ObjectKey("default", host, start_s, length_s, content, type=type_)
    untyped = ObjectKey("default", host, start_s, length_s, content, has_type=False)

    assert ObjectKey.parse(key.text) == key
    assert ObjectKey.parse(untyped.text) == untyped
    assert untyped.type == "cpu"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "README.md",
        "v1/default/l1/2026-05-28T20/0000000000000001/1780000200-60-0000000000000000.pb.gz",
        "v1/default/l0/2026-05-28T21/0000000000000001/1780000200-60-0000000000000000.pb.gz",
        "v1/default/l0/2026-05-28T20/0000000000000001/1780000200-3601-0000000000000000.pb.gz",
        "v1/default/l0/2026-05-28T20/0000000000000001/1780000200-060-0000000000000000.pb.gz",
        "v1/default/l0/2026-05-28T20/0000000000000001/1780000200-60-0000000000000000.exe",
        "v1/../l0/2026-05-28T20/0000000000000001/1780000200-60-0000000000000000.pb.gz",
        "v1/default/l0/CPU/2026-05-28T20/0000000000000001/1780000200-60-0000000000000000.pb.gz",
        "v1/default/l0/cpu/l0/2026-05-28T20/0000000000000001/1780000200-60-0000000000000000.pb.gz",
        "v1/default/l0/2026-05-28T20/x/1780000200-60-0000000000000000.pb.gz",
        "v1/default/l0/2026-05-28T20/0000000000000001/\u0660-60-0000000000000000.pb.gz",
    ],
)
def test_what_is_not_a_profiles_key_is_none(text: str) -> None:
    """One whose hour is not that of its start would not be found by its time."""
    assert ObjectKey.parse(text) is None


@given(st.text(max_size=40))
def test_a_profile_of_any_type_has_a_key(name: str) -> None:
    """Other programs' types may have any name; a name that can be in a key stays as it is."""
    profile = replace(sample_profile(), type=name)

    key = object_key(profile, b"", DEFAULT_TENANT)

    assert ObjectKey.parse(key.text) == key
    assert key.type == name or not re.fullmatch("[a-z][a-z0-9_]{0,31}", name)
    assert (key.type == "cpu") == (name == "cpu")


def test_the_key_of_a_profile_names_type_and_host_and_window_and_content() -> None:
    profile = sample_profile()
    content = pprof.encode(profile)

    key = object_key(profile, content, DEFAULT_TENANT)

    assert key.text.startswith("v1/default/l0/cpu/2026-05-28T20/00112233445566aa/1780000000-60-")
    assert (key.start_ns, key.end_ns) == WINDOW
    assert object_key(profile, content + b"!", DEFAULT_TENANT) != key


def test_a_window_of_parts_of_seconds_lies_within_its_keys() -> None:
    profile = replace(sample_profile(), window=Window(1_500_000_000, 2_000_000_001))

    key = object_key(profile, b"", DEFAULT_TENANT)

    assert (key.start_s, key.length_s) == (1, 2)


def test_a_window_of_more_than_an_hour_has_no_key() -> None:
    """Readers look one hour back for it, and no further."""
    profile = replace(sample_profile(), window=Window(0, HOUR_S * NS_PER_S + 1))

    with pytest.raises(ValueError, match="longer than an hour"):
        object_key(profile, b"", DEFAULT_TENANT)


@pytest.mark.parametrize("hosts", [(), (Host("a", "1"),), (Host("a", "1"), Host("b", "2"))])
def test_profiles_of_no_or_odd_or_several_hosts_have_a_key_too(hosts: tuple[Host, ...]) -> None:
    profile = replace(sample_profile(), accounting=Accounting(hosts=hosts))

    assert ObjectKey.parse(object_key(profile, b"", DEFAULT_TENANT).text) is not None
