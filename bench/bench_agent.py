"""What the agent costs for ever: ten programs on both CPUs, or nothing; 60 s windows.

The sampler and the uploader are watched from outside, after the first 20 s and over whole windows.
PSS shares out what the two processes have in common. Bytes per core and day are what two full
windows took in the store, times the windows of a day, over the CPUs. Those of the other profilers
that are installed (perf; bcc's profile, which Debian has in bpfcc-tools) run beside it, so that all
see the same host. Of perf only the process is seen: what it does at a tick is counted nowhere.

Run as root: `python bench/bench_agent.py [--windows 2] [--load none]`.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench_cost import START_UP_S, Reading, cpu_seconds, find_program, read
from load import ten_programs
from serving import EVERFLAME, all_pids, pss_mb, rss_mb, show

from bpf import syscalls
from storage.formats import pprof
from storage.profile import Accounting

WINDOW_S = 60
LOADS = {"programs": ten_programs, "none": contextlib.nullcontext}
PEERS_START_S = 5.0
PEERS = {
    "perf record": ("perf", "record", "-F", "99", "-a", "-g", "-o", "/dev/null"),
    "bcc's profile": ("profile-bpfcc", "-F", "99", "-a", "-f"),
}


def child_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    names = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return next(child for child, name in names.items() if b"profiler.agent.uploader" in name)


def read_both(agent: int, uploader: int, program: int) -> tuple[Reading, Reading]:
    """Read the sampler with its readers, and the uploader."""
    own = set(all_pids(agent)) - set(all_pids(uploader))
    return read(own, program), read([uploader], program)


@contextlib.contextmanager
def peers() -> Iterator[dict[str, int]]:
    """Run the other profilers; yield the pid of each."""
    started = {
        name: subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name, command in PEERS.items()
        if shutil.which(command[0])
    }
    try:
        time.sleep(PEERS_START_S)
        for name in [name for name, process in started.items() if process.poll() is not None]:
            print(f"{name} cannot run here")
            del started[name]
        yield {name: process.pid for name, process in started.items()}
    finally:
        for process in started.values():
            process.send_signal(signal.SIGINT)
            process.wait()


def peer_cpu_s(name: str, pid: int) -> float:
    """Return the CPU time of a peer so far, its BPF program's included."""
    cpu_s = cpu_seconds([pid])
    if name == "bcc's profile":
        program = find_program(pid)
        cpu_s += syscalls.ProgramInfo(program).run_time_ns / 1e9
        os.close(program)
    return cpu_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--load", choices=LOADS, default="programs")
    options = parser.parse_args()
    windows, load = options.windows, LOADS[options.load]
    with (
        tempfile.TemporaryDirectory() as name,
        load(),
        syscalls.run_time_stats(),
        peers() as others,
    ):
        folder = Path(name)
        environment = {**os.environ, "EVERFLAME_RUN": str(folder / "run")}
        command = [EVERFLAME, "agent", f"--store={folder / 'store'}", f"--spool={folder / 'spool'}"]
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as agent:
            try:
                program = find_program(agent.pid)
                time.sleep(START_UP_S)
                uploader = child_of(agent.pid)
                of_peers = {peer: -peer_cpu_s(peer, pid) for peer, pid in others.items()}
                first, first_other = read_both(agent.pid, uploader, program)
                time.sleep(windows * WINDOW_S)
                last, last_other = read_both(agent.pid, uploader, program)
                for peer, pid in others.items():
                    of_peers[peer] += peer_cpu_s(peer, pid)
                rss, peak = rss_mb(agent.pid), rss_mb(agent.pid, "VmHWM")
                pss = sum(map(pss_mb, all_pids(agent.pid)))
            finally:
                agent.terminate()
                agent.wait()
        os.close(program)
        files = sorted((folder / "store").rglob("*.pb.gz"))
        full = [path for path in files if f"-{WINDOW_S}-" in path.name]
        sizes = [path.stat().st_size for path in full]
        counts = Accounting()
        for path in files:
            counts = counts.merge(pprof.decode(path.read_bytes()).accounting)
    span = last.at_s - first.at_s
    own = 100 * (last.cpu_s - first.cpu_s) / span
    other = 100 * (last_other.cpu_s - first_other.cpu_s) / span
    bpf = 100 * (last.bpf_s - first.bpf_s) / span
    mean_size = sum(sizes) / max(1, len(sizes))  # one window is never whole
    rows = [
        ("steady CPU, sampler and readers", own, "% of one CPU", None),
        ("steady CPU, uploader", other, "% of one CPU", None),
        ("steady CPU, BPF", bpf, "% of one CPU", None),
        ("steady CPU in all", own + other + bpf, "% of one CPU", 1.0),
        ("sampler, RSS", rss, "MB", 50.0),
        ("sampler, peak RSS", peak, "MB", None),
        ("all processes, PSS", pss, "MB", 100.0),
        ("an object of a minute", mean_size / 1e3, "kB", None),
        ("a core and day", mean_size * 86400 / WINDOW_S / counts.cpus / 1e6, "MB", None),
        *(
            (f"{peer}, CPU", 100 * cpu_s / span, "% of one CPU", None)
            for peer, cpu_s in of_peers.items()
        ),
        ("lost", sum(counts.lost.values()), "samples", 0),
        ("law 1 mismatch", counts.mismatch, "ticks", 0),
    ]
    return 1 if show(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
