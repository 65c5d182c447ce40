"""Selectors: Prometheus's matchers, errors with a position, patterns that cannot run away."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.selector import PATTERN_LIMIT, TEXT_LIMIT, Matcher, Operator, Selector, SelectorError

names = st.one_of(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*", fullmatch=True), st.text(max_size=8))
values = st.text(max_size=20)
matchers = st.one_of(
    st.builds(Matcher, names, st.sampled_from([Operator.EQUAL, Operator.NOT_EQUAL]), values),
    st.builds(
        Matcher,
        names,
        st.sampled_from([Operator.MATCH, Operator.NOT_MATCH]),
        st.sampled_from(["", ".*", "a|b", r"1\.5.*", "[^\"'`]+", "é+"]),
    ),
)
selectors = st.builds(Selector, st.lists(matchers, max_size=4).map(tuple))


@given(selectors)
def test_a_selector_reads_back_what_it_writes(selector):
    """Any name and value, quotes and control characters included."""
    assert Selector.parse(str(selector)) == selector


@given(selectors, st.lists(st.dictionaries(names, values, max_size=3), max_size=5))
def test_many_label_sets_are_judged_as_each_alone(selector, label_sets):
    """Judging distinct values once changes no verdict."""
    assert selector.choose(label_sets) == [selector.accepts(labels) for labels in label_sets]


@given(st.text(max_size=40))
def test_any_text_is_a_selector_or_a_selector_error(text):
    """Nothing else comes out, whatever goes in."""
    try:
        selector = Selector.parse(text)
    except SelectorError as error:
        position = error.position
    else:
        position = 0
        assert Selector.parse(str(selector)) == selector
    assert 0 <= position <= len(text)


@pytest.mark.parametrize("text", ["", "  ", "{}", " { } "])
def test_an_empty_selector_accepts_everything(text):
    """Nothing asked for means no condition."""
    assert Selector.parse(text) == Selector()
    assert Selector.parse(text).accepts({"service": "api"})


def test_all_matchers_must_hold():
    """One failing matcher is enough."""
    selector = Selector.parse('{service="api", version=~"1\\\\.5.*",host!="a",}')

    assert selector.accepts({"service": "api", "version": "1.5.2", "host": "b"})
    assert not selector.accepts({"service": "api", "version": "1.5.2", "host": "a"})
    assert not selector.accepts({"service": "api", "version": "125", "host": "b"})
    assert selector.names == {"service", "version", "host"}


def test_a_pattern_covers_the_whole_value():
    """As in Prometheus: no need for ^ and $."""
    selector = Selector.parse('{service=~"api|web"}')

    assert selector.accepts({"service": "api"})
    assert not selector.accepts({"service": "api-2"})
    assert not selector.accepts({"service": "my web"})


def test_a_missing_label_is_an_empty_one():
    """`version=""` finds what has no version, `version!=""` what has one."""
    assert Selector.parse('{version=""}').accepts({"service": "api"})
    assert not Selector.parse('{version!=""}').accepts({"service": "api"})
    assert Selector.parse('{version=~".*"}').accepts({})
    assert not Selector.parse('{version=~".+"}').accepts({})


@pytest.mark.parametrize(
    "quoted", [r'"1\\.5"', r"'1\\.5'", r"`1\.5`", r'"1\x5c.5"', '"1\\u005c.5"']
)
def test_values_are_quoted_in_three_ways(quoted):
    """Backquotes take everything as it stands."""
    assert Selector.parse("{v=" + quoted + "}").matchers[0].value == r"1\.5"


def test_a_name_that_is_no_identifier_stands_in_quotes():
    """Labels of foreign profiles may have any name."""
    assert Selector.parse('{"thread id"="7"}').accepts({"thread id": "7"})


@pytest.mark.parametrize(
    ("text", "position", "problem"),
    [
        ('service="api"', 0, "expected {"),
        ("{", 1, "name of a label"),
        ('{service="api"', 14, "expected , or }"),
        ('{service="api"} x', 16, "something behind"),
        ("{service}", 8, "expected =, !=, =~ or !~ behind 'service'"),
        ("{service=api}", 9, "value in quotes"),
        ('{service="api}', 9, 'no closing "'),
        ('{service=~"("}', 10, "RE2 refuses"),
        (r'{a="x",v=~"1\.5"}', 12, r"unknown escape \\."),
        ('{1="x"}', 1, "name of a label"),
        (r'{a="\U00110000"}', 4, "unknown escape"),
        (r'{a="\ud800"}', 3, "not Unicode"),
        ('{a="\udc80"}', 3, "not Unicode"),
        ('{a=~"' + "x" * (PATTERN_LIMIT + 1) + '"}', 4, "more than 1024"),
        ("{" + " " * TEXT_LIMIT, TEXT_LIMIT, "longer than 4096"),
        (r'{a=~"(?:(?:a{900}){1}){1}|\\pL{900}"}', 4, "RE2 refuses"),
    ],
)
def test_an_error_says_what_is_wrong_and_where(text, position, problem):
    """The position is that of the first character that is wrong."""
    with pytest.raises(SelectorError, match=problem) as raised:
        Selector.parse(text)

    assert raised.value.position == position
    assert f"at character {position + 1}" in str(raised.value)


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(.*a){12}", "(?:a?){30}a{30}b"])
def test_a_pattern_cannot_run_away(pattern):
    """Patterns that take a backtracking matcher years end in milliseconds."""
    selector = Selector.parse(f'{{a=~"{pattern}"}}')
    started = time.process_time()

    assert selector.choose([{"a": "a" * 1000 + "!" + str(i)} for i in range(100)]) == [False] * 100
    assert time.process_time() - started < 2
