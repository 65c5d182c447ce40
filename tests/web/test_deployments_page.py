"""Deployments on the page: marks, tooltips and the list have verdicts, whatever one sees by."""

import json
import re
import urllib.parse
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Locator, Route, expect

from profiler.comparison.deployments import deployments_in
from profiler.service.watch import link_of
from storage.objects.directory import DirectoryStore
from storage.objects.tenant import TenantStore
from storage.query.query import Query
from storage.selector import Selector
from tests.support.browser import NARROW, Service, View, barriers, outside, serving, unseen_in
from tests.support.deployments import ALL, MINUTES, NEW_AT, SHOWN_HOSTILE, fill
from tests.support.stores import minutes

pytestmark = pytest.mark.browser

WINDOW = minutes(NEW_AT - 60, MINUTES + 4)
SLOWER = '{service="slower"}'


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("judged")
    fill(folder / "store")
    with serving(folder / "store", folder) as service:
        yield service


def address(service: Service, q: str = "") -> str:
    window = {"from": WINDOW.start_ns // 10**6, "until": WINDOW.end_ns // 10**6}
    return f"{service.url}/?{urllib.parse.urlencode({'q': q, **window})}"


def marks(view: View) -> Locator:
    return view.page.get_by_role("group", name="Deployments").get_by_role("button")


def altered(**values: object) -> Callable[[Route], None]:
    """Return what changes fields of deployments in responses."""

    def alter(route: Route) -> None:
        response = route.fetch()
        body = response.json()
        for each in body["deployments"]:
            each.update(values)
        route.fulfill(response=response, body=json.dumps(body))

    return alter


def test_the_page_asks_again_until_verdicts_are_ready(visit, service):
    """What is shown first has none; the request is repeated, and no longer than needed."""
    view = visit(service.url)
    asked: list[str] = []
    view.page.on("request", lambda each: asked.append(each.url))
    pending = [True, True, False]

    def alter(route: Route) -> None:
        altered(**({"pending": True, "verdict": None} if pending.pop(0) else {}))(route)

    view.page.route("**/api/v1/deployments?*", alter)
    view.page.goto(address(service, SLOWER))
    expect(marks(view).locator("[data-verdict=pending]")).to_have_count(1)
    expect(marks(view)).to_have_attribute("aria-label", re.compile(r"UTC\. verdict pending\. "))

    view.settle()

    expect(marks(view).locator("[data-verdict=regression]")).to_have_count(1)
    view.page.wait_for_timeout(1500)
    assert len([each for each in asked if "/api/v1/deployments?" in each]) == 3


@pytest.mark.parametrize("has_pointer", [True, False], ids=["mouse", "keyboard"])
def test_a_mark_says_its_verdict_and_what_explains_it(visit, service, has_pointer):
    """As a word beside it, in its name and in its tooltip."""
    view = visit(address(service, SLOWER))
    mark = marks(view)
    expect(mark.locator(".mark-word")).to_have_text("regression")
    expect(mark).to_have_accessible_name(
        re.compile(
            r"^slower 2\.0 \(previously 1\.0\), rollout on 1 host, 22:00 UTC\."
            r" regression: parse \+\d\d %, " + re.escape(SHOWN_HOSTILE) + r" new\."
            r" Compare before and after$"
        )
    )

    mark.hover() if has_pointer else view.tab_to(mark)

    tooltip = view.page.locator("#timeline .tooltip")
    expect(tooltip).to_contain_text(re.compile(r"regression: parse \+\d\d %, "))
    assert unseen_in(view) == []
    assert view.page.evaluate("[window.hacked, document.images.length]") == [None, 0]


def test_a_mark_of_several_shows_the_most_urgent_verdict(visit, service):
    """Its name has all of them."""
    view = visit(address(service))
    several, alone = marks(view).all()

    expect(several).to_have_text("3")
    expect(several.locator(".verdict-badge")).to_have_attribute("data-verdict", "regression")
    name = several.get_attribute("aria-label")
    assert all(word in name for word in ("regression: ", "improvement: ", "unchanged. "))
    expect(alone.locator(".verdict-badge")).to_have_count(0)
    expect(alone).to_have_attribute("aria-label", re.compile("not comparable: it has settled"))


def test_the_list_has_verdicts(visit, service):
    view = visit(address(service))
    view.page.locator("#deployments-menu button").first.click()

    choices = view.page.get_by_role("dialog", name="Deployments").get_by_role("button")
    found = {each.inner_text().split()[0]: each.inner_text() for each in choices.all()}

    assert "\nregression: parse +" in found["slower"]
    assert "\nimprovement: parse " in found["faster"]
    assert found["calm"].endswith("\nunchanged")
    assert "not comparable: it has settled only at" in found["fresh"]
    badges = choices.locator(".verdict-badge").evaluate_all(
        "(all) => all.map((it) => it.dataset.verdict)"
    )
    assert sorted(badges) == ["improvement", "regression", "unchanged"]


VARIANTS = {
    "regression": {"verdict": "regression"},
    "provisional": {"verdict": "regression", "provisional": True},
    "improvement": {"verdict": "improvement"},
    "unchanged": {"verdict": "unchanged"},
    "inconclusive": {"verdict": "inconclusive", "functions": []},
}

LOOK = """(it) => {
  const {backgroundColor, borderTopStyle, borderTopColor} = getComputedStyle(it);
  const sign = getComputedStyle(it, "::before").content;
  return {fill: backgroundColor, edge: borderTopStyle, colour: borderTopColor, sign};
}"""
NO_FILL = "rgba(0, 0, 0, 0)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_verdicts_differ_by_more_than_colour(visit, service, scheme):
    """By word, sign and edge; a provisional one is hollow and says so. Text is readable."""
    view = visit(service.url, color_scheme=scheme)
    looks = {}
    for name, values in VARIANTS.items():
        view.page.unroute_all()
        view.page.route("**/api/v1/deployments?*", altered(**values))
        view.page.goto(address(service, SLOWER))
        view.settle()
        looks[name] = marks(view).locator(".verdict-badge").evaluate(LOOK)
        looks[name]["name"] = marks(view).get_attribute("aria-label")
        looks[name]["line"] = view.page.locator("line.deployment").evaluate(
            "(it) => getComputedStyle(it).strokeDasharray"
        )
        expect(marks(view).locator(".mark-word")).to_have_text(re.compile("^" + values["verdict"]))
        marks(view).hover()
        assert barriers(view) == []
        view.page.locator("#deployments-menu button").first.click()
        assert barriers(view) == []

    signs = [looks[name]["sign"] for name in VARIANTS if name != "provisional"]
    assert len(set(signs)) == len(signs)
    assert "regression (provisional): parse" in looks["provisional"]["name"]
    assert looks["provisional"]["fill"] == looks["inconclusive"]["fill"] == NO_FILL
    assert looks["regression"]["fill"] not in {NO_FILL, looks["improvement"]["fill"]}
    assert looks["regression"]["colour"] != looks["improvement"]["colour"]
    assert looks["inconclusive"]["edge"] == "dotted"
    assert looks["regression"]["edge"] == "solid"
    assert len({looks[name]["line"] for name in ("regression", "provisional", "inconclusive")}) == 3


def test_a_mark_without_room_has_no_word(visit, service):
    """Nothing is cut or lies outside on a phone."""
    view = visit(address(service), viewport=NARROW)

    assert outside(view) == []
    expect(marks(view).locator(".mark-word")).to_have_count(0)
    assert barriers(view) == []


def test_a_link_of_a_watch_opens_the_comparison(visit, service, tmp_path):
    """Over the windows of the verdict."""
    tenant = TenantStore(DirectoryStore(service.store))
    query = Query(tenant, tmp_path / "cache")
    found = deployments_in(tenant, query, ALL, Selector.parse(SLOWER))

    view = visit(link_of(service.url, found.matches[0]))

    expect(view.page.locator("#verdict .headline")).to_contain_text("Regression: parse")
