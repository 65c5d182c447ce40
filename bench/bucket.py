"""A bucket of SeaweedFS on this machine that stays in a folder, and counts of its requests."""

import contextlib
import re
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from tests.support.weed import BUCKET, Weed, free_ports, using_keys  # noqa: E402

_MOST_SERVER_PORTS = 30


@dataclass(frozen=True, slots=True)
class Bucket:
    """An S3 server that runs.

    Its counts of requests come from its own metrics: nothing stands between it and its clients.
    """

    endpoint: str
    metrics_port: int

    def url(self, prefix: str) -> str:
        return f"s3://{BUCKET}/{prefix}"

    def counts(self) -> Counter[str]:
        """Return the requests of each type since it was started, and `bytes` that it sent."""
        address = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(address, timeout=20) as response:
            text = response.read().decode()
        found: Counter[str] = Counter()
        mine = rf'bucket="{BUCKET}"'
        for kind, value in re.findall(
            rf'^SeaweedFS_s3_request_total\{{{mine},code="\d+",type="(\w+)"\}} (\S+)$', text, re.M
        ):
            found[kind] += int(float(value))
        for value in re.findall(
            rf"^SeaweedFS_s3_bucket_traffic_sent_bytes_total\{{{mine}\}} (\S+)$", text, re.M
        ):
            found["bytes"] += int(float(value))
        return found


@contextlib.contextmanager
def bucket_in(folder: Path) -> Iterator[Bucket]:
    """Run a server over a folder, which keeps its objects, for the length of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_ports(_MOST_SERVER_PORTS)[-1]
    server = Weed(folder, f"-metricsPort={port}")
    with using_keys():
        server.start()
        try:
            yield Bucket(server.endpoint, port)
        finally:
            server.stop()
