"""The page to try the model on: one static file, which may load nothing but what it holds itself.

Its policy names the hashes of its own script and style, so that nothing else runs, whatever a file
name or a class name may contain.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re

from imgcls.data.formats import IMAGE_SUFFIXES

# Browsers do not count all of these suffixes among image/*.
_ACCEPTED_TYPES = ",".join(("image/*", *sorted(IMAGE_SUFFIXES)))
HTML = (
    importlib.resources.files("imgcls.serving")
    .joinpath("templates/page.html")
    .read_text("utf-8")
    .replace("{formats}", _ACCEPTED_TYPES, 1)
)


def _hash_elements(element: str) -> str:
    """The hash of each such element's text. Source: Content Security Policy 3, section 2.3.1."""
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
"""The Content-Security-Policy to send it with."""
