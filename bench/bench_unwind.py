"""How many stacks reach their outermost frame, program by program, and what unwinding costs.

Shares: each program runs alone for some seconds, sampled at 499 Hz by a recorder in this process,
with its tables on disk, as they are from the second time on that any program of the host needs
them. A share is that of samples whose user stack ends at the root, of all samples of processes that
had run for 200 ms. Samples of younger processes are shown apart, and so are those of a process that
exits: the kernel has freed its user stack. `worst` is the most frequent other reason.

Depth: a program of 50 frames, with frame pointers, on every CPU: BPF run time of a tick (the
kernel's own figure, kernel.bpf_stats) when frames are left by their rules, and when nothing is
known of the process, so that saved frame pointers are followed; in turns.

Short: a shell loop of /bin/true, a thousand processes a second, and `make -j` of small C files, at
the agent's 99 Hz, for three times as long. A sample is attributed when all of its user frames lie
in files that are known. Those of processes older than 200 ms must be whole.

Programs that are not installed are left out, and said so; `--more` adds other Pythons (of pyenv),
ruby, php, redis, nginx, PostgreSQL.

Run as root: `python bench/bench_unwind.py [--only shares|depth|short] [--more] [--seconds 10]`.
"""

import argparse
import contextlib
import os
import re
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from load import commands_in, running, spawner

from bpf import syscalls
from bpf.sampler import Sampler, SamplerConfig
from bpf.samples import RawSample
from profiler.agent.frames import FrameNumbers, Numbers
from profiler.agent.pipeline import Pipeline
from profiler.agent.recorder import Recorder
from storage.profile import GOOD_STOPS, Profile
from symbolizer.location import Kind, NamedLocation
from symbolizer.maps import MappingTable

HZ = 499
OLD_NS = 200_000_000
NATIVE, JIT = 99.5, 99.0
DEPTH = 50

DEEP = """
__attribute__((noinline)) unsigned long down(unsigned depth)
{
    volatile unsigned long spin = 0;
    if (depth == 0)
        for (;;) spin++;
    return down(depth - 1) + depth;
}
int main(void) { return (int)down(%d); }
"""


RUST = """
fn fib(n: u64) -> u64 { if n < 2 { n } else { fib(n - 1) + fib(n - 2) } }
fn main() {
    let mut words = std::collections::BTreeMap::new();
    loop {
        let n = fib(22) + words.len() as u64 % 7;
        words.entry(format!("{:x}", n)).or_insert_with(Vec::new).push(n);
        if words.len() > 1000 { words.clear(); }
        words.values_mut().for_each(|v| { v.sort(); v.truncate(50); });
    }
}
"""
OURS = """
#include <algorithm>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>
int main() {
    std::map<std::string, std::vector<int>> words;
    for (unsigned i = 0;; i++) {
        std::ostringstream text;
        text << "name " << i % 997;
        auto& list = words[text.str()];
        list.push_back(i * 7919 % 1009);
        std::sort(list.begin(), list.end(), std::greater<int>());
        if (list.size() > 500) list.clear();
    }
}
"""
BIG = """
#include <map>
#include <regex>
#include <string>
#include <iostream>
template <int N> int part(std::map<std::string, int>& m) {
    std::map<int, std::map<std::string, int>> inner;
    std::regex names("(a+)|b*" + std::to_string(N));
    for (auto& [k, v] : m) inner[v + N][k] += std::regex_match(k, names);
    for (auto& [k, v] : inner) for (auto& [l, w] : v) std::cout << k << l << w;
    return inner.size() + part<N - 1>(m);
}
template <> int part<0>(std::map<std::string, int>&) { return 0; }
int main() { std::map<std::string, int> m{{"a", 1}}; return part<60>(m); }
"""
SMALL = """
#include <stdio.h>
#include <stdlib.h>
int part{i}(int x) {{ printf("%d", x); return abs(x) + {i}; }}
"""


