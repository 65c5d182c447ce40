"""What all tests share: when a test cannot run here, and how hypothesis behaves."""

import gc
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from playwright.sync_api import Browser
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.support.browser import CHROMIUM, Contexts, View, chromium, visiting
from tests.support.weed import Weed

pytest_plugins = ["tests.support.javascript"]

# Their tests share nothing that takes long to make, and mostly wait: each goes to any worker. Those
# of other files stay together, as with --dist=loadfile.
SPREAD = (
    "tests/agent/test_agent.py",
    "tests/commands/test_record.py",
    "tests/commands/test_up.py",
    "tests/storage/blocks/test_killed_compactors.py",
    "tests/symbolizer/test_hostile_files.py",
)

# A busy machine makes single examples slow; what a test may take in all is pytest's timeout.
hypothesis.settings.register_profile("everflame", deadline=None)
hypothesis.settings.load_profile("everflame")


LONGEST_FIRST = (
    "tests/web/test_page.py",
    "tests/web/test_compare_page.py",
    "tests/agent/test_uploader.py",
    "tests/formats/test_speedscope.py",
    "tests/service/test_connections.py",
    "tests/storage/blocks/test_killed_compactors.py",
    "tests/storage/blocks/test_merges.py",
    "tests/storage/query/test_workers.py",
    "tests/symbolizer/test_hostile_files.py",
)
"""Files of a quarter of a minute and more: begun last, one would leave other workers idle."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine or this user cannot run, and say what was missing."""
    if hasattr(config, "workerinput"):
        places = {file: place for place, file in enumerate(LONGEST_FIRST)}
        items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))
    missing = {}
    if os.geteuid() != 0:
        missing["kernel"] = "loading BPF programs needs root: run ./check"
    if not shutil.which(CHROMIUM):
        missing["browser"] = f"no browser: install the package {Path(CHROMIUM).name}"
    for item in items:
        for mark, reason in missing.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))
    sources = {path: path.read_text() for path in {item.path for item in items}}
    for item in items:
        for mark in ("kernel", "alone"):
            if item.get_closest_marker(mark) and f"mark.{mark}" not in sources[item.path]:
                raise pytest.UsageError(
                    f"check misses {item.nodeid}: write mark.{mark} in its file"
                )


class Scheduling(LoadScopeScheduling):
    """Hand out tests by files, or one by one where `SPREAD` says so; the largest share first."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if file in SPREAD else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let no test be lost: of several with one name, workers run the last.

    What is there by now stays to the end, and the garbage collector need not look at it again.
    """
    gc.collect()
    gc.freeze()
    names = [item.nodeid for item in session.items]
    if hasattr(session.config, "workerinput") and len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise pytest.UsageError(f"several tests are called {twice}: mark them as alone")


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    """Run one S3 server for all tests; each keeps its objects below a prefix of its own."""
    server = Weed(tmp_path_factory.mktemp("weed"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def go(tmp_path: Path) -> Callable[..., str]:
    """Run Go's tools, which include the pprof that everybody has."""
    found = shutil.which("go")
    if found is None:
        pytest.skip("no go: install the package golang-go")
    cache = subprocess.run([found, "env", "GOCACHE"], check=True, capture_output=True, text=True)
    environment = {
        **os.environ,
        # Go builds its pprof when it is first used, for a minute of CPU time: it is kept where
        # other tests have the same libraries compiled, which are those without C.
        "GOCACHE": cache.stdout.strip(),
        "CGO_ENABLED": "0",
        "GOFLAGS": "",
        "GOTOOLCHAIN": "local",
        "GOTELEMETRY": "off",
        "PPROF_TMPDIR": str(tmp_path),
        "HOME": str(tmp_path),
    }

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(
            [found, *arguments],
            check=False,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def contexts(browser: Browser) -> Contexts:
    return Contexts(browser)


@pytest.fixture
def visit(contexts: Contexts) -> Iterator[Callable[..., View]]:
    with visiting(contexts) as open_view:
        yield open_view
