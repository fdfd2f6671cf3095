"""A chunk from manifest rows to predictions: the same however it is composed, whatever it meets."""

from __future__ import annotations

import base64
import io
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from imgcls.data.cuda import CudaTimer, DecodeStage, PinnedUploader
from imgcls.data.decoding import device_decode, device_resize
from imgcls.data.decoding.lazy_torchvision import torchvision
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.errors import ImageError
from imgcls.execution.completed import read_chunk_rows, write_chunk
from imgcls.execution.messages import ChunkTask, StageTimings
from imgcls.execution.plan import Plan
from imgcls.inference import stages
from imgcls.inference.specs import PredictSpec
from imgcls.inference.stages import PreparedImages
from imgcls.models.bundle import EngineName, load_bundle, load_bundle_weights, save_bundle
from imgcls.models.classifier import Classifier
from imgcls.models.label_sets import LabelSets, find_label_sets
from imgcls.models.scores import PendingScores
from imgcls.models.single_label import SINGLE_LABEL
from imgcls.runs.schema import build_prediction_schema
from tests.conftest import draw
from tests.execution.runs import CLASSES, manifest_of, plan_at, spec_of
from tests.fake_cuda import FakeCuda
from tests.fake_cuda import cuda as cuda
from tests.models.test_ood import with_detector

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # pytest takes the filter of imgcls away

STATUSES = {
    "ok", "missing", "forbidden", "empty", "truncated", "not_an_image", "unsupported",
    "too_large", "unreadable",
}  # fmt: skip


@pytest.fixture(scope="session")
def classifier(color_bundle: Path) -> Classifier:
    return Classifier.load(str(color_bundle), precision="fp32", device="cpu", decode="fast")


@pytest.fixture
def photographs(tmp_path: Path) -> pa.Table:
    """21 rows of which some are broken, each in another way; chunks of 8 cut through them."""
    for i in range(21):
        draw(CLASSES[i % 3], seed=i).save(tmp_path / f"{i}.jpg")
    (tmp_path / "3.jpg").unlink()
    (tmp_path / "4.jpg").write_bytes(b"")
    (tmp_path / "9.jpg").write_bytes((tmp_path / "9.jpg").read_bytes()[:500])
    (tmp_path / "10.jpg").write_bytes(b"<html>404</html>")
    draw("red").convert("CMYK").save(tmp_path / "11.jpg")
    for i in range(16, 21):  # a chunk without a single good row
        (tmp_path / f"{i}.jpg").write_bytes(b"x")
    paths = [f"{i}.jpg" if i != 5 else None for i in range(21)]
    labels = [("red", "green", "blue", None, "mauve")[i % 5] for i in range(21)]
    return pa.table({"path": paths, "label": labels})


@pytest.fixture
def spec(tmp_path: Path, photographs: pa.Table, color_bundle: Path) -> PredictSpec:
    manifest = manifest_of(tmp_path, photographs)
    plan = plan_at(tmp_path / "out", manifest, chunk_rows=8, part_rows=16)
    wide = {"scores": True, "embeddings": "float32", "batch_size": 3}
    return spec_of(tmp_path / "out", plan, manifest, str(color_bundle), **wide)


def predict_alone(spec: PredictSpec, classifier: Classifier, work: ChunkTask) -> pa.Table:
    return stages.predict_chunk(spec, classifier, read_chunk_rows(spec, work), work, StageTimings())


# ------------------------------------------------------------------ one chunk


@pytest.mark.parametrize("embeddings", [None, "float16"])
def test_ood_scores_are_columns_and_only_accepted_follows_them(
    spec: PredictSpec,
    classifier: Classifier,
    color_bundle: Path,
    tmp_path: Path,
    embeddings: Any,
) -> None:
    made = with_detector(color_bundle, tmp_path / "ood", 2.0)
    other = Classifier(made, precision="fp32", device="cpu", decode="fast")
    spec = replace(spec, embeddings=embeddings, thresholds=(0.0,) * 3)
    plain = predict_alone(spec, classifier, ChunkTask(0))
    found = predict_alone(spec, other, ChunkTask(0))
    assert found.drop_columns(["ood_score", "is_ood"]).equals(plain)
    assert set(found["is_ood"].to_pylist()) == {False, None}
    values = found["ood_score"].drop_null().to_numpy()
    median = float(np.median(values))
    stricter = with_detector(color_bundle, tmp_path / "stricter", median)
    flagged = predict_alone(
        spec, Classifier(stricter, precision="fp32", device="cpu", decode="fast"), ChunkTask(0)
    ).to_pylist()
    assert {row["is_ood"] for row in flagged} == {True, False, None}
    for row in flagged:
        assert (row["is_ood"] is None) == (row["status"] != "ok")
        assert row["accepted"] == (row["is_ood"] is False)
        assert row["is_ood"] is None or row["is_ood"] == (row["ood_score"] > median)


