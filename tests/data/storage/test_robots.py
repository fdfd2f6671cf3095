"""X-Robots-Tag: rules for all agents, and for named ones."""

from __future__ import annotations

import pytest

from imgcls.data.storage.robots import find_opt_out

AGENT = "Mozilla/5.0 (compatible; photo-bot/2.1; ops@example.com)"


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ([], None),
        (["noai"], "noai"),
        (["index, follow"], None),
        (["nofollow, NoImageAI"], "noimageai"),
        (["nofollow", "noai"], "noai"),
        (["noindex"], None),  # not one of those to respect
        # rules for named agents
        (["otherbot: noai"], None),
        (["photo-bot: noai"], "noai"),
        (["Photo-Bot: nofollow, noimageai"], "noimageai"),
        (["photo: noai", "bot: noai"], None),  # parts of the name
        (["*: noai"], "noai"),
        (["otherbot: nofollow, photo-bot: noai"], "noai"),
        (["photo-bot: nofollow, otherbot: noai, noimageai"], None),
        (["otherbot: noai", "noimageai"], "noimageai"),  # the next header is for all again
        (["otherbot: nofollow, noai"], None),
        # directives with values, whose colon does not end the name of an agent
        (["max-snippet: 20, noai"], "noai"),
        (["max-image-preview:large, noai"], "noai"),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], "noai"),
        (["unavailable_after: Tue, 25 Jun 2030 15:00:00 GMT, noai"], "noai"),
        (["otherbot: max-snippet: 20, noai"], None),
    ],
)
def test_a_rule_applies_to_all_agents_or_to_those_that_it_names(
    headers: list[str], found: str | None
) -> None:
    assert find_opt_out(headers, ("noai", "noimageai"), AGENT) == found


def test_none_is_noindex() -> None:
    assert find_opt_out(["none"], ("noindex",), "imgcls") == "noindex"
    assert find_opt_out(["none"], ("noai",), "imgcls") is None
