"""`imgcls train` with or without a teacher: a teacher's bundle first labels the images.

The labels are a committed run in the folder `teacher-run` of the output. The training itself takes
the run, see `training`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imgcls import log
from imgcls.config import requested
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import use_settings
from imgcls.errors import ConfigError, OutputError, OutputLocked
from imgcls.inference.config import PredictConfig
from imgcls.models.bundle import BUNDLE_FILE, Bundle, is_registry_uri, read_description
from imgcls.models.mlflow_registry import pin_uri
from imgcls.runs import layout
from imgcls.training import network as networks
from imgcls.training.config import TeacherConfig, TrainConfig
from imgcls.training.data.examples import read_examples
from imgcls.training.data.teacher import (
    check_teacher_classes,
    check_teacher_keys,
    check_teacher_settings,
)
from imgcls.training.data.teacher_run import is_teacher_bundle
from imgcls.training.optim.strategy import resolve_strategy
from imgcls.training.result import TrainResult
from imgcls.training.train import train

TEACHER_FOLDER = "teacher-run"


def train_student(config: TrainConfig | None = None, /, **settings: Any) -> TrainResult:
    """Train a network on labeled images and write its bundle.

    If the output folder holds an unfinished run of the same request, it is resumed from its last
    saved state. If it holds the finished bundle of the same request, that result is returned. With
    a bundle as `teacher`, the teacher labels its images first, into OUTPUT/teacher-run.

    Parameters
    ----------
    config : TrainConfig, optional
        The complete request. Pass either this or `settings`.
    **settings
        Keys of `TrainConfig`, nested (``optim={"lr": 1e-3}``) or dotted
        (``**{"optim.lr": 1e-3}``). `data` and `output` are required.

    Returns
    -------
    TrainResult
        The bundle's URL, the metrics of every epoch, and the best epoch.

    Raises
    ------
    RequestError
        The request cannot work. Nothing was started.
    TooManyErrors
        More images than `data.max_error_rate` allows cannot be decoded.
    RunFailed
        Workers failed more often than `scale.max_failures`, or the loss became NaN or infinite.
        Rerun the same call to resume from the last saved state.

    Examples
    --------
    >>> import imgcls
    >>> result = imgcls.train(  # doctest: +SKIP
    ...     data="photos/", output="bundle", model="resnet18", epochs=3
    ... )
    >>> result.best.val_accuracy  # doctest: +SKIP
    0.9312
    >>> imgcls.train(  # doctest: +SKIP
    ...     data="photos/", output="small", model="small_cnn", teacher="bundle"
    ... )
    """
    config = requested(TrainConfig, config, settings, 'train(data="photos/", output="bundle")')
    with use_settings(config.storage):
        if config.teacher is not None and is_teacher_bundle(config.teacher):
            config = _label_images(config, config.teacher)
    return train(config)


def _label_images(config: TrainConfig, teacher: TeacherConfig) -> TrainConfig:
    """Label the images of a teacher's bundle; the request with the run as its teacher."""
    from imgcls.inference.predict import predict  # Ray Data, which other trainings do not need

    output = filesystem.absolute(config.output)
    run = filesystem.join(output, TEACHER_FOLDER)
    stored = _find_stored_version(config, teacher, run)
    bundle = read_description(teacher.path if stored is None or config.overwrite else stored)
    _check_request(config, teacher, bundle, output, run)
    request = PredictConfig(
        manifest=teacher.manifest or config.data.train,
        model=teacher.path,
        output=run,
        scores=teacher.mode == "soft",
        scores_type="float32",  # float16 rounds the scores to 0 that a temperature makes large
        max_error_rate=config.data.max_error_rate,
        max_bytes=config.data.max_bytes,
        storage=config.storage,
    )
    log.show(f"teacher: predicting the images of {request.manifest.path} into {run}")
    version = None if bundle.registered is None else bundle.registered.pinned_uri
    has_moved = stored not in (None, version)
    try:
        predict(request.model_copy(update={"overwrite": has_moved}))
    except OutputLocked:
        raise
    except OutputError:
        if not config.overwrite:
            raise
        predict(request.model_copy(update={"overwrite": True}))
    taught = teacher.model_copy(update={"path": run, "manifest": None})
    return config.model_copy(update={"teacher": taught})


def _find_stored_version(config: TrainConfig, teacher: TeacherConfig, run: str) -> str | None:
    """URI of the version of the teacher that the stored labels are of; None if there is none.

    A training that is resumed uses this version, also if the alias has another one by then.
    """
    if not is_registry_uri(teacher.path):
        return None
    try:
        stored = (layout.load_run(run) or {}).get("registered_model")
    except OutputError:
        if not config.overwrite:
            raise
        return None
    if not isinstance(stored, Mapping) or stored.get("uri") != teacher.path:
        return None
    return pin_uri(stored)


def _check_request(
    config: TrainConfig, teacher: TeacherConfig, bundle: Bundle, output: str, run: str
) -> None:
    """Raise a RequestError before the labeling where the training could not start after it."""
    check_teacher_settings(config)
    if teacher.mode == "hard" and teacher.manifest is None:
        raise ConfigError(
            "teacher.mode hard: needs images without labels; set teacher.manifest to a manifest "
            "of them"
        )
    if filesystem.absolute(bundle.url) == output:
        raise ConfigError("output: is the bundle of the teacher; pass another --output")
    examples = read_examples(config.data, config.task)
    strategy = resolve_strategy(config.strategy, pretrained=config.model.weights is not None)
    check_teacher_keys(teacher, examples.targets.task, strategy)
    check_teacher_classes(teacher.path, bundle.spec.task, bundle.spec.classes, examples)
    networks.resolve_model(networks.resolve_model_snapshot(config.model))
    layout.check_output_writable(output)
    has_bundle = filesystem.exists(filesystem.join(output, BUNDLE_FILE))
    if has_bundle and not config.overwrite and not layout.is_committed(run):
        raise OutputError(
            f"output {output} already holds a bundle. Pass --overwrite, or another --output."
        )