def test_label_sets_are_a_column_and_change_no_other(
    spec: PredictSpec, classifier: Classifier, color_bundle: Path, tmp_path: Path
) -> None:
    plain = load_bundle(str(color_bundle))
    sets = LabelSets(coverage=0.9, thresholds=[0.5])
    made = save_bundle(
        str(tmp_path / "sets"),
        plain.spec.model_copy(update={"label_sets": sets}),
        load_bundle_weights(plain),
    )
    other = Classifier(made, precision="fp32", device="cpu", decode="fast")
    found = predict_alone(spec, other, ChunkTask(0))
    assert found.drop_columns(["label_set"]).equals(predict_alone(spec, classifier, ChunkTask(0)))
    assert found.schema.names.index("label_set") == found.schema.names.index("topk_scores") + 1
    for row in found.to_pylist():
        assert (row["label_set"] is None) == (row["status"] != "ok")
        if row["label_set"] is not None:
            order, is_included = find_label_sets(np.array([row["scores"]], np.float32), sets)
            assert row["label_set"] == [CLASSES[i] for i in order[0][is_included[0]]]


def test_every_row_of_a_chunk_has_its_row_and_its_reason(
    spec: PredictSpec, classifier: Classifier
) -> None:
    rows = [
        row for c in range(3) for row in predict_alone(spec, classifier, ChunkTask(c)).to_pylist()
    ]
    assert [row["row"] for row in rows] == list(range(21))
    assert {row["row"]: row["status"] for row in rows if row["status"] != "ok"} == {
        3: "missing", 4: "empty", 5: "missing", 9: "truncated", 10: "not_an_image",
        **dict.fromkeys(range(16, 21), "not_an_image"),
    }  # fmt: skip
    for row in rows:
        if row["status"] == "ok":
            assert row["topk_labels"][0] == row["predicted_label"] in CLASSES
            assert row["topk_scores"][0] == row["confidence"] == max(row["topk_scores"])
            assert len(row["scores"]) == 3
            assert (row["width"], row["height"], row["error"]) == (64, 48, None)
            assert (row["label_rank"] is None) == (row["row"] % 5 in (3, 4))
        else:
            kept = {"row", "accepted", "status", "error"}
            assert not any(value is not None for key, value in row.items() if key not in kept)
            assert row["accepted"] is False
            assert row["error"]


@pytest.mark.parametrize("form", ["struct", "path in struct", "binary", "base64"])
def test_images_in_the_rows_of_a_table_are_predicted_as_files_are(
    spec: PredictSpec, classifier: Classifier, photographs: pa.Table, tmp_path: Path, form: str
) -> None:
    paths = photographs["path"].to_pylist()
    files = [
        (tmp_path / name).read_bytes() if name and (tmp_path / name).exists() else None
        for name in paths
    ]
    if form == "binary":
        column = pa.array(files)
    elif form == "base64":
        texts = [None if each is None else base64.b64encode(each).decode() for each in files]
        column = pa.array(texts)
    else:
        kept = files if form == "struct" else [None] * len(files)
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        rows = [{"bytes": b, "path": p} for b, p in zip(kept, paths, strict=True)]
        column = pa.array(rows, kind)
    table = pa.table({"image": column, "label": photographs["label"]})
    manifest = manifest_of(tmp_path, table, image_column="image")
    plan = plan_at(tmp_path / "from rows", manifest, chunk_rows=8, part_rows=16)
    wide = {"scores": True, "embeddings": "float32", "batch_size": 3}
    own = spec_of(tmp_path / "from rows", plan, manifest, spec.bundle_url, **wide)
    names = build_prediction_names(spec, classifier)
    for number in range(3):
        expected = predict_alone(spec, classifier, ChunkTask(number)).select(names)
        assert predict_alone(own, classifier, ChunkTask(number)).select(names).equals(expected)


