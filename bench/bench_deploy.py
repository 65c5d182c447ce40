"""Real deployments: versions of small services under load, judged by what was profiled.

A service in C answers requests over loopback; each costs it half a millisecond in 14 functions. Six
of them run at once, and an agent profiles the machine in windows of 5 s. One service is replaced by
a version in which a function is 1.5 times slower, which comes back; `everflame diff --last-deploy`
judges both. In the others nothing changes: they are restarted, and each restart is judged.

There are two runs. In the first the past is long enough for six earlier pairs of windows; in the
second all there is of the past is two minutes before each deployment, and restarts are deployments
of the same program. There the service is asked again and again until the verdict is there.

Run as root: `python bench/bench_deploy.py [--past SECONDS]`; that makes only the second run, with a
past of so many seconds. Both take 25 minutes, the second one 12.
"""

import argparse
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
from typing import Any, NamedTuple

from serving import EVERFLAME

WINDOW_S = 5
SIDE_S = 20
SHORT_PAST_S = 120
SETTLED_S = 20
"""How long a deployment takes to settle and to be in the store, at most."""
SAME, CHANGED = ("cart", "mail", "stock", "users", "bills"), "shop"
"""Services that are restarted, and the one that becomes slower."""
RATE = 500
"""Requests a second and service, at random times."""
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
const char *volatile service = "%s";
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


class Event(NamedTuple):
    """A start of a service, so many seconds after the first one."""

    at_s: float
    service: str
    is_slower: bool
    version: str


class Plan(NamedTuple):
    """What is started when. The services begin to run at 0, in version 1.0."""

    name: str
    events: list[Event]
    end_s: float
    is_short: bool

    @classmethod
    def long(cls) -> "Plan":
        restarts = [Event(at_s, name, False, "1.0") for at_s in (330, 380) for name in SAME]
        changes = [Event(600, CHANGED, True, "1.1"), Event(675, CHANGED, False, "1.2")]
        return cls("long past", [*restarts, *changes], 750, is_short=False)

    @classmethod
    def short(cls, past_s: int) -> "Plan":
        """Let each version run for so long, and be the past of the next one."""
        step_s, steps = past_s + SETTLED_S, 4
        restarts = [
            Event(past_s + step_s * i, name, False, f"1.{i + 1}")
            for i in range(steps)
            for name in SAME
        ]
        changes = [
            Event(past_s, CHANGED, True, "1.1"),
            Event(past_s + step_s, CHANGED, False, "1.2"),
        ]
        events = sorted([*restarts, *changes], key=lambda each: each.at_s)
        return cls(f"past of {past_s} s", events, past_s + step_s * steps, is_short=True)


def compile_service(folder: Path, name: str, slower: float) -> Path:
    weights = {**_WEIGHTS, SLOW: _WEIGHTS[SLOW] * slower}
    # Equal programs would have one build id, and one module's name in all services.
    functions = "\n".join(f"WORK({name}, {weight})" for name, weight in weights.items())
    calls = " ".join(f"{name}();" for name in weights)
    program = folder / str(slower) / name
    program.parent.mkdir(exist_ok=True)
    command = ["gcc", "-O2", "-x", "c", "-", "-o", str(program)]
    subprocess.run(command, input=(_SERVICE % (name, functions, calls)).encode(), check=True)
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


class Answer(NamedTuple):
    exit_code: int
    found: dict[str, Any]

    @property
    def changes(self) -> dict[str, str]:
        named = ("more", "less", "new", "gone")
        functions = self.found["functions"]
        return {f["function"]: f["verdict"] for f in functions if f["verdict"] in named}

    @property
    def is_judged(self) -> bool:
        return self.found["noise"]["source"] != "none"

    @property
    def kind(self) -> str:
        noise = self.found["noise"]
        kind = "provisional" if self.found["provisional"] else "final"
        return f"{kind} by {noise['source']}, {noise['positions']} positions"


def diff(folder: Path, *arguments: str) -> Answer | None:
    """Compare; None if there is nothing to compare."""
    command = [EVERFLAME, "diff", f"--store={folder / 'store'}", "--json", *arguments]
    environment = {**os.environ, "EVERFLAME_CACHE": str(folder / "cache")}
    found = subprocess.run(command, env=environment, check=False, capture_output=True)
    if found.returncode == 2:
        return None
    return Answer(found.returncode, json.loads(found.stdout))


def last_deploy(folder: Path, service: str, version: str) -> Answer | None:
    selector = f'{{service="{service}",version="{version}"}}'
    return diff(folder, "--last-deploy", "-q", selector, "--from", "now-1h")


def around(folder: Path, service: str, at_s: float) -> Answer | None:
    """Compare both sides of a restart, without the objects that it falls in."""
    end_s = int(at_s) // WINDOW_S * WINDOW_S
    start_s = end_s + 2 * WINDOW_S
    sides = ((end_s - SIDE_S, end_s), (start_s, start_s + SIDE_S))
    first, second = (f'{{service="{service}"}}@{start}..{end}' for start, end in sides)
    return diff(folder, first, "--", second)


