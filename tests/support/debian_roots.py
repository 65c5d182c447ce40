"""Folders with programs of Debian's newest release, made by apt without being installed.

apt fetches a package and all that it needs, the C library too, into a folder of its own; nothing
of the machine changes. Signatures and hashes are checked as ever, by the keys of the package
debian-archive-keyring. The mirror is the one in the machine's own sources.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".cache" / "roots"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_UPDATE_S, _DOWNLOAD_S, _UNPACK_S, _LOCK_S = 60, 90, 60, 100
_REFUSED_FOR_S = 3600
"""For how long a failure is believed: not every test waits for a mirror that is not there."""

# The hooks that some images add look after the machine's own lists and archives.
_CONFIGURATION = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "1";
Acquire::http::Timeout "15";
Acquire::https::Timeout "15";
Dir::State "{apt}";
Dir::State::Lists "{apt}/lists";
Dir::State::status "{apt}/status";
Dir::Cache "{apt}";
Dir::Etc::sourcelist "{apt}/sources.list";
Dir::Etc::sourceparts "-";
"""


class CannotFetchError(Exception):
    """Says why packages cannot be had here."""


def fetch_root(name: str, release: str, packages: Sequence[str]) -> Path:
    """Return the folder `name` of the cache with packages of a release, made if it is not there.

    It is not brought up to date: removing it is enough to have it made anew.

    Raises:
        CannotFetchError: this is no Debian on x86-64, or its mirror did not answer in time.
    """
    return fetch_once(name, lambda root: _make(root, release, packages))


def fetch_once(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder `name` of the cache, made on the first call of all.

    A failure is believed for an hour. Processes that ask at the same time wait for the first.

    Raises:
        CannotFetchError: it cannot be made here, and `make` says why.
    """
    root, refusal = CACHE / name, CACHE / f"{name}.refused"
    if root.exists():
        return root
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(CACHE / f"{name}.lock"):
        if not root.exists():
            _refuse_again(refusal)
            try:
                make(root)
            except CannotFetchError as error:
                refusal.write_text(str(error))
                raise
    return root


def _refuse_again(refusal: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if time.time() - refusal.stat().st_mtime < _REFUSED_FOR_S:
            raise CannotFetchError(refusal.read_text())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    deadline_s = time.monotonic() + _LOCK_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise CannotFetchError(f"another process holds {path}") from None
                time.sleep(0.1)
        yield


def _make(root: Path, release: str, packages: Sequence[str]) -> None:
    apt, unfinished = root.with_suffix(".apt"), root.with_suffix(".new")
    for folder in (apt, unfinished):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        _configure(apt, release)
        _apt(apt, _UPDATE_S, "update")
        options = ("--yes", "--no-install-recommends", "--download-only")
        _apt(apt, _DOWNLOAD_S, "install", *options, *packages)
        _unpack(sorted((apt / "archives").glob("*.deb")), unfinished)
        unfinished.rename(root)
    finally:
        for folder in (apt, unfinished):
            shutil.rmtree(folder, ignore_errors=True)


def _configure(apt: Path, release: str) -> None:
    """Write apt's own folder: sources of one release, no package installed yet."""
    source = f"deb [signed-by={KEYRING} target=Packages] {mirror()} {release} main\n"
    for folder in ("lists/partial", "archives/partial"):
        (apt / folder).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(source)
    (apt / "apt.conf").write_text(_CONFIGURATION.format(apt=apt))


def mirror() -> str:
    """Return the address that this machine has its Debian from.

    Raises:
        CannotFetchError: this is no Debian on x86-64, or apt knows no address.
    """
    release = {}
    with contextlib.suppress(FileNotFoundError):
        lines = Path("/etc/os-release").read_text().splitlines()
        release = dict(line.split("=", 1) for line in lines if "=" in line)
    if release.get("ID") != "debian":
        raise CannotFetchError("this is not Debian")
    if os.uname().machine != "x86_64":
        raise CannotFetchError("this is not an x86-64 machine")
    if not KEYRING.exists():
        raise CannotFetchError(f"{KEYRING} is missing: install debian-archive-keyring")
    wanted = ("Identifier: Packages", f"Release: {release['VERSION_CODENAME']}")
    found = run(["apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted], 20)
    if not found:
        raise CannotFetchError("apt's sources name no mirror of this release")
    return found.splitlines()[0]


def _apt(apt: Path, timeout_s: float, *arguments: str) -> None:
    # apt reads the file of -c last, so that it overrules the machine's own.
    run(["apt-get", "-qq", f"-c={apt}/apt.conf", *arguments], timeout_s)


def _unpack(archives: Sequence[Path], root: Path) -> None:
    # Since 2023 the packages expect these links, which base-files makes.
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    (root / "tmp").mkdir()
    deadline_s = time.monotonic() + _UNPACK_S
    for archive in archives:
        run(["dpkg-deb", "-x", archive, root], max(1, deadline_s - time.monotonic()))


def run(command: Sequence[str | Path], timeout_s: float, folder: Path | None = None) -> str:
    """Run a program that fetches or compiles, in a folder, and return what it prints.

    Raises:
        CannotFetchError: it failed, is missing, or did not end in time.
    """
    try:
        child = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            cwd=folder,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
        )
    except subprocess.TimeoutExpired:
        raise CannotFetchError(f"{command[0]} did not end within {timeout_s:.0f} s") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines() or [f"exit code {error.returncode}"]
        raise CannotFetchError(f"{command[0]}: {lines[-1]}") from None
    except FileNotFoundError:
        raise CannotFetchError(f"{command[0]} is missing") from None
    return child.stdout
