"""Import a weights file as a bundle: `imgcls model import`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from imgcls import log
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.errors import BundleError, ConfigError, one_line
from imgcls.models import zoo
from imgcls.models.bundle import (
    FORMAT_VERSIONS,
    Bundle,
    BundleSpec,
    check_bundle_output,
    save_bundle,
)
from imgcls.models.class_list import read_class_list
from imgcls.models.config import ImportConfig, ListModelsConfig
from imgcls.models.tasks import TASKS


@with_config_storage
def import_model(config: ImportConfig) -> Bundle:
    """Make a bundle from a weights file and a list of classes, or of a backbone without any.

    Raises BundleError if they do not match, OutputError if the bundle already exists, ConfigError
    for a multi-label model without classes.
    """
    if config.task == "multilabel" and config.classes is None:
        raise ConfigError("task multilabel: needs the list of classes; pass --classes")
    arch, weights, options = zoo.resolve_snapshot(
        config.arch, config.weights, config.options, config.crop
    )
    assert weights is not None
    config = config.model_copy(update={"arch": arch, "weights": weights, "options": options})
    architecture = zoo.resolve_architecture(config.arch, config.options)
    if config.crop is not None:
        architecture = zoo.set_image_size(architecture, config.crop)
    architecture = zoo.add_pretrained_options(architecture, config.weights, config.crop)
    output = filesystem.absolute(config.output)
    check_bundle_output(output, overwrite=config.overwrite)
    classes = [] if config.classes is None else read_class_list(config.classes)
    spec = BundleSpec(
        format_version=FORMAT_VERSIONS[config.task],
        task=config.task,
        threshold=TASKS[config.task].default_threshold,
        architecture=architecture,
        classes=classes,
        preprocess=_resolve_preprocess(
            config, zoo.get_default_preprocess(architecture, config.weights)
        ),
        provenance={"imported_from": config.weights},
    )
    state = zoo.load_weights(config.weights, architecture)
    network = zoo.build_network(architecture, spec.num_outputs)
    matched = zoo.match_weights(network, state)
    for note in matched.describe_changes():
        log.emit("note", note)
    if classes:
        _check_class_count(network, matched.state, config, len(classes))
        zoo.apply_weights(network, matched.state, replace_head=False)
    else:
        zoo.apply_weights(network, matched.state, replace_head=True)
        _clear_heads(network)
    _check_input_size(network, spec.preprocess.crop)
    bundle = save_bundle(output, spec, network.state_dict())
    number = f"{len(classes):,} classes" if classes else "a backbone, for `imgcls embed`"
    kind = ", multilabel" if config.task == "multilabel" else ""
    log.show(f"bundle  {output}  ({config.arch}, {number}{kind})")
    return bundle


@torch.inference_mode()
def _check_input_size(network: nn.Module, crop: int) -> None:
    """Raise BundleError for a network that cannot process images of this size."""
    try:
        network.eval()(torch.zeros(1, 3, crop, crop))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise BundleError(
            f"crop {crop}: {type(network).__name__} cannot process images of this size "
            f"({one_line(error)}); pass another --crop, or its option for the input size"
        ) from error


@torch.no_grad()
def _clear_heads(network: nn.Module) -> None:
    """Set the heads to 0, so that equal weights make equal bundles."""
    for name in zoo.list_head_names(network):
        for parameter in network.get_submodule(name).parameters():
            parameter.zero_()


def list_models(config: ListModelsConfig) -> None:
    """Print the names of the architectures."""
    for name in zoo.list_architectures():
        if config.contains in name:
            log.show(name)


def _resolve_preprocess(config: ImportConfig, default: Preprocess) -> Preprocess:
    resize, crop = config.resize or default.resize, config.crop or default.crop
    if resize < crop:
        raise ConfigError(f"resize ({resize}) must be at least crop ({crop}); pass --resize {crop}")
    return default.model_copy(update={"resize": resize, "crop": crop, "decode": config.decode})


def _check_class_count(
    network: Any, state: Mapping[str, Any], config: ImportConfig, count: int
) -> None:
    name, _ = zoo.find_head(network)
    weight = state.get(f"{name}.weight")
    if weight is not None and len(weight) != count:
        raise BundleError(
            f"classes {config.classes}: has {count:,} classes, but the weights have "
            f"{len(weight):,} outputs; pass the class list of their training"
        )
