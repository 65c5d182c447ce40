"""Draw the README's picture: all CPUs for 20 s while ten different programs run.

Run as root, from anywhere: `python bench/picture.py`.
"""

import subprocess
import sys
from pathlib import Path

from load import ten_programs

EVERFLAME = Path(sys.executable).with_name("everflame")
README_SVG = Path(__file__).parent.parent / "README.svg"


def main() -> None:
    with ten_programs():
        subprocess.run([EVERFLAME, "record", "-a", "--for", "20s", "-o", README_SVG], check=True)


if __name__ == "__main__":
    main()
