"""A labeling run with everything on Google Cloud Storage, and on Azure Blob Storage."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from imgcls.data.storage import filesystem
from tests import clouds
from tests.clouds import Cloud
from tests.conftest import COLORS
from tests.data.storage.store_promises import placed
from tests.processes import imgcls

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(params=["gcs", "azure"])
def cloud(request: pytest.FixtureRequest) -> Any:
    with getattr(clouds, request.param)() as running:
        yield running


def test_a_bucket_is_listed_labeled_and_what_is_replaced_is_labeled_again(
    cloud: Cloud,
    tmp_path: Path,
    colors: Callable[..., Path],
    color_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    colors(12)
    images = sorted((tmp_path / "images").iterdir())
    with placed(cloud, monkeypatch) as place:
        for file in images:
            filesystem.write(place.url(f"t/in/{file.name}"), file.read_bytes())
        filesystem.write(place.url("t/in/large.jpg"), bytes(2_000_000))
        for file in color_bundle.iterdir():
            filesystem.write(place.url(f"t/bundle/{file.name}"), file.read_bytes())
        anon = ("--storage.anon", "true") if cloud.scheme == "gs" else ()

        def night(number: int, *more: object) -> list[dict[str, Any]]:
            manifest, output = place.url(f"t/m{number}"), place.url(f"t/nights/{number}")
            done = imgcls("manifest", "build", place.url("t/in"), "--output", manifest, *anon)
            assert done.returncode == 0, done.stderr
            command = (
                *("predict", "--manifest", manifest, "--model", place.url("t/bundle")),
                *(
                    "--output",
                    output,
                    "--max-bytes",
                    1_000_000,
                    "--max-error-rate",
                    1,
                    *anon,
                    *more,
                ),
            )
            done = imgcls(*command)
            assert done.returncode == 0, done.stderr
            done = imgcls(*command)
            assert "nothing to do" in done.stdout, done.stderr
            assert json.loads(filesystem.read(f"{output}/_SUCCESS"))["rows"] >= 0
            data = filesystem.read(f"{output}/predictions/part-00000.parquet")
            rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(data)).to_pylist()
            return rows

        rows = night(1)
        status = {row["path"].rpartition("/")[2]: row["status"] for row in rows}
        assert status == {file.name: "ok" for file in images} | {"large.jpg": "too_large"}
        assert {row["predicted_label"] for row in rows} <= {*COLORS, None}
        # as many bytes: only the store's version shows that it is another image
        other = images[1].read_bytes()
        same_size = images[0].read_bytes()[: len(other)].ljust(len(other), b"\0")
        filesystem.write(place.url(f"t/in/{images[1].name}"), same_size)
        again = [row["path"] for row in night(2, "--since", place.url("t/nights"))]
        assert place.url(f"t/in/{images[1].name}") in again
        assert not {place.url(f"t/in/{file.name}") for file in images if file != images[1]} & {
            *again
        }
