"""Python programs over HTTP: the interpreter's own frames are there when they are asked for."""

from collections import Counter
from dataclasses import replace

import numpy as np
import orjson
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


def lines_in(document: dict) -> set[int]:
    """Return the lines of the boxes of `Shop.price`."""
    return {frame[4] for frame in document["frames"] if frame[0] == "Shop.price"}


def test_boxes_say_where_a_function_begins_or_their_own_line(client):
    """The graph and its download alike, of one side and of two."""
    for group, line in (("function", 20), ("line", 27)):
        for parameters, panel in ((WINDOW, "flamegraph"), (BOTH, "diff")):
            asked = {"group": group, **parameters}
            assert lines_in(client.json(panel, **asked)) == {line}
            _, _, body = client.get("/api/v1/export/p.json", **asked)
            assert lines_in(orjson.loads(body)) == {line}
    for parameters in (WINDOW, BOTH):
        _, _, body = client.get("/api/v1/export/p.folded", group="line", **parameters)
        assert b";shop.pricing.main:75;shop.pricing.Shop.price:27;" in body


def test_a_function_is_found_by_the_name_that_its_box_has(client):
    """With its module, the whole of it or the last part, and by its own name."""
    whole = client.json("flamegraph", by="", focus="Shop.key", **WINDOW)["nodes"]["total"]
    for name in ("shop.pricing.Shop.key", "pricing.Shop.key"):
        shown = client.json("flamegraph", by="", focus=name, **WINDOW)
        assert shown["nodes"]["total"] == whole
        found = client.json("flamegraph", search=name.upper(), **WINDOW)["search"]
        assert (found["total"], found["functions"]) == (whole[0], 1)
        table = client.json("top", search=name, **WINDOW)["functions"]
        assert [row["function"] for row in table] == ["Shop.key"]
        changes = client.json("diff/top", search=name, **BOTH)["functions"]
        assert [row["function"] for row in changes] == ["Shop.key"]


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
