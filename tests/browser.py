"""Chromium, driven by Playwright, with the errors and network requests of each page."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parent.parent
AXE = Path(os.environ.get("AXE") or REPOSITORY / ".venv/axe/node_modules/axe-core/axe.min.js")
"""axe-core, a checker of accessibility, which `make axe` installs."""
PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome")
"""The first takes about half of the CPU time of the second."""
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)


@dataclass
class Watched:
    """A page with its errors and its network requests."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    is_unchecked: bool = False

    def check_opened_alone(self, url: str) -> None:
        """Assert that the page made no request, has no error, and fits the width of the window."""
        # data: URIs make no request
        assert [seen for seen in self.requests if not seen.startswith("data:")] == [url]
        assert self.errors == []
        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert self.page.evaluate(overflow) == 0

    def check_accessible(self, *schemes: str) -> None:
        """Assert that axe-core finds nothing wrong in the page as it is now.

        Without axe-core the test continues, and is skipped when its page closes.

        schemes: color schemes to check, `light` or `dark`; none checks the current one
        """
        if not AXE.exists():
            self.is_unchecked = True
            return
        if self.page.evaluate("typeof axe") == "undefined":
            # not by a script element: the Content-Security-Policy of a page may refuse it
            self.page.evaluate(AXE.read_text())
        for scheme in schemes or (None,):
            if scheme:
                self.page.emulate_media(color_scheme=scheme)
            found = self.page.evaluate("axe.run().then(result => result.violations)")
            violations = [
                f"{each['id']}: {node['html'][:200]} {node['failureSummary'][:300]}"
                for each in found
                for node in each["nodes"][:3]
            ]
            # pytest rewrites no assertion of this module
            assert violations == [], "\n".join((f"color scheme {scheme}:", *violations))

    def screenshot(self, name: str) -> None:
        """Save a screenshot to the folder IMGCLS_SCREENSHOTS, if it is set."""
        folder = os.environ.get("IMGCLS_SCREENSHOTS")
        if folder:
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


@contextlib.contextmanager
def launched() -> Iterator[Any]:
    """A browser without pages; skips the test if none is installed.

    Playwright runs an event loop in this thread meanwhile, so `asyncio.run` fails here.
    """
    if CHROMIUM is None:
        pytest.skip("no Chromium: install chromium-headless-shell or name one in CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(
    url: str,
    *,
    width: int = 1280,
    height: int = 900,
    scheme: str = "light",
    browser: Any | None = None,
) -> Iterator[Watched]:
    """Open a page in `browser`, or in a new one; skips the test if none is installed."""
    with contextlib.ExitStack() as stack:
        used = browser if browser is not None else stack.enter_context(launched())
        page = used.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        stack.callback(page.close)
        watched = Watched(page)
        page.on("console", lambda m: watched.errors.append(m.text) if m.type == "error" else 0)
        page.on("pageerror", lambda error: watched.errors.append(str(error)))
        page.on("request", lambda request: watched.requests.append(request.url))
        page.goto(url)
        yield watched
        if watched.is_unchecked:
            pytest.skip("accessibility was not checked: make axe, or name axe.min.js in AXE")
