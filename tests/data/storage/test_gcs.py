"""Google Cloud Storage: what holds on S3 holds there, on fake-gcs-server over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from imgcls.data.storage import gcs
from tests import clouds
from tests.clouds import Cloud
from tests.data.storage.store_promises import Place, StorePromises, placed


@pytest.fixture(scope="module")
def cloud() -> Iterator[Cloud]:
    with clouds.gcs() as running:
        yield running


@pytest.fixture
def place(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with placed(cloud, monkeypatch) as made:
        yield made


class TestGCS(StorePromises):
    module = gcs
    refusals = (
        (401, "Invalid Credentials"),
        (403, "does not have storage.objects.get access"),
        (404, "The specified bucket does not exist."),
        (429, "rateLimitExceeded"),
        (500, "backendError"),
        (503, "Service Unavailable"),
    )
