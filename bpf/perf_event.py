"""perf_event_open(2) without a library: open an event, switch it, hand it a BPF program.

Structures, names and numbers are those of the kernel's include/uapi/linux/perf_event.h on x86_64.
File descriptors are plain integers and belong to the caller.
"""

import ctypes
import errno
import fcntl
import os
import sys
import time
from pathlib import Path

from bpf.errors import PerfEventError

SYS_PERF_EVENT_OPEN = 298

PERF_TYPE_HARDWARE = 0
PERF_TYPE_SOFTWARE = 1
PERF_COUNT_HW_CPU_CYCLES = 0
PERF_COUNT_SW_CPU_CLOCK = 0
PERF_COUNT_SW_DUMMY = 9

PERF_SAMPLE_TIME = 1 << 2
PERF_FORMAT_TOTAL_TIME_ENABLED = 1 << 0
PERF_FLAG_FD_CLOEXEC = 1 << 3

PERF_EVENT_IOC_ENABLE = 0x2400
PERF_EVENT_IOC_SET_BPF = 0x40042408

_STANDSTILL_NS = 20_000_000  # longer than a jiffy, to which coarse clocks are bound

_CPUS = Path("/sys/devices/system/cpu")
_ONLINE = _CPUS / "online"
_PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Period(ctypes.Union):
    _fields_ = (("sample_period", ctypes.c_uint64), ("sample_freq", ctypes.c_uint64))


class _Wakeup(ctypes.Union):
    _fields_ = (("wakeup_events", ctypes.c_uint32), ("wakeup_watermark", ctypes.c_uint32))


class PerfEventAttr(ctypes.Structure):
    """struct perf_event_attr up to PERF_ATTR_SIZE_VER7 (kernel 5.13).

    Older kernels accept the longer structure as long as what they do not know is zero. `size` is
    filled in by `open_event`.
    """

    _anonymous_ = ("_period", "_wakeup")
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("config", ctypes.c_uint64),
        ("_period", _Period),
        ("sample_type", ctypes.c_uint64),
        ("read_format", ctypes.c_uint64),
        ("disabled", ctypes.c_uint64, 1),
        ("inherit", ctypes.c_uint64, 1),
        ("pinned", ctypes.c_uint64, 1),
        ("exclusive", ctypes.c_uint64, 1),
        ("exclude_user", ctypes.c_uint64, 1),
        ("exclude_kernel", ctypes.c_uint64, 1),
        ("exclude_hv", ctypes.c_uint64, 1),
        ("exclude_idle", ctypes.c_uint64, 1),
        ("mmap", ctypes.c_uint64, 1),
        ("comm", ctypes.c_uint64, 1),
        ("freq", ctypes.c_uint64, 1),
        ("inherit_stat", ctypes.c_uint64, 1),
        ("enable_on_exec", ctypes.c_uint64, 1),
        ("task", ctypes.c_uint64, 1),
        ("watermark", ctypes.c_uint64, 1),
        ("precise_ip", ctypes.c_uint64, 2),
        ("mmap_data", ctypes.c_uint64, 1),
        ("sample_id_all", ctypes.c_uint64, 1),
        ("exclude_host", ctypes.c_uint64, 1),
        ("exclude_guest", ctypes.c_uint64, 1),
        ("exclude_callchain_kernel", ctypes.c_uint64, 1),
        ("exclude_callchain_user", ctypes.c_uint64, 1),
        ("mmap2", ctypes.c_uint64, 1),
        ("comm_exec", ctypes.c_uint64, 1),
        ("use_clockid", ctypes.c_uint64, 1),
        ("context_switch", ctypes.c_uint64, 1),
        ("write_backward", ctypes.c_uint64, 1),
        ("namespaces", ctypes.c_uint64, 1),
        ("ksymbol", ctypes.c_uint64, 1),
        ("bpf_event", ctypes.c_uint64, 1),
        ("aux_output", ctypes.c_uint64, 1),
        ("cgroup", ctypes.c_uint64, 1),
        ("text_poke", ctypes.c_uint64, 1),
        ("build_id", ctypes.c_uint64, 1),
        ("_reserved_1", ctypes.c_uint64, 29),
        ("_wakeup", _Wakeup),
        ("bp_type", ctypes.c_uint32),
        ("config1", ctypes.c_uint64),
        ("config2", ctypes.c_uint64),
        ("branch_sample_type", ctypes.c_uint64),
        ("sample_regs_user", ctypes.c_uint64),
        ("sample_stack_user", ctypes.c_uint32),
        ("clockid", ctypes.c_int32),
        ("sample_regs_intr", ctypes.c_uint64),
        ("aux_watermark", ctypes.c_uint32),
        ("sample_max_stack", ctypes.c_uint16),
        ("_reserved_2", ctypes.c_uint16),
        ("aux_sample_size", ctypes.c_uint32),
        ("_reserved_3", ctypes.c_uint32),
        ("sig_data", ctypes.c_uint64),
    )


