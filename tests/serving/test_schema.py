"""The endpoint and its own description, held against each other by requests of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from imgcls.config import build
from imgcls.serving.api_keys import NewKeyConfig, create_key
from tests.serving.app import serving


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A key to everything, and the file that it is in."""
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    settings_ = {"file": str(file), "name": "all", "scopes": ["predict", "admin"]}
    return create_key(build(NewKeyConfig, settings_)), file


@pytest.fixture(scope="module")
def address(colour_bundle: Path, key: tuple[str, Path]) -> Iterator[str]:
    with serving(colour_bundle, keys__file=str(key[1])) as running:
        yield running.url


def test_every_answer_is_one_that_is_described(address: str, key: tuple[str, Path]) -> None:
    """Without a key too: that it is then refused is one of the checks."""
    description = schemathesis.openapi.from_url(f"{address}/openapi.json")
    for result in description.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=80, suppress_health_check=list(HealthCheck))
        def ask(case: schemathesis.Case) -> None:
            headers = {"Authorization": f"Bearer {key[0]}"}
            case.call_and_validate(
                base_url=address,
                headers=headers,
                excluded_checks=[positive_data_acceptance],  # any bytes are no image
            )

        ask()


def test_the_description_can_be_had_and_names_every_way_in(address: str) -> None:
    body = requests.get(f"{address}/openapi.json", timeout=10).json()
    assert set(body["paths"]) == {
        *("/v1/predict", "/v1/model", "/v1/model/reload", "/metrics", "/healthz", "/readyz")
    }
    schemes = body["components"]["securitySchemes"]
    assert {scheme["type"] for scheme in schemes.values()} == {"http", "apiKey"}
    kinds = body["paths"]["/v1/predict"]["post"]["requestBody"]["content"]
    assert {"application/octet-stream", "multipart/form-data"} <= set(kinds)
