"""The page's view of a fleet: its services and functions, by mouse and by keyboard alone."""

import json
import re
import shutil
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Route, expect

from storage.objects.directory import DirectoryStore
from tests.support import profiles as some
from tests.support.browser import (
    NARROW,
    Service,
    View,
    barriers,
    changes,
    outside,
    serving,
    unseen_in,
    walk_focus,
)
from tests.support.stores import START_NS, at, directory, put

pytestmark = pytest.mark.browser

WEEK_MINUTES, MINUTES = 7 * 24 * 60, 3
MANY = 1_000
HOSTILE = '<img src=x onerror="window.hacked = 1">\u202e'
UNKNOWN = "\u2013"
LISTS = ("services", "versions", "modules", "functions")


def ms(minute: int) -> int:
    return START_NS // 1_000_000 + minute * 60_000


def window(minute: int) -> dict[str, str]:
    return {"from": f"{ms(minute)}", "until": f"{ms(minute + MINUTES)}"}


NOW, BEFORE, NOTHING = window(WEEK_MINUTES), window(0), window(300)


def host_minute(week: int, host: int):
    """Return what runs on a host: api doubles in a week, in part as a new version; jobs are new."""
    version = "3" if week and host else "2"
    rows = [
        ({"service": "api", "version": version}, [some.MAIN, some.WORK], 200 * (1 + week)),
        ({"service": "db", "version": "9"}, [some.MAIN, some.MEMCPY], 150),
        ({"service": HOSTILE, "version": HOSTILE}, [some.MAIN, some.named(HOSTILE)], 20),
        ({"comm": "nameless"}, [some.MAIN], 5),
    ]
    if week:
        rows.append(({"service": "jobs"}, [some.HANDLER], 50))
    return some.build(rows, some.NAMES)


def fill(folder: Path, hosts: int) -> None:
    """Write two weeks of a fleet."""
    for week in (0, 1):
        for host in range(hosts):
            profile = host_minute(week, host)
            for minute in range(MINUTES):
                place = (f"web-{host}", f"{host:016x}")
                put(DirectoryStore(folder), at(profile, week * WEEK_MINUTES + minute, *place))


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("fleet")
    fill(folder / "store", hosts=2)
    with serving(folder / "store", folder) as service:
        yield service


def address(service: Service, **parameters: str) -> str:
    parameters = {"mode": "services", **NOW, **parameters}
    return f"{service.url}/?{urllib.parse.urlencode(parameters)}"


class Hand:
    """Uses the page with the pointer, or with keys from wherever the focus is."""

    def __init__(self, view: View, has_pointer: bool) -> None:
        self.view, self.has_pointer = view, has_pointer

    def press(self, target: Locator) -> None:
        if self.has_pointer:
            target.click()
        else:
            self.view.tab_to(target)
            self.view.page.keyboard.press("Enter")
        self.view.settle()

    def switch(self, group: str, value: str) -> None:
        page = self.view.page
        if self.has_pointer:
            page.locator(f"{group} label", has=page.locator(f"[value='{value}']")).click()
        else:
            self.view.tab_to(f"{group} input:checked")
            while not page.locator(f"{group} [value='{value}']").is_checked():
                page.keyboard.press("ArrowRight")
        self.view.settle()

    def choose(self, name: str, link: str = ".row-name") -> None:
        """Press a link of a row."""
        row = row_of(self.view, name)
        if not self.has_pointer:
            number = row.evaluate("(it) => it.sectionRowIndex")
            self.view.tab_to("#fleet-table .row-name[tabindex='0']")
            self.view.press("Home", *["ArrowDown"] * number)
        self.press(row.locator(link))


@pytest.fixture(params=[True, False], ids=["mouse", "keyboard"])
def hand_of(request) -> Callable[[View], Hand]:
    return lambda view: Hand(view, request.param)


def row_of(view: View, name: str) -> Locator:
    link = view.page.get_by_role("link", name=name, exact=True)
    return view.page.locator("#fleet-table tbody tr", has=link)


def column(view: View, title: str) -> list[str]:
    """Return the cells of a column that is shown, row by row."""
    titles = [each.rstrip(" ↑↓") for each in view.page.locator("#fleet-table th").all_inner_texts()]
    rows = view.page.locator("#fleet-table tbody tr").all()
    return [each.locator("td").nth(titles.index(title)).inner_text() for each in rows]


