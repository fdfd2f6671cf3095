"""Labeling over real HTTP: images by row, decisions, undo, agreement, and who may do it."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.specs.openapi.checks import positive_data_acceptance

from imgcls.data import image_files
from imgcls.errors import ConfigError, ManifestError, RequestError, StorageUnavailable
from imgcls.serving.config import LabelingConfig, LimitsConfig
from imgcls.serving.deployment import build_from_args
from imgcls.serving.labeling import images, queue
from imgcls.serving.labeling.images import read_queue_image
from imgcls.serving.labeling.labeling import Labeling
from imgcls.serving.problems import Problem
from tests.conftest import write_manifest
from tests.processes import wait_for
from tests.serving.app import Running, assert_problem, jpeg, post, serving
from tests.serving.labeling.queues import (
    Annotator,
    draw_mixed_queue,
    draw_queue,
    label_settings,
    read_table,
)


@pytest.fixture(scope="module")
def mixed(
    color_bundle: Path, keys: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server with API keys and a queue of good and bad images."""
    folder = tmp_path_factory.mktemp("mixed")
    with serving(
        color_bundle,
        keys__file=keys["file"],
        **label_settings(draw_mixed_queue(folder)),
    ) as running:
        yield running


def test_without_a_manifest_there_are_no_routes(server: Running) -> None:
    for path in ("/label", "/v1/labeling/queue", "/v1/labeling/images/a/0"):
        assert_problem(requests.get(f"{server.url}{path}", timeout=10), 404, "not_found")
    assert "labeling" not in requests.get(f"{server.url}/openapi.json", timeout=10).text


def test_images_are_named_by_their_row_and_nothing_else(
    mixed: Running, keys: dict[str, str]
) -> None:
    ana = Annotator(mixed, keys["ana"])
    assert_problem(ana.get_image(6), 404, "image_unknown")
    for row in ("-1", "m.csv", "0.jpg"):
        assert_problem(ana.get_image(row), 400, "invalid_parameter")
    for path in ("images/a/..%2f..%2fm.csv", "images/a//etc/passwd"):
        assert_problem(ana.get(path), 404, "not_found")


def test_browsers_get_formats_that_they_show(mixed: Running, keys: dict[str, str]) -> None:
    ana = Annotator(mixed, keys["ana"])
    for row, kind in enumerate(("image/jpeg", "image/png", "image/jpeg")):
        response = ana.get_image(row)
        assert response.headers["Content-Type"] == kind
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Cache-Control"] == "no-store"
        assert Image.open(io.BytesIO(response.content)).size == (64, 48)


def test_a_bad_image_is_a_problem_with_its_status(mixed: Running, keys: dict[str, str]) -> None:
    ana = Annotator(mixed, keys["ana"])
    assert ana.get_image(3).status_code == 200  # browsers show a part of it
    assert_problem(ana.get_image("3/suggestion"), 422, "truncated")
    for row in ("4", "4/suggestion"):
        assert_problem(ana.get_image(row), 415, "not_an_image")
    for row in ("5", "5/suggestion"):
        assert_problem(ana.get_image(row), 422, "missing")


def test_the_suggestion_is_the_prediction_of_the_service(
    mixed: Running, keys: dict[str, str]
) -> None:
    suggested = Annotator(mixed, keys["ana"]).get_image("0/suggestion").json()
    data = Annotator(mixed, keys["ana"]).get_image(0).content
    predict = {"Authorization": f"Bearer {keys['nightly']}", "Content-Type": "image/jpeg"}
    url = f"{mixed.url}/v1/predict"
    assert suggested == requests.post(url, data, headers=predict, timeout=60).json()


