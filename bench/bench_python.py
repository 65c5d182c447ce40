"""How true Python stacks are, and what naming Python's functions costs.

- stacks: tests/targets/python_calls.py runs its modes in each interpreter that there is, CPython
  3.8 to 3.15; the share of samples whose Python frames are, with their lines, a stack that the
  program can have. It knows its stacks from the interpreter's own hook for profilers.
- split: a program that spends 60/30/10 % of its time in three Python functions, at 499 Hz.
- programs: real ones under load (python_programs.py); a stack is whole if it begins where its
  thread began and, where the interpreter evaluates, goes through Python's functions.
- tick: BPF run time of a sample (kernel.bpf_stats) with 30 Python frames and native ones below, and
  of a native stack of 50 frames.
- beside: the sampler's cost beside ten programs, and in the same seconds that of `py-spy record`
  for one process. bench_cost.py has the sampler's figures in full.
- short: scripts that live for 100 ms, in a loop.
- threads: what it costs a reader to find the names of 50 threads, in each interpreter up to 3.13,
  and how many samples of threads have their names; how often it is asked when no thread is new, and
  what a sample costs the sampler then.

Run as root: `python bench/bench_python.py [--only stacks] [--seconds 20] [--pythons 3.12]`.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_cost import ROOT, cpu_seconds, measure
from bench_first_tick import record
from bench_unwind import DEEP, DEPTH, compile_c, cost_us
from load import running, ten_programs
from python_programs import Program, make_venv, programs_in
from serving import Least, Row, all_pids, show

from bpf import syscalls
from bpf.sampler import SamplerConfig
from profiler.agent import python_code
from profiler.agent.readers import Readers
from profiler.agent.recorder import Recorder
from profiler.agent.thread_names import Placed, ThreadNames
from storage.profile import Profile
from symbolizer.location import Kind
from symbolizer.maps import MappingTable
from symbolizer.runtimes.object_layouts import LAST_WITHOUT_NAMES
from symbolizer.runtimes.thread_names import read_thread_names
from tests.support.live import sample_of
from tests.support.python_images import known_image_of
from tests.support.python_stacks import MODES, SHARES, busy, judge, python_stack, tree_of
from tests.support.python_threads import program, question, tids_of
from tests.support.pythons import Interpreter, installed, interpreters

HZ = 499
RIGHT, WHOLE, SHORT = Least(99.5), Least(99.0), Least(90.0)
OFF_POINTS = 2.0
PYTHON_TICK_US, NATIVE_TICK_US = 15.0, 5.0
CPU_PERCENT, MEMORY_MB = 1.0, 60.0
PYTHON_FRAMES, NATIVE_FRAMES = 30, 20
ROUNDS = 5
MOST_WARM_UP_S = 30.0

THREADS, PASSES = 50, 50
_THREADS = """
start(*(f"worker-{n}" for n in range(%d)), target=spin)
tell("ready")
held.wait()
"""
EVALUATION = "_PyEval_EvalFrameDefault"
STARTS = frozenset(
    {"_start", "clone", "__clone", "clone3", "__clone3", "start_thread", "[ld-linux-x86-64.so.2]"}
)
"""Where threads begin, and programs: in the dynamic loader, which often has no symbols."""

_DEEP_PYTHON = """
import ctypes, sys
down = ctypes.PyDLL(sys.argv[1]).down  # keeps the GIL, as extensions do
def descend(depth):
    return descend(depth - 1) if depth else down(int(sys.argv[3]))
descend(int(sys.argv[2]))
"""
_DEEP_LIBRARY = DEEP.partition("int main")[0].replace("unsigned long down", "int down")
_SHORT = "import time\nwhile time.process_time() < 0.1: sum(i & 3 for i in range(1000))\n"


class Recording:
    """A recorder that samples only processes that it is told of, at HZ."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def of(self, pid: int, seconds: float, warm_up_s: float = 1.0) -> Profile:
        """Record a process and what descends from it, from `warm_up_s` on, with all tables read."""
        unwinding, until_s = self._recorder.unwinding, time.monotonic() + MOST_WARM_UP_S
        self._recorder.sampler.select(all_pids(pid))
        unwinding.prepare(all_pids(pid))
        record(self._recorder, warm_up_s)
        while not unwinding.is_prepared() and time.monotonic() < until_s:
            record(self._recorder, warm_up_s)
        self._recorder.sampler.select(all_pids(pid))
        self._recorder.close_window()
        record(self._recorder, seconds)
        return self._recorder.close_window()


