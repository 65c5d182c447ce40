"""`everflame doctor`: check whether this host can be profiled, and how to fix what is missing.

Every check tries the thing itself where that is possible: it loads a program, opens an event,
imports bcc. Only `fail` stops the sampler; `warn` costs names, accuracy or speed.

The module is long because it is a list: one short function for each check, in the order of output.
"""

import argparse
import ctypes
import errno
import json
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from bpf import perf_event, syscalls
from bpf.btf import VMLINUX, Btf
from bpf.errors import BpfError, LoadError, PerfEventError, SyscallError
from bpf.records import RING_PAGES
from bpf.sampler import Sampler, SamplerConfig
from bpf.samples import MAX_NATIVE_WORDS
from bpf.tracers import find_tracers
from profiler.commands import arguments
from profiler.commands.pin import kept_by
from profiler.processes.generations import clock_offsets
from profiler.text import counted, listed
from storage.objects.keys import ObjectStore, StoreError, StoreRefused
from storage.objects.open import open_tenant
from storage.objects.pins import Pins
from storage.objects.tenant import TenantStore
from symbolizer.text import readable

SCHEMA = 1

_OLDEST_KERNEL = (5, 15)
_BEFORE_THIS_PROGRAM_S = 1_767_225_600
"""2026-01-01: a clock that shows an earlier time was never set."""
_SLOW_CLOCKSOURCES = {"acpi_pm", "hpet", "jiffies", "pit"}
"""A read takes a microsecond or more, and several are taken per sample and window."""
_STEAL_WARN_SHARE = 0.05
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO in the kernel's include/linux/proc_ns.h
_BCC_IMPORT_TIMEOUT_S = 600
"""It takes a second; beside a load of 20 on two CPUs it took more than a minute."""
_CLOCK_SKEW_WARN_S = 30

_NAMED = 5
"""So many programs of others are named."""

_GIVE_RIGHTS = "run as root, or give CAP_BPF and CAP_PERFMON"


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """The result of a check. `remedy` is empty if there is nothing to fix."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n  sudo everflame doctor\n  everflame doctor --store s3://profiles/prod\n\n"
        "The store is checked when --store or EVERFLAME_STORE names one."
    )
    arguments.add_json(parser)
    arguments.add_store(parser)


def run(options: argparse.Namespace) -> int:
    store = options.store or os.environ.get("EVERFLAME_STORE")
    return main(options.json, store, options.s3_endpoint or None, options.tenant)


def main(
    as_json: bool, store: str | None = None, endpoint: str | None = None, tenant: str = ""
) -> int:
    """Print every check to stdout and return the exit status: 1 when one of them failed.

    With `store`, the URL of an object store, that is checked too.
    """
    checks = run_checks()
    if store is not None:
        checks += store_checks(store, endpoint, tenant)
    print(format_json(checks) if as_json else format_table(checks))
    return 0 if _is_fit(checks) else 1


def run_checks() -> list[Check]:
    """Run every check, in the order in which the sampler needs what they try."""
    checks: tuple[Callable[[], Check], ...] = (
        check_kernel,
        check_architecture,
        check_btf,
        check_capabilities,
        check_bpf,
        check_jit,
        check_bcc,
        check_programs,
        check_tracers,
        check_perf_event,
        check_cycles,
        check_rings,
        check_pid_namespace,
        check_time_namespace,
        check_kallsyms,
        check_cppfilt,
        check_clock,
        check_steal,
    )
    return [_run(check) for check in checks]


def format_json(checks: Iterable[Check]) -> str:
    checks = list(checks)
    report = {"schema": SCHEMA, "ok": _is_fit(checks), "checks": [asdict(c) for c in checks]}
    return json.dumps(report, ensure_ascii=False)


def format_table(checks: Sequence[Check]) -> str:
    """Return one line for each check, and the remedy below it if it did not pass."""
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{check.status:4}  {check.name:{width}}  {check.detail}")
        if check.remedy:
            lines.append(f"{'':4}  {'':{width}}  -> {check.remedy}")
    failed = [check.name for check in checks if check.status is Status.FAIL]
    lines.append(
        f"This machine cannot be profiled yet: {', '.join(failed)}."
        if failed
        else "This machine can be profiled."
    )
    return "\n".join(lines)


def check_kernel() -> Check:
    release = platform.release()
    version = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    if version >= _OLDEST_KERNEL:
        return Check("kernel", Status.OK, release)
    oldest = ".".join(map(str, _OLDEST_KERNEL))
    return Check("kernel", Status.FAIL, f"{release} is too old", f"boot {oldest} or newer")


def check_architecture() -> Check:
    machine = platform.machine()
    if machine == "x86_64":
        return Check("architecture", Status.OK, machine)
    return Check(
        "architecture", Status.FAIL, f"{machine} is not supported", "use a machine of x86_64"
    )


def check_btf() -> Check:
    """Read the kernel's types: the programs take the offsets of struct members from there."""
    try:
        Btf.of_kernel()
    except BpfError as error:
        return Check(
            "btf",
            Status.FAIL,
            str(error),
            "boot a kernel with CONFIG_DEBUG_INFO_BTF=y; in a container mount /sys",
        )
    return Check("btf", Status.OK, str(VMLINUX))


