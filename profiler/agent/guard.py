"""Guard: a stage of the agent's loop fails by itself, and neither stops the others nor spins."""

import logging
import time
from collections.abc import Callable

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0

log = logging.getLogger(__name__)


class Guard:
    """Runs one stage, and counts what it raises.

    A stage that fails twice in a row is paused, each time for longer. Its first fault is logged,
    with a traceback if it is to have one; the same fault again only with its count, at 2, 4, 8 and
    so on.

    Attributes:
        faults: how often the stage has failed.
    """

    def __init__(
        self,
        stage: str,
        longest_pause_s: float = LONGEST_PAUSE_S,
        *,
        has_traceback: bool = True,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.faults = 0
        self._stage = stage
        self._longest_pause_s = longest_pause_s
        self._has_traceback = has_traceback
        self._monotonic_s = monotonic_s
        self._in_a_row = 0
        self._known = ""
        self._times = 0
        self.resumes_s = 0.0
        """Before this time (`monotonic_s`) the stage is not run."""

    @property
    def is_paused(self) -> bool:
        return self._monotonic_s() < self.resumes_s

    def resume(self) -> None:
        """End the pause: the next `run` runs the stage."""
        self.resumes_s = 0.0

    def run(self, stage: Callable[[], object]) -> bool:
        """Run the stage, unless it is paused; return whether it has run and succeeded."""
        if self.is_paused:
            return False
        try:
            stage()
        except Exception as error:  # noqa: BLE001 - the single place that survives
            self._note(error)
            return False
        if self._in_a_row:
            log.info("recovered stage=%s faults=%d", self._stage, self._in_a_row)
        self._in_a_row = 0
        return True

    def _note(self, error: Exception) -> None:
        self.faults += 1
        self._in_a_row += 1
        if self._in_a_row > 1:
            pause_s = min(FIRST_PAUSE_S * 2.0 ** min(self._in_a_row - 2, 20), self._longest_pause_s)
            self.resumes_s = self._monotonic_s() + pause_s
        described = f"{type(error).__name__}: {error}"
        if described != self._known:
            self._known, self._times = described, 1
            if self._has_traceback:
                log.error("survived a fault stage=%s", self._stage, exc_info=error)
            else:
                log.error("survived a fault stage=%s error=%s", self._stage, described)
            return
        self._times += 1
        if self._times & (self._times - 1) == 0:
            log.error(
                "survived a fault stage=%s times=%d error=%s", self._stage, self._times, error
            )
