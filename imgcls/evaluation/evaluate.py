"""The evaluation job: label a manifest first, or take predictions that exist; then judge them.

Brings labelling and evaluation together, which do not know each other.
"""

from __future__ import annotations

from typing import Any

from imgcls.config import UnitFloat, requested
from imgcls.data import filesystem
from imgcls.data.manifest import Manifest, ManifestConfig, open_manifest
from imgcls.data.preprocess import DecodeMode
from imgcls.data.storage_settings import StorageConfig, use_settings
from imgcls.errors import ConfigError, ManifestError
from imgcls.evaluation import report
from imgcls.evaluation.compute import (
    Evaluation,
    EvaluationOptions,
    compute_evaluation,
    write_evaluation,
)
from imgcls.evaluation.label_join import select_run_columns
from imgcls.execution.placement import ScaleConfig
from imgcls.inference.predict import PredictConfig, predict
from imgcls.metrics import tables
from imgcls.models.bundle import Precision
from imgcls.runs.committed import is_scalar_type
from imgcls.runs.schema import build_prediction_schema


class EvaluateConfig(EvaluationOptions):
    """Judge predictions that exist, or label a manifest and judge what came of it."""

    predictions: str | None = None
    """The output folder of `imgcls predict`: nothing is labelled again."""
    manifest: ManifestConfig | None = None
    """What to label first, where there are no predictions yet."""
    model: str | None = None
    """The bundle to label with."""
    output: str | None = None
    """The folder to write; the predictions' own when not given, if no labels are joined."""
    scores: bool = True
    """When labelling: write every class's score, which AUROC and Brier need."""
    decode: DecodeMode | None = None
    """When labeling: as for predict."""
    precision: Precision = "auto"
    """When labelling: as for predict."""
    max_error_rate: UnitFloat = 0.01
    """When labelling: judge only if at most this share of the rows failed."""
    overwrite: bool = False
    """When labelling: throw away what is in the output folder and start over."""
    scale: ScaleConfig = ScaleConfig()
    """When labelling."""
    storage: StorageConfig = StorageConfig()


def evaluate(config: EvaluateConfig | None = None, /, **settings: Any) -> Evaluation:
    """Judge predictions, or label a manifest and judge what came of it.

    config:   the whole request, or else
    settings: its keys, as in `evaluate(predictions="out")`
    Raises RequestError when something is wrong with what was asked; what `predict` raises.
    """
    config = requested(EvaluateConfig, config, settings, 'evaluate(predictions="out")')
    with use_settings(config.storage):
        return _evaluate(config)


def _evaluate(config: EvaluateConfig) -> Evaluation:
    source = _resolve_run(config)
    output = filesystem.absolute(config.output or source)
    evaluation = compute_evaluation(source, config, need_labels=True)
    write_evaluation(evaluation, output)
    place = filesystem.join(output, report.REPORT_FILE)
    filesystem.write(place, report.render_run(evaluation).encode())
    print(tables.format_summary(tables.build_summary_table(evaluation.metrics)))
    for sentence in evaluation.omitted:
        print(f"left out: {sentence}")
    print(f"report     {place}\nnumbers    {filesystem.join(output, 'summary.json')}", flush=True)
    return evaluation


def _resolve_run(config: EvaluateConfig) -> str:
    """The folder of a committed run, labelled first if need be."""
    if config.predictions is not None:
        given = [name for name in ("manifest", "model") if getattr(config, name) is not None]
        if given:
            raise ConfigError(
                f"predictions and {given[0]} are both given; give --predictions for what is "
                "labelled already, or --manifest and --model to label first"
            )
        if config.labels is not None and config.output is None:
            raise ConfigError(
                "output: is required with --labels, so that the run's own numbers stay; give "
                "--output FOLDER"
            )
        return config.predictions
    missing = [n for n in ("manifest", "model", "output") if getattr(config, n) is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: needed to label first; or give --predictions, the output "
            "folder of `imgcls predict`"
        )
    assert config.manifest is not None
    assert config.model is not None
    assert config.output is not None
    _check_manifest(config, open_manifest(config.manifest))
    predict(
        PredictConfig(
            manifest=config.manifest,
            model=config.model,
            output=config.output,
            scores=config.scores,
            decode=config.decode,
            precision=config.precision,
            max_error_rate=config.max_error_rate,
            overwrite=config.overwrite,
            scale=config.scale,
            storage=config.storage,
        )
    )
    return config.output


def _check_manifest(config: EvaluateConfig, manifest: Manifest) -> None:
    """Raise RequestError for what could only be refused after labelling everything."""
    names = manifest.schema.names
    slices = select_run_columns(config.slice_by, joined=config.labels is not None)
    wanted = [("slice_by", name) for name in slices]
    if config.on is not None:
        wanted.append(("on", config.on))
    added = build_prediction_schema(labelled=True, scores=1, embedding=1)
    kinds = {field.name: field.type for schema in (added, manifest.schema) for field in schema}
    for option, name in wanted:
        if name not in kinds:
            raise ManifestError(
                f"{option}: manifest {manifest.source} has no column {name!r} (found: "
                f"{', '.join(names)})"
            )
        if not is_scalar_type(kinds[name]):
            raise ManifestError(
                f"{option}: column {name!r} of manifest {manifest.source} is {kinds[name]}; pass "
                "a column of plain values, such as text, numbers or dates"
            )
    if config.labels is None and manifest.label_column is None:
        raise ManifestError(
            f"manifest {manifest.source}: has no label column to judge by; name it with "
            "--manifest.label-column, or join labels with --labels TABLE"
        )