class _Capability(NamedTuple):
    name: str
    number: int
    cost: str
    is_needed: bool = False
    superset: int | None = None
    """The number of another capability that is as good."""


_DAC_OVERRIDE, _IPC_LOCK, _SYS_ADMIN = 1, 14, 21
_CAPABILITIES = (
    _Capability("CAP_BPF", 39, "programs cannot be loaded", True, _SYS_ADMIN),
    _Capability("CAP_PERFMON", 38, "CPUs cannot be sampled", True, _SYS_ADMIN),
    _Capability("CAP_SYS_PTRACE", 19, "processes of other users stay without names"),
    _Capability("CAP_DAC_READ_SEARCH", 2, "files of others give no names", False, _DAC_OVERRIDE),
    _Capability("CAP_SYSLOG", 34, "kernel functions stay without names"),
    _Capability(
        "CAP_CHECKPOINT_RESTORE", 40, "deleted executables give no names", False, _SYS_ADMIN
    ),
)
"""What the agent uses and what is lost without it (capabilities(7))."""


def check_capabilities() -> Check:
    missing = [
        capability
        for capability in _CAPABILITIES
        if not (_has_capability(capability.number) or _has_capability(capability.superset))
    ]
    if not missing:
        return Check("capabilities", Status.OK, f"all {len(_CAPABILITIES)} that are used")
    status = Status.FAIL if any(c.is_needed for c in missing) else Status.WARN
    detail = "; ".join(f"no {c.name}: {c.cost}" for c in missing)
    return Check(
        "capabilities", status, detail, f"run as root, or give {' '.join(c.name for c in missing)}"
    )


def check_bpf() -> Check:
    """Create a map and load the shortest program there is: `r0 = 0; exit`."""
    instructions = bytes.fromhex("b7000000000000009500000000000000")
    try:
        os.close(syscalls.create_map(syscalls.MAP_TYPE_ARRAY, 4, 8, 1))
        os.close(syscalls.load_program(instructions))
    except BpfError as error:
        return Check("bpf", Status.FAIL, str(error), _GIVE_RIGHTS)
    return Check("bpf", Status.OK, "a map was created and a program loaded")


def check_jit() -> Check:
    setting = Path("/proc/sys/net/core/bpf_jit_enable")
    try:
        is_on = setting.read_text().strip() != "0"
    except FileNotFoundError:
        return Check("jit", Status.OK, "always on, or not told to this network namespace")
    except PermissionError:
        return Check(
            "jit", Status.WARN, f"{setting} is readable by root only", "run doctor as root"
        )
    if is_on:
        return Check("jit", Status.OK, "on")
    return Check(
        "jit",
        Status.WARN,
        "off: a sample costs several times as much",
        "sysctl net.core.bpf_jit_enable=1",
    )


# In a child: LLVM, once mapped, would stay. A child as the sampler's own, see bpf/sampler.py.
_IMPORT_BCC = "import bcc; print(bcc.__file__); print(getattr(bcc, 'BPF', '') and bcc.__version__)"


def check_bcc(python: str = sys.executable) -> Check:
    """Import bcc with the interpreter that is to compile, and see that it is the real one."""
    child = subprocess.run(
        [python, "-c", _IMPORT_BCC],
        env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=_BCC_IMPORT_TIMEOUT_S,
        check=False,
    )
    file, _, bcc_version = child.stdout.strip().partition("\n")
    if child.returncode == 0 and bcc_version:
        return Check("bcc", Status.OK, f"{bcc_version} in {Path(file).parent}")
    if file:
        return Check(
            "bcc",
            Status.FAIL,
            f"{file} is another program of the same name (PyPI's bcc)",
            f"{python} -m pip uninstall bcc; apt-get install python3-bpfcc",
        )
    reason = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
    return Check(
        "bcc",
        Status.FAIL,
        f"{python} cannot import it: {reason}",
        "apt-get install python3-bpfcc, and use a virtual environment of the distribution's"
        " python3 with --system-site-packages (./quickstart makes one)",
    )


