"""The report of a training, with the mistakes and classes of its validation images."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from imgcls.errors import RequestError
from imgcls.evaluation import charts
from imgcls.evaluation.config import EvaluationOptions, ReportConfig
from imgcls.evaluation.report import write_report
from imgcls.models import zoo
from imgcls.models.bundle import FORMAT_VERSIONS, BundleSpec, TaskName, save_bundle
from imgcls.runs.layout import VALIDATION_PREDICTIONS_FILE
from tests.browser import opened
from tests.evaluation.multilabel_runs import build_run_table, draw_scores, draw_targets
from tests.evaluation.runs import CLASSES, draw_images, drawn

CREATED = "2026-11-29T23:10:00+00:00"


def trained(
    folder: Path,
    history: pd.DataFrame | None,
    predictions: pa.Table | None = None,
    *,
    classes: Sequence[str] = CLASSES,
    task: TaskName = "single_label",
    accuracy: float = 0.75,
    **provenance: Any,
) -> Path:
    """A bundle with the files of a training; predictions: of the validation images."""
    architecture = zoo.resolve_architecture("small_cnn", {"width": 4})
    spec = BundleSpec(
        architecture=architecture, classes=list(classes), task=task,
        format_version=FORMAT_VERSIONS[task],
        preprocess=zoo.get_default_preprocess(architecture),
        provenance={
            "seed": 3, "config": {"epochs": 2}, "created": CREATED,
            "data": {"manifests": {"data.train": {"manifest": "demo/digits-train.csv"}}},
            **provenance,
        },
        metrics={
            "epoch": 2 if history is None else min(2, len(history)),
            "val_accuracy": accuracy, "val_loss": 0.5,
        },
    )  # fmt: skip
    save_bundle(str(folder), spec, zoo.build_network(architecture, len(classes)).state_dict())
    if history is not None:
        history.to_parquet(folder / "history.parquet")
        (folder / "plots").mkdir()
        Image.new("RGB", (60, 40), "red").save(folder / "plots" / "augmented.png")
        (folder / "validation.parquet").touch()
    if predictions is not None:
        paths = [str(folder / path) for path in predictions["path"].to_pylist()]
        table = predictions.drop_columns(["camera"]).set_column(0, "path", pa.array(paths))
        record = {"imgcls": json.dumps({"created": CREATED})}
        pq.write_table(table.replace_schema_metadata(record), folder / VALIDATION_PREDICTIONS_FILE)
    return folder


def build_history(epochs: int = 3, rows: int = 200) -> pd.DataFrame:
    """Epochs from 1 on, of which the second is the best."""
    losses = [1.1, *(0.5 + 0.01 * number for number in range(epochs - 1))]
    return pd.DataFrame(
        {
            "epoch": range(1, epochs + 1), "train_loss": 1.0, "val_loss": losses,
            "train_accuracy": 0.5, "val_accuracy": 0.75, "val_rows": rows,
        }
    )  # fmt: skip


def report(folder: Path, **options: Any) -> Path:
    options = {"thumbnails": False} | options
    evaluation = EvaluationOptions.model_validate(options)
    return Path(write_report(ReportConfig(source=str(folder), evaluation=evaluation)))


def compute_accuracy(table: pa.Table) -> float:
    pairs = zip(table["label"].to_pylist(), table["predicted_label"].to_pylist(), strict=True)
    return float(np.mean([label == predicted for label, predicted in pairs]))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a training with 300 validation images, one in 50 of which is gone."""
    folder = tmp_path_factory.mktemp("trained") / "bundle"
    table = drawn(300, 3, sharpness=1.5, scores=False)
    folder = trained(folder, build_history(), table, accuracy=compute_accuracy(table))
    draw_images(folder, 300, (64, 48))
    return report(folder, thumbnails=True)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_it_shows_the_mistakes_and_classes_of_the_validation_images(
    page: Path, width: int, scheme: str, browser: Any
) -> None:
    table = pq.read_table(page.parent / VALIDATION_PREDICTIONS_FILE)
    accuracy = compute_accuracy(table)
    with opened(page.as_uri(), width=width, scheme=scheme, browser=browser) as seen:
        assert seen.page.inner_text(".headline b") == f"{accuracy:.1%}"
        rows = seen.page.locator("table.matrix tbody tr")
        cells = [row.locator("td").all_inner_texts() for row in rows.all()]
        right = sum(int(cells[each][each]) for each in range(len(CLASSES)))
        total = int(seen.page.locator("table.matrix tfoot td").last.inner_text())
        assert (right / total, total) == (accuracy, 300)
        wrong = round(300 * (1 - accuracy))
        text = f"24 of {wrong} misclassified validation images, the most confident first."
        assert seen.page.locator("#mistakes + p").inner_text() == text
        items = seen.page.locator("#gallery-mistakes li")
        assert items.locator("dd:first-of-type .bad").count() == items.count() == 24
        assert seen.page.locator("#per-class tbody tr").count() == len(CLASSES)
        links = seen.page.locator("nav a").all()
        assert [link.inner_text() for link in links] == [
            *("Curves", "Mistakes", "Confusion matrix", "Classes", "Epochs"),
            *("Augmented samples", "How it was made"),
        ]
        for link in links:
            assert seen.page.locator(link.get_attribute("href")).count() == 1
        seen.page.locator("#gallery-mistakes .zoom").first.click()
        assert seen.page.locator("#viewer").is_visible()
        seen.page.keyboard.press("Escape")
        seen.check_opened_alone(page.as_uri())
        seen.check_accessible()
        seen.screenshot(f"training-{width}")


