"""Configuration of `imgcls predict`, `imgcls embed` and `imgcls relabel`.

It is checked without torch and Ray, so that a wrong key is refused at once.
"""

from __future__ import annotations

import datetime
from typing import ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from imgcls.config import Names, Section, UnitFloat
from imgcls.data.decoding.preprocess import DecodeMode
from imgcls.data.image_files import MAX_IMAGE_BYTES
from imgcls.data.manifests.manifest import ManifestConfig
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.execution.config import ScaleConfig
from imgcls.log import LogFormat
from imgcls.models.bundle import EngineName, Precision
from imgcls.runs.lease import DEFAULT_TERM_S
from imgcls.runs.schema import EmbeddingType

ErrorStatus = Literal[
    "missing", "forbidden", "opted_out", "throttled", "unavailable", "empty", "truncated",
    "not_an_image", "unsupported", "too_large", "unreadable", "not_finite", "crashed",
]  # fmt: skip
"""Statuses of rows without a prediction."""


class SinceConfig(Section):
    """Earlier runs, whose successful rows are not labeled again."""

    shorthand: ClassVar[str | None] = "path"

    path: str
    """A run, a folder of runs such as labels/ of labels/date=.../, or a compacted history."""
    version: Names = []
    """Manifest columns whose change means another image. Default: etag, size, mtime, version."""


class RunConfig(Section):
    """A run of a model over every image of a manifest."""

    positional: ClassVar[tuple[str, ...]] = ("manifest",)

    manifest: ManifestConfig
    """The images: a CSV or Parquet file, a glob, or a folder."""
    model: str
    """Bundle folder, local or on an object store; or models:/NAME@ALIAS or models:/NAME/VERSION in
    the MLflow model registry, see docs/training.md."""
    output: str
    """Folder to write. An unfinished run in it is resumed."""
    max_error_rate: UnitFloat = 0.01
    """Maximum fraction of failed rows in a committed run; with since, of the new rows."""
    max_errors: NonNegativeInt | None = None
    """Number of failed rows allowed at any rate. Default: 10 with since, else 0."""
    max_error_rates: dict[ErrorStatus, UnitFloat] = {}
    """Per-status limits, e.g. {missing: 0.05}. A status listed here is not counted in
    max_error_rate."""
    summary_json: str | None = None
    """JSON file to write at the end, whatever the exit code: how the run ended, rows, statuses."""
    publish: str | None = None
    """Table to add the run to once it is committed: delta:URL_OR_PATH,
    iceberg:CATALOG.NAMESPACE.TABLE or hf:datasets/OWNER/NAME."""
    since: SinceConfig | None = None
    """Label only images that are new, changed or failed since these runs: one run, or a folder of
    runs."""
    relabel: bool = False
    """With since: also label images that another bundle has labeled."""
    retry_failed: bool = False
    """With since: also retry broken images that have not changed."""
    date: datetime.date | None = None
    """Date that replaces {date} in output (default: today, UTC). Set it to resume an earlier day's
    run."""
    retry_errors: bool = False
    """Retry the rows that failed in an earlier run on this output."""
    overwrite: bool = False
    """Delete the run in the output folder and start over."""
    limit: PositiveInt | None = None
    """Number of rows to label, from the start of the manifest. Default: all."""
    decode: DecodeMode | None = None
    """exact: decode JPEGs at full size. fast: decode large ones at reduced size. Default: the
    bundle's setting."""
    precision: Precision = "auto"
    """auto: bf16 where the hardware has it natively, else fp32. fp16: for GPUs without bf16; an
    image that exceeds its range becomes an error row. int8: on CPUs, with a quantized bundle."""
    engine: EngineName = "auto"
    """Library that runs the network. auto: torch; on CPUs OpenVINO (if installed) where a benchmark
    before a long run shows that it is faster, or on one machine with AVX2 from 1,000 rows per
    worker on."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Compile the model. auto: where a benchmark before a long run shows that it saves time."""
    max_pixels: int = Field(default=100_000_000, ge=1, le=178_956_970)
    """Maximum number of pixels of an image, read from its header; a larger one is too_large."""
    max_bytes: PositiveInt = MAX_IMAGE_BYTES
    """Maximum size of an image file, in bytes. A larger one is too_large and not read further."""
    chunk_rows: PositiveInt | None = None
    """Rows per chunk, the unit of work. Default: 32 to 4,096 by the size of the manifest; at most
    256 with GPUs."""
    part_rows: PositiveInt = 1_000_000
    """Maximum number of rows of an output file; fewer when it would exceed 128 MB."""
    progress_seconds: PositiveFloat = 5.0
    """Time between two progress lines in a log, in seconds."""
    log: LogFormat = "text"
    """json: one JSON object per line, each with the run id; for each chunk its worker, rows and
    times."""
    lease_seconds: PositiveFloat = DEFAULT_TERM_S
    """Time without a renewal of its lease after which a driver counts as dead, in seconds."""
    scale: ScaleConfig = ScaleConfig()
    storage: StorageConfig = StorageConfig()


