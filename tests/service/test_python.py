"""Python programs over HTTP: the interpreter's own frames are there when they are asked for."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from storage.profile import Profile
from tests.support.profiles import make_labels
from tests.support.python_profiles import LOOP, STACKS, profile_of
from tests.support.services import service
from tests.support.stores import MINUTE_NS, at, directory, minutes

END, LENGTH = 40, 2
FROM, MIDDLE, UNTIL = (
    str(minutes(each, END).start_ns // 1_000_000) for each in (END - 2 * LENGTH, END - LENGTH, END)
)
WINDOW = {"from": FROM, "until": UNTIL}
BOTH = {"from": MIDDLE, "until": UNTIL, "before_from": FROM, "before_until": MIDDLE}
ENDING = (".folded", ".speedscope.json", ".svg", ".json")


def shop(rng: np.random.Generator, number: int, host: int) -> Profile:
    """Return a minute of the shop; in the last ones the loop takes longer for the prices."""
    stacks = [
        (names, int(rng.poisson(40 * samples * (2 if number >= END - LENGTH and is_price else 1))))
        for names, samples in STACKS
        for is_price in (names[-1] == "py:Shop.price",)
    ]
    made = profile_of(stacks, service="shop", comm="python3")
    present = {make_labels({"service": "shop"}): MINUTE_NS}
    accounting = replace(made.accounting, services=present)
    return at(replace(made, accounting=accounting), number, f"web-{host}", f"{host:016x}")


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("python")
    rng = np.random.default_rng(5)
    directory(folder / "store", *(shop(rng, i, host) for i in range(END) for host in range(2)))
    with service(folder) as (_, client):
        yield client


def graph(client, **parameters) -> Counter[str]:
    """Return the totals of the boxes by their name."""
    shown = client.json("flamegraph", **parameters)
    found: Counter[str] = Counter()
    for frame, own in zip(shown["nodes"]["frame"], shown["nodes"]["self"], strict=True):
        found[shown["frames"][frame][0]] += own
    return found


def test_the_graph_and_the_table_agree_with_and_without_the_interpreters_frames(client):
    """Self time of the loop is that of Python functions; nothing is lost."""
    for native in ("0", "1"):
        selves = +graph(client, python_native=native, **WINDOW)
        table = client.json("top", python_native=native, **WINDOW)
        tabled = {row["function"]: row["self"] for row in table["functions"] if row["self"]}

        assert tabled == selves
        assert sum(selves.values()) == table["total"]
        assert (LOOP in tabled) == (native == "1")


def test_the_table_is_the_same_before_and_after_the_stacks_are_read(client):
    """It comes from totals of functions at first."""
    only = {"query": '{service="shop"}', **WINDOW}
    first = client.json("top", **only)["functions"]

    graph(client, **only)

    assert client.json("top", **only)["functions"] == first


@pytest.mark.parametrize("ending", ENDING)
def test_downloads_have_what_the_graph_shows(client, ending):
    """With and without."""
    for native in ("0", "1"):
        _, _, body = client.get(f"/api/v1/export/p{ending}", python_native=native, **WINDOW)
        assert (LOOP.encode() in body) == (native == "1")


def test_a_function_whose_loop_took_longer_costs_more(client):
    """In the table and in both graphs, where its loop is drawn with the function's verdict."""
    changed = client.json("diff/top", **BOTH)["functions"]
    verdicts = {row["function"]: row["verdict"] for row in changed}
    assert verdicts["Shop.price"] == "more"
    assert LOOP not in verdicts

    for native in ("0", "1"):
        diff = client.json("diff", python_native=native, by="", **BOTH)
        nodes, names = diff["nodes"], diff["verdicts"]
        shown = {
            (diff["frames"][frame][0], names[verdict])
            for frame, verdict in zip(nodes["frame"], nodes["verdict"], strict=True)
        }
        assert ("Shop.price", "more") in shown
        loops = {verdict for name, verdict in shown if name == LOOP}
        assert bool(loops) == (native == "1")


def test_both_graphs_have_the_same_total(client):
    """Only the number of boxes differs."""
    native, folded = (
        client.json("flamegraph", by="", python_native=each, **WINDOW)["nodes"]["total"]
        for each in ("1", "0")
    )

    assert native[0] == folded[0]
    assert len(native) > len(folded)