class Watching(Recorder):
    """A recorder that shows its raw samples, besides all that it does with them."""

    def __init__(self, config: SamplerConfig, cache: Path) -> None:
        self.seen: list[RawSample] = []
        self.profile: Profile
        seen = self.seen

        class Stages(Pipeline):
            def _locate(
                self, frames: FrameNumbers, groups: Mapping[MappingTable, list[RawSample]]
            ) -> tuple[list[RawSample], list[Numbers]]:
                located = super()._locate(frames, groups)
                seen.extend(located[0])
                return located

        self.stages = Stages
        super().__init__(config, cache)

    def watch(self, seconds: float) -> list[RawSample]:
        """Record for so long, as `everflame record` does, and return what was seen."""
        self.seen.clear()
        end_s = time.monotonic() + seconds
        next_step_s = time.monotonic() + 1
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        while time.monotonic() < end_s:
            poll.poll(1000 * max(0.0, min(end_s, next_step_s) - time.monotonic()))
            self.catch_up()
            if time.monotonic() >= next_step_s:
                self.step()
                next_step_s += 1
        self.profile = self.close_window()
        return list(self.seen)


class Share(NamedTuple):
    samples: int
    whole: int
    young: int
    leaving: int
    worst: str

    @classmethod
    def of(cls, samples: list[RawSample]) -> "Share":
        boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
        stops: Counter[str] = Counter()
        young = 0
        for sample in samples:
            if sample.first_ns + boot_ns - sample.start_ns < OLD_NS:
                young += sample.samples
            else:
                stops[sample.stop] += sample.samples
        leaving = stops.pop("no_user_registers", 0)
        whole = sum(stops[reason] for reason in GOOD_STOPS)
        bad = Counter({name: n for name, n in stops.items() if name not in GOOD_STOPS})
        worst = f"{bad.most_common(1)[0][0]} {bad.most_common(1)[0][1]}" if bad else ""
        return cls(stops.total(), whole, young, leaving, worst)

    @property
    def percent(self) -> float:
        return 100 * self.whole / self.samples if self.samples else 0.0


def compile_c(source: str, target: Path, *flags: str) -> list[str]:
    language = ["-x", "c"] if "-xc++" not in flags else []
    compiler = "gcc" if language else "g++"
    command = [compiler, *flags, *language, "-", "-o", str(target)]
    subprocess.run(command, input=source.encode(), check=True)
    return [str(target)]


def native_programs(folder: Path) -> dict[str, list[str]]:
    """Return more command lines, by the name that the processes to count have."""
    (folder / "big.cpp").write_text(BIG)
    found = {"ours -O3": compile_c(OURS, folder / "ours", "-xc++", "-O3")}
    for name, compiler in (("g++", "g++"), ("clang", "clang++")):
        if shutil.which(compiler):
            loop = f"while :; do {compiler} -O3 -c -o /dev/null {folder}/big.cpp; done"
            found[name] = ["sh", "-c", loop]
    lines = "\n".join(str(i * 7919 % 9999991) for i in range(3_000_000))
    (folder / "many").write_text(lines)
    found["sort"] = ["sh", "-c", f"while :; do sort -n {folder}/many >/dev/null; done"]
    if shutil.which("rustc"):
        (folder / "spin.rs").write_text(RUST)
        command = ["rustc", "-O", "-o", folder / "spin-rust", folder / "spin.rs"]
        subprocess.run(command, check=True)
        found["rust"] = [str(folder / "spin-rust")]
    return found


# Servers end with the shell's group; postgres's processes with their parent.
_RUBY = "def fib(n) n < 2 ? n : fib(n - 1) + fib(n - 2) end; loop { fib(20); 'aab' * 9 =~ /b$/ }"
_PHP = """function fib($n) { return $n < 2 ? $n : fib($n - 1) + fib($n - 2); }
for (;;) { fib(20); md5('a'); }"""
_REDIS = """redis-server --port 7391 --bind 127.0.0.1 --save '' &
sleep 1; redis-benchmark -p 7391 -l -q -t set,get,lpush,lrange_100"""
_NGINX = """echo 'daemon off; pid nginx.pid; error_log stderr; worker_processes 1; events {}
http { access_log off; server { listen 127.0.0.1:7392; root /usr/share; } }' > nginx.conf
nginx -p . -c nginx.conf & sleep 1; wrk -d 600 -t 1 -c 20 http://127.0.0.1:7392/common-licenses/GPL-3"""
_POSTGRES = """chmod 755 .; data=$(mktemp -d -p "$PWD"); chown postgres "$data"
as() { runuser -u postgres -- "$@"; }
bin=$(dirname "$(ls /usr/lib/postgresql/*/bin/initdb | tail -1)")
as $bin/initdb -D $data; as $bin/postgres -D $data -k $data -p 7393 -h '' & sleep 5
as pgbench -h $data -p 7393 -i -s 5 postgres; as pgbench -h $data -p 7393 -c 4 -T 600 postgres"""


