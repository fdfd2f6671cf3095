"""Thresholds of accepted predictions, as a bundle keeps them."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

NEVER_ACCEPT = 2.0
"""Threshold of a class whose predictions are never accepted. It is a number above any confidence,
rounding included, so that `score >= threshold` is false."""


def _check_threshold(value: float) -> float:
    if not (0 <= value <= 1 or value == NEVER_ACCEPT):
        raise ValueError(f"{value:g} is not in [0, 1], nor {NEVER_ACCEPT:g} (never accept)")
    return value


AcceptanceThreshold = Annotated[float, AfterValidator(_check_threshold)]