class Verdicts:
    """Asks for the verdict of a deployment until it is right, or the time is over."""

    def __init__(self, folder: Path, event: Event, until_s: float) -> None:
        self.first_s = self.named_s = float("inf")
        self._folder, self._event = folder, event
        self._begun_s, self._until_s = time.monotonic(), until_s
        self._asks = threading.Thread(target=self._ask)
        self._asks.start()

    def end(self) -> "Verdicts":
        self._asks.join()
        return self

    def _ask(self) -> None:
        expected = "more" if self._event.is_slower else "less"
        while time.monotonic() < self._until_s:
            answer = last_deploy(self._folder, self._event.service, self._event.version)
            now_s = time.monotonic() - self._begun_s
            if answer and answer.is_judged:
                self.first_s = min(self.first_s, now_s)
                if answer.changes.get(SLOW) == expected:
                    self.named_s = now_s
                    return
            time.sleep(WINDOW_S / 2)


def profile(plan: Plan, folder: Path) -> tuple[dict[Event, float], dict[Event, Verdicts]]:
    """Run a plan beside the agent; return when each event was, and the verdicts of changes."""
    names = (CHANGED, *SAME)
    programs = {
        (name, is_slower): compile_service(folder, name, 1.5 if is_slower else 1.0)
        for name in names
        for is_slower in {False, name == CHANGED}
    }
    times, verdicts = {}, {}
    with contextlib.ExitStack() as stack:
        services = {name: Service() for name in names}
        for service in services.values():
            stack.callback(service.end)
        stack.enter_context(agent(folder))
        wait_for_objects(folder / "store")
        for name, service in services.items():
            service.start(programs[name, False], "1.0")
        begun_s = time.monotonic()
        changes = [each for each in plan.events if each.service == CHANGED]
        ends = dict(zip(changes, [each.at_s for each in changes[1:]] + [plan.end_s], strict=True))
        for event in plan.events:
            time.sleep(max(0.0, begun_s + event.at_s - time.monotonic()))
            services[event.service].start(programs[event.service, event.is_slower], event.version)
            times[event] = time.time()
            if event in ends:
                verdicts[event] = Verdicts(folder, event, begun_s + ends[event])
        time.sleep(max(0.0, begun_s + plan.end_s - time.monotonic()))
        for each in verdicts.values():
            each.end()
    return times, verdicts


def wait_for_objects(store: Path) -> None:
    """Wait until the agent samples: before that it compiles its BPF programs."""
    deadline_s = time.monotonic() + 180
    while not any(store.glob("v1/**/*.*")):
        if time.monotonic() > deadline_s:
            raise SystemExit("the agent wrote nothing for three minutes")
        time.sleep(0.5)


def show_change(folder: Path, event: Event, verdicts: Verdicts) -> bool:
    """Print how a change is judged in the end; return whether that is wrong."""
    what = f"{SLOW} 1.5 times slower" if event.is_slower else "and back"
    expected, exit_code = ("more", 1) if event.is_slower else ("less", 0)
    answer = last_deploy(folder, event.service, event.version)
    if answer is None:
        print(f"  {what}: nothing to compare (MISSED)")
        return True
    others = answer.changes
    is_named = others.pop(SLOW, "") == expected
    is_right = is_named and not {"more", "new"} & {*others.values()}
    is_right = is_right and answer.exit_code == exit_code
    found = answer.found
    growth = next(f for f in found["functions"] if f["function"] == SLOW)["relative"]
    print(
        f"  {what}: {answer.changes or 'nothing'}, exit code {answer.exit_code},"
        f" {growth[0]:+.0%} ({growth[1] or 0:+.0%} to {growth[2] or 0:+.0%});"
        f" {found['before']['samples']} and {found['after']['samples']} samples, {answer.kind};"
        f" first verdict {verdicts.first_s:.0f} s after the deployment, named after"
        f" {verdicts.named_s:.0f} s ({'ok' if is_right else 'MISSED'})"
    )
    if not is_right:
        print("    " + "; ".join(found["warnings"]))
    return not is_right


def show_restarts(folder: Path, plan: Plan, times: dict[Event, float]) -> bool:
    """Print how restarts are judged; return whether any alarms or has no verdict."""
    restarts = [each for each in times if each.service != CHANGED]
    answers = [
        last_deploy(folder, each.service, each.version)
        if plan.is_short
        else around(folder, each.service, times[each])
        for each in restarts
    ]
    judged = [each for each in answers if each and each.is_judged]
    wrong = [each.changes for each in judged if each.changes]
    short = [each for each in judged if each.found["provisional"]]
    is_right = not wrong and len(judged) == len(restarts)
    print(
        f"  restarted {len(restarts)} times: {len(wrong)} alarms, {len(judged)} judged,"
        f" {len(short)} of them provisionally ({'ok' if is_right else f'MISSED: {wrong}'})"
    )
    return not is_right


def measure(plan: Plan) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        times, verdicts = profile(plan, folder)
        print(f"{plan.name}, windows of {WINDOW_S} s, {len(SAME) + 1} services on one host:")
        missed = sum(show_change(folder, *each) for each in verdicts.items())
        return missed + show_restarts(folder, plan, times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--past", type=int, metavar="SECONDS")
    options = parser.parse_args()
    plans = [Plan.short(options.past or SHORT_PAST_S)]
    if options.past is None:
        plans.insert(0, Plan.long())
    return 1 if sum(map(measure, plans)) else 0


if __name__ == "__main__":
    sys.exit(main())
