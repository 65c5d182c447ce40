"""Kill compactors again and again, and count the samples of the store after each round.

    python bench/kill_compactors.py [ROUNDS] [SEED]      default 500 rounds on each store

Two to four compactors at once, on a directory and on SeaweedFS, each killed at a random moment or
before a random change of the store, while objects arrive (tests/support/compaction_rounds.py). It
asserts after each round that every sample is there once, and at the end that all is compacted and
no file is left that no manifest names. Prints how many were killed and how long it took.

A round takes some 4 s of CPU time, so 500 on one store take 20 minutes of two free CPUs, and
several times that beside other work. With `--seconds` no round begins after that time on a store;
then as many rounds as were made are followed by the last checks.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.weed import BUCKET, KEYS, Weed  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", type=int, nargs="?", default=500)
    parser.add_argument("seed", type=int, nargs="?", default=1)
    parser.add_argument("--only", choices=["directory", "bucket"], help="one of the stores")
    parser.add_argument("--seconds", type=float, default=0.0, help="on each store, about")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:  # processes are killed, no machine
        folder = Path(name)
        server = Weed(folder / "weed")
        server.start()
        try:
            for kind, place in (
                ("directory", [f"--store={folder / 'store'}"]),
                ("bucket", [f"--store=s3://{BUCKET}/kill", f"--s3-endpoint={server.endpoint}"]),
            ):
                if options.only not in {None, kind}:
                    continue
                print(f"{kind}: ", end="", flush=True)
                subprocess.run(
                    [
                        sys.executable,
                        "-m",
                        "tests.support.compaction_rounds",
                        f"--folder={folder / f'work-{kind}'}",
                        f"--rounds={options.rounds}",
                        f"--seed={options.seed}",
                        f"--seconds={options.seconds}",
                        *place,
                    ],
                    cwd=ROOT,
                    env={**os.environ, **KEYS, "AWS_EC2_METADATA_DISABLED": "true"},
                    check=True,
                )
        finally:
            server.stop()


if __name__ == "__main__":
    main()
