"""The OpenAPI description against the service: generated requests, and every response validated."""

from __future__ import annotations

import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.serving.app import Running

EXAMPLES = {"/v1/predict": 80}
"""Requests per path; the other paths take neither parameters nor a body."""


def test_every_response_is_described(locked: Running, keys: dict[str, str]) -> None:
    """Without a key too: that it is then rejected is one of the checks."""
    description = schemathesis.openapi.from_url(f"{locked.url}/openapi.json")
    for result in description.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=EXAMPLES.get(operation.path, 10),
            suppress_health_check=list(HealthCheck),
        )
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(
                base_url=locked.url,
                headers={"Authorization": f"Bearer {keys['both']}"},
                excluded_checks=[positive_data_acceptance],  # random bytes are not an image
            )

        check()


def test_the_description_names_every_route(locked: Running) -> None:
    body = requests.get(f"{locked.url}/openapi.json", timeout=10).json()
    assert set(body["paths"]) == {
        *("/v1/predict", "/v1/model", "/v1/model/reload", "/metrics", "/healthz", "/readyz")
    }
    schemes = body["components"]["securitySchemes"]
    assert {scheme["type"] for scheme in schemes.values()} == {"http", "apiKey"}
    kinds = body["paths"]["/v1/predict"]["post"]["requestBody"]["content"]
    assert {"application/octet-stream", "multipart/form-data"} <= set(kinds)
