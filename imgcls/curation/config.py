"""Configuration of the `imgcls manifest` commands, and of `imgcls labels import`.

It is checked without torch and Ray, so that a wrong key is refused at once.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from imgcls.config import Names, Section, UnitFloat, names
from imgcls.data.annotations.tasks import ExportFormat
from imgcls.data.decoding.preprocess import DecodeMode
from imgcls.data.image_files import MAX_IMAGE_BYTES
from imgcls.data.manifests.manifest import ManifestConfig
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.execution.config import ScaleConfig
from imgcls.inference.config import ErrorStatus
from imgcls.log import LogFormat
from imgcls.models.bundle import EngineName


class ListingConfig(Section):
    """List a folder or a bucket into a manifest."""

    positional: ClassVar[tuple[str, ...]] = ("source",)

    source: str
    """Folder or prefix to list, such as s3://bucket/photos."""
    output: str
    """Folder of Parquet files to write; pass it to `--manifest`."""
    labels: bool = False
    """Use the name of the folder right below the source as the label."""
    list_concurrency: PositiveInt = 16
    """Number of prefixes that are listed in parallel."""
    overwrite: bool = False
    """Replace an existing manifest."""
    storage: StorageConfig = StorageConfig()


class ManifestBuildConfig(ListingConfig):
    """List a folder or a bucket into a manifest, or convert a glob or a table to one."""

    path_column: str = "path"
    """Column of image paths in the source table; named path in the manifest."""
    image_column: str | None = None
    """Column of the images themselves in a Parquet source; the manifest gets their URLs."""
    label_column: str | None = None
    """Column of class names in the source table; named label in the manifest. Lists stay lists."""
    label_delimiter: str | None = None
    """Separator of several class names in the label column of the source table, such as ;."""
    label_columns: Names = []
    """Class columns of the source table, separated by commas: 1, 0, or no value where unknown. They
    become one column of lists, unless some classes of an image are unknown."""
    merge_links: bool = False
    """With labels, on a local disk: an image that is linked into several class folders becomes one
    row with a list of labels."""
    delimiter: str | None = None
    """Delimiter of a CSV source, one character (default: detected in the header line)."""
    encoding: str = "utf-8"
    """Text encoding of a CSV source."""
    escape: str | None = None
    """CSV escape character before a quote inside a quoted value, such as \\ for files of Spark."""
    output_format: Literal["parquet", "csv"] = "parquet"
    """Format of the manifest. csv: labels of several classes become text with csv_separator."""
    csv_separator: str = Field(default=";", pattern=r"\S")
    """Separator of several class names in a CSV manifest; pass it to `--manifest.label-delimiter`.
    """
    contents: bool = False
    """Read every image; adds the columns status, bytes, format, width, height, digest (BLAKE2b)."""
    perceptual: bool = False
    """With contents: add the perceptual hash as a column."""
    max_pixels: int = Field(default=100_000_000, ge=1, le=178_956_970)
    """With contents: maximum number of pixels of an image."""
    max_bytes: PositiveInt = MAX_IMAGE_BYTES
    """With contents: maximum size of an image file, in bytes; a larger one is too_large."""
    scale: ScaleConfig = ScaleConfig()
    """With contents."""


ShardFormat = Literal["parquet", "tar"]


class FetchConfig(Section):
    """Store the images of a manifest, such as a list of URLs, in shards."""

    positional: ClassVar[tuple[str, ...]] = ("manifest",)

    manifest: ManifestConfig
    """The list of images: a CSV or Parquet file, a glob, or a folder."""
    output: str
    """Folder to write. An unfinished fetch in it is resumed."""
    format: ShardFormat = "parquet"
    """parquet: tables with a column of images, as Hugging Face datasets reads them. tar:
    WebDataset archives, each with a table of all its rows."""
    shard_rows: int = Field(default=5000, ge=1, le=1_000_000)
    """Manifest rows per shard, the unit that is fetched again after a kill."""
    io_concurrency: PositiveInt = 256
    """Concurrent reads over all hosts."""
    max_pixels: int = Field(default=100_000_000, ge=1, le=178_956_970)
    """Maximum number of pixels of an image; a larger one is too_large."""
    max_bytes: PositiveInt = MAX_IMAGE_BYTES
    """Maximum size of an image file, in bytes. A larger one is too_large and not read further."""
    max_error_rate: UnitFloat = 0.01
    """Maximum fraction of failed rows; above it, the exit code is 3."""
    max_error_rates: dict[ErrorStatus, UnitFloat] = {}
    """Per-status limits, e.g. {missing: 0.3}. A status listed here is not counted in
    max_error_rate."""
    retry_errors: bool = False
    """Fetch the rows again that failed in an earlier run on this output."""
    overwrite: bool = False
    """Delete the fetch in the output folder and start over."""
    progress_seconds: PositiveFloat = 5.0
    """Interval of the progress lines in a job's log, in seconds."""
    log: LogFormat = "text"
    """json: one JSON object per line."""
    storage: StorageConfig = StorageConfig()


