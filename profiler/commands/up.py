"""`everflame up`: the agent of this host and the page with its flame graphs, until Ctrl-C.

There are four processes. This one is the sampler, exactly as in `everflame agent`; its children
are the uploader, the service (`profiler.commands.serve`), and a small one that compacts the store
from time to time (`profiler.service.compaction`). The service does not run as root and only reads
the store; what compacts may write it, and nothing else: see `profiler.service.confine`. With
`--demo` there is another one, which runs example programs.
"""

import argparse
import contextlib
import math
import os
import pwd
import shlex
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from profiler.agent import agent
from profiler.agent.agent import AgentOptions, ChildProcesses
from profiler.agent.host import default_cache
from profiler.agent.supervise import Child, RefusedError
from profiler.commands import arguments, demo
from profiler.commands.agent import add_always_on, agent_options
from profiler.processes.generations import TICK_NS
from profiler.service import addresses
from profiler.text import counted, lost_to, tell
from storage.objects.directory import DirectoryStore
from storage.objects.keys import StoreError, StoreRefused
from storage.objects.open import default_store_url, default_tenant, open_store
from storage.profile import Profile

FIRST_INTERVAL_S = 5

_USERS = ("everflame", "nobody")
"""The service runs as the first of these users that this host has."""
_ENVIRONMENT = ("PATH", "HOME", "LANG", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR")
_ENVIRONMENT_OF = ("EVERFLAME_", "LC_", "PYTHON", "OPENBLAS_")
_ENVIRONMENT_OF_S3 = ("AWS_", "HTTP_", "HTTPS_", "NO_", "http_", "https_", "no_")
"""The part of the environment that the service gets; the rest may contain secrets."""

_PROBE_PERIOD_S = 0.5
_PROBE_TIMEOUT_S = 0.25
"""The service is on loopback. Samples wait in the kernel meanwhile: a drain may come late."""
_READY_WITHIN_S = 30.0
_GRACE_S = 5.0
_USAGE = 2
"""The exit status of a service that cannot start as asked."""

_IDLE_SHARE = 0.05
_IDLE_WINDOWS = 2
"""How many windows are checked for idleness, after the first one, in which everything starts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  everflame up\n"
        "  everflame up --for 20s --listen 127.0.0.1:5050\n"
        "  everflame up --demo\n\n"
        "Windows last 5 s in the first minute. Ctrl-C closes and stores the last window."
    )
    parser.add_argument("--demo", action="store_true", help="also run a few small example programs")
    arguments.add_page(parser)
    arguments.add_webhook(parser)
    add_always_on(parser)


def run(options: argparse.Namespace) -> int:
    """Sample and serve until a signal or --for ends it; return the exit status.

    Raises:
        RefusedError: the address, the store or the host cannot be used.
    """
    address = free_address(options.listen)
    asked = agent_options(options)
    asked = replace(
        asked,
        store=asked.store or default_store_url(),
        first_interval_s=min(FIRST_INTERVAL_S, asked.interval_s),
    )
    children = ServiceAndDemo(asked, address, has_demo=options.demo, webhook=options.webhook)
    begun_ns = time.time_ns()
    status = agent.run(asked, children)
    if children.has_failed:
        return _USAGE
    tell(*summary(asked, status, begun_ns))
    return 0


def hand_over(folder: Path, account: pwd.struct_passwd) -> None:
    """Make a folder the account's alone. A link is not followed: it could lead anywhere.

    Raises:
        RefusedError: it is a link, or not a folder.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        reason = "it is a link" if folder.is_symlink() else error.strerror
        raise RefusedError(
            f"cannot use the cache folder {folder}: {reason} (remove it, or set EVERFLAME_CACHE)"
        ) from error
    try:
        os.fchmod(fd, 0o700)
        os.fchown(fd, account.pw_uid, account.pw_gid)
    finally:
        os.close(fd)


def free_address(listen: str) -> tuple[str, int]:
    """Return the address to listen on; a port of 0 becomes one that is free.

    Raises:
        RefusedError: it is not an address, not of loopback, or in use.
    """
    try:
        with addresses.bind(listen) as free:
            host, port = free.getsockname()[:2]
    except addresses.ListenError as error:
        raise RefusedError(str(error)) from None
    return host, port


class ServiceAndDemo(ChildProcesses):
    """The service, and the demo if it is asked for, in the agent's loop."""

    def __init__(
        self,
        options: AgentOptions,
        address: tuple[str, int],
        *,
        has_demo: bool = False,
        webhook: str = "",
    ) -> None:
        self._options = options
        self._host, self._port = address
        self._user = service_user()
        cache = default_cache() / "service"
        command = service_command(options, address, cache, self._user)
        environment = service_environment(options, cache)
        # Not on its command line, which everybody can read.
        environment |= {"EVERFLAME_WEBHOOK": webhook} if webhook else {}
        self._service = Child("service", command, environment)
        self._cache = cache
        self._compaction_cache = default_cache() / "compaction"
        self._compaction = Child(
            "compactor",
            compaction_command(options, self._compaction_cache, is_root=bool(self._user)),
            service_environment(options, self._compaction_cache),
        )
        self._demo = Child("demo", demo.command(self._user)) if has_demo else None
        self._is_ready = False
        self._begun_s = self._next_probe_s = 0.0
        self._windows = 0
        self._cpu_ns = self._nonidle_ns = 0
        self.commands: set[int] = set()
        self.has_failed = False

    def start(self) -> None:
        check_store(self._options)
        self._cache.mkdir(parents=True, exist_ok=True)
        self._compaction_cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.geteuid() == 0:
            account = pwd.getpwnam(self._user)
            hand_over(self._cache, account)
            # So that the page can show the agent's status; root may connect all the same.
            os.chown(self._options.run_folder / "agent.sock", account.pw_uid, -1)
        self._begun_s = time.monotonic()
        self._service.supervise()
        self._compaction.supervise()
        self._start_demo()

    def begun(self) -> None:
        tell(agent.greeting(self._options))

    def supervise(self) -> None:
        self._service.supervise()
        self._compaction.supervise()
        self._start_demo()
        if self._is_ready:
            return
        now = time.monotonic()
        # Not a signal's: it could not be started as asked, and will not be the next time.
        if (self._service.status or 0) > 0:
            tell("everflame: cannot serve the page, for the reason above")
            self.has_failed = True
        elif now >= self._next_probe_s:
            self._next_probe_s = now + _PROBE_PERIOD_S
            self._is_ready = answers(self._host, self._port)
            if self._is_ready:
                tell(*directions(self._host, self._port, os.environ))
            elif now > self._begun_s + _READY_WITHIN_S:
                tell("everflame: the page does not respond yet; sampling continues")
                self._begun_s = float("inf")

    def _start_demo(self) -> None:
        if self._demo is not None:
            self._demo.supervise()
            self.commands.add(self._demo.pid)

    def note(self, profile: Profile) -> None:
        """Suggest the demo if the machine is idle."""
        self._windows += 1
        if not 1 < self._windows <= 1 + _IDLE_WINDOWS or self._demo is not None:
            return
        counts = profile.accounting
        self._cpu_ns += counts.profiled_ns * counts.cpus
        self._nonidle_ns += counts.nonidle_ns
        busy = self._nonidle_ns / max(1, self._cpu_ns)
        if self._windows == 1 + _IDLE_WINDOWS and busy < _IDLE_SHARE:
            tell(
                f"this machine is {1 - busy:.0%} idle, so there is little to see;"
                " ./quickstart --demo runs example programs"
            )

    def status(self) -> dict[str, Any]:
        return {
            name: {**child.state(), **_cost_with_workers(child.pid)}
            for name, child in (("service", self._service), ("compactor", self._compaction))
        }

    def end(self) -> None:
        every = (self._service, self._compaction, self._demo)
        children = [child for child in every if child is not None]
        for child in children:
            child.ask_to_end()
        for child in children:
            child.end(_GRACE_S)


def _cost_with_workers(pid: int) -> dict[str, int]:
    """Return the CPU time and memory of a process and its children; empty if it has ended."""
    total = Counter(_cost_of(pid))
    # Each thread has children of its own; a kernel may not tell (CONFIG_PROC_CHILDREN).
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended
            for child in path.read_text().split():
                total.update(_cost_of(int(child)))
    return dict(total)


def _cost_of(pid: int) -> dict[str, int]:
    """Return the CPU time and memory of a process; empty if it has ended (proc_pid_stat(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return {}
    return {
        "cpu_ns": (int(fields[11]) + int(fields[12])) * TICK_NS,
        "rss_bytes": int(fields[21]) * os.sysconf("SC_PAGESIZE"),
    }


def service_user() -> str:
    """Return the user that the service runs as; empty to keep this user, who is not root."""
    if os.geteuid() != 0:
        return ""
    known = {account.pw_name for account in pwd.getpwall()}
    for name in _USERS:
        if name in known:
            return name
    raise RefusedError(
        "cannot serve the page: it must not run as root, and there is no user for it"
        " (adduser --system everflame)"
    )


def service_command(
    options: AgentOptions, address: tuple[str, int], cache: Path, user: str
) -> list[str]:
    """Return the command line that confines the service and starts it."""
    store = options.store
    confine = [sys.executable, "-P", "-m", "profiler.service.confine", f"--parent={os.getpid()}"]
    confine += [f"--user={user}", f"--write={cache}"]
    confine += [f"--read={path}" for path in _folders_to_read(store)]
    serve = [sys.executable, "-P", "-m", "profiler.commands.serve", f"--store={store}"]
    serve += [f"--tenant={options.tenant}", f"--listen={addresses.shown(address)}", "--quiet"]
    serve += [f"--run-folder={options.run_folder}", f"--cache={cache}"]
    if options.endpoint:
        serve.append(f"--s3-endpoint={options.endpoint}")
    if agent.is_directory(store):
        serve += agent.kept_arguments(options)
    return [*confine, "--", *serve]


def compaction_command(options: AgentOptions, cache: Path, *, is_root: bool) -> list[str]:
    """Return the command line that compacts the store every ten minutes.

    Root stays root, as the store is its own, but loses all rights to do anything else.
    """
    store = options.store
    confine = [sys.executable, "-P", "-m", "profiler.service.confine", f"--parent={os.getpid()}"]
    confine += [f"--user={'root' if is_root else ''}", f"--write={cache}"]
    if agent.is_directory(store):
        confine.append(f"--write={directory_of(store)}")
    else:
        confine += [f"--read={path}" for path in _folders_to_read(store)]
    repeat = [sys.executable, "-P", "-m", "profiler.service.compaction", f"--parent={os.getpid()}"]
    compact = [sys.executable, "-P", "-m", "profiler.commands.compact", f"--store={store}"]
    if options.endpoint:
        compact.append(f"--s3-endpoint={options.endpoint}")
    compact.append(f"--tenant={options.tenant}")
    if options.keep_s is not None:
        # Asked for a time, nothing is kept for longer, in whatever detail.
        keep_s = math.ceil(options.keep_s)
        kept = [f"level0={min(keep_s, agent.KEEP_S)}s"]
        kept += [f"{level}={keep_s}s" for level in ("detail", "10m", "1h", "1d")]
        compact.append(f"--keep={','.join(kept)}")
    return [*confine, "--", *repeat, *compact]


def _folders_to_read(store: str) -> Iterator[Path]:
    """Return the store, or where the keys of a bucket may be."""
    if agent.is_directory(store):
        yield directory_of(store)
        return
    yield Path("~/.aws").expanduser()
    for name in (
        "AWS_SHARED_CREDENTIALS_FILE",
        "AWS_CONFIG_FILE",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CA_BUNDLE",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
    ):
        if path := os.environ.get(name):
            yield Path(path).absolute()


def service_environment(options: AgentOptions, cache: Path) -> dict[str, str]:
    """Return the environment of the service, with credentials only if there is a bucket."""
    prefixes: tuple[str, ...] = _ENVIRONMENT_OF
    if not agent.is_directory(options.store):
        prefixes += _ENVIRONMENT_OF_S3
    kept = {k: v for k, v in os.environ.items() if k in _ENVIRONMENT or k.startswith(prefixes)}
    return {**kept, "EVERFLAME_CACHE": str(cache), "TMPDIR": str(cache)}


def directory_of(store: str) -> Path:
    """Return the folder that a store lies in.

    Raises:
        RefusedError: it is not the name of a folder.
    """
    opened = open_store(store)
    assert isinstance(opened, DirectoryStore)
    return opened.root


def check_store(options: AgentOptions) -> None:
    """Write an object into a directory and delete it again.

    A bucket is the uploader's to try, who has the keys; windows wait for it.

    Raises:
        RefusedError: that failed; the message says what to do.
    """
    if not agent.is_directory(options.store):
        return
    store = open_store(options.store)
    probe = f"v1/.up/{os.getpid()}-{os.urandom(8).hex()}"
    try:
        store.put(probe, b"probe")
        store.delete(probe)
    except StoreRefused as error:
        raise RefusedError(str(error)) from error
    except StoreError as error:
        raise RefusedError(f"{error} (make room there, or use another --store)") from error


def answers(host: str, port: int) -> bool:
    """Return whether the service is up. No HTTP client: that would map TLS into the sampler."""
    name = addresses.shown((host, port))
    request = f"GET /healthz HTTP/1.0\r\nHost: {name}\r\n\r\n"
    try:
        with socket.create_connection((host, port), _PROBE_TIMEOUT_S) as connection:
            connection.sendall(request.encode())
            return connection.recv(64).split(b" ", 2)[1:2] == [b"200"]
    except OSError:
        return False


def directions(host: str, port: int, environment: Mapping[str, str]) -> list[str]:
    """Return lines that say where the page is, and how to reach it over ssh."""
    name = addresses.shown((host, port))
    lines = [f"flame graphs, the first one after 10 s: http://{name}"]
    # client address, its port, server address, its port (sshd's, see ssh(1))
    connection = environment.get("SSH_CONNECTION", "").split()
    if len(connection) == 4:
        server, server_port = connection[2:]
        user = environment.get("SUDO_USER") or environment.get("LOGNAME") or "root"
        option = "" if server_port == "22" else f"-p {server_port} "
        lines += [
            f"from your own machine: ssh -L {port}:{name} {option}{user}@{server}",
            f"  and then open http://127.0.0.1:{port} there",
        ]
    return lines


def summary(options: AgentOptions, status: Mapping[str, Any], begun_ns: int) -> list[str]:
    """Summarize in a few lines what was stored, what it cost, and what to do next."""
    upload, seconds = status["uploader"], status["uptime_s"]
    lost = sum(status["lost"].values())
    cpu_ns = status["cpu_ns"]
    own = sum(cpu_ns[part] for part in ("sampler", "readers", "bpf")) / 1e9 / seconds
    parts = f"{status['stored']:,} stored + {status['idle']:,} idle + {status['filtered']:,}"
    rate = f"{seconds:.1f} s at {status['frequency_hz']} Hz"
    memory = " + ".join(
        f"{status[name].get('rss_bytes', 0) / 1e6:.0f}"
        for name in ("sampler", "uploader", "service")
    )
    others_s = sum(status[name].get("cpu_ns", 0) for name in ("uploader", "service")) / 1e9
    others = f"uploader and service {others_s:.1f} s"
    size = f"{upload.get('uploaded_bytes', 0) / 1e3:,.0f} kB"
    closed, samples = counted(status["windows"], "window"), counted(status["stored"], "sample")
    lines = [
        f"stored {counted(upload.get('uploaded', 0), 'window')}, {size}, in {options.store}",
        f"{rate}: {closed}, {samples}, {lost:,} lost",
        f"{counted(status['ticks'], 'tick')} = {parts} filtered + {lost:,} lost",
        f"the sampler took {own:.1%} of one CPU, {others}; memory {memory} MB",
    ]
    lines += [f"warning: {lost_to(cause, number)}" for cause, number in status["lost"].items()]
    if waiting := status["spool"]["profiles"]:
        reason = upload.get("last_error") or "they are not uploaded yet"
        windows = f"{counted(waiting, 'window')} {'waits' if waiting == 1 else 'wait'}"
        lines.append(f"warning: {windows} in {options.spool}: {reason}")
    command = f"{_own_command()} "
    start = datetime.fromtimestamp(begun_ns // 1_000_000_000, UTC)
    place = "" if options.store == default_store_url() else f" --store {shlex.quote(options.store)}"
    if options.endpoint:
        place += f" --s3-endpoint {shlex.quote(options.endpoint)}"
    if options.tenant != default_tenant():
        place += f" --tenant {options.tenant}"
    return [
        *lines,
        f"look again:  {command}serve{place}",
        f"export it:   {command}export{place} --from {start:%Y-%m-%dT%H:%M:%SZ} -o cpu.svg",
        f"prove it:    {command}verify{place}",
    ]


def _own_command() -> str:
    """Return how this program can be called from here."""
    own = Path(sys.argv[0]).absolute()
    if shutil.which("everflame") == str(own):
        return "everflame"
    name = os.path.relpath(own) if own.is_relative_to(Path.cwd()) else str(own)
    return ("sudo " if os.environ.get("SUDO_USER") else "") + shlex.quote(name)
