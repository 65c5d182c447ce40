"""Real Python programs under load, each from packages in a virtual environment made for it.

gunicorn with Flask and uvicorn with Starlette, each asked by a client of ours without pause; Celery
with a broker in a folder; a NumPy job; pytest and pip in loops.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("gunicorn", "flask", "uvicorn", "starlette", "celery", "numpy", "pytest", "py-spy")
_PORTS = {"gunicorn": 7401, "uvicorn": 7402}

_FLASK = """
from flask import Flask, jsonify

app = Flask(__name__)


def work(n):
    return sum(sorted((i * 7919 % 1009 for i in range(n)), key=lambda i: -i)[:10])


@app.route("/")
def index():
    return jsonify(total=work(3000))
"""
_STARLETTE = """
import asyncio
import json

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route


async def work(n):
    await asyncio.sleep(0)
    return len(json.dumps([{"number": i, "text": str(i) * 3} for i in range(n)]))


async def index(request):
    return JSONResponse({"total": sum(await asyncio.gather(work(300), work(200)))})


app = Starlette(routes=[Route("/", index)])
"""
_CELERY = """
import re
from pathlib import Path

from celery import Celery

folder = Path(__file__).parent / "broker"
folder.mkdir(exist_ok=True)
app = Celery("tasks", broker="filesystem://", broker_transport_options={
    "data_folder_in": str(folder), "data_folder_out": str(folder)})


@app.task(ignore_result=True)
def count(n):
    words = re.findall("[a-z]+", "the quick brown fox " * n)
    return len({word: words.count(word) for word in set(words)})
"""
_PRODUCER = """
import time
from pathlib import Path

from tasks import count, folder

while True:
    if len(list(Path(folder).iterdir())) < 50:
        count.delay(2000)
    else:
        time.sleep(0.01)
"""
_CLIENT = """
import sys, time, urllib.request

while True:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/", timeout=10).read()
    except OSError:
        time.sleep(0.1)
"""
_NUMPY = """
import numpy as np

random = np.random.default_rng(1)


def step(matrix):
    values = np.sort(matrix @ matrix.T, axis=1)
    return np.apply_along_axis(lambda row: row[row > row.mean()].sum(), 1, values)


while True:
    np.fft.fft(step(random.normal(size=(300, 300)))).sum()
"""
_TESTS = """
import pytest


@pytest.fixture
def words(tmp_path):
    (tmp_path / "words").write_text("a b c " * 2000)
    return (tmp_path / "words").read_text().split()


@pytest.mark.parametrize("n", range(200))
def test_words(words, n):
    assert sorted(words, key=lambda word: word)[n] == "a"
"""


class Program(NamedTuple):
    name: str
    command: list[str]
    client: list[str] | None = None
    """What keeps it busy; it is not sampled."""


def make_venv(folder: Path, python: Path) -> Path:
    """Return a virtual environment in `folder` with what the programs need."""
    venv = folder / "venv"
    subprocess.run([python, "-m", "venv", venv], check=True)
    pip = [venv / "bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-compile", *PACKAGES], check=True, timeout=600)
    # What the loop with pip installs again and again.
    wheels = folder / "wheels"
    subprocess.run([*pip, "download", "--dest", wheels, "flask"], check=True, timeout=600)
    return venv


def programs_in(folder: Path, venv: Path) -> Iterator[Program]:
    """Write the programs into a folder and return them."""
    files = {
        "site_flask": _FLASK, "site_starlette": _STARLETTE, "tasks": _CELERY,
        "producer": _PRODUCER, "client": _CLIENT, "job": _NUMPY, "test_words": _TESTS,
    }  # fmt: skip
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    binaries, python = venv / "bin", str(venv / "bin/python")
    # All of them import from the folder that they begin in.
    in_folder = ["env", f"--chdir={folder}"]

    def client(name: str) -> list[str]:
        return [sys.executable, str(folder / "client.py"), str(_PORTS[name])]

    bind = f"--bind=127.0.0.1:{_PORTS['gunicorn']}"
    gunicorn = [f"{binaries}/gunicorn", bind, "--workers=2", "site_flask:app"]
    yield Program("gunicorn + Flask", [*in_folder, *gunicorn], client("gunicorn"))
    port = f"--port={_PORTS['uvicorn']}"
    uvicorn = [f"{binaries}/uvicorn", port, "--log-level=error", "site_starlette:app"]
    yield Program("uvicorn + Starlette", [*in_folder, *uvicorn], client("uvicorn"))
    celery = [f"{binaries}/celery", "--app=tasks", "worker", "--concurrency=2"]
    producer = [*in_folder, python, str(folder / "producer.py")]
    yield Program("Celery", [*in_folder, *celery], producer)
    yield Program("NumPy", [python, str(folder / "job.py")])
    tests = f"cd {folder}; while :; do {binaries}/pytest -q -p no:cacheprovider test_words.py; done"
    yield Program("pytest", ["sh", "-c", tests])
    install = f"{python} -m pip install --no-index --find-links={folder}/wheels --upgrade"
    loop = f"while :; do {install} --target={folder}/target flask; done"
    yield Program("pip", ["sh", "-c", loop])
