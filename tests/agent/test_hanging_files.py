"""A file system that does not answer: its files stay unknown, and sampling goes on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bpf.sampler import SamplerConfig
from profiler.agent.reader_child import Answer, Failure
from profiler.agent.readers import Readers
from profiler.agent.recorder import Recorder
from profiler.processes.programs import Program
from profiler.processes.versions import Versions
from symbolizer import identify
from symbolizer.files import OpenedFile, ProcessFiles
from symbolizer.location import Miss
from symbolizer.maps import read_maps
from symbolizer.symbols.elf import FileSource, read_elf
from tests.support.elf_files import build
from tests.support.file_systems import drop_caches, hanging
from tests.support.live import cpu_s, started, wait_for
from tests.support.targets import running

pytestmark = pytest.mark.kernel

SPIN = """
#include <unistd.h>
volatile long n;
int spin(void) {
  while (n >= 0)
    if (n++ == 1000 && write(1, "!", 1) != 1)
      return 0;
  return 1;
}
int main(void) { %s }
"""
EVERFLAME = Path(sys.executable).with_name("everflame")


def test_sampling_goes_on_beside_a_file_system_that_does_not_answer(tmp_path):
    """A program on it that is busy is sampled without names; all else as before."""
    content = build(tmp_path / "content", SPIN % "return spin();")
    other = build(tmp_path / "other", SPIN % "return spin() + 1;")
    with (
        hanging(tmp_path / "mount", content) as hung,
        running(hung.file, stdout=subprocess.PIPE) as one,
        running(other, stdout=subprocess.PIPE) as two,
        hung.ending(),
    ):
        for process in (one, two):
            # Before that it would wait for the page of its own code, and never be on a CPU.
            assert process.stdout.read(1) == b"!"
        drop_caches(hung.file)
        hung.flag.touch()
        pids = frozenset({one.pid, two.pid})
        with Recorder(SamplerConfig(499, pids=pids), tmp_path / "cache") as recorder:
            recorder.start()
            wait_for(lambda: stepped(recorder)["failed"] == 1)
            recorder.close_window()
            wait_for(is_sampled(recorder, one.pid))
            wait_for(is_sampled(recorder, two.pid))
            accounting = recorder.close_window().accounting

        output = tmp_path / "recorded.folded"
        command = [EVERFLAME, "record", "-p", f"{one.pid}", "--for", "60s", "-o", output]
        environment = {**os.environ, "EVERFLAME_CACHE": str(tmp_path / "cache")}
        ready, theirs = os.pipe()
        with running(
            *command,
            "--ready-fd",
            str(theirs),
            pass_fds=[theirs],
            env=environment,
            stderr=subprocess.DEVNULL,
        ) as recording:
            os.close(theirs)
            os.read(ready, 1)
            os.close(ready)
            used_s = cpu_s(one.pid)
            wait_for(lambda: cpu_s(one.pid) > used_s + 0.3)
            recording.send_signal(signal.SIGTERM)
            assert recording.wait(30) == 0

    assert accounting.mismatch == 0
    assert accounting.misses.get(str(Miss.NO_ANSWER), 0) >= 1
    assert accounting.stops["root"] > 50
    assert output.read_text()


@pytest.mark.alone
def test_no_time_is_spent_on_readers_that_hang(tmp_path):
    """Several that were found to hang at once had held the sampler up for 50 ms each."""
    answers: list[Answer] = []
    with (
        hanging(tmp_path / "mount", Path("/bin/sleep")) as hung,
        contextlib.closing(Readers(tmp_path, kinds="tests.support.reader_kinds")) as readers,
        hung.ending(),
    ):
        drop_caches(hung.file)
        hung.flag.touch()
        for number in range(3):
            place = {"turn": 0, "group": f"{number}", "owner": f"{number}"}
            readers.ask("open", {"path": str(hung.file)}, answers.append, **place)
        wait_for(lambda: readers.poll() or readers.status()["children"] == 3)
        longest_s, deadline_s = 0.0, time.monotonic() + 30
        while len(answers) < 3 and time.monotonic() < deadline_s:
            time.sleep(2.5)  # so that several are given up by one poll
            begun_s = time.monotonic()
            readers.poll()
            longest_s = max(longest_s, time.monotonic() - begun_s)

    assert [answer.failure for answer in answers] == [Failure.HUNG] * 3
    assert longest_s < 0.1


@pytest.mark.parametrize("reader", ["mapping", "version"])
def test_a_file_system_that_ends_while_its_file_is_open_is_no_fault(reader, tmp_path):
    """FUSE asks its server even when a file is closed, which fails when that has ended."""
    content = build(tmp_path / "content", SPIN % "return spin();")
    with content.open("rb") as file:
        build_id = read_elf(FileSource(file.fileno())).build_id
    with hanging(tmp_path / "mount", content) as hung, started(hung.file) as process:

        class Ending(ProcessFiles):
            def open_executable(self) -> OpenedFile | None:
                opened = super().open_executable()
                hung.server.kill()
                hung.server.wait()
                return opened

        if reader == "version":
            with Ending(process.pid) as files:
                found = Versions().read(files, Program("file", is_own_code=True))
        else:
            with Path(f"/proc/{process.pid}/maps").open("rb") as file:
                mapping = next(
                    each for each in read_maps(file.fileno()) if each.path == bytes(hung.file)
                )
            values = {
                "pids": [process.pid],
                "start": mapping.start,
                "end": mapping.end,
                "offset": mapping.file_offset,
                "path": str(hung.file),
                "build_id": "",
                "device": list(mapping.device),
                "inode": mapping.inode,
            }
            identifier = identify.Identifier()
            with identifier.opened(values) as opened:
                hung.server.kill()
                hung.server.wait()
                found = identifier.identify(opened)

    assert found.build_id == build_id


def is_sampled(recorder: Recorder, pid: int) -> Callable[[], bool]:
    """Return whether a process has used a CPU for as long as 100 ticks take, from now on."""
    until_s = cpu_s(pid) + 100 / recorder.config.frequency_hz

    def is_reached() -> bool:
        stepped(recorder)
        return cpu_s(pid) >= until_s

    return is_reached


def stepped(recorder: Recorder) -> dict[str, int]:
    recorder.catch_up()
    recorder.step()
    return recorder.files.status()
