"""The demo page in a real browser, against the HTTP application in this process."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imgcls.models.bundle import load_bundle_weights, load_ood_arrays, save_bundle
from imgcls.models.label_sets import ALWAYS_INCLUDED, LabelSets
from tests.browser import Watched, opened
from tests.conftest import draw
from tests.models.test_ood import with_detector
from tests.serving.app import Running, serving


@pytest.fixture
def key(keys: dict[str, str]) -> str:
    return keys["nightly"]


def drop(page: Any, files: list[Path]) -> None:
    """Drop files on the page, as with a mouse."""
    contents = [[file.name, base64.b64encode(file.read_bytes()).decode()] for file in files]
    transfer = page.evaluate_handle(
        """(files) => {
            const transfer = new DataTransfer();
            for (const [name, data] of files) {
                const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
                transfer.items.add(new File([bytes], name, { type: "image/jpeg" }));
            }
            return transfer;
        }""",
        contents,
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


def enter_key(page: Any, key: str) -> None:
    """Fill in a key and wait until the page describes the model."""
    page.fill("#key", key)
    page.locator("#key").blur()
    page.wait_for_function(
        "() => document.querySelector('#about').textContent.includes('3 classes')"
    )


def test_the_page_classifies_dropped_images(locked: Running, key: str, tmp_path: Path) -> None:
    for name in ("red", "green"):
        draw(name, (320, 240)).save(tmp_path / f"{name}.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "red.jpg").read_bytes()[:900])
    with opened(locked.url) as page:
        page.check_accessible("dark", "light")
        cards = page.page.locator("#results > li")

        def wait_for_results(count: int) -> None:
            cards.nth(count - 1).wait_for()
            page.page.wait_for_function(
                "() => ![...document.querySelectorAll('.label')].some(e => e.textContent === '…')"
            )

        drop(page.page, [tmp_path / "red.jpg", tmp_path / "green.jpg"])
        wait_for_results(2)
        assert cards.nth(0).locator(".badge").inner_text() == "key missing"
        assert "no API key" in page.page.locator("#message").inner_text()
        page.screenshot("serve-no-key")
        page.check_accessible("dark", "light")

        page.page.fill("#key", key + "x")
        page.page.locator("#files").set_input_files(str(tmp_path / "red.jpg"))
        wait_for_results(3)
        assert cards.nth(0).locator(".badge").inner_text() == "key unknown"

        page.page.click("#clear")
        enter_key(page.page, key)
        drop(page.page, [tmp_path / "red.jpg", tmp_path / "green.jpg"])
        wait_for_results(2)
        for index in (0, 1):
            card = cards.nth(index)
            assert card.locator(".label").inner_text() in ("red", "green", "blue")
            assert card.locator(".badge").inner_text() == "accepted"
            assert card.locator("progress").count() == 3
            assert card.locator(".took").inner_text().endswith(" ms")
            assert "accepted" in str(card.locator("img").get_attribute("alt"))
        page.page.fill("#threshold", "1")
        page.page.locator("#files").set_input_files(
            [str(tmp_path / "broken.jpg"), str(tmp_path / "green.jpg")]
        )
        wait_for_results(4)
        badges = [cards.nth(index).locator(".badge").inner_text() for index in (0, 1)]
        assert sorted(badges) == ["abstained", "truncated"]
        assert "3 images classified, 1 failed" in page.page.locator("#message").inner_text()
        page.screenshot("serve")
        page.check_accessible("dark", "light")
        assert_private(page, locked.url)
        unexpected = [text for text in page.errors if "401" not in text and "422" not in text]
        assert unexpected == []


def test_the_page_shows_label_sets_and_unknown_images(color_bundle: Path, tmp_path: Path) -> None:
    draw("red", (320, 240)).save(tmp_path / "red.jpg")
    made = with_detector(color_bundle, tmp_path / "ood", -1.0)
    sets = LabelSets(coverage=0.9, thresholds=[ALWAYS_INCLUDED])
    save_bundle(
        str(tmp_path / "bundle"),
        made.spec.model_copy(update={"label_sets": sets}),
        load_bundle_weights(made),
        ood_arrays=load_ood_arrays(made),
    )
    with serving(tmp_path / "bundle") as running, opened(running.url) as page:
        page.page.locator("#files").set_input_files(str(tmp_path / "red.jpg"))
        card = page.page.locator("#results > li").first
        card.locator(".took").wait_for()
        badges = card.locator(".badge").all_inner_texts()
        assert badges == ["abstained", "unlike the training data"]
        text = card.inner_text()
        assert "One of: " in text
        assert {"red", "green", "blue"} == set(text.split("One of: ")[1].split("\n")[0].split(", "))
        page.screenshot("serve-sets")


def assert_private(page: Watched, url: str) -> None:
    """Nothing is stored beyond the tab, and nothing is loaded from elsewhere."""
    assert page.page.evaluate("() => localStorage.length") == 0
    assert page.page.evaluate("() => document.cookie") == ""
    assert {each.split("?")[0] for each in page.requests if not each.startswith("blob:")} <= {
        f"{url}/", f"{url}/v1/model", f"{url}/v1/predict", "data:,",
    }  # fmt: skip


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_phone_and_is_usable_by_keyboard(
    locked: Running, key: str, tmp_path: Path, width: int
) -> None:
    draw("blue", (640, 480)).save(tmp_path / "blue.jpg")
    with opened(locked.url, width=width, height=844, scheme="dark") as page:
        page.page.fill("#key", key)
        page.page.locator("#files").set_input_files(str(tmp_path / "blue.jpg"))
        page.page.locator("#results .badge").wait_for()
        page.screenshot(f"serve-{width}-dark")
        assert page.page.evaluate("() => document.documentElement.scrollWidth") <= width
        page.page.focus("#key")
        reached = []
        for _ in range(6):
            page.page.keyboard.press("Tab")
            focused = "document.activeElement.id || document.activeElement.textContent"
            reached.append(page.page.evaluate(focused))
        assert reached == ["top_k", "threshold", "files", "camera", "Explain", "clear"]


@pytest.fixture
def busy(locked: Running) -> Iterator[threading.Event]:
    """Until this event is set, the service answers no prediction."""
    release = threading.Event()
    locked.service._decode_pool.submit(release.wait, 60)
    yield release
    release.set()


def test_cleared_images_are_not_sent_and_not_counted(
    locked: Running, key: str, busy: threading.Event, tmp_path: Path
) -> None:
    files = [tmp_path / f"{i}.jpg" for i in range(12)]
    for file in files:
        draw("red").save(file)
    with opened(locked.url) as page:
        enter_key(page.page, key)
        page.page.locator("#files").set_input_files([str(file) for file in files])
        page.page.locator("#results > li").nth(11).wait_for()
        page.page.click("#clear")
        busy.set()
        page.page.locator("#files").set_input_files(str(files[0]))
        page.page.locator("#results .badge").wait_for()
        assert page.page.locator("#message").inner_text() == "1 image classified"
        sent = [url for url in page.requests if "/v1/predict" in url]
        assert len(sent) == 4 + 1


def test_a_malformed_key_is_reported_and_not_sent(
    locked: Running, key: str, tmp_path: Path
) -> None:
    draw("red").save(tmp_path / "red.jpg")
    with opened(locked.url) as page:
        page.page.fill("#key", key + " → ops")
        page.page.locator("#files").set_input_files(str(tmp_path / "red.jpg"))
        badge = page.page.locator("#results .badge")
        badge.wait_for()
        assert badge.inner_text() == "key malformed"
        assert "Copy it again" in page.page.locator("#message").inner_text()
        assert not any("/v1/predict" in url for url in page.requests)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_input_fields_are_visible(locked: Running, scheme: str) -> None:
    """At a contrast of 3 to 1. Source: WCAG 2.2, 1.4.11 and its definition of contrast."""
    colors = """(id) => [[document.getElementById(id), "borderTopColor"],
        [document.getElementById(id), "backgroundColor"], [document.body, "backgroundColor"]]
        .map(([element, name]) => getComputedStyle(element)[name].match(/\\d+/g).map(Number))"""

    placeholder_colors = """() => [getComputedStyle(byId("threshold"), "::placeholder").color,
        getComputedStyle(byId("threshold")).backgroundColor]
        .map((color) => color.match(/\\d+/g).map(Number))"""

    def luminance(color: list[int]) -> float:
        parts = [value / 255 for value in color]
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    with opened(locked.url, scheme=scheme) as page:
        for name in ("key", "top_k", "threshold", "drop"):
            edge, *backgrounds = (luminance(each) for each in page.page.evaluate(colors, name))
            for background in backgrounds:
                darker, lighter = sorted((edge, background))
                assert (lighter + 0.05) / (darker + 0.05) >= 3, name
        placeholder, background = map(luminance, page.page.evaluate(placeholder_colors))
        darker, lighter = sorted((placeholder, background))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5  # 1.4.3; axe-core does not check it


def test_without_explanations_there_is_no_button(color_bundle: Path, tmp_path: Path) -> None:
    draw("red", (320, 240)).save(tmp_path / "red.jpg")
    with (
        serving(color_bundle, limits__explained_images=0) as running,
        opened(running.url) as page,
    ):
        drop(page.page, [tmp_path / "red.jpg"])
        page.page.locator("#results .badge").first.wait_for()
        assert page.page.get_by_role("button", name="Explain").count() == 0


def test_an_image_is_explained_by_a_button(server: Running, tmp_path: Path) -> None:
    draw("red", (320, 240)).save(tmp_path / "red.jpg")
    with opened(server.url, width=390, scheme="dark") as page:
        drop(page.page, [tmp_path / "red.jpg"])
        picture = page.page.locator("#results img")
        page.page.get_by_role("button", name="Explain").click()
        page.page.get_by_role("button", name="Show image").wait_for()
        assert picture.get_attribute("src").startswith("data:image/jpeg;base64,")
        assert picture.get_attribute("alt").startswith(
            "image regions that contribute to the score of "
        )
        page.page.wait_for_function("document.querySelector('#results img').naturalWidth > 0")
        page.screenshot("serve-explained")
        page.check_accessible("light", "dark")
        page.page.get_by_role("button", name="Show image").click()
        assert picture.get_attribute("src").startswith("blob:")
        assert "accepted" in picture.get_attribute("alt")
        assert page.errors == []