def test_images_that_are_gone_are_marked(tmp_path: Path) -> None:
    table = drawn(40, sharpness=0.0, scores=False)
    text = report(trained(tmp_path / "bundle", build_history(), table), thumbnails=True).read_text()
    assert text.count('<span class="gone">no image</span>') == 24


def test_a_store_that_refuses_access_leaves_the_images_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    table = drawn(40, sharpness=0.0, scores=False)
    paths = pa.array([f"s3://gone-bucket/{row}.jpg" for row in range(40)])
    folder = trained(tmp_path / "bundle", build_history(), table)
    place = folder / VALIDATION_PREDICTIONS_FILE
    stored = pq.read_table(place)
    moved = stored.set_column(0, "path", paths).replace_schema_metadata(stored.schema.metadata)
    pq.write_table(moved, place)
    text = report(folder, thumbnails=True, gallery=1).read_text()
    assert text.count('<span class="gone">no image</span>') == 1
    assert "s3://gone-bucket/" in text
    assert "the report has no images: s3://gone-bucket/" in capsys.readouterr().out


def test_it_shows_many_classes_as_a_picture(tmp_path: Path) -> None:
    names = [f"class number {i}" for i in range(1000)]
    table = drawn(3000, classes=names, sharpness=4.0, scores=False)
    folder = trained(tmp_path / "bundle", build_history(), table, classes=names)
    text = report(folder).read_text()
    assert len(text) < 4_000_000
    assert text.count('class="picture"') == 1
    assert "metrics/per_class" not in text


def test_a_multilabel_training_has_the_mistakes_of_each_class(tmp_path: Path, browser: Any) -> None:
    targets = draw_targets(200)
    table = build_run_table(targets, draw_scores(targets))
    labels = table.column_names.index("labels")
    table = table.set_column(labels, "label", table["labels"])  # as the training names it
    folder = trained(tmp_path / "bundle", build_history(), table, task="multilabel")
    with opened(report(folder).as_uri(), width=390, browser=browser) as seen:
        groups = seen.page.locator("details.class")
        assert groups.count() == len(CLASSES)
        assert seen.page.locator("#per-class tbody tr").count() == len(CLASSES)
        assert seen.page.locator("#cooccurrence").count() == 1
        assert "metrics/" not in seen.page.inner_text("body")
        seen.check_accessible()
        assert seen.errors == []
        seen.screenshot("training-multilabel")
    report(trained(tmp_path / "few", build_history(), table.drop_columns(["scores"]),
                   task="multilabel"))  # fmt: skip
    text = (tmp_path / "few" / "report.html").read_text()
    assert "too many validation images and classes to store all scores" in text


@pytest.mark.parametrize("kind", ["earlier", "replaced", "calibrated"])
def test_without_predictions_of_this_bundle_it_names_the_command(tmp_path: Path, kind: str) -> None:
    made: dict[str, Any] = {
        "earlier": {},
        "replaced": {"created": "2026-11-30T00:00:00+00:00"},
        "calibrated": {"calibration": {}},
    }[kind]
    table = None if kind == "earlier" else drawn(50, scores=False)
    folder = trained(tmp_path / "bundle", build_history(), table, **made)
    text = report(folder).read_text()
    assert f"imgcls evaluate --manifest {folder}/validation.parquet --model {folder}" in text
    assert "Confusion matrix</h2>" not in text


@pytest.mark.parametrize("epochs", [1, 3, 40])
def test_all_ticks_are_whole_epochs_of_the_training(epochs: int) -> None:
    for chart in charts.plot_training_curves(build_history(epochs), 1):
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", chart)
        assert texts.count("best: epoch 1") == 1
        ticks = texts[: texts.index("epoch")]
        assert ticks
        assert {tick for tick in ticks if not 1 <= int(tick) <= epochs} == set()
        if epochs == 3:
            assert ticks == ["1", "2", "3"]


def test_the_curves_of_multilabel_show_the_mean_average_precision() -> None:
    history = build_history().assign(val_mean_average_precision=[0.3, 0.7, 0.6])
    texts = re.findall(r">([^<>]+)</text>", charts.plot_training_curves(history, 2)[1])
    assert "mean average precision" in texts
    assert "training" not in texts, "it is computed of the validation images alone"


def test_it_has_curves_epochs_and_augmented_samples(tmp_path: Path, browser: Any) -> None:
    place = report(trained(tmp_path / "bundle", build_history()))
    with opened(place.as_uri(), browser=browser) as seen:
        body = seen.page.inner_text("body")
        assert "3 epochs, weights of epoch 2" in body
        assert "75.0%" in body
        assert seen.page.title() == "small_cnn trained on digits-train, November 29, 2026"
        assert "n = 200 validation images" in seen.page.inner_text(".headline")
        seen.check_accessible()
        assert seen.page.locator("figure svg").count() == 2
        assert seen.page.locator("figure img").evaluate("i => i.naturalWidth") == 60
        assert seen.errors == []


def test_it_prints_on_a4(page: Path, browser: Any) -> None:
    with opened(page.as_uri(), width=688, scheme="dark", browser=browser) as seen:
        seen.page.emulate_media(media="print")  # 688 px: the width of A4 without its margins
        assert seen.page.locator("nav, .filters, .more").locator("visible=true").count() == 0
        wide = "all => all.filter(each => each.scrollWidth > each.parentElement.clientWidth + 1)"
        assert seen.page.locator("table").evaluate_all(f"{wide}.map(each => each.id)") == []
        seen.screenshot("training-print")


def test_other_sources_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"\(no _run.json\)"):
        report(tmp_path)
    with pytest.raises(RequestError, match="without a training history"):
        report(trained(tmp_path / "bundle", None))
