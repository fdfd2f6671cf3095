"""The model card has everything that is known of a model, and nothing that is not."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
import yaml

from imgcls.models import zoo
from imgcls.models.bundle import BundleSpec, save_bundle
from imgcls.models.bundle_card import escape_markdown
from imgcls.training.model_card import build_model_card

PROVENANCE: dict[str, Any] = {
    "created": "2026-01-02T03:04:05+00:00",
    "config": {
        "data": {"train": {"path": "s3://bucket/pets.csv"}},
        "model": {"name": "small_cnn", "weights": None, "options": {"width": 8}},
        "optim": {"name": "adamw", "lr": 0.001, "clip_norm": None},
        "augment": {"flip": True, "crop": {"scale": [0.5, 1.0]}},
        "output": "/home/someone/bundle",
        "track": {"mlflow": "http://internal:5000"},
        "epochs": 3,
        "precision": "auto",
        "seed": 7,
    },
    "git_commit": "abc123-dirty",
    "host": "secret-host",
    "python": "3.11.9",
    "versions": {"imgcls": "0.1.0", "torch": "2.14.1"},
    "seed": 7,
    "precision": "bf16",
    "data": {
        "manifests": {
            "data.train": {
                "manifest": "s3://bucket/pets.csv",
                "fingerprint": "f" * 32,
                "rows": 1440,
            }
        },
        "train_rows": 1294,
        "val_rows": 146,
        "train_failed": 1,
        "val_failed": 2,
    },
}
HISTORY = pd.DataFrame(
    {
        "epoch": [0, 1, 2, 3],
        "phase": ["probe", "train", "train", "train"],
        "train_loss": [math.nan, 1.0, 0.5, 0.25],
        "train_accuracy": [math.nan, 0.6, 0.8, 0.99],
        "val_loss": [1.5, 1.1, 0.7, 0.9],
        "val_accuracy": [0.5, 0.75, 0.875, 0.8125],
        "val_balanced_accuracy": [0.4, 0.7, 0.85, 0.8],
        "lr": [math.nan, 1e-3, 5e-4, 0.0],
        "seconds": [10.0, 1800.0, 1800.0, 1800.0],
        "train_rows": 1293,
        "val_rows": 144,
    }
)


def spec_of(classes: list[str], **changes: Any) -> BundleSpec:
    architecture = zoo.resolve_architecture("small_cnn", {"width": 8})
    preprocess = zoo.get_default_preprocess(architecture)
    return BundleSpec(architecture=architecture, classes=classes, preprocess=preprocess, **changes)


def card_of(**changes: Any) -> str:
    spec = spec_of(["cat", "dog", "owl"], provenance=PROVENANCE)
    return build_model_card(spec, HISTORY, 2, **changes)


def front_matter(card: str) -> dict[str, Any]:
    opening, front, _ = card.split("---\n", 2)
    assert opening == ""
    found: dict[str, Any] = yaml.safe_load(front)
    return found


def cells(card: str, first: str) -> list[str]:
    """The cells of the table row that begins with `first`."""
    (line,) = [line for line in card.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_front_matter_is_what_the_hub_reads() -> None:
    front = front_matter(card_of())
    assert front["library_name"] == "imgcls"
    assert front["pipeline_tag"] == "image-classification"
    assert {"image-classification", "small_cnn"} < set(front["tags"])
    assert "license" not in front
    (model,) = front["model-index"]
    (result,) = model["results"]
    assert model["name"] == "small_cnn-pets"
    assert result["task"]["type"] == "image-classification"
    assert result["dataset"] == {"type": "pets", "name": "pets", "split": "validation"}
    metrics = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert metrics == {"accuracy": 0.875, "balanced_accuracy": 0.85, "loss": 0.7}
    assert front["metrics"] == list(metrics)


def test_it_describes_the_model_and_its_use() -> None:
    card = card_of(parameters=354410, plots=["plots/curves.png"])
    assert "# small_cnn, 3 classes" in card
    assert "`small_cnn` (imgcls) with 354,410 parameters, trained from random weights." in card
    assert "Classes: cat, dog, owl." in card
    assert "![curves](plots/curves.png)" in card
    assert "    imgcls predict --model THIS_FOLDER" in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "Classifier.load(" in code


def test_fine_tuned_weights_are_named() -> None:
    model = PROVENANCE["config"]["model"] | {"weights": "IMAGENET1K_V1"}
    made = PROVENANCE | {"config": PROVENANCE["config"] | {"model": model}}
    assert "fine-tuned from `IMAGENET1K_V1`" in build_model_card(
        spec_of(["a", "b"], provenance=made), HISTORY, 2
    )


def test_the_results_are_those_of_the_epoch_that_was_kept() -> None:
    card = card_of()
    titles = next(line for line in card.splitlines() if "(kept)" in line)
    assert titles == "| | epoch 0 (probe) | epoch 2 (kept) | epoch 3 (last) |"
    accuracy = cells(card, "validation accuracy")
    assert accuracy[0].startswith("50.0 %")
    assert accuracy[1] == "87.5 % (95 % interval 81.1 to 91.9 %)"
    assert cells(card, "training loss, nats") == ["", "0.5000", "0.2500"]
    assert (
        "classifies 87.5 % (95 % interval 81.1 to 91.9 %) of 144 validation images correctly"
        in card
    )


def test_the_data_are_listed_with_the_images_left_out() -> None:
    card = card_of()
    assert "1,294 images to train on, 146 to validate, held out of the same manifest" in card
    assert "3 of them could not be decoded and were left out" in card
    assert cells(card, "data.train") == ["`s3://bucket/pets.csv`", "1,440", f"`{'f' * 32}`"]


def test_the_settings_are_listed_without_private_ones() -> None:
    card = card_of(workers="2 x (1 CPU)")
    assert cells(card, "optim") == ["name adamw, lr 0.001"]
    assert cells(card, "augment") == ["flip True, crop.scale \\[0.5, 1.0\\]"]
    assert cells(card, "epochs") == ["3"]
    assert cells(card, "seed") == ["7"]
    assert cells(card, "precision") == ["bf16"]
    assert cells(card, "workers") == ["2 x (1 CPU)"]
    assert cells(card, "wall time") == ["1 h 30 min"]
    assert cells(card_of(seconds=61.25), "wall time") == ["61.2 s"]
    for private in ("internal:5000", "secret-host", "/home/someone"):
        assert private not in card


def test_classes_without_validation_images_are_a_limitation() -> None:
    rows = {"cat": (100, 10), "dog": (20, 0), "owl": (7, 3)}
    card = card_of(class_rows=rows)
    assert "Training images per class: 7 to 100, median 20." in card
    assert cells(card, "dog") == ["20", "0"]
    assert "No validation image shows these classes: dog." in card
    assert "No validation image" not in card_of()


def test_missing_calibration_and_few_validation_images_are_limitations() -> None:
    few = HISTORY.assign(val_rows=12)
    spec = spec_of(["a", "b"], temperature=1.5)
    assert "not calibrated" in card_of()
    assert "not calibrated" not in build_model_card(spec, HISTORY, 2)
    assert "Few validation images" in build_model_card(spec, few, 2)
    assert "Few validation images" not in card_of()


def test_versions_and_commit_are_listed() -> None:
    card = card_of()
    assert "Created 2026-01-02T03:04:05+00:00" in card
    assert "imgcls at commit `abc123-dirty`" in card
    assert "imgcls 0.1.0, torch 2.14.1, python 3.11.9" in card


@pytest.mark.parametrize("missing", [*PROVENANCE, "everything"])
def test_a_card_can_be_written_without_any_provenance_key(missing: str) -> None:
    made = {key: value for key, value in PROVENANCE.items() if key != missing}
    made = {} if missing == "everything" else made
    card = build_model_card(spec_of(["a", "b"], provenance=made), HISTORY, 2)
    assert front_matter(card)["library_name"] == "imgcls"
    assert "None" not in card
    for empty in ("## Data\n\n\n", "## Training\n\n| setting | value |\n| --- | --- |\n\n"):
        assert empty not in card


def test_a_history_of_few_columns_is_enough() -> None:
    history = pd.DataFrame({"epoch": [1], "val_loss": [0.5], "val_accuracy": [0.5]})
    card = build_model_card(spec_of(["a", "b"]), history, 1)
    assert cells(card, "validation accuracy") == ["50.0 %"]
    assert "balanced" not in card
    history = history.assign(val_loss=math.nan, val_accuracy=math.nan)
    assert "model-index" not in front_matter(build_model_card(spec_of(["a", "b"]), history, 1))


NASTY = ["a|b", "<script>", "_under_", "`tick`", "*", "[x](y)", "two\nlines", "a_b", "x" * 500, " "]


def test_class_names_cannot_break_the_page() -> None:
    rows = dict.fromkeys(NASTY, (1, 0))
    card = build_model_card(spec_of(NASTY), HISTORY, 2, class_rows=rows)
    assert cells(card.replace("\\|", "!"), "a!b") == ["1", "0"]
    for harmless in ("\\<script\\>", "\\_under\\_", "\\`tick\\`", "\\[x\\](y)", "two lines", "a_b"):
        assert harmless in card
    assert "x" * 81 not in card
    assert "<script>" not in card
    assert escape_markdown(" ") == "(blank)"
    made = {"data": {"manifests": {"data.train": {"manifest": "odd`|name.csv"}}}}
    odd = build_model_card(spec_of(["a", "b"], provenance=made), HISTORY, 2)
    assert "| data.train | `` odd`\\|name.csv `` |" in odd
    assert front_matter(odd)["model-index"][0]["name"] == "small_cnn-odd`|name"


def test_long_lists_of_classes_are_cut() -> None:
    names = [f"class {i}" for i in range(1000)]
    card = build_model_card(spec_of(names), HISTORY, 2, class_rows=dict.fromkeys(names, (5, 0)))
    assert "class 19 and 980 more" in card
    assert "... and 950 more classes." in card
    assert "class 19 and 980 more." in card.split("No validation image shows")[1]
    assert len(card) < 10_000


def test_the_bundle_takes_the_card_that_it_is_given(tmp_path: Any) -> None:
    import torch

    spec, state = spec_of(["a", "b"]), {"weight": torch.zeros(1)}
    save_bundle(str(tmp_path / "one"), spec, state, card="# Mine\n")
    assert (tmp_path / "one" / "README.md").read_text() == "# Mine\n"
    save_bundle(str(tmp_path / "two"), spec, state)
    assert (tmp_path / "two" / "README.md").read_text().startswith("# small_cnn, 2 classes")


MULTILABEL: dict[str, Any] = {"task": "multilabel", "format_version": 2, "threshold": 0.5}
MULTILABEL_HISTORY = HISTORY.assign(val_mean_average_precision=[0.5, 0.6, 0.7, 0.65])


def test_a_multilabel_model_has_map_and_no_sentence_about_one_class() -> None:
    spec = spec_of(["cat", "dog"], provenance=PROVENANCE, **MULTILABEL)
    card = build_model_card(spec, MULTILABEL_HISTORY, 2)
    assert "A multi-label image classifier: `small_cnn`" in card
    assert "Its mean average precision over the classes is 70.0 % on 144 validation images." in card
    assert "Any number of classes per image: the score of each class is the sigmoid" in card
    assert "label threshold 0.5." in card
    for text in ("one of the classes", "classifies", "acceptance", "interval", "Confidences"):
        assert text not in card
    assert "labels that exclude each other can both be predicted" in card
    assert "Scores are not calibrated" in card
    assert "All classes have the threshold 0.5, which was not chosen on data." in card
    mean = cells(card, "validation mean average precision (mAP)")
    assert mean == ["50.0 %", "70.0 %", "65.0 %"]
    shares = cells(card, "validation accuracy: share of correct decisions")
    assert shares == ["50.0 %", "87.5 %", "81.2 %"]
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "print(prediction.labels, prediction.topk_labels, prediction.topk_scores)" in code
    front = front_matter(card)
    (result,) = front["model-index"][0]["results"]
    names = {metric["type"]: (metric["name"], metric["value"]) for metric in result["metrics"]}
    assert names["mean_average_precision"] == ("Mean average precision (mAP)", 0.7)
    assert names["accuracy"] == ("Accuracy (share of correct decisions)", 0.875)
    assert "multi-label-classification" in front["tags"]


def test_a_multilabel_card_has_only_what_is_known() -> None:
    spec = spec_of(["cat", "dog"], thresholds={"cat": 0.3, "dog": 2.0}, **MULTILABEL)
    history = HISTORY.assign(val_rows=20)
    card = build_model_card(spec, history, 2)
    assert "mean average precision" not in card
    assert "label threshold per class, 0.3 to 0.3; never predicted: dog." in card
    assert "not chosen on data" not in card
    assert "Few validation images: the results are uncertain." in card
