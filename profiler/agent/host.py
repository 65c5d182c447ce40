"""The host that is sampled: its identity, its folder for tables, and whether it can be sampled."""

import logging
import os
import resource
import socket
import tempfile
from pathlib import Path

from profiler.agent.supervise import RefusedError
from profiler.processes.generations import clock_offsets
from storage.profile import Host
from symbolizer.digest import blake2b

_FILES, _FILES_OF_CPU = 256, 4
"""What a sampler has open at most: a descriptor for each table that it keeps, for maps of the
kernel, and for events and rings of each CPU."""

log = logging.getLogger(__name__)


def this_host() -> Host:
    """Return the name of this host and an id that stays over restarts (from machine-id(5))."""
    name = socket.gethostname()
    seed = name
    for path in (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id")):
        if path.is_file() and (text := path.read_text().strip()):
            seed = text
            break
    # machine-id(5) asks for a keyed hash wherever the id leaves the host.
    return Host(name, blake2b(seed.encode(), digest_size=8, key=b"everflame").hexdigest())


def default_cache() -> Path:
    """Return where symbol tables are kept from one run to the next."""
    if chosen := os.environ.get("EVERFLAME_CACHE"):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/var/cache/everflame")
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "everflame"


def open_cache(folder: Path) -> tuple[Path, "tempfile.TemporaryDirectory[str] | None"]:
    """Return the cache folder, or a temporary one if it cannot be written to."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder, None
    except OSError as error:
        log.warning(
            "cannot write to the cache folder %s: %s; symbols and unwind tables will be built again"
            " next time (set EVERFLAME_CACHE to a folder that can be written)",
            folder,
            error.strerror,
        )
        temporary = tempfile.TemporaryDirectory(prefix="everflame-")
        return Path(temporary.name), temporary


def allow_open_files() -> None:
    """Raise this process's own limit on open files to what sampling needs, if it is lower.

    Raises:
        RefusedError: it cannot be raised so far.
    """
    needed = _FILES + _FILES_OF_CPU * (os.cpu_count() or 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
    if allowed < needed:
        raise RefusedError(
            f"cannot sample: this process may open only {hard} files (allow {needed}:"
            f" `ulimit -n {needed}`, or LimitNOFILE={needed} in a systemd unit)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def refuse_time_namespace() -> None:
    """Refuse to sample where the clocks differ from those that samples carry.

    Raises:
        RefusedError: they do.
    """
    if offsets := clock_offsets():
        differ = " and ".join(f"{name} by {seconds} s" for name, seconds in offsets.items())
        raise RefusedError(
            f"cannot sample in a time namespace: its clocks differ from the kernel's ({differ});"
            " start the profiler outside it"
        )
