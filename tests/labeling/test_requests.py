"""What can be known to fail is refused before Ray is started."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import ray

from imgcls.config import build
from imgcls.data.manifest import ManifestConfig, open_manifest
from imgcls.data.preprocess import Decode
from imgcls.errors import RequestError
from imgcls.labeling.plan import Identity
from imgcls.labeling.predict import PredictConfig, _Run, predict
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


def test_int8_needs_a_bundle_that_was_prepared_for_it(tmp_path: Path, colour_bundle: Path) -> None:
    told = refused(tmp_path, colour_bundle, "a.jpg", precision="int8")
    assert f"`imgcls model quantise --model {colour_bundle} --manifest FILE --output NEW`" in told
    told = refused(tmp_path, colour_bundle, "a.jpg", precision="int8", compile="always")
    assert "int8 is not compiled; give one of the two" in told


def test_exact_decoding_is_refused_where_gpus_are_to_decode(
    tmp_path: Path, colour_bundle: Path
) -> None:
    more = {"decode": "exact", "scale.layout": "gpu_decode"}
    told = refused(tmp_path, colour_bundle, "a.jpg", **more)
    assert "set --scale.layout gpu, or --decode fast" in told


def test_the_decode_setting_is_part_of_what_a_resumed_run_must_match(
    tmp_path: Path, colour_bundle: Path
) -> None:
    write_manifest(tmp_path / "manifest.csv", [("a.jpg",)], ("path",))
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "manifest.csv")))
    bundle = load_bundle(str(colour_bundle))

    def identity(decode: Decode | None) -> Identity:
        asked = {"manifest": manifest.files[0], "model": bundle.url, "output": "out"}
        run: Any = _Run(
            build(PredictConfig, asked), "out", manifest, bundle.with_decode(decode),
            None, None, 0.0,  # type: ignore[arg-type]
        )  # fmt: skip
        found: Identity = run._identity()
        return found

    own = bundle.spec.preprocess.decode
    other: Decode = "exact" if own == "fast" else "fast"
    assert identity(None) == identity(own)
    assert identity(other).differences(asdict(identity(own))) == [
        f"settings.decode: {own!r} then, {other!r} now"
    ]


def test_who_waits_for_a_store_is_not_to_be_taken_to_hang(
    tmp_path: Path, colour_bundle: Path
) -> None:
    told = refused(tmp_path, colour_bundle, "s3://b/a.jpg", **{"scale.hang_seconds": 180})
    assert told.startswith("scale.hang_seconds 180: for s3://b/a.jpg a worker may wait 3 x 60 s")
    assert "give more than 180, or a smaller --storage.deadline-seconds" in told


def test_a_bucket_that_is_not_there_is_refused(
    s3: Any, tmp_path: Path, colour_bundle: Path
) -> None:
    told = refused(tmp_path, colour_bundle, "s3://no-such-bucket-here/a.jpg")
    assert "s3://no-such-bucket-here/a.jpg: no such bucket; correct the manifest's paths" in told


def test_credentials_that_are_not_there_are_asked_for(
    s3: Any, tmp_path: Path, colour_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget_connections()
    assert "check the credentials" in refused(tmp_path, colour_bundle, url("a.jpg"))
