"""What readers can be asked for, with names that come late or are damaged.

`cache/hold` lets every request for names wait until it is gone, `cache/garble` says as JSON what is
put into the answers to them, and `cache/garble-files` damages what is said of files.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from profiler.agent import reader_kinds
from profiler.agent.reader import Read


def kinds(cache: Path) -> Mapping[str, Read]:
    known = dict(reader_kinds.kinds(cache))
    read = known["names"]

    def names(values: Mapping[str, Any]) -> Any:
        while (cache / "hold").exists():
            time.sleep(0.01)
            sum(range(10_000))  # one that uses no CPU time hangs
        answer = read(values)
        if (cache / "garble").exists():
            return {**answer, **json.loads((cache / "garble").read_text())}
        return answer

    def identify(values: Mapping[str, Any]) -> Any:
        answer = known["file"](values)
        if (cache / "garble-files").exists():
            return {**answer, "segments": [[float("inf"), 0, 0]]}
        return answer

    return {**known, "names": names, "file": identify}
