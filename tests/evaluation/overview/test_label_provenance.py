"""What a lineage states about a manifest."""

from __future__ import annotations

from imgcls.evaluation.overview.label_provenance import describe_manifest


def test_a_setting_of_another_version_is_named() -> None:
    ((name, reason),) = describe_manifest({"path": "/m.csv", "tint": 1}, None)
    assert name == "cannot be opened"
    assert reason.startswith("its settings are of another version (tint: ")
