"""The validation images of a trained bundle as a run, so that the same code evaluates both."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.data.manifests.label_columns import LabelColumns, is_list
from imgcls.data.storage import filesystem
from imgcls.models.bundle import Bundle
from imgcls.runs.committed import CommittedRun
from imgcls.runs.layout import (
    PREDICTIONS_METADATA,
    VALIDATION_PREDICTIONS_FILE,
    VALIDATION_TOP_K,
)


def open_validation_run(bundle: Bundle) -> CommittedRun | None:
    """The predictions of the validation images that the training stored.

    None if there are none, as in bundles of earlier versions, or if they are those of another
    bundle: of one that was in this folder before, or of this one before its calibration.
    """
    url, spec = filesystem.join(bundle.url, VALIDATION_PREDICTIONS_FILE), bundle.spec
    if not filesystem.exists(url):
        return None
    with filesystem.open_read(url) as stream:
        file = pq.ParquetFile(stream, pre_buffer=False)
        rows, schema = file.metadata.num_rows, file.schema_arrow
    record = json.loads((schema.metadata or {}).get(PREDICTIONS_METADATA, b"{}"))
    created = spec.provenance.get("created")
    if created is None or record.get("created") != created or "calibration" in spec.provenance:
        return None
    return CommittedRun(
        url=bundle.url,
        files=(url,),
        rows=rows,
        classes=tuple(spec.classes),
        path_column=schema.names[0],
        label_column="label" if spec.task == "single_label" else None,
        label_columns=_find_label_columns(bundle, schema),
        task=spec.task,
        root="",
        top_k=VALIDATION_TOP_K,
        bundle_sha256=bundle.sha256,
        manifest_fingerprint="",
        schema=schema.remove_metadata(),
        provenance={"config": {"model": bundle.url}},
        success_record={},
        run_record={"identity": {"settings": {}}},
    )


def _find_label_columns(bundle: Bundle, schema: pa.Schema) -> LabelColumns | None:
    """The columns of the labels of a multilabel bundle; see `Examples.build_manifest`."""
    if bundle.spec.task == "single_label":
        return None
    if "label" in schema.names and is_list(schema.field("label").type):
        return LabelColumns("label")
    return LabelColumns(per_class=tuple(bundle.spec.classes))
