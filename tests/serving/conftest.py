"""Servers that many tests of the HTTP interface share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imgcls.config import build
from imgcls.serving.api_keys import NewKeyConfig, create_key
from tests.serving.app import Running, serving


@pytest.fixture(scope="session")
def server(color_bundle: Path) -> Iterator[Running]:
    """A server without API keys and with low limits."""
    with serving(color_bundle, limits__image_bytes=1 << 20, limits__body_bytes=4 << 20) as running:
        yield running


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """API keys of all kinds; `file` is the path of their key file."""
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys = {"file": str(file)}
    settings: dict[str, dict[str, object]] = {
        "nightly": {},
        "ops": {"scopes": ["admin"]},
        "both": {"scopes": ["predict", "admin"]},
        "slow": {"images_per_minute": 30},
        "ana": {"scopes": ["label"]},
        "ben": {"scopes": ["label"], "images_per_minute": 30},
    }
    for name, more in settings.items():
        keys[name] = create_key(build(NewKeyConfig, {"file": str(file), "name": name, **more}))
    return keys


@pytest.fixture(scope="session")
def locked(color_bundle: Path, keys: dict[str, str]) -> Iterator[Running]:
    """A server that accepts `keys`."""
    with serving(color_bundle, keys__file=keys["file"]) as running:
        yield running