def check_programs() -> Check:
    """Compile and load the sampler's real programs, and throw them away again."""
    start = time.monotonic()
    try:
        with Sampler(SamplerConfig()) as sampler:
            depth = sampler.deepest_stack
    except LoadError as error:
        return Check("programs", Status.FAIL, str(error), "fix what failed above first")
    except BpfError as error:
        return Check("programs", Status.FAIL, str(error), _GIVE_RIGHTS)
    detail = f"compiled and loaded in {time.monotonic() - start:.1f} s"
    if depth < MAX_NATIVE_WORDS:
        detail += f"; this kernel's verifier accepts small ones only, for stacks of {depth} frames"
        return Check("programs", Status.WARN, detail, "none is needed; a newer kernel accepts more")
    return Check("programs", Status.OK, f"{detail}, for stacks of up to {depth} frames")


def check_tracers() -> Check:
    """Look for programs during which the kernel skips ours: one may be active on a CPU at a time.

    That holds for kprobes and tracepoints (bpf_prog_active in trace_call_bpf); a name is the first
    15 characters of what its author calls it.
    """
    found = [
        f"{readable(each.name) or f'program {each.number}'} ({each.kind})"
        for each in find_tracers()
    ]
    if not found:
        return Check("tracers", Status.OK, "no programs of kprobes or tracepoints")
    return Check(
        "tracers",
        Status.WARN,
        f"ticks are skipped while these BPF programs run: {listed(found, _NAMED)}",
        "none is needed for a few percent; stop the tracer to count every tick",
    )


def check_perf_event() -> Check:
    try:
        _open_on_first_cpu(hardware=False)
    except PerfEventError as error:
        return Check("perf_event", Status.FAIL, str(error), _GIVE_RIGHTS)
    return Check("perf_event", Status.OK, "the cpu-clock ticks")


def check_cycles() -> Check:
    try:
        _open_on_first_cpu(hardware=True)
    except PerfEventError as error:
        is_refused = error.errno in (errno.EACCES, errno.EPERM)
        remedy = "none is needed without --hardware (a virtual machine needs a virtual PMU)"
        return Check("cycles", Status.WARN, str(error), _GIVE_RIGHTS if is_refused else remedy)
    return Check("cycles", Status.OK, "the cycle counter can be sampled (--hardware)")


def check_rings() -> Check:
    """Compare what may be locked for the rings that tell of new processes with what they take."""
    wanted_kb = (1 + RING_PAGES) * mmap.PAGESIZE // 1024
    allowed_kb = int(Path("/proc/sys/kernel/perf_event_mlock_kb").read_text())
    if allowed_kb >= wanted_kb or _has_capability(_IPC_LOCK):
        return Check("rings", Status.OK, f"{wanted_kb} KB a CPU may be locked")
    return Check(
        "rings",
        Status.WARN,
        f"only {allowed_kb} of {wanted_kb} KB a CPU may be locked: short processes lose names",
        f"sysctl kernel.perf_event_mlock_kb={wanted_kb}, or give CAP_IPC_LOCK",
    )


def check_pid_namespace() -> Check:
    """See that pids mean here what they mean to the kernel, whose numbers the samples carry."""
    if Path("/proc/self/ns/pid").stat().st_ino == _INITIAL_PID_NAMESPACE:
        return Check("pid_namespace", Status.OK, "the host's")
    return Check(
        "pid_namespace",
        Status.FAIL,
        "this is a container's: the processes of samples cannot be found",
        "docker run --pid=host; in Kubernetes hostPID: true",
    )


def check_time_namespace() -> Check:
    """See that times mean here what they mean to the kernel, whose times the samples carry."""
    if not (offsets := clock_offsets()):
        return Check("time_namespace", Status.OK, "the host's, or one with the same clocks")
    differ = " and ".join(f"{name} differs by {seconds} s" for name, seconds in offsets.items())
    return Check(
        "time_namespace",
        Status.FAIL,
        f"{differ}: the processes of samples cannot be found",
        "start the profiler outside the time namespace",
    )


