"""Evaluation job: evaluate existing predictions, or run prediction on a manifest first.

Writes the metric tables, `summary.json` and `report.html`, and logs the headline numbers.
"""

from __future__ import annotations

from typing import Any

from imgcls import log
from imgcls.config import requested
from imgcls.data.manifests.manifest import Manifest, open_manifest
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import use_settings
from imgcls.errors import ConfigError, ManifestError
from imgcls.evaluation.compute import Evaluation, compute_evaluation
from imgcls.evaluation.config import EvaluateConfig
from imgcls.evaluation.explained import check_explainable
from imgcls.evaluation.label_join import select_run_columns
from imgcls.evaluation.multilabel import MultiLabelEvaluation
from imgcls.evaluation.result import RunEvaluation, write_evaluation
from imgcls.inference.predict import PredictConfig, predict
from imgcls.metrics import tables
from imgcls.metrics.formatting import format_summary
from imgcls.runs import layout
from imgcls.runs.committed import is_scalar_type
from imgcls.runs.schema import build_prediction_schema


def evaluate(
    config: EvaluateConfig | None = None, /, **settings: Any
) -> Evaluation | MultiLabelEvaluation:
    """Evaluate existing predictions, or run prediction on a manifest and evaluate the result.

    Writes metric tables, `summary.json` and `report.html` to the output folder, and logs the
    headline numbers.

    Parameters
    ----------
    config : EvaluateConfig, optional
        All settings. Pass either `config` or `settings`.
    **settings
        Fields of `EvaluateConfig`, nested or dotted (`**{"scale.workers": 2}`).

    Returns
    -------
    Evaluation or MultiLabelEvaluation
        Metrics and tables, by the task of the bundle; in a notebook a short report is shown.

    Raises
    ------
    RequestError
        If a setting, a column, the labels or the run cannot be used.
    TooManyErrors
        If prediction exceeded `max_error_rate`.
    RunFailed
        If prediction was interrupted; call again to resume.

    Examples
    --------
    >>> import imgcls
    >>> result = imgcls.evaluate(predictions="out", slice_by="camera")  # doctest: +SKIP
    >>> result.get_metric("accuracy").value  # doctest: +SKIP
    0.9944
    """
    config = requested(EvaluateConfig, config, settings, 'evaluate(predictions="out")')
    with use_settings(config.storage):
        return _evaluate(config)


def _evaluate(config: EvaluateConfig) -> Evaluation | MultiLabelEvaluation:
    source, was_shown = _resolve_run(config)
    # with a manifest, the output is that of prediction, where {date} is replaced
    given = config.output if config.manifest is None else None
    output = filesystem.absolute(given or source)
    if not filesystem.is_same(output, source):
        layout.check_no_run(output)
    evaluation = compute_evaluation(source, config, need_labels=True)
    write_evaluation(evaluation, output)
    report_url = filesystem.join(output, layout.REPORT_FILE)
    filesystem.write(report_url, evaluation.render(in_notebook=False).encode())
    _log_result(evaluation, output, was_shown=was_shown)
    return evaluation


def _log_result(evaluation: RunEvaluation, output: str, *, was_shown: bool) -> None:
    """Log the headline numbers and where the others are.

    was_shown: prediction has just logged the metrics that need no scores
    """
    metrics = evaluation.metrics
    if was_shown:
        names = {metric.name for metric in evaluation.compute_count_metrics()}
        metrics = [metric for metric in metrics if metric.name not in names]
    text = format_summary(tables.build_summary_table(metrics))
    if text:
        log.show(text)
    for note in evaluation.omitted:
        log.show(f"left out: {note}")
    log.show(f"all metrics  {filesystem.join(output, layout.SUMMARY_FILE)}")
    log.show(f"tables       {filesystem.join(output, layout.METRICS_FOLDER)}")
    log.show(f"report       {filesystem.join(output, layout.REPORT_FILE)}")


def _resolve_run(config: EvaluateConfig) -> tuple[str, bool]:
    """Folder of a committed run, and whether prediction just made it and logged its metrics."""
    if config.predictions is not None:
        given = [name for name in ("manifest", "model") if getattr(config, name) is not None]
        if given:
            raise ConfigError(
                f"predictions and {given[0]} are both given; pass --predictions to evaluate "
                "existing predictions, or --manifest and --model to predict first"
            )
        if config.labels is not None and config.output is None:
            raise ConfigError(
                "output: is required with --labels, so that the metrics of the run itself are "
                "kept; pass --output FOLDER"
            )
        return config.predictions, False
    missing = [n for n in ("manifest", "model", "output") if getattr(config, n) is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: required to predict first; or pass --predictions, the output "
            "folder of `imgcls predict`"
        )
    assert config.manifest is not None
    assert config.model is not None
    assert config.output is not None
    _check_manifest(config, open_manifest(config.manifest))
    if config.explain:
        check_explainable(config.model)
    result = predict(
        PredictConfig(
            manifest=config.manifest,
            model=config.model,
            output=config.output,
            scores=config.scores,
            decode=config.decode,
            precision=config.precision,
            engine=config.engine,
            max_error_rate=config.max_error_rate,
            overwrite=config.overwrite,
            scale=config.scale,
            storage=config.storage,
        )
    )
    return result.output, result.counts is not None and config.labels is None


def _check_manifest(config: EvaluateConfig, manifest: Manifest) -> None:
    """Raise ManifestError for errors that would otherwise show only after prediction."""
    names = manifest.schema.names
    slices = select_run_columns(config.slice_by, joined=config.labels is not None)
    columns = [("slice_by", name) for name in slices]
    if config.on is not None:
        columns.append(("on", config.on))
    added = build_prediction_schema(
        labeled=True, has_label_sets=True, has_ood=True, scores=1, embedding=1
    )
    kinds = {field.name: field.type for schema in (added, manifest.schema) for field in schema}
    for option, name in columns:
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
    if config.labels is None and manifest.find_label_columns() is None:
        raise ManifestError(
            f"manifest {manifest.source}: has no label column to evaluate against; name it with "
            "--manifest.label-column, or join labels with --labels TABLE"
        )