def test_only_keys_with_the_scope_label_and_within_their_rate(
    mixed: Running, keys: dict[str, str]
) -> None:
    for path in ("queue", "progress", "images/a/0", "images/a/0/suggestion"):
        assert_problem(Annotator(mixed).get(path), 401, "key_missing")
        assert_problem(Annotator(mixed, keys["nightly"]).get(path), 403, "scope_missing")
    for path in ("next", "decisions", "undo"):
        assert_problem(Annotator(mixed).post(path), 401, "key_missing")
        assert_problem(Annotator(mixed, keys["both"]).post(path), 403, "scope_missing")
    ben = Annotator(mixed, keys["ben"])
    statuses = [ben.get_image("0/suggestion").status_code for _ in range(8)]
    assert statuses[0] == 200
    assert statuses[-1] == 429
    assert ben.get_image(0).status_code == 200  # an image and its suggestion count once


def test_the_annotator_is_the_name_of_the_key(mixed: Running, keys: dict[str, str]) -> None:
    body = Annotator(mixed, keys["ana"], "someone else").post("next").json()
    assert body["annotator"] == "ana"
    assert Annotator(mixed, keys["ana"]).get("queue").json()["annotator"] == "ana"


def test_wrong_requests_are_problems_and_store_nothing(color_bundle: Path, tmp_path: Path) -> None:
    settings_ = label_settings(draw_queue(tmp_path, 2))
    with serving(color_bundle, **settings_) as running:
        ana = Annotator(running, name="ana")
        assert_problem(Annotator(running).post("next"), 400, "annotator_missing")
        for name in ("", " ", "a/b", "x" * 65, "a\nb"):
            assert_problem(Annotator(running, name=name).post("next"), 400, "invalid_parameter")
        assert_problem(ana.decide(2, ["red"]), 404, "image_unknown")
        assert_problem(ana.decide(0, ["mauve"]), 400, "unknown_class")
        assert_problem(ana.decide(0, []), 400, "invalid_labels")
        assert_problem(ana.decide(0, ["red", "blue"]), 400, "invalid_labels")
        assert_problem(ana.decide(0, ["red"], "short"), 400, "invalid_parameter")
        assert_problem(ana.post("undo", submission="0" * 32), 404, "submission_unknown")
        url = f"{running.url}/v1/labeling/next"
        for data in (b"{", b"[]", b'{"annotator": "\\ud800"}', b'{"more": 1}'):
            typed = {"Content-Type": "application/json"}
            response = requests.post(url, data, headers=typed, timeout=10)
            assert_problem(response, 400, "invalid_parameter")
        form = requests.post(url, {"annotator": "ana"}, timeout=10)
        assert_problem(form, 415, "unsupported_body")
        large = requests.post(url, json={"annotator": "a" * (2 << 20)}, timeout=10)
        assert_problem(large, 413, "too_many_bytes")
        foreign = {"Origin": "https://example.com"}
        assert_problem(
            requests.post(url, json={"queue": ana.queue}, headers=foreign, timeout=10),
            403,
            "keys_needed",
        )
        assert not list((tmp_path / "labels").glob("*.parquet"))


def test_two_annotators_agree_and_disagree(color_bundle: Path, tmp_path: Path) -> None:
    with serving(
        color_bundle,
        **label_settings(draw_queue(tmp_path)),
        labeling__annotations_per_image=2,
        labeling__classes="none",
    ) as running:
        ana, ben = (Annotator(running, name=name) for name in ("ana", "ben"))
        assert ana.get("queue").json()["classes"] == ["red", "green", "blue", "none"]
        for row, label in enumerate(("red", "red", "blue", "blue")):
            assert ana.decide(row, [label]).status_code == 200
        for row, label in enumerate(("red", "red", "blue", "none")):
            body = ben.decide(row, [label]).json()
        assert (body["labeled"], body["remaining"]) == (4, 4)
        assert body["last"]["labels"] == ["none"]
        found = ana.get("progress").json()
        assert (found["images"], found["complete"]) == (8, 4)
        (pair,) = found["agreements"]
        assert (pair["first"], pair["second"], pair["images"]) == ("ana", "ben", 4)
        assert pair["equal"] == 0.75
        # chance: red 1/4, blue 1/2 * 1/4
        assert pair["kappa"] == pytest.approx((0.75 - 0.375) / (1 - 0.375))
        assert found["disagreements"] == [
            {"row": 3, "path": "3.jpg", "labels": {"ana": ["blue"], "ben": ["none"]}}
        ]
        Annotator(running, name="cem").decide(3, ["none"])
        assert ana.get("progress").json()["disagreements"] == []
        labels = read_table(tmp_path / "labels")
        assert labels.num_rows == 9
        assert {row["label"] for row in labels.to_pylist() if row["path"].endswith("/3.jpg")} == {
            *("blue", "none")
        }