def test_a_service_leads_to_its_graph_and_its_growth_to_a_comparison(hand_of, visit, service):
    """Over the same window; Back leads to the list again, as it was."""
    view = visit(f"{service.url}/?{urllib.parse.urlencode(NOW)}&focus=work&node=0123456789abcdef")
    view.expect("status of 404")
    hand, page = hand_of(view), view.page

    hand.press(page.get_by_role("link", name="Fleet", exact=True))
    assert view.parameters() == {"mode": "services", **NOW}
    assert page.title().startswith("Fleet services")
    assert column(view, "Service")[:3] == ["api", "db", "jobs"]
    assert column(view, "Growth")[:3] == ["+100 %", "±0.0 %", "new"]
    assert column(view, "Hosts")[:3] == ["2", "2", "2"]
    assert column(view, "Versions")[:3] == ["2 50.0 %, 3 50.0 %", "9", ""]
    expect(page.locator("#fleet-summary")).to_have_text(
        re.compile(r"^\d\.\d\d cores used, \+\d+ % \(\+0\.\d+\) against the week before$")
    )
    expect(page.locator("#fleet-table")).to_contain_text("5 services")
    listed = view.seen()

    hand.choose("api")
    assert view.parameters() == {"q": '{service="api"}', **NOW}
    assert [box.name for box in view.boxes() if box.row == 1] == ["api"]
    expect(page.locator("#graph canvas")).to_be_visible()
    expect(page.locator("#fleet")).to_be_hidden()
    view.back()
    assert changes(listed, view.seen()) == []

    hand.choose("api", ".row-link")
    compared = {"q": '{service="api"}', "mode": "compare", "before_from": "-7d", **NOW}
    assert view.parameters() == compared
    expect(page.locator("#before-menu")).to_contain_text("Same time a week ago")
    expect(page.locator("#before-facts")).to_contain_text("2 hosts")

    hand.press(page.get_by_role("link", name="Fleet", exact=True))
    assert view.parameters() == {"mode": "services", **NOW}
    hand.choose("(no service)")
    assert view.parameters()["q"] == '{service=""}'
    assert view.box("all").samples == 5 * 2 * MINUTES


def test_lists_are_ordered_split_and_filtered_in_the_address(hand_of, visit, service):
    """Each is a step, an address of its own, and leads on to the next question."""
    view = visit(address(service))
    hand, page = hand_of(view), view.page
    seen = []

    for value, first in zip(LISTS[1:], ("api 2", "api", "clamp"), strict=True):
        seen.append(view.seen())
        hand.switch("#list", value)
        assert view.parameters()["mode"] == value
        assert page.locator("#fleet-table .row-name").first.inner_text() == first
    seen.append(view.seen())
    hand.switch("#order", "growth")
    assert view.parameters()["order"] == "growth"
    assert column(view, "Function")[:2] == ["clamp", "handler"]
    assert column(view, "Change")[1].startswith("+")
    seen.append(view.seen())
    if hand.has_pointer:
        page.select_option("#split", "service,version")
    else:
        view.tab_to("#split")
        view.press("ArrowDown", "ArrowDown", "ArrowDown")
    view.settle()
    assert view.parameters()["split"] == "service,version"
    assert column(view, "Version")[0] == "3"

    other = visit(page.url)
    assert changes(view.seen(), other.seen()) == []
    if hand.has_pointer:
        for before in seen[::-1]:
            for _ in range(4):
                view.back()
                if view.seen()["address"] == before["address"]:
                    break
            assert changes(before, view.seen()) == []

    page.goto(address(service, mode="modules"))
    hand.choose("libc.so.6")
    expected = {"mode": "functions", "filter": "libc.so.6", **NOW}
    assert view.parameters() == expected
    assert column(view, "Function") == ["memcpy"]
    hand.choose("memcpy")
    row = {"focus": "memcpy", "row": "memcpy\nlibc.so.6"}
    assert view.parameters() == {**row, **NOW}
    expect(page.locator("#panel h3")).to_have_text("memcpy")
    assert [box.name for box in view.boxes() if box.row == 1] == ["db"]

    page.goto(address(service))
    page.locator("#fleet-filter").fill("JOB")
    view.wait(lambda: view.parameters().get("filter") == "JOB")
    view.settle()
    assert column(view, "Service") == ["jobs"]
    page.locator("#fleet-filter").fill("nothing like it")
    expect(page.locator("#fleet-table tbody")).to_have_text("No service matches “nothing like it”")
    hand.switch("#list", "versions")
    assert "filter" not in view.parameters()