def check_kallsyms() -> Check:
    # Per-CPU symbols have the address 0 on some kernels, so one line tells nothing.
    with Path("/proc/kallsyms").open(encoding="ascii", errors="replace") as lines:
        if any(line.split(" ", 1)[0].strip("0") for line in lines):
            return Check("kallsyms", Status.OK, "kernel addresses are visible")
    restriction = Path("/proc/sys/kernel/kptr_restrict").read_text().strip()
    return Check(
        "kallsyms",
        Status.WARN,
        f"addresses are hidden (kptr_restrict is {restriction}): kernel functions have no names",
        "give CAP_SYSLOG" + ("; sysctl kernel.kptr_restrict=1" if restriction == "2" else ""),
    )


def check_cppfilt() -> Check:
    path = shutil.which("c++filt")
    if path:
        return Check("cppfilt", Status.OK, path)
    return Check(
        "cppfilt",
        Status.WARN,
        "c++filt not found: C++ and Rust names stay mangled",
        "apt-get install binutils",
    )


def check_clock() -> Check:
    """Judge the clock that windows are cut by, and the one behind every time stamp."""
    source = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    name = source.read_text().strip() if source.exists() else "unknown"
    now_s = time.time()
    if now_s < _BEFORE_THIS_PROGRAM_S:
        shown = time.strftime("%Y-%m-%d", time.gmtime(now_s))
        return Check(
            "clock", Status.FAIL, f"it shows {shown}, which is too early", "set the time (chrony)"
        )
    if name in _SLOW_CLOCKSOURCES:
        return Check(
            "clock",
            Status.WARN,
            f"the clocksource {name} is slow",
            "see `dmesg | grep clocksource` for why the kernel gave up tsc",
        )
    if not _is_synchronized():
        return Check(
            "clock",
            Status.WARN,
            f"clocksource {name}; not synchronized: windows of hosts may not line up",
            "run a time service (apt-get install chrony)",
        )
    return Check("clock", Status.OK, f"clocksource {name}, synchronized")


def check_steal() -> Check:
    """Return how much CPU time since boot the hypervisor gave to others (proc_stat(5))."""
    times = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    share = times[7] / max(sum(times), 1)
    detail = f"{share:.1%} of the CPU time since boot went to other machines"
    if share < _STEAL_WARN_SHARE:
        return Check("steal", Status.OK, detail)
    return Check(
        "steal",
        Status.WARN,
        f"{detail}: stolen time is sampled as if it had been used",
        "move to a less crowded host, or compare shares and not costs",
    )


def store_checks(url: str, endpoint: str | None = None, tenant: str = "") -> list[Check]:
    """Try an object store with a small object, which is deleted again, and the tenant's pins.

    The checks end with the first that fails, because the later ones need what it tried.
    """
    checks: list[Check] = []
    try:
        store = open_tenant(url, endpoint, tenant)
        checks.extend(_try_store(store.store))  # keeps those given before one raises
        checks.append(_judge_pins(store))
    except StoreRefused as error:
        name = _STORE_CHECKS[len(checks)]
        checks.append(Check(name, Status.FAIL, error.problem, error.remedy))
    except StoreError as error:
        remedy = "check that the store runs, has room and can be reached, then run doctor again"
        checks.append(Check(_STORE_CHECKS[len(checks)], Status.FAIL, str(error), remedy))
    return checks


_STORE_CHECKS = (
    "store",
    "store_write",
    "store_conditional",
    "store_replace",
    "store_clock",
    "store_pins",
)