class ScanConfig(Section):
    """The images to scan, and how."""

    positional: ClassVar[tuple[str, ...]] = ("manifest",)

    manifest: ManifestConfig
    """The manifest of the images."""
    output: str
    """Folder to write the results to."""
    max_pixels: int = Field(default=100_000_000, ge=1, le=178_956_970)
    """Maximum number of pixels of an image; a larger one is refused from its header."""
    max_bytes: PositiveInt = MAX_IMAGE_BYTES
    """Maximum size of an image file, in bytes; a larger one gets the status too_large."""
    overwrite: bool = False
    """Delete earlier results in the output folder and start over."""
    progress_seconds: PositiveFloat = 5.0
    """Interval of the progress lines in a job's log, in seconds."""
    scale: ScaleConfig = ScaleConfig()
    storage: StorageConfig = StorageConfig()


class StatsConfig(ScanConfig):
    """Describe a data set: classes, sizes, formats, a contact sheet per class."""

    sheet_images: NonNegativeInt = 12
    """Number of images on the contact sheet of a class."""
    max_sheets: PositiveInt = 50
    """Maximum number of contact sheets; the largest classes come first."""
    seed: int = 0
    """Seed for choosing the images of the contact sheets."""
    min_positives: NonNegativeInt = 10
    """Multi-label: minimum number of images of a class; one with fewer is reported."""


BY_CONTENT = "content"


class SplitConfig(Section):
    """Split a manifest into parts; duplicates and groups are never shared between parts."""

    positional: ClassVar[tuple[str, ...]] = ("manifest",)

    manifest: ManifestConfig
    """The manifest to split."""
    output: str
    """Folder for the parts: one Parquet file each, to be passed to `--manifest`."""
    parts: dict[str, PositiveFloat] = {"train": 0.8, "val": 0.1, "test": 0.1}
    """Fraction of the rows for each part, by its name."""
    folds: int | None = Field(default=None, ge=2, le=100)
    """Number of cross-validation folds instead of parts: folders with train and val.parquet."""
    by: str = BY_CONTENT
    """Rows to keep together: content (same image bytes), or a column such as patient."""
    stratify: bool | None = None
    """Give each part its share of every class, after reading all labels (default: for multi-label
    manifests). Off: by a hash, so that added rows move no earlier row to another part."""
    seed: int = 0
    """Seed of the split."""
    overwrite: bool = False
    """Replace an existing split."""
    storage: StorageConfig = StorageConfig()


Issue = Literal[
    "unreadable",
    "wrong-extension",
    "tiny",
    "extreme-aspect",
    "odd-size",
    "near-black",
    "near-white",
    "low-information",
    "blurry",
    "greyscale",
    "rotated",
    "exact-duplicates",
    "near-duplicates",
    "similar",
    "leakage",
    "label-conflict",
    "label-error",
    "outlier",
]


class RulesConfig(Section):
    """Thresholds of the rules for single images."""

    min_side: PositiveInt = 16
    """Tiny: minimum length of the shorter side, in pixels; off where the median is below it."""
    max_aspect: PositiveFloat = 4.0
    """Extreme aspect: maximum ratio of the longer to the shorter side."""
    max_size_ratio: PositiveFloat = 10.0
    """Odd size: maximum ratio between the number of pixels and its median, either way."""
    black_level: UnitFloat = 0.1
    """Near-black: 95 % of the pixels are darker than this (0 is black, 1 is white)."""
    white_level: UnitFloat = 0.95
    """Near-white: 95 % of the pixels are brighter than this (0 is black, 1 is white)."""
    min_entropy: NonNegativeFloat = 2.0
    """Low information: minimum entropy of the brightness, in bits (0 to 8)."""
    min_sharpness: NonNegativeFloat = 0.12
    """Blurry: minimum sharpness (standard deviation of the Laplacian over that of brightness)."""
    min_color: UnitFloat = 0.03
    """Grayscale: minimum difference between the color channels (0 to 1)."""
    max_gray_share: UnitFloat = 0.2
    """Grayscale: maximum fraction of such images; above it, none is reported."""


