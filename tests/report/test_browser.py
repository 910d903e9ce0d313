"""The page in a real browser: slider, tabs, enlarged pictures in step, theme, a phone's width, no request, no error."""

import re
import shutil

import pytest
import torch

from sfumato.report import Page, curves

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    photo = torch.rand(3, 120, 180, generator=torch.Generator().manual_seed(0))
    page = Page("A page " * 8, subtitle="sub", facts={f"fact {i}": "a long value " * 3 for i in range(6)})
    page.section("Slider").slider(
        photo, {"one": photo * 0.5, "two": 1 - photo}, ("noisy", ""), reference=photo, reference_label="clean"
    )
    page.section("Pictures").pictures({"a": photo, "b": 1 - photo, "half": photo[:, ::2, ::2]})
    page.section("Curves").figure(curves({"x": ([0, 1], [0, 1]), "y": ([0, 1], [1, 2])}))
    page.section("Table").table([{f"column {i}": "some words " * 2 for i in range(8)}]).code("x" * 300)
    return page.write(tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture
def page(browser, file, request):
    options = {"viewport": {"width": 1280, "height": 800}, **getattr(request, "param", {})}
    context = browser.new_context(**options)
    page = context.new_page()
    troubles = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith(("data:", "file:")) or troubles.append(asked.url))
    page.goto(file.as_uri())
    yield page
    context.close()
    assert troubles == []


def position(page):
    return float(page.evaluate("parseFloat(document.querySelector('.slider').style.getPropertyValue('--pos'))"))


def drag(page, start, end):
    box = page.locator(".stage").bounding_box()
    page.mouse.move(box["x"] + box["width"] * start, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * end, box["y"] + 50, steps=4)
    page.mouse.up()


def test_the_divider_follows_mouse_and_keys(page):
    assert position(page) == 50
    drag(page, 0.5, 0.2)
    assert position(page) == pytest.approx(20, abs=0.5)
    cut = page.evaluate("getComputedStyle(document.querySelector('.side.right')).clipPath")
    assert float(re.search(r"([\d.]+)%\)$", cut)[1]) == pytest.approx(20, abs=0.5)
    for key, expected in (("ArrowRight", 21), ("ArrowLeft", 20), ("End", 100), ("Home", 0)):
        page.keyboard.press(key)  # the drag has given the divider the focus
        assert position(page) == pytest.approx(expected, abs=1)
    drag(page, 0.5, 1.6)
    assert position(page) == 100


@pytest.mark.parametrize(
    "page", [{"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}], indirect=True
)
def test_a_finger_moves_the_divider(page):
    page.locator(".stage").scroll_into_view_if_needed()
    box = page.locator(".stage").bounding_box()
    page.touchscreen.tap(box["x"] + 0.75 * box["width"], box["y"] + 20)
    assert position(page) == pytest.approx(75, abs=0.5)


def test_tabs_choose_the_right_picture(page):
    tabs = page.get_by_role("tab")
    assert tabs.all_inner_texts() == ["one", "two", "clean"]
    tabs.nth(1).click()
    assert page.locator(".right img:visible").get_attribute("data-label") == "two"
    page.keyboard.press("ArrowRight")
    assert page.locator(".right img:visible").get_attribute("data-label") == "clean"
    assert page.locator(".right .label").inner_text() == "clean"
    assert [tab.get_attribute("aria-selected") for tab in tabs.all()] == ["false", "false", "true"]
    assert page.get_by_role("slider").get_attribute("aria-label") == "Divider between noisy and clean"


def seen(page):
    """The region `(left, top, right, bottom)`, in shares of the picture, that every visible lens shows at its middle."""
    return page.evaluate(
        """[...document.querySelectorAll('.lens')].filter(lens => !lens.hidden).map(lens => {
            const box = lens.getBoundingClientRect(), image = lens.querySelector('img').getBoundingClientRect();
            return [(box.left + box.width / 2 - image.left) / image.width, (box.top + box.height / 2 - image.top) / image.height,
                    image.width / box.width];
        })"""
    )


def test_enlarged_pictures_move_in_step(page):
    page.get_by_role("button", name="Enlarge a", exact=True).click()
    assert page.get_by_role("dialog").is_visible()
    first = seen(page)
    assert len(first) == 3
    assert all(view[:2] == pytest.approx([0.5, 0.5], abs=0.01) for view in first)
    lens = page.locator(".lens").nth(1)
    box = lens.bounding_box()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.5 * box["height"])
    for _ in range(4):
        page.mouse.wheel(0, -300)
    page.wait_for_timeout(100)
    zoomed = seen(page)
    assert zoomed[0][2] > 4 * first[0][2]
    assert zoomed[0][0] > 0.6  # it zooms towards the pointer
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"], steps=4)
    page.mouse.up()
    moved = seen(page)
    assert moved[0][0] > zoomed[0][0] + 0.01
    for views in (zoomed, moved):  # the half-sized picture too
        assert all(view == pytest.approx(views[0], abs=0.01) for view in views)


def test_keys_flip_at_the_same_place(page):
    page.get_by_role("button", name="Enlarge b", exact=True).click()
    for key in ("+", "+", "ArrowRight"):
        page.keyboard.press(key)
    assert page.locator(".where").inner_text() == "b (2 of 3)"
    here = seen(page)
    page.keyboard.press("ArrowRight")
    assert page.locator(".where").inner_text() == "half (3 of 3)"
    assert seen(page)[0] == pytest.approx(here[0], abs=0.01)
    page.keyboard.press("Shift+ArrowRight")
    assert seen(page)[0][0] > here[0][0]
    page.keyboard.press("a")
    assert len(seen(page)) == 3
    page.keyboard.press("Escape")
    assert not page.get_by_role("dialog").is_visible()
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Enlarge b"


def test_the_slider_opens_all_its_pictures(page):
    page.get_by_role("button", name="Enlarge all pictures").click()
    assert page.locator(".lens .label").all_inner_texts() == ["noisy", "one", "two", "clean"]


@pytest.mark.parametrize("page", [{"color_scheme": "dark"}, {"color_scheme": "light"}], indirect=True)
def test_theme_follows_the_system_until_it_is_switched(page):
    def ground():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    def ink():
        return page.evaluate("getComputedStyle(document.querySelector('.wide svg text')).fill")

    before, letters = ground(), ink()
    page.get_by_role("button", name="Switch between light and dark").click()
    after = ground()
    assert {before, after} == {"rgb(251, 251, 251)", "rgb(22, 24, 27)"}
    assert ink() != letters
    page.reload()
    assert ground() == after


@pytest.mark.parametrize("page", [{"viewport": {"width": w, "height": 844}} for w in (320, 390, 700, 1280)], indirect=True)
def test_nothing_is_wider_than_the_window(page):
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator(".wide:visible").count() + page.locator(".narrow:visible").count() == 1
    letters = page.evaluate(
        """[...document.querySelectorAll('svg.plot text')]
            .filter(text => text.textContent !== '●' && text.getBoundingClientRect().width)
            .map(text => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a)"""
    )
    assert min(letters) >= 9.5  # letters in figures stay readable