class PredictConfig(RunConfig):
    """Label every image of a manifest."""

    has_predictions: ClassVar[bool] = True

    top_k: int = Field(default=5, ge=1, le=20)
    """Number of labels kept per image."""
    threshold: UnitFloat | None = None
    """Minimum confidence of an accepted prediction. Default: the bundle's threshold."""
    embeddings: bool | EmbeddingType = False
    """Also write the input of the model's final layer, in float32 unless the type is named. Spark
    (4.3 and before) cannot read a table with float16."""
    scores: bool = False
    """Also write the score of every class."""
    scores_type: Literal["float32", "float16"] = "float32"
    """Type of the written scores. Spark (4.3 and before) cannot read a table with float16."""
    reference: str | None = None
    """Earlier run to measure the drift of predicted classes and confidence against."""
    max_psi: NonNegativeFloat | None = None
    """Maximum drift in a committed run, as population stability index."""
    max_ood_share: UnitFloat | None = None
    """Maximum share of predicted rows that are out of distribution in a committed run."""
    explain: int = Field(default=0, ge=0, le=1000)
    """After the commit, write class activation maps (image regions that contribute to the score of
    the class) of this number of rows: the most confident mistakes, or without labels the least
    confident rows."""


class EmbedConfig(RunConfig):
    """Compute the embedding of every image of a manifest, without predictions."""

    dtype: EmbeddingType = "float16"
    """Type of the embeddings. Spark (4.3 and before) cannot read a table with float16."""


class EmbeddingRunConfig(PredictConfig):
    """The request of `imgcls embed` as one of `imgcls predict`."""

    has_predictions: ClassVar[bool] = False

    @classmethod
    def from_request(cls, config: EmbedConfig) -> EmbeddingRunConfig:
        """The same settings."""
        settings = {name: getattr(config, name) for name in RunConfig.model_fields}
        return cls(**settings, embeddings=config.dtype)


class RelabelConfig(Section):
    """Label a committed run with another head or by labeled images, from its embeddings."""

    positional: ClassVar[tuple[str, ...]] = ("source",)

    source: str
    """The run: output folder of `imgcls predict --embeddings`."""
    output: str
    """Folder to write. An unfinished run in it is resumed."""
    model: str | None = None
    """Bundle of the same network with another head, such as of `imgcls train --strategy probe`."""
    labels: ManifestConfig | None = None
    """Labeled images of the run, instead of a model: each image gets the labels of the k most
    similar ones, any number of them if the labeled images have."""
    k: PositiveInt = 20
    """Number of labeled neighbors of an image, with labels."""
    source_model: str | None = None
    """Bundle that made the run. Default: the folder that was passed to `imgcls predict`."""
    top_k: int | None = Field(default=None, ge=1, le=20)
    """Number of labels kept per image. Default: as in the run."""
    threshold: UnitFloat | None = None
    """Minimum confidence of an accepted prediction, or minimum score of a predicted label for
    multilabel. Default: the bundle's threshold; with labels 0, or 0.5 for multilabel."""
    scores: bool = False
    """Also write the score of every class."""
    scores_type: Literal["float32", "float16"] = "float32"
    """Type of the written scores. Spark (4.3 and before) cannot read a table with float16."""
    embeddings: bool = False
    """Also copy the embeddings."""
    overwrite: bool = False
    """Delete the run in the output folder and start over."""
    storage: StorageConfig = StorageConfig()

    @model_validator(mode="after")
    def _check_source(self) -> RelabelConfig:
        if (self.model is None) == (self.labels is None):
            raise ValueError("pass either model or labels")
        if self.labels is not None and self.embeddings:
            raise ValueError(
                "embeddings: are those of the source's bundle, which a run with labels does not "
                "name; use the source for them"
            )
        return self