def test_multilabel_images_have_any_number_of_labels(
    multilabel_bundle: Path, tmp_path: Path
) -> None:
    with serving(
        multilabel_bundle,
        **label_settings(draw_queue(tmp_path, 3)),
        labeling__annotations_per_image=2,
    ) as running:
        ana, ben = (Annotator(running, name=name) for name in ("ana", "ben"))
        ana.decide(0, ["blue", "red"])
        ana.decide(1, [])
        ben.decide(0, ["red"])
        ben.decide(1, [])
        assert_problem(ana.decide(2, ["red", "red"]), 400, "invalid_labels")
        (pair,) = ana.get("progress").json()["agreements"]
        # of 6 yes or no, 5 agree; yes: 2 and 1
        assert pair["equal"] == 0.5
        chance = (2 * 1 + 4 * 5) / 36
        assert pair["kappa"] == pytest.approx((5 / 6 - chance) / (1 - chance))
        labels = read_table(tmp_path / "labels").to_pylist()
        assert [row["label"] for row in labels] == [["red", "blue"], [], ["red"], []]


def test_a_reloaded_queue_keeps_the_decisions(color_bundle: Path, tmp_path: Path) -> None:
    """Decisions belong to absolute paths: rows may be added and moved."""
    manifest = draw_queue(tmp_path, 3)
    options = label_settings(manifest)
    with serving(color_bundle, **options) as running:
        Annotator(running, name="ana").decide(0, ["red"])
    write_manifest(manifest, [("2.jpg",), ("1.jpg",), (str(tmp_path / "0.jpg"),)], ("path",))
    with serving(color_bundle, **options) as running:
        body = Annotator(running, name="ana").post("next").json()
        assert [each["path"] for each in body["assigned"]] == ["1.jpg", "2.jpg"]
        assert body["last"]["row"] == 2
        assert body["labeled"] == 1


