"""HTML pages in one file: they open from disk and ask no server for anything.

Owns the look that all of them share, in `templates/page.html.j2`; what is on a page is its room's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2


def render_page(room: str, template: str, shown: Mapping[str, Any]) -> str:
    """A page made from a template in `room`/templates, such as `imgcls.evaluation`.

    Raises jinja2.UndefinedError for a name that the template has and `shown` has not.
    """
    loader = jinja2.ChoiceLoader([jinja2.PackageLoader(room), jinja2.PackageLoader("imgcls")])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=False, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(shown)