def build_prediction_names(spec: PredictSpec, classifier: Classifier) -> list[str]:
    """The columns of predictions, without the text of errors, which names the place."""
    written = predict_alone(spec, classifier, ChunkTask(0)).schema.names
    return [name for name in written if name not in ("path", "error")]


def test_scores_are_float32_unless_float16_is_asked_for(
    spec: PredictSpec, classifier: Classifier
) -> None:
    full = predict_alone(spec, classifier, ChunkTask(0))["scores"]
    half = predict_alone(replace(spec, scores_type="float16"), classifier, ChunkTask(0))["scores"]
    assert full.type == pa.list_(pa.float32(), 3)
    assert half.type == pa.list_(pa.float16(), 3)
    for exact, rounded in zip(full.to_pylist(), half.to_pylist(), strict=True):
        if exact is not None:
            assert rounded == np.array(exact).astype(np.float16).tolist()


def test_embeddings_in_float16_are_rounded_and_null_beyond_its_range(
    spec: PredictSpec, classifier: Classifier
) -> None:
    full = predict_alone(replace(spec, embeddings="float32"), classifier, ChunkTask(0))
    half = predict_alone(replace(spec, embeddings="float16"), classifier, ChunkTask(0))
    width = classifier.embedding_width
    assert full["embedding"].type == pa.list_(pa.float32(), width)
    assert half["embedding"].type == pa.list_(pa.float16(), width)
    assert half.drop_columns("embedding").equals(full.drop_columns("embedding"))
    pairs = zip(full["embedding"].to_pylist(), half["embedding"].to_pylist(), strict=True)
    found = [(exact, rounded) for exact, rounded in pairs if exact is not None]
    assert found
    for exact, rounded in found:
        assert rounded == np.array(exact).astype(np.float16).tolist()
    column = stages._build_embeddings(np.array([[1, 65519], [1, 65520]], np.float32), "float16")
    assert column.to_pylist() == [[1.0, 65504.0], None]


