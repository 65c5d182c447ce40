"""Tracers: BPF programs of others during which the kernel skips ours.

One program of a kprobe, a tracepoint or a perf event may be active on a CPU at a time
(bpf_prog_active, in trace_call_bpf and bpf_overflow_handler): a tick that interrupts another one is
skipped. `Sampler.drain` counts these ticks; here is who may have caused them.
"""

import os
from typing import NamedTuple

from bpf import syscalls
from bpf.errors import SyscallError

_KINDS = {syscalls.PROG_TYPE_KPROBE: "kprobe", syscalls.PROG_TYPE_TRACEPOINT: "tracepoint"}


class Tracer(NamedTuple):
    """A loaded program. Its name is the first 15 bytes of what its author calls it, or empty."""

    number: int
    name: bytes
    kind: str


def find_tracers() -> list[Tracer]:
    """Return the programs of kprobes and tracepoints, of whomever.

    Raises:
        SyscallError: this process may not list programs.
    """
    found = []
    for number in syscalls.program_ids():
        try:
            fd = syscalls.program_by_id(number)
        except SyscallError:  # unloaded meanwhile
            continue
        try:
            info = syscalls.ProgramInfo(fd)
        finally:
            os.close(fd)
        if kind := _KINDS.get(info.type):
            found.append(Tracer(number, info.name, kind))
    return found
