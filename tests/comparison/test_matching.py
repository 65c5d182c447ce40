"""Matched windows: equally long, settled, without another deployment, and a past to judge by."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.comparison.matching import match
from profiler.comparison.rollouts import Deployment, DeploymentKind
from profiler.comparison.sides import Operand
from storage.profile import Window
from storage.selector import Selector
from tests.support.stores import MINUTE_NS, START_NS, minutes

HOSTS = ("web-1", "web-2")


def deployed(
    first: int,
    last: int,
    *,
    previous: str = "1",
    version: str = "2",
    kind: DeploymentKind = DeploymentKind.ROLLOUT,
    hosts: tuple[str, ...] = HOSTS,
    rest: tuple[str, ...] = ("web-3",),
) -> Deployment:
    """Return one whose first host changed in a minute and whose last had before another."""
    first_ns, last_ns = (START_NS + at * MINUTE_NS for at in (first, last))
    settled_ns = last_ns + 2 * MINUTE_NS
    times = (first_ns, last_ns, settled_ns)
    return Deployment("api", version, previous, *times, hosts, rest, kind=kind)


def matched(
    deployment: Deployment,
    span: tuple[int, int],
    *others: Deployment,
    selector: str = "{}",
    data_since: int = 10**6,
):
    def has_data(window: Window) -> bool:
        return window.end_ns > START_NS + data_since * MINUTE_NS

    same = sorted([deployment, *others], key=lambda each: each.first_ns)
    return match(deployment, same, Selector.parse(selector), minutes(*span), has_data)


def in_minutes(operand: Operand | None) -> tuple[float, float]:
    assert operand is not None
    start, end = ((at_ns - START_NS) / MINUTE_NS for at_ns in operand.window)
    return start, end


def test_a_day_of_data_gives_an_hour_on_whole_tens_of_minutes():
    found = matched(deployed(1441, 1444), (0, 1700))

    assert in_minutes(found.before) == (1380, 1440)
    assert in_minutes(found.after) == (1450, 1510)
    assert found.reason == ""


def test_the_sides_select_their_version_and_what_was_asked_for():
    found = matched(deployed(1441, 1444), (0, 1700), selector='{host=~"web.*",service=~"a.*"}')

    assert str(found.before.selector) == '{service="api",version="1",host=~"web.*"}'
    assert str(found.after.selector) == '{service="api",version="2",host=~"web.*"}'


def test_data_that_are_older_than_what_was_read_count_as_past():
    """The page reads an hour around; that there are data before it says a listing."""
    without = matched(deployed(100, 102), (0, 200))
    with_past = matched(deployed(100, 102), (0, 200), data_since=-2000)

    assert in_minutes(without.before) == (95, 100)
    assert in_minutes(with_past.before) == (40, 100)


def test_no_window_reaches_into_another_deployment():
    later = deployed(1460, 1461, previous="2", version="3")
    earlier = deployed(1420, 1421, previous="0", version="1")
    found = matched(deployed(1441, 1444), (0, 1700), earlier, later)

    assert in_minutes(found.before) == (1427, 1441)
    assert in_minutes(found.after) == (1446, 1460)


def test_a_canary_and_the_rest_have_the_same_window():
    found = matched(deployed(1441, 1442, kind=DeploymentKind.CANARY), (0, 1600))

    assert in_minutes(found.before) == in_minutes(found.after) == (1444, 1504)


def test_a_canary_without_a_past_is_compared_with_itself_as_long_as_it_was_a_rollout():
    """As many hosts as tell the noise need no past."""
    of_rollout, of_canary = (
        matched(deployed(5, 6, kind=kind), (0, 60))
        for kind in (DeploymentKind.ROLLOUT, DeploymentKind.CANARY)
    )
    many = deployed(5, 6, kind=DeploymentKind.CANARY, hosts=HOSTS * 2, rest=("web-3",) * 4)

    assert of_canary == of_rollout
    assert in_minutes(of_canary.before) == (3, 5)
    assert in_minutes(matched(many, (0, 60)).before) == (8, 60)


def test_a_canary_beside_the_old_version_on_one_host_is_compared_with_what_ran_before():
    canary = deployed(1441, 1442, kind=DeploymentKind.CANARY, hosts=("web-3",))
    found = matched(canary, (0, 1600))

    assert in_minutes(found.before) == (1380, 1440)
    assert in_minutes(found.after) == (1450, 1510)


@pytest.mark.parametrize(
    ("span", "others", "reason"),
    [
        ((0, 104), (), "it has settled only at"),
        ((0, 200), (deployed(103, 105, version="3"),), "3 (rollout at"),
        ((0, 200), (deployed(96, 98, version="1"),), "1 (rollout at"),
        ((100, 200), (), "there are no data from before it"),
    ],
)
def test_what_cannot_be_compared_says_why(span, others, reason):
    found = matched(deployed(100, 102), span, *others)

    assert (found.before, found.after) == (None, None)
    assert found.reason.startswith("not comparable: ")
    assert reason in found.reason
    assert found.as_json()["compare"] is None


@given(
    st.integers(1, 3000), st.integers(1, 60), st.integers(1, 3000), st.sampled_from([-5000, 10**6])
)
def test_sides_are_equal_settled_and_within_the_data(past, took, future, data_since):
    deployment = deployed(past, past + took)
    found = matched(deployment, (0, past + took + future), data_since=data_since)
    if found.before is None:
        assert future < 3
        return

    (before, first), (after, end) = in_minutes(found.before), in_minutes(found.after)
    assert first - before == end - after
    assert 1 <= end - after <= 60
    assert 0 <= before < first <= past
    assert past + took + 2 <= after < end <= past + took + future