def test_equal_relative_paths_in_other_folders_are_other_images(
    color_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "labels"
    for day in ("monday", "tuesday"):
        manifest = draw_queue(tmp_path / day, 3)
        options = {"labeling__manifest": str(manifest), "labeling__output": str(output)}
        with serving(color_bundle, **options) as running:
            ana = Annotator(running, name="ana")
            assert ana.post("next").json()["assigned"][0]["path"] == "0.jpg"
            ana.decide(0, ["red"])
    paths = [row["path"] for row in read_table(output).to_pylist()]
    assert paths == [str(tmp_path / day / "0.jpg") for day in ("monday", "tuesday")]


def test_a_replica_with_another_list_of_images_rejects_each_request_with_a_row(
    color_bundle: Path, tmp_path: Path
) -> None:
    manifest, output = draw_queue(tmp_path, 3), tmp_path / "labels"
    options = label_settings(manifest)
    with serving(color_bundle, **options) as one:
        write_manifest(manifest, [("2.jpg",), ("1.jpg",), ("0.jpg",)], ("path",))
        with serving(color_bundle, **options) as two:
            queue_id = Annotator(one, name="ana").queue
            other = Annotator(two, name="ana")
            assert Annotator(one, name="ana").post("next").json()["queue"] == queue_id
            for row in ("0", "0/suggestion"):
                assert_problem(other.get_image(row, queue_id), 409, "queue_changed")
            for path, body in (
                ("next", {}),
                ("undo", {"submission": "0" * 32}),
                ("decisions", {"row": 0, "labels": ["red"], "submission": "0" * 32}),
            ):
                response = other.post(path, queue=queue_id, **body)
                assert_problem(response, 409, "queue_changed")
            assert list(output.glob("*.parquet")) == []


def read_csv_queue(folder: Path, paths: list[str], **more: object) -> queue.LabelingQueue:
    manifest = write_manifest(folder / "m.csv", [(path,) for path in paths], ("path",))
    config = LabelingConfig.model_validate(
        {"manifest": {"path": str(manifest), **more}, "output": "x"}
    )
    assert config.manifest is not None
    return queue.read_queue(config.manifest)


def test_the_queue_has_each_image_once_in_order(tmp_path: Path) -> None:
    table = pa.table({"path": ["b.jpg", None, "a.jpg", "b.jpg", "/c.jpg", "", f"{tmp_path}/a.jpg",
                             "./b.jpg", f"file://{tmp_path}/a.jpg", "file:///c.jpg"]})  # fmt: skip
    pq.write_table(table, tmp_path / "m.parquet")
    config = LabelingConfig.model_validate({"manifest": str(tmp_path / "m.parquet"), "output": "x"})
    assert config.manifest is not None
    found = queue.read_queue(config.manifest)
    assert found.paths == (f"{tmp_path}/b.jpg", f"{tmp_path}/a.jpg", "/c.jpg")
    assert [found.describe(path) for path in found.paths] == ["b.jpg", "a.jpg", "/c.jpg"]
    first, second = (read_csv_queue(tmp_path, ["a.jpg"], root=root) for root in ("/x", "/y"))
    assert first.queue_id != second.queue_id


def test_the_page_shows_no_credentials_of_urls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [
        "https://ana:secret@h/a.jpg?X-Amz-Signature=s", "zip://https://h/z.zip?sig=s#a b?.jpg",
        "https://ana:pa/ss@h/a.jpg", "https://ana:p#w@h/b.jpg", "az://c/a.jpg?sig=s",
    ]  # fmt: skip
    found = read_csv_queue(tmp_path, urls)
    assert found.paths == tuple(urls)
    assert [found.describe(url) for url in urls] == [
        "https://h/a.jpg?...", "zip://https://h/z.zip?...#a b?.jpg",
        "https://h/a.jpg", "https://h/b.jpg", "az://c/a.jpg?...",
    ]  # fmt: skip

    def refuse(url: str, _: int) -> bytes:
        raise StorageUnavailable(f"{url}: no answer")

    monkeypatch.setattr(image_files, "read_image", refuse)
    with pytest.raises(Problem) as caught:
        read_queue_image(urls[0], LimitsConfig())
    assert caught.value.detail == "https://h/a.jpg?... no answer"


def test_a_replica_that_cannot_open_labeling_serves_predictions(
    color_bundle: Path, keys: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level("ERROR", "ray.serve"),
        serving(
            color_bundle,
            keys__file=keys["file"],
            labeling__manifest=str(tmp_path / "removed.csv"),
            labeling__output=str(tmp_path / "labels"),
        ) as running,
    ):
        predict = {"Authorization": f"Bearer {keys['nightly']}"}
        assert post(running, jpeg(), headers=predict).status_code == 200
        assert requests.get(f"{running.url}/label", timeout=10).status_code == 200
        assert_problem(Annotator(running).get("queue"), 401, "key_missing")
        ana = Annotator(running, keys["ana"])
        for response in (ana.get("queue"), ana.post("next", queue="a"), ana.get_image(0, "a")):
            problem = assert_problem(response, 503, "labeling_unavailable")
            assert "removed.csv: no such file" in problem["detail"]
            assert response.headers["Retry-After"]
        paths = requests.get(f"{running.url}/openapi.json", timeout=10).json()["paths"]
        for operation in paths["/v1/labeling/{path}"].values():
            assert "503" in operation["responses"]
    assert "labeling is not available in this replica" in caplog.text


def test_slow_images_hold_up_nothing_else(
    color_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end, started = threading.Event(), []

    def wait(*_: object) -> bytes:
        started.append(True)
        assert may_end.wait(60)
        return b""

    monkeypatch.setattr(images, "read_queue_image", wait)
    for limit in ("MAX_WAITING_IMAGES", "MAX_READS"):
        monkeypatch.setattr(images, limit, 40)
    with (
        serving(
            color_bundle,
            **label_settings(draw_queue(tmp_path, 3)),
        ) as running,
        ThreadPoolExecutor(40) as pool,
    ):
        ana = Annotator(running, name="ana")
        try:
            queue_id = ana.queue
            reads = [pool.submit(ana.get_image, 0, queue_id) for _ in range(40)]
            wait_for(lambda: len(started) == 40, 30)
            assert_problem(ana.get_image(0, queue_id), 503, "busy")
            # threads that refresh keys and load models, and those of the decisions
            in_thread = asyncio.run_coroutine_threadsafe(asyncio.to_thread(int), running.loop)
            assert in_thread.result(30) == 0
            assert ana.decide(0, ["red"]).status_code == 200
        finally:
            may_end.set()
        for each in reads:
            assert_problem(each.result(), 422, "empty")


def test_relative_paths_in_a_serve_config_file_are_refused(color_bundle: Path) -> None:
    for changed in (
        {"labeling.output": "labels"},
        {"labeling.output": "run:1/labels"},
        {"labeling.output": "delta:/labels"},
        {"labeling.manifest": "m.csv"},
        {"labeling.manifest": "delta:tables/x"},
    ):
        args = {"model": str(color_bundle), "labeling.manifest": "/m.csv", "labeling.output": "/l"}
        with pytest.raises(RequestError, match=r"is relative to the working directory"):
            build_from_args({**args, **changed})


def test_wrong_settings_are_refused_before_the_service_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from imgcls.config import build
    from imgcls.serving.config import ServeConfig

    for wrong in ({"output": "x"}, {"manifest": "x"}, {"classes": "a"}):
        with pytest.raises(ConfigError, match="labeling"):
            build(ServeConfig, {"model": "x", **{f"labeling.{k}": v for k, v in wrong.items()}})

    def open_queue(manifest: Path, **more: object) -> None:
        settings_ = {"manifest": str(manifest), "output": str(tmp_path / "labels"), **more}
        Labeling.open(LabelingConfig.model_validate(settings_), several=False)

    with pytest.raises(ManifestError, match="no such file"):
        open_queue(tmp_path / "none.csv")
    write_manifest(tmp_path / "empty.csv", [], ("path",))
    with pytest.raises(RequestError, match="no image to label"):
        open_queue(tmp_path / "empty.csv")
    manifest = draw_queue(tmp_path, 2)
    with pytest.raises(RequestError, match="a name twice"):
        open_queue(manifest, classes="a,a")
    monkeypatch.setattr(queue, "MAX_IMAGES", 1)
    with pytest.raises(RequestError, match="more than 1 images"):
        open_queue(manifest)


def test_every_labeling_response_is_described(mixed: Running, keys: dict[str, str]) -> None:
    description = schemathesis.openapi.from_url(f"{mixed.url}/openapi.json")
    operations = [result.ok() for result in description.get_all_operations()]
    labeling = [each for each in operations if "/labeling/" in each.path]
    assert len(labeling) == 7
    for operation in labeling:

        @given(case=operation.as_strategy())
        @settings(max_examples=6, suppress_health_check=list(HealthCheck))
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(
                base_url=mixed.url,
                headers={"Authorization": f"Bearer {keys['ana']}"},
                excluded_checks=[positive_data_acceptance],  # the ID of the queue is not known
            )

        check()