assert ctypes.sizeof(PerfEventAttr) == 128
assert PerfEventAttr.clockid.offset == 92  # the bit fields above it filled one word


def open_event(
    attr: PerfEventAttr,
    *,
    pid: int = -1,
    cpu: int = -1,
    group_fd: int = -1,
    flags: int = PERF_FLAG_FD_CLOEXEC,
) -> int:
    """Open a perf event and return its file descriptor, which the caller closes.

    Raises:
        PerfEventError: the kernel refused; `errno` says why, the message what to do.
    """
    attr.size = ctypes.sizeof(attr)
    fd = _libc.syscall(
        ctypes.c_long(SYS_PERF_EVENT_OPEN),
        ctypes.byref(attr),
        ctypes.c_int(pid),
        ctypes.c_int(cpu),
        ctypes.c_int(group_fd),
        ctypes.c_ulong(flags),
    )
    if fd < 0:
        number = ctypes.get_errno()
        target = f"CPU {cpu}" if pid == -1 else f"process {pid}"
        raise PerfEventError(f"cannot attach to {target}: {_explain(number)}", number)
    return int(fd)


def enable(fd: int) -> None:
    _control(fd, "enable", PERF_EVENT_IOC_ENABLE, 0)


def set_bpf(fd: int, prog_fd: int) -> None:
    """Run a BPF program of type PERF_EVENT at every overflow of the event."""
    _control(fd, "attach the BPF program to", PERF_EVENT_IOC_SET_BPF, prog_fd)


def enabled_ns(fd: int) -> int:
    """Return for how long the event has been enabled, if it was opened by one of the attrs below.

    An event whose CPU went offline stops for good, also when the CPU comes back, and nothing else
    shows it (kernel 6.18): a time that stands still means that the event must be opened again.
    """
    try:
        count_and_time = os.read(fd, 16)
    except OSError as error:
        number = error.errno or 0
        raise PerfEventError(f"cannot read perf event {fd}: {_explain(number)}", number) from error
    return int.from_bytes(count_and_time[8:16], sys.byteorder)


def online_id(cpu: int) -> int:
    """Return a number that changes whenever the CPU comes online; 0 if it cannot be known.

    The kernel makes the CPU's `topology` folder in sysfs anew each time (topology_add_dev), with an
    inode that was not used before. Nothing is asked of the CPU itself, unlike by `has_stopped`.
    """
    try:
        return (_CPUS / f"cpu{cpu}" / "topology").stat().st_ino
    except OSError:
        return 0


def has_gone(fd: int, cpu: int, opened_id: int) -> bool:
    """Return whether the CPU was offline since its event was opened, when `online_id` was this.

    The event itself is read only if sysfs is missing: that interrupts the CPU, and so wakes it.
    """
    return online_id(cpu) != opened_id if opened_id else has_stopped(fd)