def test_keys_lead_to_lists_and_rows(visit, service):
    view = visit(address(service))
    page = view.page
    for key, name in zip("4321", LISTS[::-1], strict=True):
        view.press(key)
        assert view.parameters()["mode"] == name
    view.press("g", "ArrowDown", "Enter")
    assert view.parameters()["q"] == '{service="db"}'
    view.press("f")
    assert view.parameters() == {"mode": "services", **NOW}
    view.press("/")
    expect(page.locator("#fleet-filter")).to_be_focused()


def test_a_link_can_be_opened_in_another_tab(visit, service):
    """It is one: the browser's own ways of opening it work."""
    view = visit(address(service))
    link = row_of(view, "api").locator(".row-name")

    with view.page.context.expect_page() as opened:
        link.click(modifiers=["Control"])
    other = opened.value
    other.wait_for_url(lambda url: "service%3D%22api%22" in url)
    other.close()
    assert view.parameters()["mode"] == "services"


def test_the_list_does_not_wait_for_its_trend(visit, service):
    """It has the focus meanwhile, and keeps it; a trend that fails is said, and can be retried."""
    view = visit(address(service, **NOTHING))
    page, held = view.page, []

    def hold(route: Route) -> None:
        if "trend=0" in route.request.url:
            route.continue_()
        else:
            held.append(route)

    page.route("**/fleet/services?*", hold)
    page.goto(address(service))
    view.wait(lambda: held)
    expect(row_of(view, "api")).to_be_visible()
    assert set(column(view, "Growth")) == {"…"}
    expect(page.locator("#fleet-summary")).to_contain_text("loading the week before…")
    page.keyboard.press("g")
    page.keyboard.press("ArrowDown")
    held.pop().continue_()
    view.settle()
    assert column(view, "Growth")[0] == "+100 %"
    expect(row_of(view, "db").locator(".row-name")).to_be_focused()

    view.expect("status of 504")
    problem = {"title": "Took too long", "detail": "the list of services was late", "status": 504}
    page.keyboard.press("r")
    view.wait(lambda: held)
    held.pop().fulfill(status=504, body=json.dumps(problem), content_type="application/json")
    view.settle()
    expect(page.locator("#fleet-summary")).to_contain_text(
        "no trend: the list of services was late"
    )
    assert column(view, "Service")[0] == "api"
    assert set(column(view, "Growth")) == {UNKNOWN}
    page.unroute("**/fleet/services?*")
    view.press("r")
    assert column(view, "Growth")[0] == "+100 %"


def test_one_host_and_a_first_week(visit, tmp_path):
    """Hosts are not told apart where there is one; without a week before there is no trend."""
    fill(tmp_path / "store", hosts=1)
    with serving(tmp_path / "store", tmp_path) as service:
        view = visit(address(service, **BEFORE))

        assert column(view, "Service")[:2] == ["api", "db"]
        assert "Hosts" not in view.page.locator("#fleet-table th").all_inner_texts()
        assert set(column(view, "Growth")) == {UNKNOWN}
        expect(view.page.locator("#fleet-summary")).to_contain_text(
            "no trend: the store has too little data of the week before"
        )


def test_a_thousand_services_are_shown_step_by_step(visit, tmp_path):
    """The largest first; all of them are searched."""
    profiles = []
    for host in range(5):
        numbers = range(host, MANY, 5)
        rows = [({"service": f"s-{i:04}"}, [some.MAIN], MANY - i) for i in numbers]
        profiles.append(at(some.build(rows), 0, f"web-{host}", f"{host:016x}"))
    directory(tmp_path / "store", *profiles)
    with serving(tmp_path / "store", tmp_path) as service:
        view = visit(address(service, **BEFORE))
        page, rows = view.page, view.page.locator("#fleet-table tbody tr")

        expect(page.locator("#fleet-table .table-head")).to_contain_text("200 of 1,000 services")
        assert rows.count() == 200
        page.get_by_role("button", name="Show more").click()
        view.settle()
        assert rows.count() == MANY
        assert column(view, "Service")[-1] == f"s-{MANY - 1:04}"
        page.locator("#fleet-filter").fill(f"s-{MANY - 1:04}")
        view.wait(lambda: rows.count() == 1)


