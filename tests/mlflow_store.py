"""A real MLflow model registry in a SQLite file, with its artifacts next to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from imgcls.training.config import TrackConfig
from imgcls.training.registration import register_bundle


@dataclass(frozen=True)
class ModelStore:
    """uri: of tracking and registry; client: of MLflow, for both"""

    uri: str
    client: Any

    def track(self, name: str) -> TrackConfig:
        return TrackConfig(mlflow=self.uri, register_as=name)

    def register(self, name: str, bundle: Path, alias: str | None = None) -> str:
        """Register a bundle as the training does; returns the version, which the alias then has."""
        version = register_bundle(self.track(name), str(bundle))
        assert version is not None
        if alias is not None:
            self.client.set_registered_model_alias(name, alias, version)
        return version


def open_store(folder: Path) -> ModelStore:
    """Make the registry; it takes seconds to make its tables."""
    mlflow = pytest.importorskip("mlflow", reason="needs pip install 'imgcls[mlflow]'")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    client.create_experiment("imgcls", (folder / "artifacts").as_uri())
    return ModelStore(uri, client)
