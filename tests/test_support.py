"""What tests are built on, where a fault of it would go unseen."""

import subprocess
import sys
from pathlib import Path

from tests.support.live import stat_fields, wait_for

PARENT = """
import subprocess, time
from tests.support.targets import ending_with_us
print(subprocess.Popen(ending_with_us("sleep", "1000")).pid, flush=True)
time.sleep(1000)
"""


def has_ended(pid: int) -> bool:
    try:
        return stat_fields(pid)[0] == b"Z"
    except FileNotFoundError:
        return True


def test_servers_end_with_a_test_run_that_is_killed() -> None:
    """It cannot stop them, and they would go on for days."""
    command = [sys.executable, "-c", PARENT]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) as parent:
        server = int(parent.stdout.readline())
        wait_for(lambda: Path(f"/proc/{server}/comm").read_text() == "sleep\n")

        parent.kill()

        wait_for(lambda: has_ended(server), 30)
