"""A real deployment: two versions of a small service under load, judged by what was profiled.

A service in C answers requests over loopback; each costs it some milliseconds in 14 functions. An
agent profiles the machine in windows of 5 s. The first version runs, is restarted ten times, is
replaced by one in which one function is 1.5 times slower, and comes back. `everflame diff
--last-deploy` judges both deployments, and `everflame diff` the time around each restart.

Run as root: `python bench/bench_deploy.py`. It takes 16 minutes.
"""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from serving import EVERFLAME

WINDOW_S = 5
PAST_S, RESTARTS, RESTART_S, DEPLOYED_S = 330, 10, 50, 75
SIDE_S = 20
RATE = 500
"""Requests a second, at random times."""
SLOW = "parse_filters"
_WEIGHTS = {
    "read_header": 8,
    "check_token": 5,
    "parse_query": 9,
    SLOW: 14,
    "find_user": 7,
    "load_rules": 6,
    "match_rules": 10,
    "rank_hits": 12,
    "merge_hits": 8,
    "cut_page": 4,
    "format_row": 9,
    "escape_text": 6,
    "add_checksum": 5,
    "log_access": 3,
}
_SERVICE = """
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
volatile unsigned long sink;
#define WORK(name, rounds) __attribute__((noinline)) void name(void) \\
  { for (unsigned long i = 0; i < (rounds) * 2000ul; i++) sink += i ^ (sink >> 3); sink++; }
%s
int main(int argc, char **argv)
{
  int listener = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
  at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  if (bind(listener, (void *)&at, sizeof at) || listen(listener, 16)) return 1;
  for (;;) {
    int client = accept(listener, 0, 0);
    char request[64];
    while (read(client, request, sizeof request) > 0) { %s if (write(client, "ok", 2) < 2) break; }
    close(client);
  }
}
"""


def compile_service(folder: Path, slower: float) -> Path:
    weights = {**_WEIGHTS, SLOW: _WEIGHTS[SLOW] * slower}
    functions = "\n".join(f"WORK({name}, {weight})" for name, weight in weights.items())
    calls = " ".join(f"{name}();" for name in weights)
    program = folder / str(slower) / "shop"
    program.parent.mkdir()
    command = ["gcc", "-O2", "-x", "c", "-", "-o", str(program)]
    subprocess.run(command, input=(_SERVICE % (functions, calls)).encode(), check=True)
    return program


class Service:
    """A service that runs in one version after the other, and its load."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self._ends = threading.Event()
        self._load = threading.Thread(target=self._ask)
        self._load.start()

    def start(self, program: Path, version: str) -> None:
        self.stop()
        environment = {**os.environ, "SERVICE_VERSION": version}
        self._process = subprocess.Popen([program, str(self._port)], env=environment)

    def stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()

    def end(self) -> None:
        self._ends.set()
        self._load.join()
        self.stop()

    def _ask(self) -> None:
        while not self._ends.is_set():
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self._port), timeout=1) as client,
            ):
                next_s = time.monotonic()
                while not self._ends.is_set():
                    client.sendall(b"GET")
                    if not client.recv(8):
                        break
                    # A load that comes too late is not made up for.
                    next_s = max(next_s + random.expovariate(RATE), time.monotonic() - 0.1)
                    time.sleep(max(0.0, next_s - time.monotonic()))
            time.sleep(0.05)


@contextlib.contextmanager
def agent(folder: Path) -> Iterator[Path]:
    environment = {**os.environ, "EVERFLAME_RUN": str(folder / "run")}
    command = [EVERFLAME, "agent", f"--interval={WINDOW_S}s", f"--spool={folder / 'spool'}"]
    store = folder / "store"
    with subprocess.Popen(
        [*command, f"--store={store}"], env=environment, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield store
        finally:
            process.terminate()


def diff(folder: Path, *arguments: str) -> tuple[int, dict]:
    command = [EVERFLAME, "diff", f"--store={folder / 'store'}", "--json", *arguments]
    environment = {**os.environ, "EVERFLAME_CACHE": str(folder / "cache")}
    found = subprocess.run(command, env=environment, check=False, capture_output=True)
    if found.returncode == 2:
        raise SystemExit(found.stderr.decode())
    return found.returncode, json.loads(found.stdout)


def changes(found: dict) -> dict[str, str]:
    named = ("more", "less", "new", "gone")
    return {f["function"]: f["verdict"] for f in found["functions"] if f["verdict"] in named}


def around(at_s: float) -> list[str]:
    """Return the windows of both sides of a restart, without the objects that it falls in."""
    end_s = int(at_s) // WINDOW_S * WINDOW_S
    start_s = end_s + 2 * WINDOW_S
    sides = ((end_s - SIDE_S, end_s), (start_s, start_s + SIDE_S))
    first, second = (f'{{service="shop"}}@{start}..{end}' for start, end in sides)
    return [first, "--", second]


def main() -> int:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        same, slower = compile_service(folder, 1.0), compile_service(folder, 1.5)
        service = Service()
        stack.callback(service.end)
        stack.enter_context(agent(folder))
        service.start(same, "1.0")
        time.sleep(PAST_S)
        restarts = []
        for _ in range(RESTARTS):
            service.start(same, "1.0")
            restarts.append(time.time())
            time.sleep(RESTART_S)
        found = {}
        for version, program in (("1.1", slower), ("1.2", same)):
            service.start(program, version)
            time.sleep(DEPLOYED_S)
            asked = ["--last-deploy", "-q", '{service="shop"}', "--from", "now-1h"]
            found[version] = diff(folder, *asked)
        alarms = [diff(folder, *around(at_s)) for at_s in restarts]
    rows = [
        (f"{SLOW} 1.5 times slower", *found["1.1"], "more", 1),
        ("and back", *found["1.2"], "less", 0),
    ]
    missed = 0
    for what, code, answer, expected, exit_code in rows:
        others = changes(answer)
        is_named = others.pop(SLOW, "") == expected
        is_right = is_named and not {"more", "new"} & {*others.values()} and code == exit_code
        missed += not is_right
        growth = next(f for f in answer["functions"] if f["function"] == SLOW)["relative"]
        noise = answer["noise"]
        print(
            f"{what}: {changes(answer) or 'nothing'}, exit code {code},"
            f" {growth[0]:+.0%} ({growth[1] or 0:+.0%} to {growth[2] or 0:+.0%});"
            f" {answer['before']['samples']} and {answer['after']['samples']} samples,"
            f" {noise['positions']} earlier positions ({'ok' if is_right else 'MISSED'})"
        )
        if not is_right:
            print("  " + "; ".join(answer["warnings"]))
    judged = [answer for _, answer in alarms if answer["noise"]["source"] != "none"]
    wrong = [changes(answer) for answer in judged if changes(answer)]
    is_right = not wrong and len(judged) == RESTARTS
    missed += not is_right
    print(
        f"restarted {RESTARTS} times: {len(wrong)} alarms, {len(judged)} judged"
        f" ({'ok' if is_right else f'MISSED: {wrong}'})"
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
