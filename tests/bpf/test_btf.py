"""Offsets of kernel structs come from the running kernel's own types, or are refused clearly."""

import re
import struct

import pytest

from bpf.btf import VMLINUX, Btf
from bpf.errors import BtfError


@pytest.fixture(scope="module")
def kernel() -> Btf:
    return Btf.of_kernel()


def test_the_first_member_of_a_struct_is_at_offset_zero(kernel: Btf) -> None:
    """struct list_head { next, prev } is the same on every 64-bit kernel."""
    assert kernel.member_offsets("list_head", ["next", "prev"]) == {"next": 0, "prev": 8}


def test_members_inside_anonymous_unions_are_found(kernel: Btf) -> None:
    """struct page keeps `mapping` in a struct in a union, both without a name."""
    offsets = kernel.member_offsets("page", ["flags", "mapping"])

    assert offsets["flags"] == 0
    assert 0 < offsets["mapping"] <= 32


def test_members_keep_their_order_of_declaration(kernel: Btf) -> None:
    """tgid follows pid at once in include/linux/sched.h, and both are 32 bits wide."""
    offsets = kernel.member_offsets("task_struct", ["pid", "tgid"])

    assert offsets["tgid"] == offsets["pid"] + 4


def test_a_member_that_is_not_there_is_named(kernel: Btf) -> None:
    with pytest.raises(BtfError, match=re.escape("cannot find no_such_member in struct page")):
        kernel.member_offsets("page", ["no_such_member"])


def test_a_struct_that_is_not_there_is_named(kernel: Btf) -> None:
    with pytest.raises(BtfError, match="cannot find struct no_such_struct"):
        kernel.member_offsets("no_such_struct", ["x"])


@pytest.mark.parametrize("blob", [b"", b"\x7fELF" + bytes(60), struct.pack("<HBB", 0xEB9F, 1, 0)])
def test_what_is_not_btf_is_refused(blob: bytes) -> None:
    with pytest.raises(BtfError, match="cannot read kernel types"):
        Btf(blob)


def test_a_cut_blob_is_refused() -> None:
    """The types announced by the header are not all there."""
    blob = VMLINUX.read_bytes()[: 1 << 20]

    with pytest.raises(BtfError, match="cut short"):
        Btf(blob).member_offsets("task_struct", ["pid"])
