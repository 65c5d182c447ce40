"""The child that compiles: imports bcc, loads the programs, sends their descriptors, and exits.

LLVM costs 120 to 170 MB of memory, so the sampling process never maps it. Run as
`python -m bpf.compile FD` with a clean environment (`ARCH` and others would mislead bcc), where FD
is one end of a Unix stream socket and standard input holds a Request as JSON. The answer is one
message: JSON, and the descriptors that it numbers.
"""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from bpf.btf import Btf
from bpf.errors import BpfError

HERE = Path(__file__).parent

_TASK_MEMBERS = (
    "pid",
    "tgid",
    "mm",
    "comm",
    "flags",
    "group_leader",
    "start_boottime",
    "self_exec_id",
)


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    request = json.loads(sys.stdin.buffer.read())
    try:
        answer, descriptors = _load(request)
    except BpfError as error:
        answer, descriptors = {"error": str(error)}, []
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
    offsets = Btf.of_kernel().member_offsets("task_struct", _TASK_MEMBERS)
    constants = {f"TASK_{name.upper()}": value for name, value in offsets.items()}
    constants |= request["constants"]
    os.chdir("/")  # bcc would find headers in the current directory before its own
    try:
        module = BPF(
            src_file=str(HERE / "sampler.bpf.c").encode(),
            cflags=[f"-I{HERE}", *(f"-D{name}={value}" for name, value in constants.items())],
        )
        programs = {
            name: module.load_func(name.encode(), getattr(BPF, kind)).fd
            for name, kind in request["programs"].items()
        }
        maps = {name: module[name.encode()].map_fd for name in request["maps"]}
    except Exception as error:  # bcc raises plain Exception for everything
        raise BpfError(f"cannot load the BPF programs: {error}") from error
    names = [*programs, *maps]
    return {"descriptors": names}, [*programs.values(), *maps.values()]


if __name__ == "__main__":
    main()
