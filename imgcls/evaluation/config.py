"""Configuration of the commands that evaluate, compare, calibrate and report.

It is checked without torch and Ray, so that a wrong key is refused at once.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from imgcls.config import Names, Section, UnitFloat
from imgcls.data.annotations.tasks import ToolFormat
from imgcls.data.decoding.preprocess import DecodeMode
from imgcls.data.manifests.manifest import ManifestConfig
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.execution.config import ScaleConfig
from imgcls.models.bundle import EngineName, Precision
from imgcls.models.ood import OodMethod


class LabelTableConfig(Section):
    """CSV or Parquet table of labels."""

    shorthand: ClassVar[str | None] = "path"

    path: str
    """File, folder or glob of the table."""
    column: str | None = None
    """Column of class names, or of lists of them (default: `label`; for a multilabel run also
    `labels`)."""
    label_delimiter: str | None = None
    """Separator of several class names in the column, such as ; (multilabel)."""
    label_columns: Names = []
    """Columns of classes, separated by commas: 1, 0, or no value where unknown (multilabel)."""
    delimiter: str | None = None
    """CSV delimiter (default: detected from the header line)."""
    encoding: str = "utf-8"
    """CSV text encoding."""
    escape: str | None = None
    """CSV escape character before a quote inside a quoted value, e.g. \\ for files from Spark."""


class LabelJoinConfig(Section):
    """Labels to evaluate a run against."""

    labels: LabelTableConfig | None = None
    """Table of labels to join (default: the label column of the run)."""
    on: str | None = None
    """Column that joins predictions and labels (default: the path column)."""

    @model_validator(mode="after")
    def _check_join(self) -> Self:
        if self.on is not None and self.labels is None:
            raise ValueError("on: is the key of --labels, which is missing; pass --labels TABLE")
        return self


class EvaluationOptions(LabelJoinConfig):
    """Labels to evaluate against, and contents of the report."""

    slice_by: Names = []
    """Manifest columns to slice by: all metrics for each value, e.g. camera,site."""
    small_slice: PositiveInt = 30
    """Slices with fewer labeled rows are marked as small."""
    gallery: PositiveInt = 24
    """Images of each kind in the report."""
    thumbnails: bool = True
    """Read the images and show thumbnails in the report."""
    explain: Annotated[int, Field(ge=0, le=1000)] = 0
    """Number of mistakes in the report with class activation maps (Grad-CAM): image regions that
    contribute to the scores. Takes a forward and a backward pass of the model for each."""
    explain_model: str | None = None
    """With explain: bundle that made the run. Default: the folder that was passed to predict."""

    @property
    def num_mistakes(self) -> int:
        """Number of mistakes to keep, of which `explain` are explained."""
        return max(self.gallery, self.explain)


class EvaluateConfig(EvaluationOptions):
    """Evaluate existing predictions, or run prediction on a manifest and evaluate the result."""

    positional: ClassVar[tuple[str, ...]] = ("predictions",)

    predictions: str | None = None
    """Output folder of `imgcls predict`, to evaluate without running the model again."""
    manifest: ManifestConfig | None = None
    """Images to predict first, if there are no predictions yet."""
    model: str | None = None
    """Bundle to predict with."""
    output: str | None = None
    """Folder to write to (default: the predictions' folder; required with --labels)."""
    scores: bool = True
    """With a manifest: write the scores of all classes, which AUROC and Brier need."""
    decode: DecodeMode | None = None
    """With a manifest: as for predict."""
    precision: Precision = "auto"
    """With a manifest: as for predict."""
    engine: EngineName = "auto"
    """With a manifest: as for predict."""
    max_error_rate: UnitFloat = 0.01
    """With a manifest: maximum share of failed rows; above it nothing is evaluated."""
    overwrite: bool = False
    """With a manifest: delete the contents of the output folder and start over."""
    scale: ScaleConfig = ScaleConfig()
    """With a manifest: as for predict."""
    storage: StorageConfig = StorageConfig()


def _validate_points(text: str) -> str:
    parse_points(text)
    return text


def parse_points(text: str) -> float:
    """Parse a difference of accuracies: `0.5pt`, `0.5pp` and `0.5%` are 0.005.

    A number without a unit is a fraction. Raises ValueError if it is not in [0, 1).
    """
    number = text.strip().lower()
    for unit in ("pt", "pp", "%"):
        if number.endswith(unit):
            value = float(number.removesuffix(unit)) / 100
            break
    else:
        value = float(number)
    if not 0 <= value < 1:
        raise ValueError(f"{text!r} is not between 0 and 100 points; write 0.5pt for half a point")
    return value


class CompareConfig(Section):
    """Compare the accuracy or the multilabel metrics of two runs over the same images."""

    positional: ClassVar[tuple[str, ...]] = ("run_a", "run_b")

    run_a: str
    """Output folder of the run to compare with, e.g. of the current model."""
    run_b: str
    """Output folder of the run of the candidate model."""
    on: str | None = None
    """Column that identifies the image; required if the runs have different manifests."""
    labels: LabelTableConfig | None = None
    """Table of labels to join (default: the label column of run_a)."""
    slice_by: Names = []
    """Columns of run_a to slice by: the difference for each value, e.g. camera,site."""
    fail_if_worse: Annotated[str, AfterValidator(_validate_points)] | None = None
    """Exit with code 3 if the accuracy of run_b is lower by more than this, e.g. 0.5pt; for
    multilabel, if its mean average precision is."""
    output: str | None = None
    """Folder for per_class, slices and differing rows as Parquet, and summary.json."""
    storage: StorageConfig = StorageConfig()


class CalibrateConfig(LabelJoinConfig):
    """Calibrate confidence, choose acceptance thresholds and label sets, write a new bundle."""

    model: str
    """Bundle that predicted the held-out images."""
    predictions: str
    """Output folder of `imgcls predict --scores` on labeled held-out images."""
    output: str
    """Folder of the new bundle."""
    method: Literal["temperature", "vector", "none"] = "temperature"
    """vector: a scale and a bias per class (needs many rows per class); none: thresholds only."""
    target_precision: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Choose the lowest threshold at which this share of the accepted rows is correct; for
    multilabel, of the predicted labels."""
    best_f1: bool = False
    """For multilabel: choose the thresholds with the best F1."""
    per_class: bool | None = None
    """Choose a threshold per predicted class instead of one for all (default: with best_f1)."""
    min_rows: PositiveInt = 30
    """Minimum number of accepted labeled rows for a threshold; with best_f1, of images with the
    class."""
    coverage: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Choose conformal label sets, which include the label with this probability."""
    coverage_per_class: bool = False
    """Reach the coverage for the images of each class, not only on average."""
    rank_penalty: Annotated[FiniteFloat, Field(ge=0.0)] = 0.0
    """Makes large label sets smaller and small ones larger (RAPS), such as 0.01."""
    max_ood_rate: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Detect images unlike the training data; this share of the held-out images is flagged. The
    predictions need --embeddings."""
    ood_reference: str | None = None
    """Output folder of `imgcls predict --embeddings` on training images, which images are compared
    with. Default: every other held-out image."""
    ood_method: OodMethod = "knn"
    """knn: distance to the reference embeddings; energy: of the logits."""
    overwrite: bool = False
    """Replace an existing bundle."""
    storage: StorageConfig = StorageConfig()

    @model_validator(mode="after")
    def _check_thresholds(self) -> Self:
        if self.best_f1 and self.target_precision is not None:
            raise ValueError(
                "best_f1: chooses the thresholds, as target_precision does; pass one of them"
            )
        return self

    @property
    def has_class_thresholds(self) -> bool:
        """Whether each class gets its own threshold."""
        return self.best_f1 if self.per_class is None else self.per_class


MIN_IMAGES = 16


class QuantizeConfig(Section):
    """Create a bundle that runs in int8 on CPUs, and measure agreement, accuracy and speed."""

    model: str
    """Bundle to calibrate."""
    manifest: ManifestConfig
    """Images like those to be predicted; if they have labels, accuracy is measured too."""
    output: str
    """Folder of the new bundle."""
    images: int = Field(default=1024, ge=2 * MIN_IMAGES)
    """Images to draw at random from the first million rows: half to calibrate, half to evaluate."""
    engine: EngineName = "auto"
    """Engine to quantize for. openvino: for x86 CPUs with AVX2. torch: for VNNI or AMX. auto: torch
    if this CPU has one of them, else openvino."""
    overwrite: bool = False
    """Replace an existing bundle."""
    storage: StorageConfig = StorageConfig()


class ReportConfig(Section):
    """Write report.html for a run (labeled or not) or for a trained bundle."""

    positional: ClassVar[tuple[str, ...]] = ("source",)

    source: str
    """Output folder of `imgcls predict`, or a bundle of `imgcls train`."""
    output: str | None = None
    """File to write (default: report.html in the source folder)."""
    evaluation: EvaluationOptions = EvaluationOptions()
    storage: StorageConfig = StorageConfig()


DEFAULT_DEPTH = 4


class RunsConfig(Section):
    """List the outputs in a folder, or show what one of them was made from."""

    positional: ClassVar[tuple[str, ...]] = ("folder",)

    folder: str
    """Folder with outputs of imgcls, local or on an object store."""
    lineage: str | None = None
    """Path of an output, or 8 or more digits of a bundle's SHA-256: show what it was made from.
    Path of an image: show its newest prediction and label."""
    html: str | None = None
    """HTML file to write, one page without external parts."""
    json_lines: bool = False
    """Print one JSON object per output instead of a table."""
    depth: NonNegativeInt = DEFAULT_DEPTH
    """Maximum number of levels below the folder that are searched."""
    storage: StorageConfig = StorageConfig()


class SelectConfig(Section):
    """Select the rows of a run that are most useful to label next."""

    positional: ClassVar[tuple[str, ...]] = ("run",)

    run: str
    """Output folder of `imgcls predict`, or of `imgcls history compact`."""
    output: str
    """Folder to write manifest.parquet and selection.parquet to."""
    count: PositiveInt = 500
    """Number of rows to select."""
    by: Literal["margin", "entropy", "ood", "disagreement"] = "margin"
    """margin: small difference of the two best scores. entropy: of all scores. ood: unlike the
    training data. disagreement: with another model, see other_run."""
    diverse: bool = False
    """Of the most uncertain rows, choose some whose embeddings differ from each other (weighted
    k-means++). Default: the most uncertain ones."""
    candidates: PositiveInt | None = None
    """Number of most uncertain rows to choose from. Default: 10 times count, or 5 times if
    diverse."""
    per_class_cap: PositiveInt | None = None
    """Maximum number of selected rows of each predicted class."""
    max_similarity: Annotated[float, Field(gt=0.0, le=1.0)] = 0.98
    """Cosine similarity of two embeddings above which the images are near-duplicates: only one of
    them is selected."""
    other_run: str | None = None
    """For disagreement: output folder of another model's run over the same images."""
    on: str | None = None
    """Column that identifies the image in both runs; required if their manifests differ."""
    exclude: ManifestConfig | None = None
    """Manifest of images that are not selected, such as those that are being labeled."""
    include_labeled: bool = False
    """Also select rows that have a label."""
    format: ToolFormat | None = None
    """Labeling tool to write tasks for as well, with the predictions: label-studio, cvat, fiftyone,
    or csv for a spreadsheet."""
    image_root: str | None = None
    """Folder or prefix where the tool's names of images start. label-studio: the folder that is its
    LOCAL_FILES_DOCUMENT_ROOT (default: /). cvat: the root of its share or cloud storage (default:
    the bucket; of local images the file name alone, as uploaded)."""
    overwrite: bool = False
    """Replace an existing selection."""
    storage: StorageConfig = StorageConfig()

    @model_validator(mode="after")
    def _check_candidates(self) -> Self:
        if self.candidates is not None and self.candidates < self.count:
            raise ValueError(f"candidates {self.candidates}: is smaller than count {self.count}")
        if self.image_root is not None and self.format not in ("label-studio", "cvat"):
            raise ValueError(
                "image_root: has no effect without --format label-studio or cvat; remove it"
            )
        return self


class SimilarConfig(Section):
    """Find the images of a run that are similar to given ones, by their embeddings."""

    positional: ClassVar[tuple[str, ...]] = ("run",)

    run: str
    """Output folder of `imgcls predict --embeddings`."""
    to: Annotated[Names, Field(min_length=1)]
    """The images to find similar ones to: paths or URLs."""
    k: PositiveInt = 10
    """Number of similar images per image."""
    model: str | None = None
    """Bundle that made the run. Default: the folder that was passed to `imgcls predict`."""
    index: str | None = None
    """Folder of an approximate index, built there once: for repeated searches of a large run.
    Default: compare every embedding."""
    output: str | None = None
    """Parquet file to write the table to as well."""
    storage: StorageConfig = StorageConfig()