class DuplicatesConfig(Section):
    """Minimum similarity of two images that count as duplicates."""

    max_hash_distance: int = Field(default=60, ge=0, le=100)
    """Near duplicates: maximum number of bits of the perceptual hash (of 256) that differ."""
    min_contrast: UnitFloat = 0.02
    """Minimum contrast of an image for its perceptual hash to be used."""
    min_side: PositiveInt = 24
    """Minimum length of the shorter side, in pixels, for the perceptual hash to be used."""
    min_cosine: UnitFloat = 0.95
    """With a model: minimum cosine similarity between the embeddings of similar images."""
    seed: PositiveInt = 1
    """Seed of the random projections of the embeddings."""


class LabelErrorsConfig(Section):
    """Detection of label errors and outliers, with a model."""

    folds: int = Field(default=5, ge=2, le=20)
    """Number of cross-validation folds."""
    max_probe_images: PositiveInt = 50_000
    """Maximum number of images to fit a probe on; classes with few images are used completely."""
    min_margin: UnitFloat = 0.0
    """Label errors: minimum difference of probability between the best class and the label;
    multi-label: between the class and the mean of the images that have, or lack, it."""
    neighbors: PositiveInt = 10
    """Outliers: number of nearest neighbors whose mean distance is used."""
    max_reference_images: PositiveInt = 10_000
    """Outliers: maximum number of images among which neighbors are searched."""
    outlier_deviations: PositiveFloat = 5.0
    """Outliers: minimum distance above the median, in robust standard deviations."""
    seed: int = 1
    """Seed of the folds and samples."""
    min_positives: NonNegativeInt = 10
    """Multi-label: minimum number of images of a class; one with fewer is reported."""


IssueList = Annotated[list[Issue], BeforeValidator(names)]


class CheckConfig(ScanConfig):
    """Check a data set: bad images, duplicates, leaks between manifests, probable label errors."""

    against: Names = []
    """Other manifests, such as the test set; an image in both is reported as leakage."""
    model: str | None = None
    """Bundle whose embeddings are used to find similar images, outliers and label errors."""
    decode: DecodeMode | None = None
    """Decode route for the model: exact or fast (default: bundle's)."""
    engine: EngineName = "auto"
    """Library that runs the model: torch, or openvino (optional, for CPUs). auto: torch."""
    output: str
    """Folder for the results; with drop, NAME.parquet writes the clean manifest there."""
    drop: IssueList = []
    """Write the manifest without rows that have these issues; the first duplicate is kept."""
    fail_on: IssueList = []
    """Exit with status 3 if one of these issues is found."""
    rules: RulesConfig = RulesConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()
    labels: LabelErrorsConfig = LabelErrorsConfig()
    gallery: NonNegativeInt = 24
    """Maximum number of images shown per issue."""


ConflictPolicy = Literal["error", "majority", "newest", "skip"]


class LabelsImportConfig(Section):
    """Merge the labels that people gave in a labeling tool onto a manifest."""

    positional: ClassVar[tuple[str, ...]] = ("export",)

    export: str
    """Export of the tool: a file, the folder of a FiftyOne data set, or a labels table in Parquet
    (a file or a folder)."""
    onto: ManifestConfig
    """Manifest whose rows get the labels; images that are not in it are added."""
    output: str
    """Parquet file to write; labels_history.parquet is kept next to it."""
    format: ExportFormat = "auto"
    """Format of the export. imgcls: a labels table. auto: by the content."""
    images: ManifestConfig | None = None
    """Manifest of the images that were labeled, such as next/manifest.parquet. Names in the export
    that are not absolute paths are looked up in it, an image that is neither in it nor in onto is
    refused, and added images get its columns."""
    image_root: str | None = None
    """Folder or URL prefix of relative names in the export, such as s3://bucket. Default: match
    them with the end of the paths in images."""
    on_conflict: ConflictPolicy = "error"
    """Where annotators disagree about an image. error: list the images and write nothing. majority:
    the label of more than half. newest: the last label. skip: none of them."""
    existing: Literal["replace", "keep"] = "replace"
    """Where the manifest has another label: replace it, or keep it."""
    new_classes: bool = False
    """Accept class names that are not in the manifest."""
    multilabel: bool = False
    """For a manifest without labels: an image may have any number of them."""
    skip_unchanged: bool = False
    """cvat, fiftyone: leave out images whose labels are unchanged predictions of a model."""
    overwrite: bool = False
    """Replace an existing output."""
    storage: StorageConfig = StorageConfig()
