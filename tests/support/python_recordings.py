"""Recordings of Python processes: one recorder, which is told whom to sample."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from bpf.sampler import SamplerConfig
from profiler.agent.recorder import Recorder
from storage.profile import Profile
from symbolizer.location import Frame, Kind
from tests.support.python_stacks import PythonFrame, PythonStack

HZ = 499
_STEP_S = 0.2
_LONGEST_S = 150

_Result = TypeVar("_Result")


class Recording:
    """Not to be used from several threads at once.

    Attributes:
        recorder: samples only processes that it was told of, and what these start.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def meanwhile(self, work: Callable[[], _Result]) -> _Result:
        """Have other work done while the recorder does its own, without which it falls behind."""
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(work)
            while not done.done():
                self.recorder.step()
                time.sleep(_STEP_S)
        return done.result()

    def for_a_while(self, seconds: float) -> Profile:
        """Return what is sampled from the last window's end to so much later."""
        self.meanwhile(lambda: time.sleep(seconds))  # ticks are what is waited for
        return self.recorder.close_window()

    def until(self, is_enough: Callable[[list[Profile]], bool], what: str) -> list[Profile]:
        """Close one window after the other until they are enough; return all of them."""
        end_s, found = time.monotonic() + _LONGEST_S, [self.for_a_while(0.3)]
        while not is_enough(found):
            assert time.monotonic() < end_s, f"waited {_LONGEST_S} s for {what}"
            found.append(self.for_a_while(0.7))
        return found

    def settle(self, *pids: int) -> None:
        """Have processes sampled until the kernel knows where the frames of each are.

        What is recorded from then on is a steady state.
        """
        self.recorder.sampler.select(pids)
        self.recorder.step()
        self.recorder.close_window()  # one of them may have been another program until now
        waiting = set(pids)

        def are_known(profiles: list[Profile]) -> bool:
            waiting.difference_update(
                pid for pid in [*waiting] if any(stacks_of(profiles[-1:], pid))
            )
            return not waiting

        self.until(are_known, f"Python frames of {pids}")
        self.recorder.close_window()


@contextlib.contextmanager
def recording(cache: Path) -> Iterator[Recording]:
    config = SamplerConfig(frequency_hz=HZ, pids=frozenset())
    with Recorder(config, cache) as recorder:
        recorder.start()
        yield Recording(recorder)


def frames_of(
    profiles: Iterable[Profile], pid: int | None = None
) -> Iterator[tuple[tuple[Frame, ...], int]]:
    """Return the stacks of a process, or of all, root first, with their samples."""
    for profile in profiles:
        bounds = list(pairwise(profile.stack_offsets.tolist()))
        names = [profile.frames(number)[::-1] for number in range(len(profile.locations))]
        for labels, stack, samples in zip(
            profile.row_labels.tolist(),
            profile.row_stacks.tolist(),
            profile.row_samples.tolist(),
            strict=True,
        ):
            if pid in {None, int(dict(profile.label_sets[labels]).get("pid", 0))}:
                places = profile.stack_locations[slice(*bounds[stack])].tolist()
                yield tuple(frame for place in places for frame in names[place]), samples


def stacks_of(profiles: Iterable[Profile], pid: int | None = None) -> Counter[PythonStack]:
    """Return the Python frames of the stacks of a process, or of all, with samples.

    Samples without user frames do not count: those of a program that is being loaded or ends.
    """
    found: Counter[PythonStack] = Counter()
    for stack, samples in frames_of(profiles, pid):
        if any(frame.kind is not Kind.KERNEL for frame in stack):
            python = (frame for frame in stack if frame.kind is Kind.PYTHON)
            found[tuple(PythonFrame(f.function, f.file, f.line) for f in python)] += samples
    return found