def test_without_predictions_a_row_has_an_embedding_or_an_error(
    spec: PredictSpec, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = predict_alone(spec, classifier, ChunkTask(0))
    alone = replace(
        spec, embeddings="float16", has_predictions=False, scores=False, label_column=None
    )
    found = predict_alone(alone, classifier, ChunkTask(0))
    assert found.schema.names == ["row", "embedding", "width", "height", "status", "error"]
    assert found["status"].to_pylist() == full["status"].to_pylist()
    is_null = found["embedding"].is_null().to_pylist()
    assert is_null == [status != "ok" for status in found["status"].to_pylist()]
    build = stages._build_embeddings
    monkeypatch.setattr(
        stages, "_build_embeddings", lambda values, dtype: build(values * 1e9, dtype)
    )
    found = predict_alone(alone, classifier, ChunkTask(0))
    assert found["embedding"].null_count == found.num_rows
    assert "ok" not in found["status"].to_pylist()
    assert "beyond the range of float16; pass --dtype float32" in str(found["error"].to_pylist())


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_doing_a_chunk_twice_writes_the_same_bytes(
    spec: PredictSpec, color_bundle: Path, tmp_path: Path, engine: EngineName
) -> None:
    written = []
    for _ in range(2):
        fresh = Classifier.load(str(color_bundle), precision="fp32", engine=engine, device="cpu")
        for number in range(3):
            work = ChunkTask(number)
            write_chunk(spec, work, predict_alone(spec, fresh, work), StageTimings())
        staged = (tmp_path / "out" / "_staging").glob("part-*/chunk-*")
        written.append({path.name: path.read_bytes() for path in staged})
        assert len(written[-1]) == 3
    assert written[0] == written[1]


@pytest.mark.parametrize("work", [ChunkTask(0), ChunkTask(1), ChunkTask(2)])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_stages_give_the_same_table_wherever_a_layout_puts_them(
    spec: PredictSpec, classifier: Classifier, work: ChunkTask, batch_size: int
) -> None:
    spec = chunk_with(spec, batch_size=batch_size)
    rows, seconds = read_chunk_rows(spec, work), StageTimings()
    fused = stages.predict_chunk(spec, classifier, rows, work, seconds)
    prepared = stages.prepare_on_cpu(spec, rows, classifier.preprocess, seconds)
    split = stages.classify_prepared(spec, classifier, rows, work, prepared, seconds)
    left = stages.prepare_on_cpu(spec, rows, classifier.preprocess, seconds, max_device_bytes=10**9)
    stages.decode_on_device(left, classifier, seconds)
    fetched = stages.classify_prepared(spec, classifier, rows, work, left, seconds)
    assert split.equals(fused)
    assert fetched.equals(fused)
    assert fused.schema.equals(build_prediction_schema(labeled=True, scores=3, embedding=32))
    assert seconds.fetch > 0
    assert seconds.prepare > 0


def mixed_files(folder: Path) -> pa.Table:
    """13 rows: files for the device, others, damaged ones and a missing one, in turn."""
    image = draw("red", (60, 40))
    files: list[tuple[str, dict[str, Any]]] = [
        ("jpg", {}), ("png", {}), ("jpg", {"progressive": True}), ("webp", {}),
        ("jpg", {"subsampling": 0}), ("gif", {}), ("jpg", {}), ("jpg", {}),
    ]  # fmt: skip
    for i, (kind, options) in enumerate(files):
        image.save(folder / f"{i}.{kind}", **options)
    image.convert("CMYK").save(folder / "8.jpg")
    whole = (folder / "7.jpg").read_bytes()
    (folder / "9.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "10.jpg").write_bytes(b"junk")
    (folder / "12.jpg").write_bytes(whole)
    paths = [f"{i}.{kind}" for i, (kind, _) in enumerate(files)]
    paths += [f"{i}.jpg" for i in range(8, 13)]
    return pa.table({"path": paths, "label": ["red"] * 13})


@pytest.mark.parametrize(("most", "on_device"), [
    (10**9, [0, 4, 6, 7, 12]), (0, []), (2700, [0, 4]),
])  # fmt: skip
def test_only_baseline_jpegs_reach_the_device_and_the_table_is_that_of_a_cpu(
    classifier: Classifier, color_bundle: Path, tmp_path: Path, most: int, on_device: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    manifest = manifest_of(tmp_path, mixed_files(tmp_path))
    plan = plan_at(tmp_path / "out", manifest, chunk_rows=16)
    spec = spec_of(tmp_path / "out", plan, manifest, str(color_bundle), batch_size=3)
    work, timings = ChunkTask(0), StageTimings()
    rows = read_chunk_rows(spec, work)
    prepared = stages.prepare_on_cpu(
        spec, rows, classifier.preprocess, timings, max_device_bytes=most
    )
    assert list(prepared.jpegs) == on_device
    assert len(prepared.pixels) == 10 - len(on_device)
    for module in (stages.decode, device_decode):
        monkeypatch.delattr(module, "decode_image")  # the GPU's worker decodes nothing itself
    stages.decode_on_device(prepared, classifier, timings)
    found = stages.classify_prepared(spec, classifier, rows, work, prepared, timings)
    monkeypatch.undo()
    assert found.equals(predict_alone(spec, classifier, work))
    assert found["status"].to_pylist() == [
        *["ok"] * 9, "truncated", "not_an_image", "missing", "ok",
    ]  # fmt: skip


def test_a_file_that_the_device_and_the_cpu_reject_is_an_error_of_its_row(
    classifier: Classifier, color_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_of(tmp_path, mixed_files(tmp_path))
    plan = plan_at(tmp_path / "out", manifest, chunk_rows=16)
    spec = spec_of(tmp_path / "out", plan, manifest, str(color_bundle))
    rows = read_chunk_rows(spec, ChunkTask(0))
    prepared = stages.prepare_on_cpu(
        spec, rows, classifier.preprocess, StageTimings(), max_device_bytes=10**9
    )
    decode_batch = device_decode.decode_batch
    monkeypatch.setattr(
        device_decode,
        "decode_batch",
        lambda *args, **options: [
            ImageError("rejected") if index == 1 else result
            for index, result in enumerate(decode_batch(*args, **options))
        ],
    )
    stages.decode_on_device(prepared, classifier, StageTimings())
    found = stages.classify_prepared(
        spec, classifier, rows, ChunkTask(0), prepared, StageTimings()
    ).to_pylist()
    expected = predict_alone(spec, classifier, ChunkTask(0)).to_pylist()
    assert (found[4]["status"], found[4]["error"]) == ("unreadable", "rejected")
    assert found[4]["predicted_label"] is found[4]["width"] is None
    assert found[:4] + found[5:] == expected[:4] + expected[5:]


def test_pixels_of_cpus_and_of_the_device_are_both_there_before_the_forward_pass(
    cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda", 0)
    preprocess = Preprocess(resize=24, crop=16, decode="fast")
    resize, decode_jpeg = device_resize.resize_on_device, torchvision.io.decode_jpeg
    monkeypatch.setattr(DecodeStage, "_idle", {})
    monkeypatch.setattr(
        torchvision.io, "decode_jpeg", lambda files, mode, device: decode_jpeg(files, mode)
    )
    monkeypatch.setattr(
        device_resize,
        "resize_on_device",
        lambda tensor, *args: cuda.launch(resize(tensor, *args), tensor),
    )
    manifest = manifest_of(tmp_path, mixed_files(tmp_path))
    plan = plan_at(tmp_path / "out", manifest, chunk_rows=16)
    spec = spec_of(tmp_path / "out", plan, manifest, "")
    rows = read_chunk_rows(spec, ChunkTask(0))
    prepared = stages.prepare_on_cpu(spec, rows, preprocess, StageTimings(), max_device_bytes=10**9)
    oracle: Any = SimpleNamespace(preprocess=preprocess, device=gpu, upload=PinnedUploader(gpu))
    stages.decode_on_device(prepared, oracle, StageTimings())
    assert len(prepared.pixels) == 10
    assert len(cuda.streams) == 2  # decoding and upload
    cuda.launch(torch.stack(list(prepared.pixels)), *prepared.pixels)


def test_classes_ranked_on_the_device_give_the_same_table(
    spec: PredictSpec, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, work = read_chunk_rows(spec, ChunkTask(0)), ChunkTask(0)
    prepared = stages.prepare_on_cpu(spec, rows, classifier.preprocess, StageTimings())
    expected = stages.classify_prepared(spec, classifier, rows, work, prepared, StageTimings())
    monkeypatch.setattr(classifier, "_ranks_on_device", True)
    monkeypatch.delattr("imgcls.models.task.select_top_k")
    found = stages.classify_prepared(spec, classifier, rows, work, prepared, StageTimings())
    assert found.equals(expected)


def test_a_retry_does_its_rows_alone_and_without_the_manifest(
    spec: PredictSpec, classifier: Classifier, photographs: pa.Table, tmp_path: Path
) -> None:
    draw("green", seed=9).save(tmp_path / "9.jpg")
    carried = photographs.take([9, 11]).select(["path", "label"])
    work = ChunkTask(1, (1, 3), carried)
    (tmp_path / "out" / "_staging" / "manifest" / "part-00000.parquet").unlink()
    table = predict_alone(spec, classifier, work)
    assert table["row"].to_pylist() == [9, 11]
    assert table["status"].to_pylist() == ["ok", "ok"]
    write_chunk(spec, work, table, StageTimings())
    [file] = (tmp_path / "out" / "_staging" / "part-00000").iterdir()
    assert file.name == f"retry-00000001.{spec.plan.run_id}.parquet"


def test_a_run_that_starts_over_reads_its_own_manifest(tmp_path: Path) -> None:
    """Its shards have the names of the old ones, which a worker may have open."""
    found = []
    for name in ("old", "new"):
        table = pa.table({"path": [f"{name} {i}" for i in range(8)]})
        manifest = manifest_of(tmp_path / name, table)
        plan = plan_at(tmp_path / "out", manifest, chunk_rows=8)
        spec = spec_of(tmp_path / "out", plan, manifest, "")
        found.append(read_chunk_rows(spec, ChunkTask(0)).to_pylist() == table.to_pylist())
    assert found == [True, True]


def chunk_with(spec: PredictSpec, **changes: Any) -> PredictSpec:
    return PredictSpec(**{**vars(spec), **changes})


# ------------------------------------------------------------------ the model's output

COARSE = npst.arrays(np.float32, (6, 5), elements=st.sampled_from([0.0, 0.125, 0.25, 0.5]))


@given(
    scores=COARSE,
    labels=st.lists(st.sampled_from(["a", "b", "c", "d", "e", "z", None]), min_size=6, max_size=6),
    top_k=st.integers(1, 7),
)
def test_with_scores_that_tie_the_label_rank_is_the_labels_place_in_the_top_k(
    scores: np.ndarray, labels: list[str | None], top_k: int
) -> None:
    """Rank 1 is always the prediction, so that top-1 accuracy and accuracy are one number."""
    classes = ["a", "b", "c", "d", "e"]
    pending = PendingScores(torch.from_numpy(scores), None, CudaTimer(torch.device("cpu")))
    oracle: Any = SimpleNamespace(
        classes=classes,
        task=SINGLE_LABEL,
        label_sets=None,
        ood_detector=None,
        find_ood=lambda _: None,
        embedding_width=1,
        bundle=SimpleNamespace(
            spec=SimpleNamespace(task="single_label", label_sets=None, ood=None, classes=classes)
        ),
        submit=lambda _, **__: pending,
    )
    pixels = np.zeros((6, 1, 1, 3), np.uint8)
    prepared = PreparedImages(pixels, ["ok"] * 6, [None] * 6, [1] * 6, [1] * 6)
    thresholds = dict(zip(classes, (0.1, 0.2, 0.25, 0.3, 0.5), strict=True))
    spec = bare(
        6, label_column="label", top_k=top_k, batch_size=6, thresholds=tuple(thresholds.values())
    )
    rows = pa.table({"path": ["p"] * 6, "label": pa.array(labels, pa.string())})
    table = stages.classify_prepared(spec, oracle, rows, ChunkTask(0), prepared, StageTimings())
    for row, label, score in zip(table.to_pylist(), labels, scores, strict=True):
        if label not in classes:
            assert row["label_rank"] is row["label_score"] is None
            continue
        assert row["label_score"] == score[classes.index(label)]
        place = row["topk_labels"].index(label) + 1 if label in row["topk_labels"] else None
        assert row["label_rank"] == place or (place is None and row["label_rank"] > top_k)
        assert (row["label_rank"] == 1) == (row["predicted_label"] == label)
        assert row["confidence"] == score.max() == row["topk_scores"][0]
        assert row["accepted"] == (score.max() >= np.float32(thresholds[row["predicted_label"]]))
        assert row["topk_scores"] == sorted(row["topk_scores"], reverse=True)


# ------------------------------------------------------------------ whatever comes


def bare(rows: int, **changes: Any) -> PredictSpec:
    """An order for one chunk that is nowhere on disk."""
    values: dict[str, Any] = {
        "output": "/nowhere", "plan": Plan("r", rows, rows, rows), "bundle_url": "",
        "bundle_sha256": "", "path_column": "path", "label_column": None,
        "root": os.path.dirname(__file__),
        "top_k": 2, "thresholds": (0.0,) * 3, "scores": False, "embeddings": None,
        "decode": "fast", "precision": "fp32", "compile": False, "batch_size": 4,
        "max_pixels": 1_000_000,
        "io_concurrency": 4, "storage": StorageConfig(), "session": "", "crash_retries": 1,
    }  # fmt: skip
    return PredictSpec(**{**values, **changes})


def assert_a_row_each(classifier: Classifier, paths: Sequence[str | None]) -> list[str]:
    """Label a manifest of these paths; the statuses, after checking that each has its row."""
    rows = pa.table({"path": pa.array(paths, pa.string())})
    table = stages.predict_chunk(bare(len(paths)), classifier, rows, ChunkTask(0), StageTimings())
    table.validate(full=True)
    assert table.schema.equals(build_prediction_schema(labeled=False))
    assert table["row"].to_pylist() == list(range(len(paths)))
    statuses: list[str] = table["status"].to_pylist()
    assert set(statuses) <= STATUSES
    good = [status == "ok" for status in statuses]
    assert [label is not None for label in table["predicted_label"].to_pylist()] == good
    assert [not error for error in table["error"].to_pylist()] == good
    return statuses


NOT_FOUND = [
    "", ".", "..", "/", "~", "foo://x", "foo://", "://x", "http://", "http://[", "http://[::1",
    "data:", "data:,", "data:;base64,", "data:;base64,%%%", "data:image/png",
    "file://", "file:///nowhere", "file://nowhere", "memory://nowhere", "local://nowhere",
    "zip://a.jpg::nowhere.zip", "simplecache::file://nowhere", "tar://x.tar#", "tar://#x", "zip://x\0.zip#a.jpg",
    "tar://nowhere.tar#a.jpg", "tar://.#a.jpg", "parquet://x#image/0/1", "parquet://x.parquet#",
    "a\0b.jpg", "\0", "a\nb",
    "a\r\nb", "%00", "%2e%2e/%2e%2e", "100%", "?", "#", "[x].jpg", "*.jpg", "C:\\a.jpg", "é\u0301",
    "\u202egpj.a", "\ufeff", "\U0001f408.jpg", "a" * 255, "a" * 5000, "/".join(["a"] * 3000),
    "s p a c e", " ", "-", "--help", "$(true)", "`true`", "'", '"', "None", "nan", "null",
]  # fmt: skip


def test_paths_that_lead_nowhere_are_missing_rows(classifier: Classifier) -> None:
    statuses = assert_a_row_each(classifier, [None, *NOT_FOUND])
    assert statuses[0] == "missing"
    assert "ok" not in statuses
    status_of = dict(zip(NOT_FOUND, statuses[1:], strict=True))
    assert status_of["file:///nowhere"] == status_of["*.jpg"] == status_of["100%"] == "missing"
    assert status_of["data:,"] == "empty"
    assert (
        status_of["foo://x"]
        == status_of["a\0b.jpg"]
        == status_of["."]
        == status_of["a" * 5000]
        == "unreadable"
    )


ANY_TEXT = st.text(max_size=60) | st.text("/.:%\\\0\n\t [?*#é", max_size=20)
# no scheme of a network: a name that resolves to something would be asked
ODD_URLS = st.builds(
    "{}{}{}".format,
    st.sampled_from(
        ["foo", "data", "file", "memory", "local", "zip", "tar", "parquet", "x+y", "1", ""]
    ),
    st.sampled_from(["://", ":", ":/", "::", ":///"]),
    ANY_TEXT,
)
PATHS = st.lists(
    st.none() | ANY_TEXT | ODD_URLS | st.sampled_from(NOT_FOUND), min_size=1, max_size=12
)


def images_of_every_kind() -> list[bytes]:
    picture = draw("red", (40, 30))
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (picture, "JPEG", {}),
        (picture, "JPEG", {"progressive": True}),
        (picture.convert("CMYK"), "JPEG", {}),
        (picture.convert("L"), "JPEG", {}),
        (picture, "PNG", {}),
        (picture.quantize(8), "PNG", {"transparency": 1}),
        (Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG", {}),
        (picture.quantize(8), "GIF", {"save_all": True, "append_images": [draw("blue", (40, 30))]}),
        (picture, "WEBP", {"lossless": True}),
        (picture, "WEBP", {}),
        (picture, "BMP", {}),
        (picture, "TIFF", {}),
        (picture, "TIFF", {"compression": "tiff_lzw"}),
        (picture, "TIFF", {"compression": "jpeg"}),
    ]
    made = []
    for image, format, options in kinds:
        sink = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        if format != "GIF" and format != "BMP":
            options = {**options, "exif": exif}
        image.save(sink, format, **options)
        made.append(sink.getvalue())
    return made


IMAGES = images_of_every_kind()


def mutated(rng: random.Random) -> bytes:
    """An image file, damaged in one to four places; most damage is near the headers."""
    data = bytearray(rng.choice(IMAGES))
    for _ in range(rng.randint(1, 4)):
        near = min(len(data), rng.choice([16, 64, 512, len(data)]))
        at = rng.randrange(near) if near else 0
        match rng.randrange(6):
            case 0:
                del data[at:]
            case 1:
                del data[at : at + rng.randint(1, 32)]
            case 2:
                data[at:at] = rng.randbytes(rng.randint(1, 32))
            case 3:
                data[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
            case 4:
                data[at:at] = data[at : at + rng.randint(1, 256)]
            case _:
                for place in range(at, min(len(data), at + rng.randint(1, 8))):
                    data[place] = rng.randrange(256)
    return bytes(data)


def check_mutated_images(classifier: Classifier, seed: int) -> None:
    rng = random.Random(seed)
    files = [mutated(rng) for _ in range(8)]
    paths = [f"data:;base64,{base64.b64encode(file).decode()}" for file in files]
    assert_a_row_each(classifier, paths)


def test_images_of_every_kind_are_good_before_they_are_damaged(classifier: Classifier) -> None:
    paths = [f"data:;base64,{base64.b64encode(file).decode()}" for file in IMAGES]
    assert set(assert_a_row_each(classifier, paths)) == {"ok"}


@settings(max_examples=150)
@given(paths=PATHS)
def test_any_text_in_the_path_column_gives_a_row(
    classifier: Classifier, paths: list[str | None]
) -> None:
    assert_a_row_each(classifier, paths)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_damaged_images_give_a_row(classifier: Classifier, seed: int) -> None:
    check_mutated_images(classifier, seed)


@pytest.mark.chaos
@settings(max_examples=5000)
@given(paths=PATHS)
def test_any_text_in_the_path_column_gives_a_row_at_length(
    classifier: Classifier, paths: list[str | None]
) -> None:
    assert_a_row_each(classifier, paths)


@pytest.mark.chaos
@settings(max_examples=5000)
@given(seed=st.integers(0, 2**32))
def test_damaged_images_give_a_row_at_length(classifier: Classifier, seed: int) -> None:
    check_mutated_images(classifier, seed)


def test_a_row_that_is_known_to_crash_is_left_alone(
    spec: PredictSpec, classifier: Classifier
) -> None:
    work = ChunkTask(0)
    rows = read_chunk_rows(spec, work)
    whole = stages.predict_chunk(spec, classifier, rows, work, StageTimings())
    without = stages.predict_chunk(
        spec, classifier, rows, work, StageTimings(), {1: "it died of it"}
    )
    assert without["status"].to_pylist()[1] == "crashed"
    assert without["error"].to_pylist()[1] == "it died of it"
    assert without["predicted_label"].to_pylist()[1] is None
    others = [row for row in range(rows.num_rows) if row != 1]
    assert without["status"].take(others).to_pylist() == whole["status"].take(others).to_pylist()
    assert without["row"].to_pylist() == whole["row"].to_pylist()


def test_what_was_read_is_counted_in_bytes(spec: PredictSpec, classifier: Classifier) -> None:
    work, spent = ChunkTask(0), StageTimings()
    rows = read_chunk_rows(spec, work)
    stages.predict_chunk(spec, classifier, rows, work, spent)
    blobs = [blob for blob in stages.fetch_images(spec, rows) if isinstance(blob, bytes)]
    assert spent.bytes == sum(len(blob) for blob in blobs) > 0


def test_an_image_without_finite_scores_is_an_error_and_its_neighbors_keep_theirs(
    tmp_path: Path, overflowing_bundle: Path
) -> None:
    classifier = Classifier.load(str(overflowing_bundle), precision="fp32", device="cpu")
    for name in ("red", "green", "blue"):
        draw(name).save(tmp_path / f"{name}.png")
    Image.new("RGB", (64, 48), "white").save(tmp_path / "white.png")
    paths = ["red.png", "white.png", "absent.png", "green.png", "white.png", "blue.png"]
    table = pa.table({"path": paths, "label": ["red"] * 6})
    manifest = manifest_of(tmp_path, table)
    plan = plan_at(tmp_path / "out", manifest, chunk_rows=8)
    wide = {"scores": True, "embeddings": "float32", "batch_size": 2}
    spec = spec_of(tmp_path / "out", plan, manifest, str(overflowing_bundle), **wide)
    rows = predict_alone(spec, classifier, ChunkTask(0)).to_pylist()
    statuses = ["ok", "not_finite", "missing", "ok", "not_finite", "ok"]
    assert [row["status"] for row in rows] == statuses
    alone = classifier.predict([draw(name) for name in ("red", "green", "blue")])
    good = [row for row in rows if row["status"] == "ok"]
    assert [row["confidence"] for row in good] == pytest.approx([p.confidence for p in alone])
    assert [row["predicted_label"] for row in good] == [p.label for p in alone]
    for row in rows:
        if row["status"] == "not_finite":
            message = f"the network of {overflowing_bundle} outputs NaN or infinity for this image"
            assert row["error"] == f"{message} in fp32"
            kept = {"row", "accepted", "status", "error"}
            assert not any(value is not None for key, value in row.items() if key not in kept)
            assert row["accepted"] is False
    # the layout with GPUs composes the same stages
    prepared = stages.prepare_on_cpu(
        spec, read_chunk_rows(spec, ChunkTask(0)), classifier.preprocess, StageTimings()
    )
    halves = stages.classify_prepared(
        spec,
        classifier,
        read_chunk_rows(spec, ChunkTask(0)),
        ChunkTask(0),
        prepared,
        StageTimings(),
    )
    assert halves.to_pylist() == rows
