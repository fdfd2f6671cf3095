"""Opt-outs in HTTP responses: the header X-Robots-Tag, with rules for all or for named agents.

Source of the syntax: Google Search Central, "Robots meta tag, data-nosnippet, and X-Robots-Tag".
`noai` and `noimageai` are directives of DeviantArt, which img2dataset honors too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Literal

ROBOTS_HEADER = "X-Robots-Tag"
RobotsDirective = Literal["noai", "noimageai", "noindex", "noimageindex"]
"""Directives by which the owner of an image may exclude it from data sets."""

_AGENT = re.compile(r"[\w*./+-]+")
_WITH_VALUE = frozenset("unavailable_after max-snippet max-image-preview max-video-preview".split())
"""Directives that are followed by a colon and a value, and so are not names of agents."""
_SAME_AS = {"none": "noindex"}  # `none` is `noindex, nofollow`


def find_opt_out(
    headers: Iterable[str], directives: Collection[str], user_agent: str
) -> str | None:
    """The first of `directives` that the headers apply to this agent; None without one.

    headers:    values of all X-Robots-Tag headers of a response
    user_agent: User-Agent of the request; rules for an agent that it names apply, in any case

    A rule after the name of an agent is for that agent, up to the next name or the end of the
    header. Rules before any name are for all agents.
    """
    wanted = set(directives)
    for header in headers:
        applies = True
        for rule in header.lower().split(","):
            name, colon, rest = rule.strip().partition(":")
            if colon and name.strip() not in _WITH_VALUE and _AGENT.fullmatch(name.strip()):
                applies = _is_named(name.strip(), user_agent.lower())
                name = rest
            found = _SAME_AS.get(name.strip(), name.strip())
            if applies and found in wanted:
                return found
    return None


def _is_named(agent: str, user_agent: str) -> bool:
    words = rf"(?<![\w-]){re.escape(agent)}(?![\w-])"
    return agent == "*" or re.search(words, user_agent) is not None
