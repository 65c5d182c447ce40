"""Draw the README's pictures while ten different programs run on all CPUs.

README.svg is a recording of 20 s. README.png is the page over three minutes that the agent stored,
in Debian's Chromium.

Run as root, from anywhere: `python bench/picture.py [svg] [png]`.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from load import ten_programs
from playwright.sync_api import sync_playwright
from serving import serving

EVERFLAME = Path(sys.executable).with_name("everflame")
ROOT = Path(__file__).parent.parent
CHROMIUM = "/usr/bin/chromium"
RECORDED_S = 180


def draw_recording() -> None:
    with ten_programs():
        command = [EVERFLAME, "record", "-a", "--for", "20s", "-o", ROOT / "README.svg"]
        subprocess.run(command, check=True)


def draw_page() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begun = int(time.time())
        with ten_programs():
            command = [EVERFLAME, "agent", "--interval=10s", f"--for={RECORDED_S}s"]
            command += [f"--store={folder / 'store'}", f"--spool={folder / 'spool'}"]
            environment = {**os.environ, "EVERFLAME_RUN": str(folder)}
            subprocess.run(command, env=environment, check=True)
        with serving(str(folder / "store"), folder / "cache") as service, sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 860})
            # The programs start together; what they do then is not what they do all day.
            shown = begun - begun % 10 + 30
            page.goto(f"{service.url}/?from={shown}&until={begun + RECORDED_S}")
            page.wait_for_selector("html[data-state=ready]")
            page.wait_for_timeout(1000)  # the timeline and the table come with answers of their own
            page.screenshot(path=ROOT / "README.png")
            browser.close()


def main() -> None:
    wanted = sys.argv[1:] or ["svg", "png"]
    if "svg" in wanted:
        draw_recording()
    if "png" in wanted:
        draw_page()


if __name__ == "__main__":
    main()