def has_stopped(fd: int) -> bool:
    """Return whether the event is dead, its CPU having been offline since it was opened.

    Each reading interrupts the event's CPU (smp_call_function_single in perf_event_read).
    """
    first_ns = enabled_ns(fd)
    give_up_ns = time.monotonic_ns() + _STANDSTILL_NS
    while enabled_ns(fd) == first_ns:
        if time.monotonic_ns() > give_up_ns:
            return True
    return False


def online_cpus() -> tuple[int, ...]:
    return parse_cpus(_ONLINE.read_text())


def parse_cpus(text: str) -> tuple[int, ...]:
    """Parse the kernel's list format: `0-3,8` is CPUs 0, 1, 2, 3 and 8."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus.extend(range(int(first), int(last or first) + 1))
    return tuple(cpus)


def sampling_attr(frequency_hz: int, hardware: bool) -> PerfEventAttr:
    """Describe an event that overflows `frequency_hz` times a second on a busy CPU.

    It starts disabled and writes no records: a BPF program does the counting. With `hardware` it
    is the cycle counter, which many virtual machines lack (ENOENT); otherwise the cpu-clock timer.
    """
    attr = PerfEventAttr()
    attr.type = PERF_TYPE_HARDWARE if hardware else PERF_TYPE_SOFTWARE
    attr.config = PERF_COUNT_HW_CPU_CYCLES if hardware else PERF_COUNT_SW_CPU_CLOCK
    attr.read_format = PERF_FORMAT_TOTAL_TIME_ENABLED
    attr.sample_freq = frequency_hz
    attr.freq = 1
    attr.disabled = 1
    return attr


def lifecycle_attr(wakeup_bytes: int) -> PerfEventAttr:
    """Describe an event whose ring says which processes fork, exec, map and exit.

    And which code the kernel makes at run time, as BPF programs.

    The time (CLOCK_MONOTONIC ns) is the last 8 bytes of each record, for sample_id_all appends the
    fields of `sample_type` and TIME is the only one. `wakeup_bytes` unread bytes make the file
    descriptor readable.
    """
    attr = PerfEventAttr()
    attr.type = PERF_TYPE_SOFTWARE
    attr.config = PERF_COUNT_SW_DUMMY
    attr.sample_type = PERF_SAMPLE_TIME
    attr.read_format = PERF_FORMAT_TOTAL_TIME_ENABLED
    attr.disabled = 1
    names = ("mmap", "mmap2", "comm", "comm_exec", "task", "build_id", "ksymbol", "sample_id_all")
    for name in names:
        setattr(attr, name, 1)
    attr.use_clockid = 1
    attr.clockid = time.CLOCK_MONOTONIC
    attr.watermark = 1
    attr.wakeup_watermark = wakeup_bytes
    return attr


def _control(fd: int, verb: str, request: int, argument: int) -> None:
    try:
        fcntl.ioctl(fd, request, argument)
    except OSError as error:
        number = error.errno or 0
        raise PerfEventError(
            f"cannot {verb} perf event {fd}: {_explain(number)}", number
        ) from error


def _explain(number: int) -> str:
    if number in (errno.EACCES, errno.EPERM):
        try:
            level = _PARANOID.read_text().strip()
        except OSError:
            return "this kernel was built without perf events"
        return f"perf_event_paranoid is {level} (run as root, or set it to -1)"
    reasons = {
        errno.ENODEV: "it is offline (open it again when it is back)",
        errno.ENOENT: "this machine has no such counter (use the cpu-clock)",
        errno.EOPNOTSUPP: "this machine has no such counter (use the cpu-clock)",
        errno.ESRCH: "it has exited",
        errno.EMFILE: "too many open files (raise RLIMIT_NOFILE)",
        errno.EINVAL: "there is no such CPU, or this kernel is too old (5.13 or later is needed)",
        errno.E2BIG: "this kernel does not know an option asked for (5.13 or later is needed)",
        errno.ENOSYS: "this kernel was built without perf events",
    }
    return reasons.get(number, os.strerror(number))
