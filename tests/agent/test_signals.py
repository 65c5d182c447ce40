"""Signals as values: those that ask to end, and the one that nohup has asked to ignore."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from profiler.agent.signals import ENDING, Signals

SCRIPT = """
import os, signal, time
from profiler.agent.signals import Signals
with Signals() as signals:
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
    print(signals.wait(time.monotonic() + 30).name)
"""


@pytest.mark.parametrize("number", sorted(ENDING))
def test_each_signal_that_asks_to_end_is_met_once(number) -> None:
    handler = signal.getsignal(number)
    with Signals() as signals:
        os.kill(os.getpid(), number)

        assert signals.wait(time.monotonic() + 30) is number
        assert signals.wait(time.monotonic()) is None

    assert signal.getsignal(number) == handler


@pytest.mark.parametrize(("before", "met"), [([], "SIGHUP"), (["nohup"], "SIGTERM")])
def test_a_hangup_that_is_ignored_at_the_start_stays_ignored(before, met) -> None:
    """The next signal is the first that is met."""
    child = subprocess.run(
        [*before, sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )

    assert child.stdout == f"{met}\n"


def test_a_descriptor_that_may_rest_is_met_afterwards() -> None:
    """What comes until then gathers; another descriptor, or a signal, is met at once."""
    with Signals() as signals:
        resting, urgent = os.pipe(), os.pipe()
        signals.watch(resting[0], may_rest=True)
        signals.watch(urgent[0])
        os.write(resting[1], b"x")
        begun_s = time.monotonic()

        signals.wait(begun_s + 30, rest_until_s=begun_s + 0.2)
        rested_s = time.monotonic() - begun_s
        os.write(urgent[1], b"x")
        signals.wait(begun_s + 60, rest_until_s=begun_s + 60)
        os.read(urgent[0], 1)
        os.kill(os.getpid(), signal.SIGTERM)
        met = signals.wait(begun_s + 60, rest_until_s=begun_s + 60)

        assert 0.2 <= rested_s < 30
        assert met is signal.SIGTERM
        assert time.monotonic() - begun_s < 60
        for fd in (*resting, *urgent):
            os.close(fd)