def more_programs(folder: Path) -> dict[str, list[str]]:
    """Return those that a machine seldom has all of."""
    found = {}
    for python in sorted((Path.home() / ".pyenv/versions").glob("3.*/bin/python3")):
        version = python.parent.parent.name
        (folder / version).symlink_to(python.resolve())
        script = str(folder / "spin.py")
        found[version] = [str(folder / version), script]
    for name, needed, command in (
        ("ruby", "ruby", ["ruby", "-e", _RUBY]),
        ("php", "php", ["php", "-r", _PHP]),
        ("redis-server", "redis-benchmark", ["sh", "-c", _REDIS]),
        ("nginx", "wrk", ["sh", "-c", f"cd {folder}; {_NGINX}"]),
        ("postgres", "pgbench", ["sh", "-c", f"cd {folder}; {_POSTGRES}"]),
    ):
        if shutil.which(needed):
            found[name] = command
        else:
            print(f"left out, not installed: {name} ({needed})", file=sys.stderr)
    return found


def measure_shares(folder: Path, seconds: float, has_more: bool) -> int:
    """Print the table of programs; return how many have missed their aim."""
    names = {"g++": "cc1plus", "python3": "python3", "go": "spin-go", "rust": "spin-rust"}
    names |= {"ours -O3": "ours", "clang": "clang++"}
    commands = {**commands_in(folder), **native_programs(folder)}
    if has_more:
        commands |= more_programs(folder)
    missed = 0
    with Watching(SamplerConfig(frequency_hz=HZ), folder / "cache") as recorder:
        recorder.start()
        for name, command in commands.items():
            aim = JIT if name in {"node", "java"} else NATIVE
            comm = names.get(name, name).encode()
            wait_s = 12 if name == "postgres" else 3  # until its data are there
            with running(command):
                first = Share.of(mine(recorder.watch(wait_s), comm))
            with running(command):
                recorder.watch(wait_s - 3)
                share = Share.of(mine(recorder.watch(seconds), comm))
            verdict = "ok" if share.percent >= aim else "MISSED"
            missed += verdict == "MISSED"
            print(
                f"{name:10} {share.percent:7.2f} % of {share.samples:6,} whole (at least {aim:g}:"
                f" {verdict}); {share.young} younger, {share.leaving} leaving;"
                f" first time {first.percent:.1f} %"
                + (f"; worst: {share.worst}" if share.worst else ""),
                flush=True,
            )
    return missed


def mine(samples: list[RawSample], comm: bytes) -> list[RawSample]:
    return [sample for sample in samples if sample.leader_comm == comm]


def measure_depth(folder: Path, seconds: float, _has_more: bool) -> int:
    """Print what a tick costs at DEPTH frames, by rules and by frame pointers."""
    flags = ("-O1", "-fno-omit-frame-pointer", "-fno-optimize-sibling-calls")
    command = compile_c(DEEP % DEPTH, folder / "deep", *flags)
    by_rules, by_pointers = [], []
    with contextlib.ExitStack() as stack, syscalls.run_time_stats():
        for _ in range(os.cpu_count() or 1):
            stack.enter_context(running(command))
        recorder = stack.enter_context(Watching(SamplerConfig(frequency_hz=HZ), folder / "cache"))
        sampler = stack.enter_context(Sampler(SamplerConfig(frequency_hz=HZ)))
        recorder.start()
        recorder.watch(3)
        recorder.stop()
        for _ in range(5):
            recorder.sampler.start()
            by_rules.append(cost_us(recorder.sampler, seconds / 5))
            recorder.sampler.stop()
            seen = recorder.sampler.drain().samples
            sampler.start()
            by_pointers.append(cost_us(sampler, seconds / 5))
            sampler.stop()
            others = sampler.drain().samples
            for some in (seen, others):
                depths = Counter(len(each.user) for each in some if each.leader_comm == b"deep")
                assert abs(depths.most_common(1)[0][0] - DEPTH) < 8, depths
    rules, pointers = sorted(by_rules)[2], sorted(by_pointers)[2]
    ratio = rules / pointers
    verdict = "ok" if ratio <= 4 else "MISSED"
    print(f"a tick at {DEPTH} frames, by rules                 {rules:8.2f} us")
    print(f"the same by saved frame pointers             {pointers:8.2f} us")
    print(f"ratio                                        {ratio:8.2f}  (at most 4: {verdict})")
    return int(ratio > 4)


