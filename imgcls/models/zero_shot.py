"""Zero-shot classifiers: `imgcls model zero-shot`.

The texts of the classes are embedded once. The bundle holds the vision tower with the class vectors
as its head, so that it runs without the text tower and its tokenizer, like any other bundle.
"""

from __future__ import annotations

from imgcls import log
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.errors import BundleError
from imgcls.models import zoo
from imgcls.models.bundle import Bundle, BundleSpec, check_bundle_output, save_bundle
from imgcls.models.class_list import parse_class_list, read_class_list, read_text
from imgcls.models.config import ZeroShotConfig
from imgcls.models.libraries import open_clip_library as open_clip

_CLASS = "{}"
"""Placeholder of the class name in a template."""


@with_config_storage
def make_zero_shot(config: ZeroShotConfig) -> Bundle:
    """Make a bundle whose classes are described by texts.

    The scores are the softmax of the scaled cosine similarities between an image and the class
    vectors (see `open_clip_library.compute_class_head`).

    Raises BundleError if the model, its weights, the classes or the templates cannot be used, and
    OutputError if the bundle already exists.
    """
    architecture = zoo.resolve_architecture(config.arch)
    if architecture.source != "open_clip":
        raise BundleError(
            f"arch {config.arch}: has no text tower; pass a model of open_clip, such as "
            f"{open_clip.OPEN_CLIP_PREFIX}ViT-B-32"
        )
    output = filesystem.absolute(config.output)
    check_bundle_output(output, overwrite=config.overwrite)
    classes, templates = _read_classes(config), _read_templates(config)
    preprocess = zoo.get_default_preprocess(architecture, config.weights)
    model = open_clip.load_both_towers(
        architecture.name, zoo.load_weights(config.weights, architecture)
    )
    weight, bias = open_clip.compute_class_head(model, architecture.name, classes, templates)
    network = zoo.build_network(architecture, len(classes))
    head = {"head.weight": weight, "head.bias": bias}
    state = {**zoo.match_weights(network, model.state_dict()).state, **head}
    zoo.apply_weights(network, state, replace_head=False)
    spec = BundleSpec(
        architecture=architecture,
        classes=classes,
        preprocess=preprocess.model_copy(update={"decode": config.decode}),
        provenance={"zero_shot": {"weights": config.weights, "templates": templates}},
    )
    bundle = save_bundle(output, spec, network.state_dict())
    log.show(
        f"bundle  {output}  ({config.arch}, {len(classes):,} classes, {len(templates):,} texts per "
        "class)"
    )
    return bundle


def _read_classes(config: ZeroShotConfig) -> list[str]:
    names = config.classes
    if len(names) == 1 and names[0].endswith(".txt"):
        return read_class_list(names[0])
    return parse_class_list("\n".join(names), "classes")


def _read_templates(config: ZeroShotConfig) -> list[str]:
    """The texts, with {} for the class name."""
    if config.templates == "imagenet":
        return open_clip.list_imagenet_templates()
    lines = read_text(config.templates, "templates", "text").splitlines()
    templates = [line.strip() for line in lines if line.strip()]
    for text in templates:
        # any other brace would be a field of the text, too
        if text.count(_CLASS) != 1 or {"{", "}"} & set(text.replace(_CLASS, "")):
            raise BundleError(
                f"templates {config.templates}: {text!r} has no {{}} for the class name, or "
                "another brace; write one text per line, such as: a photo of a {}."
            )
    if not templates:
        raise BundleError(f"templates {config.templates}: has no text; write one per line")
    return templates
