"""The child that compiles: imports bcc, loads the programs, sends their descriptors, and exits.

LLVM costs 120 to 170 MB of memory, so the sampling process never maps it. Run as
`python -m bpf.compile FD` with a clean environment (`ARCH` and others would mislead bcc), where FD
is one end of a Unix stream socket and standard input holds a Request as JSON. The answer is one
message: JSON, and the descriptors that it numbers.
"""

import contextlib
import ctypes
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from bpf.btf import Btf
from bpf.errors import BpfError, BtfError

HERE = Path(__file__).parent
MAX_PROGRAMS = 32
"""A program may call the next 33 times, on old kernels 32 (MAX_TAIL_CALL_CNT)."""
MAX_WALK_PROGRAMS = 19
"""Of these, for the native walk; the others are for interpreter frames and a copy."""

_TASK_MEMBERS = (
    "pid",
    "tgid",
    "mm",
    "comm",
    "flags",
    "group_leader",
    "start_boottime",
    "self_exec_id",
    "thread",
)

_TIMER_FUNCTION = b" perf_swevent_hrtimer\n"
"""What the timer of a cpu-clock event calls."""


def main() -> None:
    # Where memory is short, the kernel ends this process and not the one that waits for it.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    channel = socket.socket(fileno=int(sys.argv[1]))
    request = json.loads(sys.stdin.buffer.read())
    if request["nice"]:
        with contextlib.suppress(OSError):  # it may only lower its priority
            os.setpriority(os.PRIO_PROCESS, 0, request["nice"])
    try:
        answer, descriptors = _load(request)
    except BpfError as error:
        answer, descriptors = {"error": str(error)}, []
    except MemoryError:
        answer, descriptors = {"memory": True}, []
    socket.send_fds(channel, [json.dumps(answer).encode()], descriptors)


def _load(request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    try:
        # The only import of bcc: here it can cost nobody memory.
        from bcc import BPF  # noqa: PLC0415
    except ImportError as error:
        raise BpfError(
            "cannot import bcc: install the distribution's package (apt-get install"
            f" python3-bpfcc) and use its python3: {error}"
        ) from error
    types = Btf.of_kernel()
    constants: dict[str, int | str] = {}
    for prefix, struct, members in (
        ("TASK", "task_struct", _TASK_MEMBERS),
        ("MM", "mm_struct", ("start_code", "start_stack", "exe_file")),
        ("FILE", "file", ("f_inode",)),
        ("INODE", "inode", ("i_ino", "i_sb")),
        ("SUPER", "super_block", ("s_dev",)),
        ("THREAD", "thread_struct", ("fsbase",)),
    ):
        for name, offset in types.member_offsets(struct, members).items():
            constants[f"{prefix}_{name.upper()}"] = offset
    constants |= request["constants"]
    timers = _timer_constants(types)
    constants |= timers
    absent = () if timers else (*request["timer_programs"], *request["timer_maps"])
    os.chdir("/")  # bcc would find headers in the current directory before its own
    try:
        module, programs, frames = _compile(
            BPF,
            constants,
            {name: kind for name, kind in request["programs"].items() if name not in absent},
            request["frames_per_program"],
        )
        for place, name in enumerate(request["calls"]):
            module[b"programs"][ctypes.c_int(place)] = ctypes.c_int(programs[name])
        maps = {
            name: module[name.encode()].map_fd for name in request["maps"] if name not in absent
        }
    except MemoryError:
        raise
    except Exception as error:  # bcc raises plain Exception for everything
        raise BpfError(f"cannot load the BPF programs: {error}") from error
    names = [*programs, *maps]
    answer = {"descriptors": names, "frames_per_program": frames}
    return answer, [*programs.values(), *maps.values()]


def _timer_constants(types: Btf) -> dict[str, int | str]:
    """Return where the timer of an event lies, and what it calls; nothing if that is not known.

    kallsyms hides addresses without CAP_SYSLOG, and structures differ between kernels.
    """
    try:
        event = types.member_offsets("perf_event", ("hw", "prog"))
        constants: dict[str, int | str] = {
            "EVENT_TIMER": event["hw"]
            + types.member_offsets("hw_perf_event", ("hrtimer",))["hrtimer"],
            "EVENT_PROGRAM": event["prog"],
            "PROGRAM_AUX": types.member_offsets("bpf_prog", ("aux",))["aux"],
            "AUX_ID": types.member_offsets("bpf_prog_aux", ("id",))["id"],
            "HRTIMER_FUNCTION": types.member_offsets("hrtimer", ("function",))["function"],
        }
        with Path("/proc/kallsyms").open("rb") as symbols:
            for line in symbols:
                if line.endswith(_TIMER_FUNCTION) and (address := int(line[:16], 16)):
                    return constants | {"TIMER_FUNCTION": f"{address:#x}ULL"}
    except (BtfError, OSError):
        pass
    return {}


def _compile(
    bpf: Any,
    constants: dict[str, int | str],
    kinds: dict[str, str],
    choices: list[int],
) -> tuple[Any, dict[str, int], int]:
    """Compile and load; where the verifier finds a program too large, smaller ones are tried."""
    for frames in choices:
        limits = {
            "FRAMES_PER_PROGRAM": frames,
            "MAX_PROGRAMS": MAX_PROGRAMS,
            "MAX_WALK_PROGRAMS": MAX_WALK_PROGRAMS,
        }
        defined = {**constants, **limits}
        module = bpf(
            src_file=str(HERE / "sampler.bpf.c").encode(),
            cflags=[f"-I{HERE}", *(f"-D{name}={value}" for name, value in defined.items())],
        )
        try:
            programs = {
                name: module.load_func(name.encode(), getattr(bpf, kind)).fd
                for name, kind in kinds.items()
            }
        except Exception:  # the verifier's refusal is a plain Exception, as all else of bcc
            if frames == choices[-1]:
                raise
        else:
            return module, programs, frames
    raise AssertionError


if __name__ == "__main__":
    main()