@contextlib.contextmanager
def recording(cache: Path) -> Iterator[Recording]:
    config = SamplerConfig(frequency_hz=HZ, pids=frozenset())
    with Recorder(config, cache) as recorder:
        recorder.start()
        yield Recording(recorder)


def measure_stacks(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    with recording(folder / "cache") as recorded:
        for interpreter in chosen(options):
            for mode in MODES:
                tree = tree_of(interpreter, mode)
                with busy(interpreter, mode) as process:
                    profile = recorded.of(process.pid, options.seconds / 5)
                verdict = judge(tree, ((python_stack(r.stack), r.samples) for r in profile.rows()))
                what = f"{interpreter.name} {mode}, of {verdict.samples:,}"
                yield what, verdict.percent, "% right", RIGHT
                for samples, fault, _ in verdict.wrong[:2]:
                    print(f"    {samples:5,} samples: {fault}")


def measure_split(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    with recording(folder / "cache") as recorded:
        for interpreter in chosen(options):
            with busy(interpreter, "split") as process:
                profile = recorded.of(process.pid, options.seconds)
            leaves: Counter[str] = Counter()
            for row in profile.rows():
                frames = python_stack(row.stack)
                leaves[frames[-1].function if frames else ""] += row.samples
            total = max(1, profile.total_samples)
            shares = {name: 100 * leaves[name] / total for name in SHARES}
            off = max(abs(shares[name] - known) for name, known in SHARES.items())
            text = " / ".join(f"{share:.1f}" for share in shares.values())
            yield f"{interpreter.name} split, {text}", off, "points off", OFF_POINTS


def measure_programs(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    python = native_python(options)
    venv = make_venv(folder, python.executable)
    print(f"real programs, by {python.name}")
    with recording(folder / "cache") as recorded:
        for program in programs_in(folder, venv):
            profile = profile_of(recorded, program, options.seconds)
            yield from whole_rows(program.name, profile, WHOLE)


def profile_of(recorded: Recording, program: Program, seconds: float) -> Profile:
    with contextlib.ExitStack() as started:
        pid = started.enter_context(running(program.command))
        if program.client:
            started.enter_context(running(program.client))
        return recorded.of(pid, seconds, warm_up_s=10)  # so that names are read, too


def whole_rows(name: str, profile: Profile, aim: float) -> Iterator[Row]:
    """Judge each stack; the reasons why some are not whole go to the screen."""
    found: Counter[str] = Counter()
    functions = [names_of(profile, number) for number in range(len(profile.locations))]
    for stack, samples in zip(
        profile.row_stacks.tolist(), profile.row_samples.tolist(), strict=True
    ):
        start, end = profile.stack_offsets[stack : stack + 2].tolist()
        words = profile.stack_locations[start:end].tolist()
        found[fault_of([functions[word] for word in words])] += samples
    judged = found.total() - found["no user frames"]
    yield f"{name}, of {judged:,}", 100 * found[""] / max(1, judged), "% whole", aim
    for fault, samples in found.most_common(5):
        if fault:
            print(f"    {samples:5,} samples: {fault}")


Named = tuple[Kind, tuple[str, ...]]
"""A location: its kind and its functions."""


def names_of(profile: Profile, number: int) -> Named:
    frames = profile.frames(number)
    return frames[0].kind, tuple(frame.function for frame in frames)


def is_start(function: str) -> bool:
    # Debian's libc has no name for clone3, but knows where it begins.
    return function in STARTS or function.startswith("libc.so.6+0x")


def fault_of(stack: Sequence[Named]) -> str:
    """Return why a stack of a Python process is not whole, empty if it is."""
    user = [each for each in stack if each[0] is not Kind.KERNEL]
    if not user:
        return "no user frames"  # of a process that begins or ends
    if not any(map(is_start, user[0][1])):
        return f"does not begin at a thread's start, but at {user[0][1][-1]}"
    evaluations = sum(any(f.startswith(EVALUATION) for f in names) for _, names in user)
    python = sum(kind is Kind.PYTHON for kind, _ in user)
    # Each evaluation runs one function at least.
    return "" if python >= evaluations else "an evaluation without its Python functions"


def measure_tick(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    flags = ("-O1", "-fno-omit-frame-pointer", "-fno-optimize-sibling-calls")
    native = compile_c(DEEP % DEPTH, folder / "deep", *flags)
    compile_c(_DEEP_LIBRARY, folder / "deep.so", *flags, "-shared", "-fPIC")
    (folder / "deep.py").write_text(_DEEP_PYTHON)
    # The module itself is a frame, and so is each of its levels.
    depths = [str(PYTHON_FRAMES - 2), str(NATIVE_FRAMES - 5)]
    script = [str(folder / "deep.py"), str(folder / "deep.so"), *depths]
    python = native_python(options).command(*script)
    with syscalls.run_time_stats():
        for name, command, most, least in (
            ("Python stack", python, PYTHON_TICK_US, Least(PYTHON_FRAMES)),
            (f"native stack of {DEPTH}", native, NATIVE_TICK_US, None),
        ):
            cost, of_python, others = tick_cost(command, folder, options.seconds)
            yield f"BPF time of a sample, {name}", cost, "us", most
            yield "    Python frames", of_python, "", least
            yield "    other frames", others, "", None


def tick_cost(command: list[str], folder: Path, seconds: float) -> tuple[float, int, int]:
    """Return the BPF run time of a tick in us where each CPU runs a command.

    Also the frames of its most frequent kind of stack: Python's, and others.
    """
    with contextlib.ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            pid = stack.enter_context(running(command))
        recorder = stack.enter_context(Recorder(SamplerConfig(frequency_hz=HZ), folder / "cache"))
        recorder.start()
        record(recorder, 3)
        recorder.close_window()
        costs = []
        for _ in range(ROUNDS):
            costs.append(cost_us(recorder.sampler, seconds / ROUNDS))
            recorder.step()
        profile = recorder.close_window()
    comm = Path(command[0]).name
    shapes: Counter[tuple[int, int]] = Counter()
    for row in profile.rows():
        if dict(row.labels).get("comm", "").startswith(comm[:15]):
            python = len(python_stack(row.stack))
            shapes[python, len(row.stack) - python] += row.samples
    assert shapes, f"no sample of process {pid}: {comm}"
    return statistics.median(costs), *shapes.most_common(1)[0][0]


def measure_beside(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    py_spy = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    output = folder / "profile.pb.gz"
    seconds = max(40, round(options.seconds))
    with contextlib.ExitStack() as stack, syscalls.run_time_stats():
        programs = stack.enter_context(ten_programs())
        process = stack.enter_context(busy(native_python(options), "methods"))
        measure(ROOT, 25, output, folder / "cache")  # builds the tables
        beside = stack.enter_context(spying(py_spy, process.pid, folder)) if py_spy else None
        begun_s, used_s = time.monotonic(), cpu_seconds([beside] if beside else [])
        cost = measure(ROOT, seconds, output, folder / "cache")
        if beside:
            theirs_s = cpu_seconds([beside]) - used_s
            theirs = 100 * theirs_s / (time.monotonic() - begun_s)
    print(f"load: {', '.join(programs)} and a Python program")
    yield "sampler beside ten programs, 99 Hz", cost.steady, "% of a CPU", CPU_PERCENT
    yield "    its RSS", cost.rss, "MB", MEMORY_MB
    yield "    BPF run time", cost.us_a_sample, "us a sample", None
    if beside:
        yield "py-spy record of one process, 99 Hz", theirs, "% of a CPU", None


@contextlib.contextmanager
def spying(py_spy: str, pid: int, folder: Path) -> Iterator[int]:
    options = ["--rate=99", "--format=raw", "--duration=3600", f"--output={folder}/spied"]
    with running([py_spy, "record", *options, "--pid", str(pid)]) as spy:
        time.sleep(2)
        yield spy


def measure_short(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    python = native_python(options)
    script = folder / "short.py"
    script.write_text(_SHORT)
    loop = f"while :; do {python.executable} {script}; done"
    with recording(folder / "cache") as recorded, running(["sh", "-c", loop]) as pid:
        profile = recorded.of(pid, options.seconds, warm_up_s=3)
    yield from whole_rows(f"scripts of 100 ms, {python.name}", profile, SHORT)


def measure_threads(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    with Recorder(SamplerConfig(frequency_hz=HZ, pids=frozenset()), folder / "cache") as recorder:
        recorder.start()
        for python in chosen(options):
            if python.version[1] > LAST_WITHOUT_NAMES:
                continue
            with program(python, _THREADS % THREADS) as process:
                process.stdout.readline()
                reader_ms = pass_ms(question(python, process.pid))
                named = Recording(recorder).of(process.pid, options.seconds / 5)
                before = recorder.threads.status()["asked"]
                record(recorder, options.seconds / 5)
                later = recorder.threads.status()["asked"] - before
                of_sample_us = sample_cost_us(recorder.readers, python, process.pid)
            labels: Counter[str] = Counter()
            for row in named.rows():
                labels[dict(row.labels)["thread"]] += row.samples
            share = 100 * sum(labels[f"worker-{n}"] for n in range(THREADS)) / labels.total()
            yield f"{python.name}, {THREADS} threads: a reader's CPU", reader_ms, "ms", None
            yield "    samples with their names", share, "%", Least(99.0)
            yield "    questions when no thread is new", later, "", 0
            yield "    a sample of a known thread", of_sample_us, "us", 5.0


def pass_ms(asked: Mapping[str, Any]) -> float:
    """Return the CPU time of finding the names of all threads of a process."""
    costs = []
    for _ in range(PASSES):
        begun_s = time.process_time()
        answer = read_thread_names(asked)
        costs.append(1e3 * (time.process_time() - begun_s))
        assert answer is not None
        assert len(answer["names"]) == THREADS
    return statistics.median(costs)


def sample_cost_us(readers: Readers, python: Interpreter, pid: int) -> float:
    """Return what a sample of a thread costs the sampler whose name is known."""
    asked, (_, layout) = question(python, pid), known_image_of(python.runtime_file)
    interpreter = python_code.Interpreter(asked["version"], layout, runtime=asked["runtime"])
    threads = ThreadNames(readers, lambda _: Placed(interpreter, 0))
    samples = [sample_of(pid, tid=tid) for tid in sorted(tids_of(pid) - {pid})]
    groups = {MappingTable.of([]): samples}
    threads.note(groups)
    readers.wait(time.monotonic() + 30, lambda: threads.status()["threads"] == THREADS)
    begun_s = time.process_time()
    for _ in range(ROUNDS * PASSES):
        threads.note(groups)
        labels = [threads.label(sample) for sample in samples]
    assert len({*labels}) == THREADS
    return 1e6 * (time.process_time() - begun_s) / (ROUNDS * PASSES * len(samples))


def chosen(options: argparse.Namespace) -> list[Interpreter]:
    found = [
        each
        for each in interpreters()
        if not options.pythons or any(matches(each, name) for name in options.pythons)
    ]
    if not found:
        raise SystemExit(f"no such interpreter here: {' '.join(options.pythons)}")
    return found


def matches(interpreter: Interpreter, name: str) -> bool:
    """Return whether `3.12`, `3.14-sid` and the like stand for an interpreter."""
    version, _, source = name.partition("-")
    own, _, its_source = interpreter.name.partition("-")
    return (own == version or own.startswith(f"{version}.")) and source in {"", its_source}


def native_python(options: argparse.Namespace) -> Interpreter:
    """Return the newest that is installed on this machine, or that was chosen."""
    own = [
        each
        for each in chosen(options)
        if each.root == Path("/") and (options.pythons or each in installed())
    ]
    if not own:
        raise SystemExit("no interpreter of this machine's own is chosen")
    return own[-1]


PARTS = {
    "stacks": measure_stacks,
    "split": measure_split,
    "programs": measure_programs,
    "tick": measure_tick,
    "beside": measure_beside,
    "short": measure_short,
    "threads": measure_threads,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--pythons", nargs="*", default=[], metavar="VERSION[-SOURCE]")
    options = parser.parse_args()
    missed = 0
    for name, part in PARTS.items():
        if not options.only or name in options.only:
            with tempfile.TemporaryDirectory() as folder:
                missed += show(part(options, Path(folder)))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
