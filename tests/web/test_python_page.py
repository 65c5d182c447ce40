"""The page of a Python program: its functions, their lines, and the interpreter on request."""

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import expect

from tests.support import profiles as some
from tests.support.browser import Service, View, barriers, outside, serving
from tests.support.python_profiles import LOOP, shop_profile
from tests.support.stores import START_NS, at, directory

pytestmark = pytest.mark.browser

PHONE = {"width": 390, "height": 1400}
SWITCH = "#python_native"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("python")
    shop = [at(shop_profile(), minute) for minute in range(3)]
    directory(folder / "store", *shop, at(some.build([({}, [some.MAIN], 9)], some.NAMES), 10))
    with serving(folder / "store", folder) as running:
        yield running


def address(service: Service, more: str = "", minute: int = 0) -> str:
    first = START_NS // 1_000_000 + minute * 60_000
    return f"{service.url}/?from={first}&until={first + 180_000}{more}"


def names(view: View) -> set[str]:
    return {box.name for box in view.boxes()}


def test_the_switch_shows_the_interpreters_own_frames(
    visit: Callable[..., View], service: Service
) -> None:
    """It is in the address, in the graph, the table and the downloads, and Back undoes it."""
    view = visit(address(service, "&tab=both"))
    whole = view.box("all").total
    assert LOOP not in names(view)

    view.page.locator(SWITCH).check()
    view.settle()

    assert view.parameters()["python_native"] == "1"
    assert LOOP in names(view)
    assert view.box("all").total == whole
    expect(view.page.locator("#pane-table")).to_contain_text(LOOP)
    for link in view.page.locator("#downloads a").all():
        assert "python_native=1" in (link.get_attribute("href") or "")
    view.back()
    assert not view.page.locator(SWITCH).is_checked()
    expect(view.page.locator("#pane-table")).not_to_contain_text(LOOP)


def test_a_link_may_ask_for_all_frames(visit: Callable[..., View], service: Service) -> None:
    asked = visit(address(service, "&python_native=1", minute=10))

    assert asked.page.locator(SWITCH).is_checked()


def test_a_box_of_a_python_function_says_its_file_and_line(
    visit: Callable[..., View], service: Service
) -> None:
    """The line on which the function begins, or its own if boxes are lines."""
    view = visit(address(service))
    view.click_box("Shop.price")
    expect(view.page.locator("#panel")).to_contain_text("/srv/shop/shop.py:20")
    expect(view.page.locator("#panel")).to_contain_text("shop.pricing")

    lines = visit(address(service, "&group=line"))
    lines.click_box("Shop.price")
    expect(lines.page.locator("#panel")).to_contain_text("/srv/shop/shop.py:27")


def test_a_python_function_is_spoken_of_with_its_module(
    visit: Callable[..., View], service: Service
) -> None:
    """To screen readers, in buttons and in links: another module may have a function called so."""
    view = visit(address(service))
    view.click_box("Shop.price")

    expect(view.page.locator("#graph [aria-live]")).to_contain_text("shop.pricing.Shop.price, ")
    expect(view.page.locator("#crumbs")).to_contain_text("shop.pricing.<module>")
    view.button("Focus", "#panel").click()
    view.settle()
    assert view.parameters()["focus"] == "shop.pricing.Shop.price"
    assert view.box("Shop.price").samples == 3 * 76  # in three minutes


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [{"width": 1280, "height": 1000}, PHONE])
def test_python_functions_can_be_read_in_both_themes(
    visit: Callable[..., View], service: Service, theme: str, size: dict[str, int]
) -> None:
    """Nothing lies outside of the page, and nothing is a barrier."""
    for more in ("", "&python_native=1"):
        view = visit(address(service, more), viewport=size, color_scheme=theme)

        assert view.page.locator(SWITCH).is_visible()
        assert outside(view) == []
        assert barriers(view) == []
