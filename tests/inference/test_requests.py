"""Requests that cannot succeed are refused before Ray starts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from imgcls.cluster import session
from imgcls.cluster.session import Node
from imgcls.config import build
from imgcls.data.decoding.preprocess import DecodeMode
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.errors import OutputError, RequestError
from imgcls.execution.plan import RunIdentity
from imgcls.inference.predict import PredictConfig, predict
from imgcls.inference.requests import (
    check_output_columns,
    check_resumable,
    check_timeouts,
    limit_chunk_rows,
    resolve_settings,
)
from imgcls.models import openvino_package
from imgcls.models.bundle import load_bundle
from tests.conftest import write_manifest
from tests.s3 import forget_connections, url


def refused(tmp_path: Path, bundle: Path, image: str, **more: object) -> str:
    manifest = write_manifest(tmp_path / "manifest.csv", [(image,)], ("path",))
    output = tmp_path / "out"
    asked = {"manifest": str(manifest), "model": str(bundle), "output": str(output), **more}
    with pytest.raises(RequestError) as caught:
        predict(build(PredictConfig, asked))
    assert not ray.is_initialized()
    assert not output.exists()
    return str(caught.value)


def test_int8_needs_a_bundle_that_was_prepared_for_it(tmp_path: Path, color_bundle: Path) -> None:
    message = refused(tmp_path, color_bundle, "a.jpg", precision="int8")
    assert f"`imgcls model quantize --model {color_bundle} --manifest FILE --output NEW`" in message
    message = refused(tmp_path, color_bundle, "a.jpg", precision="int8", compile="always")
    assert "an int8 network cannot be compiled" in message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"compile": "always"}, "takes no compiled network; use --engine torch, or set --compile"),
        ({}, "is not installed; run: pip install 'imgcls[openvino]', or use --engine torch"),
    ],
)
def test_an_engine_that_cannot_run_is_refused_before_ray_starts(
    tmp_path: Path, color_bundle: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, str],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(openvino_package, "is_openvino_installed", lambda: False)
    assert message in refused(tmp_path, color_bundle, "a.jpg", engine="openvino", **more)


def test_the_engine_is_part_of_what_a_resumed_run_must_match(color_bundle: Path) -> None:
    bundle = load_bundle(str(color_bundle))

    def identity(engine: str) -> RunIdentity:
        asked = {"manifest": "m.csv", "model": bundle.url, "output": "out", "engine": engine}
        return RunIdentity({}, {}, resolve_settings(build(PredictConfig, asked), bundle))

    assert identity("torch").find_differences(asdict(identity("openvino"))) == [
        "settings.engine: 'openvino' then, 'torch' now"
    ]


@pytest.mark.parametrize(
    ("gpus", "layout", "classes", "most"),
    [
        (0, "auto", 1000, 4096),
        (0, "auto", 21_841, 187),
        (1, "auto", 1000, 256),
        (1, "gpu", 1000, 256),
        (1, "cpu", 1000, 4096),
    ],
)
def test_chunks_are_limited_by_the_memory_that_they_take(
    monkeypatch: pytest.MonkeyPatch, gpus: int, layout: str, classes: int, most: int
) -> None:
    """187 rows of 21,841 scores are 16 MB; a chunk for a GPU is in the object store as pixels."""
    monkeypatch.setattr(session, "is_private_session", lambda: True)
    monkeypatch.setattr(session, "list_nodes", lambda: [Node(cpus=4, gpus=0), Node(4, gpus)])
    asked = {"manifest": "m.csv", "model": "b", "output": "out", "scale.layout": layout}
    bundle: Any = SimpleNamespace(spec=SimpleNamespace(num_outputs=classes))
    assert limit_chunk_rows(build(PredictConfig, asked), bundle) == most


@pytest.mark.parametrize("changes", [{}, {"precision": "int8", "engine": "torch"}])
def test_a_run_of_a_version_without_engines_is_resumed(
    color_bundle: Path, changes: dict[str, str]
) -> None:
    bundle = load_bundle(str(color_bundle))
    asked = {"manifest": "m.csv", "model": bundle.url, "output": "out", **changes}
    now = RunIdentity({}, {}, resolve_settings(build(PredictConfig, asked), bundle))
    earlier = {name: value for name, value in now.settings.items() if name != "engine"}
    assert now.find_differences({"settings": earlier}) == []


def test_exact_decoding_is_refused_where_gpus_are_to_decode(
    tmp_path: Path, color_bundle: Path
) -> None:
    more = {"decode": "exact", "scale.layout": "gpu_decode"}
    message = refused(tmp_path, color_bundle, "a.jpg", **more)
    assert "Set --scale.layout gpu, or --decode fast" in message


def test_the_decode_setting_is_part_of_what_a_resumed_run_must_match(
    tmp_path: Path, color_bundle: Path
) -> None:
    write_manifest(tmp_path / "manifest.csv", [("a.jpg",)], ("path",))
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "manifest.csv")))
    bundle = load_bundle(str(color_bundle))

    def identity(decode: DecodeMode | None) -> RunIdentity:
        asked = {"manifest": manifest.files[0], "model": bundle.url, "output": "out"}
        settings = resolve_settings(build(PredictConfig, asked), bundle.with_decode(decode))
        return RunIdentity({}, {"sha256": bundle.sha256}, settings)

    own = bundle.spec.preprocess.decode
    other: DecodeMode = "exact" if own == "fast" else "fast"
    assert identity(None) == identity(own)
    assert identity(other).find_differences(asdict(identity(own))) == [
        f"settings.decode: {own!r} then, {other!r} now"
    ]


def test_who_waits_for_a_store_is_not_to_be_taken_to_hang(
    tmp_path: Path, color_bundle: Path
) -> None:
    message = refused(tmp_path, color_bundle, "s3://b/a.jpg", **{"scale.worker_timeout_s": 180})
    assert message.startswith(
        "scale.worker_timeout_s 180: for s3://b/a.jpg a worker may wait 3 x 60 s"
    )
    remedy = "Set --scale.worker-timeout-s above 180, or a smaller --storage.retry-timeout-s"
    assert remedy in message
    signed = "https://me:secret@h/a.jpg?sig=secret"
    message = refused(tmp_path, color_bundle, signed, **{"scale.worker_timeout_s": 180})
    assert "for https://h/a.jpg?... a worker" in message


@pytest.mark.parametrize("image", ["data:image/png;base64,AAAA", "a.jpg", "file:///a.jpg"])
def test_an_image_that_is_in_no_store_needs_no_long_timeout(
    tmp_path: Path, color_bundle: Path, image: str
) -> None:
    file = write_manifest(tmp_path / "manifest.csv", [(image,)], ("path",))
    asked = {"manifest": str(file), "model": str(color_bundle), "output": str(tmp_path / "out")}
    config = build(PredictConfig, {**asked, "scale.worker_timeout_s": 1})
    bundle, manifest = load_bundle(str(color_bundle)), open_manifest(config.manifest)
    check_timeouts(config, config.output, bundle, manifest)
    with pytest.raises(RequestError, match=r"for s3://b/out a worker may wait"):
        check_timeouts(config, "s3://b/out", bundle, manifest)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("path,Status", "column 'Status' is an output column of predict (case is ignored)"),
        (
            "path,status",
            "column 'status' is an output column of predict (case is ignored). Rename it in",
        ),
        (
            "path,TopK_Labels",
            "column 'TopK_Labels' is an output column of predict (case",
        ),
        (
            "path,status,Width",
            "columns 'status', 'Width' are output columns of predict (case is ignored). Rename "
            "them in the manifest, or leave them out with --manifest.drop-columns status,Width (",
        ),
        ("path,run", "column 'run' is an output column of `imgcls history compact`"),
        ("path,Run", "column 'Run' is an output column of `imgcls history compact`"),
        ("path,bundle_sha256", "column 'bundle_sha256' is an output column of `imgcls history"),
        ("path,labelled_at", "column 'labelled_at' is an output column of `imgcls history"),
        ("path,site,Site", "columns 'site' and 'Site' differ only by case"),
        ("path,Path", "columns 'path' and 'Path' differ only by case"),
    ],
)
def test_columns_that_would_hide_others_are_refused(
    tmp_path: Path, color_bundle: Path, columns: str, message: str
) -> None:
    names = tuple(columns.split(","))
    manifest = write_manifest(tmp_path / "columns.csv", [("a.jpg",) * len(names)], names)
    refusal = refused(tmp_path, color_bundle, "a.jpg", manifest=str(manifest))
    assert refusal.startswith(f"manifest {manifest}: {message}")


def test_columns_named_like_those_of_others_are_let_through(tmp_path: Path) -> None:
    columns = ("path", "run_id", "running", "stat us", "label", "hash")
    manifest = write_manifest(tmp_path / "columns.csv", [("a.jpg",) * 6], columns)
    check_output_columns(open_manifest(ManifestConfig(path=str(manifest))))


def test_a_bucket_that_is_not_there_is_refused(s3: Any, tmp_path: Path, color_bundle: Path) -> None:
    message = refused(tmp_path, color_bundle, "s3://no-such-bucket-here/a.jpg")
    assert "s3://no-such-bucket-here/a.jpg: no such bucket. Correct the manifest's paths" in message


def test_credentials_that_are_not_there_are_asked_for(
    s3: Any, tmp_path: Path, color_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget_connections()
    assert "check the credentials" in refused(tmp_path, color_bundle, url("a.jpg"))


def test_the_folder_of_a_bundle_is_refused_as_output(color_bundle: Path) -> None:
    output = str(color_bundle)
    values = {"manifest": "m.csv", "model": output, "output": output, "overwrite": True}
    with pytest.raises(OutputError, match="is the folder of a bundle; pass another --output"):
        check_resumable(output, build(PredictConfig, values))


def test_only_tables_keep_a_folder_of_predictions_from_being_used(tmp_path: Path) -> None:
    config = build(PredictConfig, {"manifest": "m.csv", "model": "bundle", "output": str(tmp_path)})
    folder = tmp_path / "predictions"
    folder.mkdir()
    (folder / ".DS_Store").write_bytes(b"Bud1")
    check_resumable(str(tmp_path), config)
    (folder / "part-00000.parquet").touch()
    with pytest.raises(OutputError, match="holds predictions but no"):
        check_resumable(str(tmp_path), config)
