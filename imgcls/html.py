"""Render self-contained HTML pages, which open from disk without a server.

The common layout is in `templates/page.html.j2`; each package has its own page templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2

from imgcls.formatting import format_count


def render_page(package: str, template: str, values: Mapping[str, Any]) -> str:
    """Render a template of `package`/templates, such as `imgcls.evaluation`.

    Templates can call `format_count`.
    Raises jinja2.UndefinedError if the template uses a name that `values` does not have.
    """
    loader = jinja2.ChoiceLoader([jinja2.PackageLoader(package), jinja2.PackageLoader("imgcls")])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=False, undefined=jinja2.StrictUndefined
    )
    environment.globals["format_count"] = format_count
    return environment.get_template(template).render(values)
