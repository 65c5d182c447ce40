"""Loads to profile: ten different programs on all CPUs, and a thousand short processes a second.

The ten are openssl, xz, python3, node, java, Go, g++ in a loop, bash, sort and perl. They are
single-threaded or nearly so and together keep two CPUs busy for as long as the block lasts. What is
not installed is left out, and said so.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_GO = """package main
func fib(n int) int { if n < 2 { return n }; return fib(n-1) + fib(n-2) }
func main() { for { fib(35) } }
"""
_JAVA = """public class Spin {
  static int fib(int n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
  public static void main(String[] a) { while (true) fib(30); }
}
"""
_NODE = """
function fib(n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
for (;;) { JSON.parse(JSON.stringify({ a: fib(25), b: [..."everflame"] })); }
"""
_PYTHON = """
import json, re
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
while True:
    json.loads(json.dumps({"a": fib(18), "b": list(range(200))}))
    re.sub("a+b", "c", "aaab" * 1000)
"""
_PERL = 'while (1) { my %h; $h{$_ % 97} .= $_ for 1..20000; join ",", sort keys %h }'
_CPP = """#include <map>
#include <regex>
#include <string>
int main() { std::map<std::string, int> m; m["a"] = std::regex_match("a", std::regex("a+")); }
"""


def _commands(folder: Path) -> dict[str, list[str]]:
    (folder / "spin.js").write_text(_NODE)
    (folder / "spin.py").write_text(_PYTHON)
    (folder / "spin.cpp").write_text(_CPP)
    (folder / "Spin.java").write_text(_JAVA)
    (folder / "numbers").write_bytes(b"".join(b"%d\n" % (i * 7919 % 999983) for i in range(500000)))
    forever = "while :; do {}; done"
    return {
        "openssl": ["openssl", "speed", "-seconds", "3600", "sha256"],
        "xz": ["sh", "-c", forever.format(f"xz -6 -c {folder}/numbers >/dev/null")],
        "python3": ["/usr/bin/python3", str(folder / "spin.py")],
        "node": ["node", str(folder / "spin.js")],
        "java": ["java", "-XX:+PreserveFramePointer", "-cp", str(folder), "Spin"],
        "go": [str(folder / "spin-go")],
        "g++": ["sh", "-c", forever.format(f"g++ -O2 -c -o /dev/null {folder}/spin.cpp")],
        "bash": ["bash", "-c", "while :; do x=$((x + 1)); y=${x//1/2}; done"],
        "sort": ["sh", "-c", forever.format(f"sort -n {folder}/numbers >/dev/null")],
        "perl": ["perl", "-e", _PERL],
    }


def _build(folder: Path) -> None:
    if shutil.which("go"):
        (folder / "spin.go").write_text(_GO)
        environment = {**os.environ, "GOFLAGS": "-mod=mod", "GOCACHE": str(folder / "cache")}
        command = ["go", "build", "-o", str(folder / "spin-go"), str(folder / "spin.go")]
        subprocess.run(command, check=True, env=environment)
    if shutil.which("javac"):
        subprocess.run(["javac", "-d", str(folder), str(folder / "Spin.java")], check=True)


def commands_in(folder: Path) -> dict[str, list[str]]:
    """Prepare the ten in a folder and return the command lines of those that are installed."""
    commands = _commands(folder)
    _build(folder)
    needs = {name: command[0] for name, command in commands.items()}
    needs |= {"xz": "xz", "g++": "g++", "sort": "sort"}
    if not (folder / "Spin.class").exists():
        needs["java"] = "javac"
    missing = [name for name in commands if not shutil.which(needs[name])]
    if missing:
        print(f"left out, not installed: {', '.join(missing)}", file=sys.stderr)
    return {name: command for name, command in commands.items() if name not in missing}


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[int]:
    """Run a command for the length of the block; return its pid, which is that of its group.

    It is killed with this process as well, whatever ends that (prctl(2), PR_SET_PDEATHSIG).
    """
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "--", *command],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process.pid
    finally:
        # It leads a group of its own, with whatever its loop has started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def ten_programs() -> Iterator[list[str]]:
    """Run the load for the length of the block and return the names of those that run."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        commands = commands_in(Path(temporary))
        for command in commands.values():
            stack.enter_context(running(command))
        yield list(commands)


_TINY = "int main(void) { return 0; }"
_SPAWNER = r"""
#include <spawn.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>

static long long now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int main(int argc, char **argv)
{
    char *tiny[] = {argv[1], NULL}, *environment[] = {NULL};
    long long period = 1000000000LL / atoi(argv[2]), next = now_ns();
    long long end = next + atoi(argv[3]) * 1000000000LL;
    for (; next < end; next += period) {
        struct timespec at = {next / 1000000000LL, next % 1000000000LL};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL);
        pid_t pid;
        if (posix_spawn(&pid, tiny[0], NULL, NULL, tiny, environment) == 0)
            waitpid(pid, NULL, 0);
    }
    return 0;
}
"""


def spawner(folder: Path, rate: int, seconds: int) -> list[str]:
    """Compile a program that starts a tiny one `rate` times a second; return its command line."""
    for source, name in ((_TINY, "tiny"), (_SPAWNER, "spawner")):
        command = ["gcc", "-O2", "-x", "c", "-", "-o", folder / name]
        subprocess.run(command, input=source.encode(), check=True)
    return [str(folder / "spawner"), str(folder / "tiny"), str(rate), str(seconds)]


@contextlib.contextmanager
def thousand_processes() -> Iterator[list[str]]:
    """Start 1,000 short processes a second for the length of the block, at most ten minutes."""
    with tempfile.TemporaryDirectory() as temporary:
        process = subprocess.Popen(spawner(Path(temporary), 1000, 600))
        try:
            yield ["1,000 processes a second"]
        finally:
            process.kill()
            process.wait()