def _try_store(store: ObjectStore) -> Iterator[Check]:
    folder = "v1/.doctor/"
    probe = f"{folder}{os.getpid()}-{os.urandom(8).hex()}"
    next(store.list(folder), None)
    yield Check("store", Status.OK, f"{store} can be read")
    before_ns = time.time_ns()
    try:
        store.put(probe, b"probe")
        yield Check("store_write", Status.OK, "an object was written")
        yield _judge_second_put(is_new=store.put(probe, b"another"))
        modified_ns = next(store.list(probe)).modified_ns
        ahead_s = (modified_ns - (before_ns + time.time_ns()) // 2) / 1e9
        yield _try_replacement(store, probe)
        yield _judge_store_clock(ahead_s)
    finally:
        left = _delete(store, probe)
    if left is not None:
        yield left


def _delete(store: ObjectStore, probe: str) -> Check | None:
    """Delete the object again; return a warning if that fails, as agents need no such right."""
    try:
        store.delete(probe)
    except StoreError as error:
        problem = error.problem if isinstance(error, StoreRefused) else str(error)
        remedy = f"delete {probe}; in a bucket, only lifecycle rules have to delete"
        return Check("store_delete", Status.WARN, problem, remedy)
    return None


def _judge_second_put(*, is_new: bool) -> Check:
    if not is_new:
        return Check("store_conditional", Status.OK, "an existing object is not replaced")
    return Check(
        "store_conditional",
        Status.FAIL,
        "it replaces existing objects: a retry could count a window twice",
        "use a server that knows If-None-Match (Amazon's, MinIO, SeaweedFS 4, Ceph 19 do)",
    )


def _try_replacement(store: ObjectStore, probe: str) -> Check:
    """Replace the object twice, the second time as somebody who has not seen the first.

    Only `everflame compact` needs that, so its lack is a warning.
    """
    name = "store_replace"
    try:
        _, tag = store.get_tagged(probe)
        is_replaced = store.replace(probe, b"changed", tag) is not None
        is_overwritten = store.replace(probe, b"too late", tag) is not None
    except StoreRefused as error:
        problem = f"everflame compact cannot work here: {error.problem}"
        return Check(name, Status.WARN, problem, error.remedy)
    if is_replaced and not is_overwritten:
        return Check(name, Status.OK, "an object is replaced only by who has seen its last content")
    return Check(
        name,
        Status.WARN,
        "everflame compact cannot work here: "
        + ("changes made at the same time are lost" if is_replaced else "nothing can be replaced"),
        "use a server that knows If-Match (Amazon's, MinIO and SeaweedFS 4 do)",
    )


def _judge_pins(store: TenantStore) -> Check:
    """Judge whether what is pinned is still there: a bucket's lifecycle rules ignore pins."""
    name = "store_pins"
    pins = list(Pins(store.store, store.tenant).every())
    damaged = [pin for pin in pins if pin.problem]
    past = [pin for pin in pins if pin.end_ns < time.time_ns()]
    empty = [pin.name for pin in past if kept_by(store, pin).is_empty]
    if damaged:
        return Check(
            name,
            Status.WARN,
            f"the pin {damaged[0].key} cannot be read: {damaged[0].problem}",
            "its window is kept all the same; remove it by this key, and pin the window again",
        )
    if empty:
        return Check(
            name,
            Status.WARN,
            f"nothing is left of what is pinned as {', '.join(empty)}",
            "look for lifecycle rules of the bucket and for agents of older versions, which ignore"
            " pins; everflame pin --remove removes the pin",
        )
    windows = counted(len(pins), "window")
    return Check(name, Status.OK, f"{windows} pinned in {store}" if pins else "nothing is pinned")


def _judge_store_clock(ahead_s: float) -> Check:
    """Judge the difference of the clocks; the store's own time stamps may be whole seconds."""
    if abs(ahead_s) <= _CLOCK_SKEW_WARN_S:
        return Check("store_clock", Status.OK, f"within {_CLOCK_SKEW_WARN_S} s of this machine's")
    side = "ahead of" if ahead_s > 0 else "behind"
    return Check(
        "store_clock",
        Status.WARN,
        f"{abs(ahead_s):.0f} s {side} this machine's: S3 refuses requests from 15 minutes on",
        "set the time of the one that is wrong (chrony)",
    )


def _run(check: Callable[[], Check]) -> Check:
    """Run one check; a file that cannot be read fails that check and not the others."""
    name = check.__name__.removeprefix("check_")
    try:
        return check()
    except SyscallError as error:
        return Check(name, Status.WARN, f"cannot be checked: {error}", _GIVE_RIGHTS)
    except (OSError, subprocess.SubprocessError) as error:
        return Check(name, Status.FAIL, f"cannot be checked: {error}", "mount /proc and /sys")


def _is_fit(checks: Iterable[Check]) -> bool:
    return all(check.status is not Status.FAIL for check in checks)


def _has_capability(number: int | None) -> bool:
    """Return whether it is effective (CapEff in proc_pid_status(5)); no number is no capability."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:")[2].split(maxsplit=1)[0], 16)
    return number is not None and bool(effective >> number & 1)


def _open_on_first_cpu(*, hardware: bool) -> None:
    attr = perf_event.sampling_attr(99, hardware)
    os.close(perf_event.open_event(attr, cpu=perf_event.online_cpus()[0]))


class _Timex(ctypes.Structure):
    """struct timex; only `modes` is set, to 0: read and change nothing (adjtimex(2))."""

    _fields_ = (("modes", ctypes.c_uint), ("rest", ctypes.c_long * 31))


def _is_synchronized() -> bool:
    time_error = 5  # TIME_ERROR: nobody keeps the clock
    return int(ctypes.CDLL(None).adjtimex(ctypes.byref(_Timex()))) != time_error
