"""Demo page of the service: one static HTML file without external resources.

Its Content-Security-Policy allows only its own script and style, by their hashes, so that no file
name or class name can run code.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re

from imgcls.data.formats import IMAGE_SUFFIXES

# browsers do not know all of these suffixes as image/*
_ACCEPTED_TYPES = ",".join(("image/*", *sorted(IMAGE_SUFFIXES)))
HTML = (
    importlib.resources.files("imgcls.serving")
    .joinpath("templates/page.html")
    .read_text("utf-8")
    .replace("{formats}", _ACCEPTED_TYPES, 1)
)


def _hash_elements(element: str) -> str:
    """Hash the text of every such element. Source: Content Security Policy 3, section 2.3.1."""
    texts = re.findall(rf"<{element}>(.*?)</{element}>", HTML, re.DOTALL)
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_hash_elements('script')}",
        f"style-src {_hash_elements('style')}",
        "img-src blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Content-Security-Policy of the page."""
