"""Pages of the service: static HTML files without external resources.

The Content-Security-Policy of a page allows only its own script and style, by their hashes, so that
no file name or class name can run code.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
from dataclasses import dataclass

from starlette.responses import HTMLResponse

from imgcls.data.formats import IMAGE_SUFFIXES

# browsers do not know all of these suffixes as image/*
_ACCEPTED_TYPES = ",".join(("image/*", *sorted(IMAGE_SUFFIXES)))


@dataclass(frozen=True)
class StaticPage:
    """An HTML page and its Content-Security-Policy."""

    html: str
    policy: str

    @classmethod
    def load(cls, template: str) -> StaticPage:
        """Load a file of `templates`, with the files that its lines `{include NAME}` name."""
        html = re.sub(
            r"^\{include ([\w.]+)\}\n",
            lambda match: _read_template(match[1]),
            _read_template(template),
            flags=re.MULTILINE,
        ).replace("{formats}", _ACCEPTED_TYPES, 1)
        return cls(html, _build_policy(html))

    def build_response(self) -> HTMLResponse:
        return HTMLResponse(self.html, headers={"Content-Security-Policy": self.policy})


def _read_template(name: str) -> str:
    return (
        importlib.resources.files("imgcls.serving").joinpath("templates", name).read_text("utf-8")
    )


def _build_policy(html: str) -> str:
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash_elements(html, 'script')}",
            f"style-src {_hash_elements(html, 'style')}",
            "img-src blob: data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _hash_elements(html: str, element: str) -> str:
    """Hash the text of every such element. Source: Content Security Policy 3, section 2.3.1."""
    texts = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


DEMO_PAGE = StaticPage.load("page.html")
