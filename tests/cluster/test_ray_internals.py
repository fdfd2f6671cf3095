"""Ray's private parts are used in one module, which is checked when Ray is upgraded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ray

import imgcls
from imgcls.cluster import ray_internals

PRIVATE = re.compile(
    r"\bray[\w.]*\._|_raylet|internal_kv|kill_monitor|_data_context"
    r"|_streaming_gen_buffer|_pending_requests_to|_get_global_client"
)


def test_no_other_module_uses_private_parts_of_ray() -> None:
    package = Path(imgcls.__file__).parent
    found = [
        f"{file.relative_to(package)}:{number}: {line.strip()}"
        for file in package.rglob("*.py")
        if file.name != "ray_internals.py"
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if PRIVATE.search(line)
    ]
    assert not found


def test_they_were_checked_against_the_installed_version() -> None:
    assert ray.__version__.startswith(f"{ray_internals.RAY_VERSION}."), (
        "Ray was upgraded: read imgcls/cluster/ray_internals.py, then set RAY_VERSION"
    )


@pytest.mark.parametrize("name", ray_internals.__all__)
def test_private_classes_are_found(name: str) -> None:
    assert getattr(ray_internals, name).__name__ == name


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        _ = ray_internals.Missing
