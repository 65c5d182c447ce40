"""Paths: what a person asks of a flame graph, held to the slow and obvious way."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from profiler.flamegraph.paths import Paths
from profiler.flamegraph.stacks import Group
from storage.columns import Columns
from symbolizer.location import Kind
from tests.support import profiles as some

Listed = Counter[tuple[str, ...]]


def listed(paths: Paths) -> Listed:
    """Return the values by path, as names."""
    counts: Listed = Counter()
    for boxes, value in zip(rows_of(paths), paths.values.tolist(), strict=True):
        counts[tuple(paths.frames[box].function for box in boxes)] += value
    return counts


def rows_of(paths: Paths) -> list[list[int]]:
    """Return the boxes of each path."""
    lists = paths.shape.lists
    bounds = zip(lists.starts.tolist(), lists.ends.tolist(), strict=True)
    return [lists.boxes[start:end].tolist() for start, end in bounds]


def changed(paths: Paths, change) -> Listed:
    counts: Listed = Counter()
    for names, value in listed(paths).items():
        new = change(names)
        if new is not None:
            counts[new] += value
    return counts


def a_function(paths: Paths, data) -> str:
    names = sorted({frame.function for frame in paths.frames if frame.kind is not Kind.LABEL})
    return data.draw(st.sampled_from(names)) if names else "none"


@given(some.profiles(), st.sampled_from(list(Group)), st.data())
def test_every_question_gives_the_paths_it_says(profile, group, data):
    """Focus, hide, callers and inversion keep what they say, and no label is a function."""
    paths = Paths.of(Columns.of(profile), ("comm", "service"), group)
    name, heads = a_function(paths, data), paths.heads

    def callers(names):
        if name not in names[heads:]:
            return None
        at = max(i for i, each in enumerate(names) if each == name)
        return names[:at][::-1]

    def hidden(names):
        return names[:heads] + tuple(each for each in names[heads:] if each != name)

    assert listed(paths.focus(name)) == changed(paths, lambda n: n if name in n[heads:] else None)
    assert listed(paths.hide(name)) == changed(paths, hidden)
    assert listed(paths.callers(name)) == changed(paths, callers)
    assert listed(paths.inverted()) == changed(paths, lambda n: n[:heads] + n[heads:][::-1])
    assert paths.hide(name).total == profile.total_value


def test_a_service_named_like_a_function_is_no_function():
    """To show only main, or to hide it, leaves what runs in a service main as it is."""
    other = some.named("other")
    paths = Paths.of(
        Columns.of(some.build([({"comm": "main"}, [other], 2)], some.NAMES)), ("comm",)
    )

    assert paths.focus("main").total == 0
    assert listed(paths.hide("main")) == listed(paths)


def test_what_is_looked_at_in_parts_is_the_whole(monkeypatch):
    """However many boxes are taken at a time, the answers are the same."""
    profile = some.synthetic(500, 20, 300)
    whole = Paths.of(Columns.of(profile), ("comm",))
    asked = (
        listed,
        lambda paths: listed(paths.inverted()),
        lambda paths: listed(paths.hide("function_3")),
        lambda paths: listed(paths.callers("function_3")),
        lambda paths: listed(paths.focus("function_3")),
        lambda paths: paths.search("_12"),
        lambda paths: paths.functions(),
    )
    expected = [ask(whole) for ask in asked]

    for boxes in (1, 7, 1000):
        monkeypatch.setattr("profiler.flamegraph.stacks._PART_BOXES", boxes)
        assert [ask(Paths.of(Columns.of(profile), ("comm",))) for ask in asked] == expected


@given(some.profiles(), st.data())
def test_what_stands_on_a_box_is_the_rest_of_its_paths(profile, data):
    """Following boxes from the root keeps the paths that begin with them."""
    paths = Paths.of(Columns.of(profile), ("comm",))
    rows = rows_of(paths)
    if not rows:
        return
    row = data.draw(st.sampled_from(rows))
    path = row[: data.draw(st.integers(0, len(row)))]
    names = tuple(paths.frames[box].function for box in path)

    below = paths.below(path)

    begun = [each[: len(path)] == path for each in rows]
    assert below.total == sum(
        value for value, has in zip(paths.values.tolist(), begun, strict=True) if has
    )
    assert all(listed(paths)[names + rest] for rest in listed(below))
    assert paths.sums_along(path) == [
        (paths.below(path[: i + 1]).total, paths.below(path[: i + 1]).total_samples)
        for i in range(len(path))
    ]
    assert below.root == (paths.frames[path[-1]] if path else paths.root)


@given(some.profiles(), st.sampled_from(["", "a", "F", "main", ".so", "\u202e"]))
def test_a_search_counts_each_path_once(profile, text):
    """The share that matches is that of the paths with at least one match."""
    paths = Paths.of(Columns.of(profile), ("comm",))

    found = paths.search(text)

    expected, functions = 0, set()
    for boxes, value in zip(rows_of(paths), paths.values.tolist(), strict=True):
        frames = [paths.frames[box] for box in boxes]
        hits = {
            frame
            for frame in frames
            if text.casefold() in frame.function.casefold()
            or text.casefold() in frame.module.casefold()
        }
        functions |= hits
        expected += value if hits else 0
    assert found.total == expected
    assert found.functions == len(functions)