def cost_us(sampler: Sampler, seconds: float) -> float:
    before = sampler.run_stats()
    time.sleep(seconds)
    after = sampler.run_stats()
    return (after.run_time_ns - before.run_time_ns) / (after.run_count - before.run_count) / 1000


def measure_short(folder: Path, seconds: float, _has_more: bool) -> int:
    """Print how samples of many short processes end."""
    for i in range(200):
        (folder / f"part{i}.c").write_text(SMALL.format(i=i))
    objects = " ".join(f"part{i}.o" for i in range(200))
    (folder / "Makefile").write_text(f"all: {objects}\nclean:\n\trm -f *.o\n")
    make = f"cd {folder}; while :; do make -s -j4 all; make -s clean; done"
    loads = {
        "a shell loop of /bin/true": ["sh", "-c", "while :; do /bin/true; done"],
        "1,000 processes a second": spawner(folder, 1000, 600),
        "make -j4 of small C files": ["sh", "-c", make],
    }
    missed = 0
    config = SamplerConfig()
    with syscalls.run_time_stats(), Watching(config, folder / "cache") as recorder:
        recorder.start()
        for name, command in loads.items():
            with running(command):
                recorder.watch(15)
                begun_ns, begun = cpu_ns(recorder), processes_so_far()
                samples = recorder.watch(3 * seconds)
                percent = (cpu_ns(recorder) - begun_ns) / seconds / 3e7
                rate = (processes_so_far() - begun) / seconds / 3
            print(f"{name}, {rate:,.0f} processes a second")
            missed += show_short(Share.of(samples), recorder.profile, percent / max(1, rate / 1000))
    return missed


def processes_so_far() -> int:
    text = Path("/proc/stat").read_text()
    return int(re.search(r"^processes (\d+)$", text, re.MULTILINE)[1])


def cpu_ns(recorder: Recorder) -> int:
    """Return the CPU time of this process, of the builders it waited for, and of its programs."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    theirs = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = own.ru_utime + own.ru_stime + theirs.ru_utime + theirs.ru_stime
    return int(seconds * 1e9) + recorder.sampler.run_stats().run_time_ns


def show_short(share: Share, profile: Profile, cpu_percent: float) -> int:
    known, unknown, without = attribute(profile)
    attributed = 100 * known / max(1, known + unknown)
    stops = profile.accounting.stops
    reasons = ", ".join(f"{reason} {n}" for reason, n in stops.items() if reason not in GOOD_STOPS)
    rows = [
        ("samples with user frames attributed", attributed, "%", attributed >= 95),
        ("whole, of processes older than 200 ms", share.percent, "%", share.percent >= 99),
        ("CPU, where more: for 1,000 of them", cpu_percent, "% of one", cpu_percent <= 10),
    ]
    for what, value, unit, is_reached in rows:
        print(f"    {what:40} {value:8.2f} {unit} ({'ok' if is_reached else 'MISSED'})")
    print(
        f"    samples: {share.samples:,} of older, {share.young:,} of younger, {share.leaving:,} of"
        f" leaving processes, {without:,} without user frames; incomplete: {reasons}",
        flush=True,
    )
    return sum(not is_reached for *_, is_reached in rows)


def attribute(profile: Profile) -> tuple[int, int, int]:
    """Return samples whose user frames are all in known files, those of others, and the rest."""
    is_lost = [
        isinstance(place, NamedLocation) and place.module in {"[exited]", "[unknown]"}
        for place in profile.locations
    ]
    is_user = [
        not (isinstance(place, NamedLocation) and place.kind == Kind.KERNEL)
        for place in profile.locations
    ]
    known = unknown = without = 0
    for stack, samples in zip(
        profile.row_stacks.tolist(), profile.row_samples.tolist(), strict=True
    ):
        start, end = profile.stack_offsets[stack : stack + 2].tolist()
        words = profile.stack_locations[start:end].tolist()
        if any(is_lost[word] for word in words):
            unknown += samples
        elif any(is_user[word] for word in words):
            known += samples
        else:
            without += samples
    return known, unknown, without


PARTS = {"shares": measure_shares, "depth": measure_depth, "short": measure_short}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--more", action="store_true", help="more programs, as far as there are")
    options = parser.parse_args()
    missed = 0
    for name, measure in PARTS.items():
        if not options.only or name in options.only:
            with tempfile.TemporaryDirectory() as folder:
                missed += measure(Path(folder), options.seconds, options.more)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
