"""A real browser for pages: Debian's Chromium, driven through Playwright, watching what it asks."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@dataclass
class Watched:
    """A page, with all that went wrong in it and all that it asked the network for."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def screenshot(self, name: str) -> None:
        """Keep a picture where IMGCLS_SCREENSHOTS names a folder."""
        folder = os.environ.get("IMGCLS_SCREENSHOTS")
        if folder:
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


@contextlib.contextmanager
def opened(
    url: str, *, width: int = 1280, height: int = 900, scheme: str = "light"
) -> Iterator[Watched]:
    """Open a page in a fresh browser; skips the test where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium, or name one in CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            watched = Watched(page)
            page.on("console", lambda m: watched.errors.append(m.text) if m.type == "error" else 0)
            page.on("pageerror", lambda error: watched.errors.append(str(error)))
            page.on("request", lambda request: watched.requests.append(request.url))
            page.goto(url)
            yield watched
        finally:
            browser.close()