def test_every_empty_or_error_state_has_a_way_out(hand_of, visit, service, tmp_path):
    """No data in the range, nothing that matches, a broken selector, a store that is away."""
    view = visit(address(service, **NOTHING))
    hand, page, state = hand_of(view), view.page, view.page.locator("#state")
    assert view.state() == "empty"
    expect(state).to_contain_text("No data in this range")
    expect(page.locator("#fleet")).to_be_hidden()
    hand.press(state.get_by_role("button", name=re.compile("^20..-..-.. ")).first)
    assert view.state() == "ready"
    assert view.parameters()["mode"] == "services"
    expect(page.locator("#fleet")).to_be_visible()

    page.goto(address(service, q='{service="nobody"}', mode="functions"))
    expect(state).to_contain_text("No match")
    hand.press(view.button("db", "#state"))
    assert column(view, "Function")[:1] == ["memcpy"]

    view.expect("status of 400|status of 503")
    page.goto(address(service, q="{service="))
    assert view.state() == "error"
    hand.press(view.button("Clear the selector", "#state"))
    assert view.state() == "ready"

    if not hand.has_pointer:
        return
    store = Path(shutil.copytree(service.store, tmp_path / "store"))
    with serving(store, tmp_path) as other:
        page.goto(address(other))
        assert view.state() == "ready"
        store.rename(tmp_path / "away")
        page.wait_for_timeout(1000)  # a listing is believed for half a second
        hand.press(page.locator("#refresh"))
        assert view.state() == "error"
        expect(page.locator("#notice")).to_contain_text("Store away")
        expect(page.locator("#fleet-table table")).to_have_class("stale")
        (tmp_path / "away").rename(store)
        hand.press(view.button("Retry"))
        assert view.state() == "ready"
        expect(page.locator("#fleet-table table")).not_to_have_class("stale")


def test_an_empty_store_says_how_to_begin(visit, tmp_path):
    (tmp_path / "store").mkdir()
    with serving(tmp_path / "store", tmp_path) as service:
        view = visit(f"{service.url}/?mode=services")

        assert view.state() == "empty"
        expect(view.page.locator("#state")).to_contain_text("sudo everflame up")


def test_hostile_names_are_shown_as_text(visit, service):
    """In every list, and in what their links lead to."""
    view = visit(address(service))
    page = view.page
    for name in LISTS:
        page.goto(address(service, mode=name, split="service,version"))
        view.settle()
        expect(page.locator("#fleet-table")).to_contain_text(r"\u202e")
        assert unseen_in(view) == []
        assert page.evaluate("[window.hacked, document.images.length]") == [None, 0]
    page.goto(address(service, split="__proto__", order="constructor", filter="<IMG src"))
    assert view.state() == "ready"
    assert unseen_in(view) == []
    page.locator("#fleet-table .row-name").click()
    view.settle()
    assert [box.name for box in view.boxes() if box.row == 1] == [
        HOSTILE.replace("\u202e", r"\u202e")
    ]


def test_the_lists_are_accessible_and_fit_a_phone(visit, service):
    """axe-core finds nothing serious, also in the dark; nothing lies beside a narrow page."""
    for scheme in ("light", "dark"):
        view = visit(address(service), color_scheme=scheme)
        for name in LISTS:
            view.page.goto(address(service, mode=name, split="service"))
            assert barriers(view) == []
    narrow = visit(address(service), viewport=NARROW)
    for width in (390, 640):
        narrow.page.set_viewport_size({"width": width, "height": 800})
        for name in LISTS:
            narrow.page.goto(address(service, mode=name, split="service,version"))
            narrow.settle()
            assert outside(narrow) == []
    reached = walk_focus(visit(address(service, mode="functions")))
    assert {"#fleet-filter", "#split", "#range-button", "#selector-input"} <= set(reached)
    assert len(reached) > 15
