"""Confine: run a program without root's rights, restricted to a few folders.

Run as `python -m profiler.service.confine`.

`everflame up` runs as root and starts programs that need no root: the service, which responds to
requests of other users, and the demo. Before it execs such a program, this launcher drops rights:

- It becomes another user, and `no_new_privs` prevents it from gaining rights again.
- With `--read` it keeps one capability, CAP_DAC_READ_SEARCH: the store is 0700 and stays so. A
  group of readers would have to be set on every file that is already in a store, and on the folders
  above; an idmapped mount needs CAP_SYS_ADMIN and support by the file system. The capability can
  read everything and write nothing.
- Landlock (Linux 5.13; enabled in Debian 12 and 13 and Ubuntu 24.04) restricts that: the program
  can read only the named folders, its own code and what Python needs of the system, and write only
  the folders of `--write`. It cannot read /etc/shadow and /root, capability or not. If the kernel
  has no Landlock, this layer is missing, and a warning says so.

Started by an ordinary user, it drops all capabilities and stays that user; then Landlock alone
protects the store from being written.
"""

import argparse
import ctypes
import errno
import logging
import os
import pwd
import signal
import struct
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

_CAP_SETGID, _CAP_SETUID, _CAP_DAC_READ_SEARCH = 6, 7, 2
_CAPABILITY_VERSION_3 = 0x20080522  # capget(2): two words of 32 capabilities each

# prctl(2)
_PR_SET_PDEATHSIG = 1
_PR_SET_KEEPCAPS = 8
_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 2, 4

# landlock(7); the numbers of its system calls are the same on every architecture.
_NR_CREATE_RULESET, _NR_ADD_RULE, _NR_RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL_DEVICE = 1 << 14, 1 << 15
_RIGHTS_BY_VERSION = (0, 1 << 13, 1 << 14, 1 << 15, 1 << 15, 1 << 16)
"""By version: it knows the rights below this bit. Later versions add none for files."""
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEVICE
_READ = _EXECUTE | _READ_FILE | _READ_DIR

_SYSTEM = (
    *("/usr", "/lib", "/lib64", "/bin", "/sbin", "/proc", "/sys/devices/system"),
    "/sys/fs/cgroup",  # DuckDB reads its limits there, and fails where it may not
    *("/dev/urandom", "/dev/random", "/dev/zero"),
    # The rest of /etc is configuration of other programs, and passwords.
    *("/etc/ld.so.cache", "/etc/localtime", "/etc/timezone", "/etc/passwd", "/etc/group"),
    *("/etc/hosts", "/etc/host.conf", "/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/gai.conf"),
    *("/etc/services", "/etc/mime.types", "/etc/ssl", "/etc/ca-certificates"),
    "/run/systemd/resolve",
)
_SYSTEM_WRITTEN = ("/dev/null", "/dev/shm")  # noqa: S108 - where semaphores of multiprocessing are

_libc = ctypes.CDLL(None, use_errno=True)
log = logging.getLogger(__name__)


class ConfineError(Exception):
    """The program cannot be confined as asked; the message says what to do."""


def main() -> int:
    """Confine this process, then become the command."""
    logging.basicConfig(format="everflame: %(message)s")
    options = _parse_options()
    try:
        confine(options.user, options.read, options.write)
        # Last: a change of user clears it (prctl(2)).
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != options.parent:
            return 0  # the parent died before prctl could report it
        os.execv(options.command[0], options.command)  # noqa: S606 - it is what was asked
    except (ConfineError, OSError) as error:
        log.error("%s", error)
    return 2


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m profiler.service.confine")
    parser.add_argument("--user", default="")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--read", type=Path, action="append", default=[])
    parser.add_argument("--write", type=Path, action="append", default=[])
    parser.add_argument("command", nargs="+")
    return parser.parse_args()


def confine(user: str, read: Sequence[Path], write: Sequence[Path]) -> None:
    """Drop all rights except to read and to write these folders.

    Raises:
        ConfineError: this process may not do so.
    """
    ruleset = _make_ruleset(read, write)  # opens its folders while it still may
    if os.geteuid() == 0:
        _become(user, {_CAP_DAC_READ_SEARCH} if read else set())
    else:
        _set_capabilities(set())
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if ruleset is None:
        log.warning("this kernel has no Landlock: the service can read files outside the store")
    elif _libc.syscall(_NR_RESTRICT_SELF, ruleset, 0) != 0:
        raise ConfineError(f"cannot restrict files: {os.strerror(ctypes.get_errno())}")
    else:
        os.close(ruleset)


def _become(user: str, kept: set[int]) -> None:
    account = pwd.getpwnam(user)
    held = capabilities()
    for name, number in (("SETUID", _CAP_SETUID), ("SETGID", _CAP_SETGID)):
        if number not in held:
            raise ConfineError(
                f"cannot become {user}: CAP_{name} is missing (add it, or run"
                " everflame agent here and everflame serve elsewhere)"
            )
    if not kept <= held:
        raise ConfineError(
            "cannot read the store as another user: CAP_DAC_READ_SEARCH is missing (add it, as"
            " with docker run --cap-add DAC_READ_SEARCH, or run everflame agent without a page)"
        )
    for number in range(64):
        # Without CAP_SETPCAP it stays; no_new_privs makes it useless.
        if number not in kept and _libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) == 1:
            _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    _prctl(_PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
    os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)
    _set_capabilities(kept)


def capabilities() -> set[int]:
    """Return the effective capabilities of this process."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    sets = ctypes.create_string_buffer(24)
    if _libc.capget(header, sets) != 0:
        return set()
    low, _, _, high, _, _ = struct.unpack("=6I", sets.raw)
    effective = low | high << 32
    return {number for number in range(64) if effective >> number & 1}


def _set_capabilities(kept: set[int]) -> None:
    """Hold only these, as ambient ones, which survive execve(2)."""
    bits = sum(1 << number for number in kept)
    low, high = bits & 0xFFFFFFFF, bits >> 32
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    if _libc.capset(header, struct.pack("=6I", low, low, low, high, high, high)) != 0:
        raise ConfineError(f"cannot drop capabilities: {os.strerror(ctypes.get_errno())}")
    for number in kept:
        if _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0) != 0:
            raise ConfineError(f"cannot keep a capability: {os.strerror(ctypes.get_errno())}")


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise ConfineError(f"cannot confine: {os.strerror(ctypes.get_errno())}")


def _make_ruleset(read: Iterable[Path], write: Iterable[Path]) -> int | None:
    """Return the descriptor of a Landlock ruleset; None if the kernel has no Landlock."""
    version = _libc.syscall(_NR_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    if version < 1:
        return None
    end = _RIGHTS_BY_VERSION[min(version, len(_RIGHTS_BY_VERSION) - 1)]
    handled = end - 1
    attributes = struct.pack("=Q", handled)
    ruleset: int = _libc.syscall(_NR_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return None
    code = {sys.prefix, sys.base_prefix, *filter(None, sys.path)}
    for path in (*map(Path, _SYSTEM), *map(Path, sorted(code)), *read):
        _allow(ruleset, path, handled & _READ)
    for path in (*map(Path, _SYSTEM_WRITTEN), *write):
        _allow(ruleset, path, handled)
    return ruleset


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            return  # a missing path needs no rule
        raise
    try:
        rights &= ~0 if path.is_dir() else _OF_FILES
        rule = struct.pack("=Qi", rights, fd)
        if _libc.syscall(_NR_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0) != 0:
            reason = os.strerror(ctypes.get_errno())
            raise ConfineError(f"cannot allow {path}: {reason}")
    finally:
        os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
