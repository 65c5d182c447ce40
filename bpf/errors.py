"""What the kernel side raises: one base class, so that a caller may catch all of it."""


class BpfError(Exception):
    """Base of everything `bpf` raises on purpose.

    BpfError
    └── PerfEventError    the kernel refused a perf event or something asked of one
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
