"""The labeling page in a real browser, against the HTTP application in this process."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imgcls.models.bundle import load_bundle, load_bundle_weights, save_bundle
from tests.browser import Watched, launched, opened
from tests.serving.app import serving
from tests.serving.labeling.queues import draw_mixed_queue, draw_queue, label_settings, read_table


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as running:
        yield running


@contextlib.contextmanager
def label_page(browser: Any, bundle: Path, manifest: Path, **settings: Any) -> Iterator[Watched]:
    """The labeling page of a server with a queue.

    settings: further ones of the server
    """
    with (
        serving(bundle, **label_settings(manifest), **settings) as running,
        opened(f"{running.url}/label", browser=browser) as watched,
    ):
        yield watched


def enter(page: Any, field: str, value: str) -> None:
    """Fill in the name or the key, and start."""
    page.fill(f"#{field}", value)
    page.keyboard.press("Enter")
    wait_for_image(page)


def wait_for_image(page: Any, path: str = "") -> None:
    page.wait_for_function(
        """(path) => document.querySelector('#caption').textContent.endsWith(path) &&
            !document.querySelector('#image').hidden && !document.querySelector('#accept').disabled
        """,
        arg=path,
    )


def wait_for_counts(page: Any, text: str) -> None:
    page.wait_for_function(
        "(text) => document.querySelector('#counts').textContent.startsWith(text)", arg=text
    )


def press(page: Any, *keys: str) -> None:
    """Press keys, each when its image is shown."""
    for key in keys:
        wait_for_image(page)
        page.keyboard.press(key)


def get_rows(output: Path, annotator: str) -> list[tuple[str, Any]]:
    rows = read_table(output).to_pylist()
    return [(Path(row["path"]).name, row["label"]) for row in rows if row["annotator"] == annotator]


def test_two_annotators_label_by_keyboard_and_undo(
    browser: Any, color_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "labels"
    with serving(
        color_bundle,
        **label_settings(draw_queue(tmp_path, 6)),
        labeling__annotations_per_image=2,
    ) as running:
        with opened(f"{running.url}/label", browser=browser) as watched:
            page = watched.page
            enter(page, "name", "ana")
            watched.screenshot("label")
            suggested = page.locator("#suggestion").inner_text().split(": ")[1].split(",")[0]
            press(page, "Enter", "2", "3")  # accepts the suggestion of 0.jpg
            wait_for_counts(page, "3 labeled")
            press(page, "z")
            wait_for_image(page, "2.jpg")
            assert "Undone: 2.jpg was blue" in page.locator("#message").inner_text()
            press(page, "Backspace")
            wait_for_image(page, "1.jpg")
            press(page, "1", "1", "s", "2")
            wait_for_image(page, "5.jpg")
            page.locator("#classes button", has_text="green").click()
            wait_for_counts(page, "5 labeled, 1 skipped, 0 left")
            page.get_by_text("All images are done.").wait_for()
            assert get_rows(output, "ana") == [
                ("0.jpg", suggested), ("1.jpg", "red"), ("2.jpg", "red"), ("3.jpg", None),
                ("4.jpg", "green"), ("5.jpg", "green"),
            ]  # fmt: skip
            page.reload()
            page.get_by_text("All images are done.").wait_for()  # the name is kept
            assert_private(watched, running.url)
            assert watched.errors == []
        with opened(f"{running.url}/label", browser=browser) as watched:
            page = watched.page
            page.locator("#name").wait_for()
            watched.check_accessible("dark", "light")
            enter(page, "name", "ben")
            watched.check_accessible("dark", "light")
            press(page, "1", "1", "1", "1", "1", "1")
            wait_for_counts(page, "6 labeled")
            page.click("summary")
            page.get_by_text("Cohen’s kappa").wait_for()
            disagreements = page.locator("#report li button")
            assert "5.jpg" in disagreements.last.inner_text()
            assert "ana: green; ben: red" in disagreements.last.inner_text()
            watched.screenshot("label-agreement")
            page.set_viewport_size({"width": 320, "height": 844})  # the tables scroll
            watched.check_accessible("dark", "light")
            disagreements.last.click()
            wait_for_image(page, "5.jpg")
            press(page, "2")
            wait_for_counts(page, "6 labeled")
            page.click("#refresh")
            page.wait_for_function(
                "() => !document.querySelector('#report').textContent.includes('5.jpg')"
            )
        assert dict(get_rows(output, "ben"))["5.jpg"] == "green"


def assert_private(watched: Watched, url: str) -> None:
    """Nothing is stored but the name, and nothing is loaded from elsewhere."""
    assert watched.page.evaluate("() => Object.keys(localStorage)") == ["annotator"]
    assert watched.page.evaluate("() => document.cookie") == ""
    for each in watched.requests:
        if not each.startswith(("blob:", "data:")):
            assert each == f"{url}/label" or each.startswith(f"{url}/v1/labeling/")


def test_multilabel_keys_toggle_and_enter_saves(
    browser: Any, multilabel_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "labels"
    with label_page(browser, multilabel_bundle, draw_queue(tmp_path, 3)) as watched:
        page = watched.page
        enter(page, "name", "ana")
        page.get_by_text("Save: red, blue").wait_for()  # as suggested
        press(page, "1", "2")
        assert page.locator("#accept").inner_text().endswith("Save: green, blue")
        watched.screenshot("label-multilabel")
        watched.check_accessible("dark", "light")
        press(page, "Enter")
        wait_for_image(page, "1.jpg")
        page.get_by_text("Save: red, blue").wait_for()
        press(page, "1", "3", "Enter")
        wait_for_counts(page, "2 labeled")
        assert get_rows(output, "ana") == [("0.jpg", ["green", "blue"]), ("1.jpg", [])]


def test_images_that_cannot_be_shown_are_skipped(
    browser: Any, color_bundle: Path, keys: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "labels"
    with label_page(
        browser, color_bundle, draw_mixed_queue(tmp_path), keys__file=keys["file"]
    ) as watched:
        page = watched.page
        page.locator("#key").wait_for()
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.get_by_text("the API key is unknown").wait_for()
        enter(page, "key", keys["ana"])
        assert "Labeling as ana" in page.locator("#who").inner_text()
        press(page, "1", "1", "1")  # JPEG, PNG, TIFF
        page.get_by_text("No suggestion: ").wait_for()
        page.keyboard.press("s")  # truncated
        for name in ("text.jpg", "gone.jpg"):
            page.wait_for_function(
                """(name) => document.querySelector('#caption').textContent === name
                    && document.querySelector('#status').className === 'broken'""",
                arg=name,
            )
            assert page.locator("#classes button").first.is_disabled()
            if name == "text.jpg":
                watched.screenshot("label-broken")
                watched.check_accessible("dark", "light")
            page.keyboard.press("1")  # has no effect
            page.keyboard.press("s")
        wait_for_counts(page, "3 labeled, 3 skipped, 0 left")
        assert [label for _, label in get_rows(output, "ana")] == ["red"] * 3 + [None] * 3


def test_many_classes_are_found_by_typing(browser: Any, color_bundle: Path, tmp_path: Path) -> None:
    names = ",".join(f"class {i:03d}" for i in range(60))
    with label_page(
        browser, color_bundle, draw_queue(tmp_path, 3), labeling__classes=names
    ) as watched:
        page = watched.page
        enter(page, "name", "ana")
        assert page.locator("#classes button").count() == 3  # the likely ones
        page.keyboard.press("/")
        page.keyboard.type("nothing")
        page.get_by_text("No class found.").wait_for()
        page.keyboard.press("Enter")  # has no effect
        page.keyboard.press("Escape")
        assert page.locator("#classes button").count() == 3
        page.keyboard.press("/")
        page.keyboard.type("CLASS 04")
        assert page.locator("#classes button").count() == 10
        watched.screenshot("label-search")
        watched.check_accessible("dark", "light")
        page.keyboard.type("2")
        assert "Enter" not in page.locator("#accept").inner_text()
        page.click("#figure")  # the first match has the key also outside of the field
        page.keyboard.press("Enter")
        wait_for_image(page, "1.jpg")
        page.focus("#search")
        page.keyboard.press("Enter")  # the field is empty: accepts
        wait_for_counts(page, "2 labeled")
        rows = get_rows(tmp_path / "labels", "ana")
        assert rows[0] == ("0.jpg", "class 042")
        assert rows[1][1] in ("red", "green", "blue")


def test_unsaved_decisions_are_sent_again_once_the_server_answers(
    browser: Any, color_bundle: Path, tmp_path: Path
) -> None:
    """The reply to a stored decision is lost, too: it is stored once."""
    output = tmp_path / "labels"
    with label_page(browser, color_bundle, draw_queue(tmp_path, 3)) as watched:
        page, attempts = watched.page, []

        def lose_reply(route: Any) -> None:
            attempts.append(route.request.post_data_json["submission"])
            if len(attempts) == 1:
                route.fetch()
            if len(attempts) < 3:
                route.abort()
            else:
                route.continue_()

        enter(page, "name", "ana")
        page.route("**/decisions", lose_reply)
        press(page, "1")
        page.get_by_text("1 decision not saved yet").wait_for()
        wait_for_image(page, "1.jpg")  # the next image is shown meanwhile
        page.get_by_text("Saved.").wait_for()
        wait_for_counts(page, "1 labeled")
        assert len(attempts) == 3
        assert len(set(attempts)) == 1
        assert get_rows(output, "ana") == [("0.jpg", "red")]


def hold_decisions(page: Any) -> list[Any]:
    """Hold the decisions back; a test answers them."""
    held: list[Any] = []

    def hold(route: Any) -> None:
        held.append(route)

    page.route("**/decisions", hold)
    return held


def reject(route: Any, detail: str) -> None:
    body = json.dumps({"detail": detail})
    route.fulfill(status=400, content_type="application/problem+json", body=body)


def test_rejected_decisions_come_back_after_the_shown_image_and_undo_nothing_else(
    browser: Any, color_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "labels"
    with label_page(browser, color_bundle, draw_queue(tmp_path, 5)) as watched:
        page = watched.page
        enter(page, "name", "ana")
        press(page, "1")
        wait_for_counts(page, "1 labeled")
        held = hold_decisions(page)
        press(page, "2")
        wait_for_image(page, "2.jpg")
        page.keyboard.press("z")  # takes back the decision that is being sent
        wait_for_held(page, held)
        reject(held.pop(), "the first reason")
        wait_for_image(page, "1.jpg")
        assert "the first reason" in page.locator("#message").inner_text()
        press(page, "2", "3")
        wait_for_image(page, "3.jpg")
        wait_for_held(page, held)
        reject(held.pop(), "the second reason")
        page.get_by_text("1.jpg was not saved: the second reason.").wait_for()
        wait_for_held(page, held)
        reject(held.pop(), "the third reason")
        page.get_by_text("2.jpg was not saved: the third reason.").wait_for()
        assert "the second reason" in page.locator("#message").inner_text()
        assert page.locator("#caption").inner_text() == "3.jpg"  # still the same
        page.unroute("**/decisions")
        press(page, "1")
        for name, key in (("1.jpg", "2"), ("2.jpg", "3"), ("4.jpg", "1")):
            wait_for_image(page, name)
            press(page, key)
        wait_for_counts(page, "5 labeled")
        assert page.locator("#message").inner_text() == ""
        assert dict(get_rows(output, "ana")) == {
            "0.jpg": "red", "1.jpg": "green", "2.jpg": "blue", "3.jpg": "red", "4.jpg": "red",
        }  # fmt: skip


def wait_for_held(page: Any, held: list[Any]) -> None:
    for _ in range(300):
        if held:
            return
        page.wait_for_timeout(50)
    raise AssertionError("no request arrived")


def test_unsaved_decisions_stay_with_the_annotator_who_made_them(
    browser: Any, color_bundle: Path, keys: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "labels"
    with label_page(
        browser, color_bundle, draw_queue(tmp_path, 3), keys__file=keys["file"]
    ) as watched:
        page = watched.page
        page.locator("#key").wait_for()
        enter(page, "key", keys["ana"])
        held = hold_decisions(page)
        press(page, "1", "2")
        wait_for_held(page, held)
        page.click("#change")
        page.get_by_text("2 decisions not saved yet").wait_for()
        assert page.locator("#setup").is_hidden()
        # even if the field is changed meanwhile, the decisions are sent with the first key
        page.evaluate("(key) => { byId('key').value = key; }", keys["both"])
        held.pop().abort()
        page.unroute("**/decisions")
        wait_for_counts(page, "2 labeled")
        page.click("#change")
        page.locator("#key").wait_for()
        assert get_rows(output, "ana") == [("0.jpg", "red"), ("1.jpg", "green")]


def test_an_image_that_cannot_be_loaded_now_can_be_tried_again(
    browser: Any, color_bundle: Path, tmp_path: Path
) -> None:
    with label_page(browser, color_bundle, draw_queue(tmp_path, 3)) as watched:
        page, order = watched.page, []
        page.on("request", lambda each: order.append(each.url.rpartition("/")[2]))
        page.route(
            "**/images/*/0",
            lambda route: route.fulfill(
                status=503, content_type="application/problem+json", body='{"detail": "busy"}',
                headers={"Retry-After": "0.01"},
            ),
        )  # fmt: skip
        page.fill("#name", "ana")
        page.keyboard.press("Enter")
        page.get_by_text("This image cannot be loaded now: busy").wait_for()
        assert "Enter" not in page.locator("#accept").inner_text()
        watched.screenshot("label-retry")
        page.wait_for_function("() => loaded.size === 3")
        assert "1" not in order[: order.index("0") + 1]  # the shown image is loaded first
        page.unroute("**/images/*/0")
        page.click("#retry")
        wait_for_image(page, "0.jpg")
        assert page.locator("#retry").is_hidden()


def test_classes_named_s_and_z_own_their_keys(
    browser: Any, color_bundle: Path, tmp_path: Path
) -> None:
    loaded = load_bundle(str(color_bundle))
    spec = loaded.spec.model_copy(update={"classes": ["s", "b", "Z"]})
    save_bundle(str(tmp_path / "bundle"), spec, load_bundle_weights(loaded))
    with label_page(browser, tmp_path / "bundle", draw_queue(tmp_path, 4)) as watched:
        page = watched.page
        enter(page, "name", "ana")
        assert page.locator("#undo").inner_text() == "BackspaceUndo"
        assert page.locator("#skip").inner_text() == "DeleteSkip"
        press(page, "s", "z", "b")
        wait_for_counts(page, "3 labeled")
        press(page, "Backspace")
        wait_for_counts(page, "2 labeled")
        press(page, "Delete")
        wait_for_counts(page, "2 labeled, 1 skipped")
        rows = get_rows(tmp_path / "labels", "ana")
        assert rows == [("0.jpg", "s"), ("1.jpg", "Z"), ("2.jpg", None)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_can_be_used_by_touch(
    browser: Any, color_bundle: Path, tmp_path: Path, scheme: str
) -> None:
    with (
        serving(
            color_bundle,
            **label_settings(draw_queue(tmp_path, 3)),
        ) as running,
        opened(
            f"{running.url}/label", width=390, height=844, scheme=scheme, browser=browser
        ) as watched,
    ):
        page = watched.page
        enter(page, "name", "ana")
        watched.screenshot(f"label-390-{scheme}")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
        for button in page.locator("#panel button").all():
            box = button.bounding_box()
            assert box["height"] >= 44
        accept = page.locator("#accept").bounding_box()
        assert accept["y"] + accept["height"] <= 844  # without scrolling
        page.locator("#classes button").nth(1).click()
        wait_for_counts(page, "1 labeled")
        assert page.evaluate("() => document.activeElement.id") == "figure"
        assert page.locator("#counts").get_attribute("aria-live") == "polite"
        assert "1.jpg" in str(page.locator("#image").get_attribute("alt"))
        page.keyboard.press("Tab")
        reached = page.evaluate("() => document.activeElement.textContent")
        assert reached.startswith("1")


def test_names_of_classes_are_text_and_not_html(
    browser: Any, color_bundle: Path, tmp_path: Path
) -> None:
    loaded = load_bundle(str(color_bundle))
    spec = loaded.spec.model_copy(update={"classes": ["<img src=x>", "a&b", "1"]})
    save_bundle(str(tmp_path / "bundle"), spec, load_bundle_weights(loaded))
    with label_page(browser, tmp_path / "bundle", draw_queue(tmp_path, 1)) as watched:
        enter(watched.page, "name", "ana")
        texts = watched.page.locator("#classes button").all_inner_texts()
        assert any("<img src=x>" in text for text in texts)
        keys = watched.page.locator("#classes kbd").all_inner_texts()
        assert keys == ["2", "3", "1"]  # the key of a class that is one character is its name
        assert watched.page.locator("#panel img").count() == 0
        assert watched.errors == []
