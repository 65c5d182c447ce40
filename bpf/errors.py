"""What the kernel side raises: one base class, so that a caller may catch all of it."""

import os


class BpfError(Exception):
    """Base of everything `bpf` raises on purpose.

    BpfError
    ├── PerfEventError    the kernel refused a perf event or something asked of one
    ├── SyscallError      bpf(2) refused
    ├── BtfError          the kernel's own types cannot be read, or lack a member
    └── LoadError         the BPF programs could not be compiled or loaded
    """


class PerfEventError(BpfError):
    """The kernel refused a perf event; the message names what to do about it.

    Attributes:
        errno: the system's error number, for callers to whom some refusals are expected: ENODEV is
            a CPU that went offline, ENOENT a counter this machine does not have.
    """

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class SyscallError(BpfError):
    """bpf(2) refused; `errno` says why."""

    def __init__(self, what: str, errno: int) -> None:
        super().__init__(f"cannot {what}: {os.strerror(errno)}")
        self.errno = errno


class BtfError(BpfError):
    """The kernel's own types cannot be read, or lack a member."""


class LoadError(BpfError):
    """The BPF programs could not be compiled or loaded."""
