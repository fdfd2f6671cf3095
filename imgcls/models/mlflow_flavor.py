"""Bundles as MLflow models: written for MLflow, and loaded by `mlflow.pyfunc.load_model`.

The model names this module as its loader, so MLflow stores no pickled code. Its folder holds the
bundle as it is.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import imgcls
from imgcls.data.storage import filesystem
from imgcls.errors import RequestError
from imgcls.models.bundle import Bundle
from imgcls.models.classifier import Classifier
from imgcls.models.mlflow_registry import LOADER_MODULE
from imgcls.models.prediction import FailedPrediction, Prediction

if TYPE_CHECKING:
    import pandas as pd

BUNDLE_FOLDER = "bundle"
DEFAULT_TOP_K = 5
_LEFT_OUT = "tensorboard/"
"""Folder of a trained bundle that is not part of the model."""


class PyfuncClassifier:
    """A classifier as MLflow calls it: a table of images in, a table of predictions out."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Predict the classes of images.

        Parameters
        ----------
        model_input
            pandas.DataFrame with the column `path` (paths or URLs) or `image` (bytes of a file).
        params
            top_k: number of classes per image.

        Returns
        -------
        pandas.DataFrame
            One row per image: predicted_label, or predicted_labels of a multilabel bundle;
            confidence, accepted, topk_labels, topk_scores, status and error. An image that cannot
            be used has its status and null predictions.

        Raises
        ------
        RequestError
            If the table has neither or both of the columns.
        """
        import pandas as pd

        given = [name for name in ("image", "path") if name in getattr(model_input, "columns", ())]
        given = [name for name in given if model_input[name].notna().any()] or given
        if len(given) != 1:
            found = ", ".join(map(str, getattr(model_input, "columns", ()))) or "no columns"
            raise RequestError(
                f"model input: has {found}; pass a table with one of the columns image (bytes) "
                "and path"
            )
        top_k = int((params or {}).get("top_k", DEFAULT_TOP_K))
        absent: str | bytes = "" if given[0] == "path" else b""
        column = model_input[given[0]]
        images = list(column.astype(object).where(column.notna(), absent))
        made = self.classifier.predict(images, top_k=top_k, errors="return") if images else []
        columns = _list_columns(self.classifier.bundle)
        rows = [[column.read(each) for column in columns] for each in made]
        return pd.DataFrame(rows, columns=[column.name for column in columns])


def _load_pyfunc(path: str) -> PyfuncClassifier:
    """Load the model of a bundle folder; MLflow calls this by its name."""
    return PyfuncClassifier(Classifier.load(path))


def save_mlflow_model(bundle: Bundle, folder: str) -> None:
    """Write a bundle as an MLflow model into a new local folder."""
    from mlflow import pyfunc

    with (
        tempfile.TemporaryDirectory(prefix="imgcls-mlflow-") as temporary,
        warnings.catch_warnings(),
    ):
        copied = os.path.join(temporary, BUNDLE_FOLDER)
        for name in filesystem.walk(bundle.url):
            if not name.startswith(("_", _LEFT_OUT)):
                data = filesystem.read(filesystem.join(bundle.url, name))
                filesystem.write(os.path.join(copied, name), data)
        warnings.filterwarnings("ignore", ".*input example", UserWarning)
        pyfunc.save_model(
            folder,
            loader_module=LOADER_MODULE,
            data_path=copied,
            signature=_build_signature(bundle),
            pip_requirements=[f"imgcls=={imgcls.__version__}"],
            metadata={"bundle_sha256": bundle.sha256, "task": bundle.spec.task},
        )


class _Column(NamedTuple):
    """A column of the output; kind: name of an MLflow data type."""

    name: str
    kind: str
    is_list: bool = False
    is_optional: bool = False

    def read(self, prediction: Prediction | FailedPrediction) -> Any:
        """The value of the column for an image."""
        return getattr(prediction, self.name.removeprefix("predicted_"))


_COLUMNS = (
    _Column("confidence", "double", is_optional=True),
    _Column("accepted", "boolean"),
    _Column("topk_labels", "string", is_list=True),
    _Column("topk_scores", "double", is_list=True),
    _Column("status", "string"),
    _Column("error", "string", is_optional=True),
)


def _list_columns(bundle: Bundle) -> tuple[_Column, ...]:
    is_multilabel = bundle.spec.task == "multilabel"
    name = "predicted_labels" if is_multilabel else "predicted_label"
    return (_Column(name, "string", is_list=is_multilabel, is_optional=True), *_COLUMNS)


def _build_signature(bundle: Bundle) -> Any:
    """Input: one of two columns. Output: as `PyfuncClassifier.predict` returns it."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    def build_column(column: _Column) -> Any:
        kind = DataType[column.kind]
        return ColSpec(
            Array(kind) if column.is_list else kind,
            column.name,
            required=not column.is_optional,
        )

    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(DataType.string, "path", required=False),
                ColSpec(DataType.binary, "image", required=False),
            ]
        ),
        outputs=Schema([build_column(column) for column in _list_columns(bundle)]),
        params=ParamSchema([ParamSpec("top_k", DataType.long, DEFAULT_TOP_K)]),
    )
