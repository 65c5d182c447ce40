"""The demo: small example programs that `everflame up --demo` runs.

    shop      Python, in two versions at once as while one replaces the other: 1.5.0 prices baskets
              in a worse way than 1.4.0
    search    Python, ranks documents
    report    Perl, a program in C whose functions have names: counts the lines of a log

Each is bounded to a share of one CPU, at nice 10. A service is this very file under the name of the
service, in a release folder of its own, as a deployment would have left it there; so it imports
nothing but the standard library. All end when the first process here ends, and that with `up`.
"""

import argparse
import ctypes
import os
import pwd
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_NICE = 10
_SHOP_SHARE = 0.2  # of one CPU, for each of two versions
_SEARCH_SHARE = 0.35
_REPORT_SHARE = 0.35
_TURN_S = 0.02

_PERL = r"""
use strict; use warnings; use Time::HiRes qw(sleep clock);
my ($share, $turn) = @ARGV;
my @lines = map {
    sprintf '10.0.%d.%d - - "GET /item/%d?q=%x HTTP/1.1" %d %d', $_ % 7, $_ % 251, $_ * 37 % 1009,
        $_ * 2654435761 % 65536, $_ % 13 ? 200 : 404, $_ * 7919 % 90001
} 1 .. 2000;
sub count_lines {
    my (%by_path, %by_status);
    for my $line (@lines) {
        next unless $line =~ m{^(\S+) .* "(?:GET|POST) (/\w+)/(\d+)\S* [^"]*" (\d+) (\d+)$};
        $by_path{"$2/$3"} += $5;
        $by_status{$4}++;
    }
    return map { "$_ $by_path{$_}" } sort { $by_path{$b} <=> $by_path{$a} } keys %by_path;
}
while (1) {
    my $begun = clock();
    count_lines() while clock() - $begun < $turn;
    sleep((clock() - $begun) * (1 - $share) / $share);
}
"""


def command(user: str) -> list[str]:
    """Return the command line of the demo; as root it becomes `user`, otherwise that is empty."""
    return [sys.executable, __file__, f"--user={user}", f"--parent={os.getpid()}"]


def main() -> int:
    """Be one of the services, or start them all and wait for the end."""
    services = {"shop": run_shop, "search": run_search}
    if service := services.get(Path(sys.argv[0]).stem):
        _end_with(int(sys.argv[1]), signal.SIGKILL)
        service()
    if sys.argv[1:2] == ["report"]:
        _end_with(int(sys.argv[2]), signal.SIGKILL)
        script = sys.argv[3]
        os.execvp("perl", ["perl", script, str(_REPORT_SHARE), str(_TURN_S)])  # noqa: S606
    return _run_all()


def _run_all() -> int:
    parser = argparse.ArgumentParser(prog="demo")
    parser.add_argument("--user", default="")
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source = Path(__file__).read_bytes()
    if os.geteuid() == 0:
        _become(options.user)
    os.nice(_NICE)
    folder = Path(tempfile.mkdtemp(prefix="everflame-demo-"))
    processes: list[subprocess.Popen[bytes]] = []
    try:
        _end_with(options.parent, signal.SIGTERM)
        processes += [
            _start_python(folder / "shop" / "releases" / "1.4.0" / "shop.py", source),
            _start_python(folder / "shop" / "releases" / "1.5.0" / "shop.py", source),
            _start_python(folder / "search" / "search.py", source, SERVICE_VERSION="2026.1"),
            _start_perl(folder / "report" / "report.pl", source, SERVICE_VERSION="7.2"),
        ]
        for process in processes:
            process.wait()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for process in processes:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _become(user: str) -> None:
    account = pwd.getpwnam(user)
    os.setgroups([])
    os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
    os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)


def _end_with(parent: int, number: signal.Signals) -> None:
    """Have the kernel send a signal when the parent ends, which may have happened already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(0)


def _start_python(script: Path, source: bytes, **environment: str) -> subprocess.Popen[bytes]:
    script.parent.mkdir(parents=True)
    script.write_bytes(source)
    return _start(["/usr/bin/python3", str(script), str(os.getpid())], script.parent, environment)


def _start_perl(script: Path, source: bytes, **environment: str) -> subprocess.Popen[bytes]:
    script.parent.mkdir(parents=True)
    script.write_text(_PERL)
    starter = script.with_name("start.py")
    starter.write_bytes(source)
    arguments = ["/usr/bin/python3", str(starter), "report", str(os.getpid()), str(script)]
    return _start(arguments, script.parent, environment)


def _start(
    arguments: list[str], folder: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    plain = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        arguments, stdin=subprocess.DEVNULL, cwd=folder, env=plain | environment
    )


def _work(work: Callable[[], object], share: float) -> None:
    """Do it for ever, for a share of one CPU."""
    while True:
        begun_s = time.process_time()
        while time.process_time() - begun_s < _TURN_S:
            work()
        time.sleep((time.process_time() - begun_s) * (1 - share) / share)


def run_shop() -> None:
    """Serve orders; the version is that of the release folder."""
    is_slow = Path(sys.argv[0]).absolute().parent.name == "1.5.0"
    chance = random.Random(1)  # noqa: S311 - baskets, not keys
    prices = {f"article-{number}": chance.randrange(100, 10_000) for number in range(500)}
    price = price_by_search if is_slow else price_by_key

    def serve_order() -> None:
        basket = chance.choices(list(prices), k=12)
        total = sum(price(prices, article) for article in basket)
        render_receipt(basket, total)

    _work(serve_order, _SHOP_SHARE)


def price_by_key(prices: dict[str, int], article: str) -> int:
    return prices[article]


def price_by_search(prices: dict[str, int], article: str) -> int:
    for name, price in prices.items():
        if name == article:
            return price
    return 0


def render_receipt(basket: list[str], total: int) -> str:
    lines = [f"{count} x {article}" for article, count in sorted(Counter(basket).items())]
    return "\n".join([*lines, f"total {total / 100:.2f}"])


def run_search() -> None:
    """Rank documents for queries."""
    chance = random.Random(2)  # noqa: S311 - documents, not keys
    words = [f"w{number:03}" for number in range(300)]
    documents = [Counter(chance.choices(words, k=80)) for _ in range(120)]

    def serve_query() -> None:
        query = chance.sample(words, 4)
        rank(documents, query)

    _work(serve_query, _SEARCH_SHARE)


def rank(documents: list[Counter[str]], query: list[str]) -> list[int]:
    scores = {number: score(document, query) for number, document in enumerate(documents)}
    return sorted(scores, key=scores.__getitem__, reverse=True)[:10]


def score(document: Counter[str], query: list[str]) -> float:
    return sum(document[word] / (1 + document[word]) for word in query)


if __name__ == "__main__":
    sys.exit(main())
