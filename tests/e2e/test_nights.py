"""Nights of a growing, changing, failing folder, and what they come to in the end."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imgcls.cli import main
from imgcls.curation.build import build_manifest
from imgcls.curation.config import ManifestBuildConfig
from imgcls.models import zoo
from imgcls.models.bundle import BundleSpec, save_bundle
from tests.conftest import COLORS, draw, save
from tests.e2e.outputs import parquet
from tests.processes import RayCluster, run_here, started, wait_for

pytestmark = pytest.mark.timeout(900)
SETTINGS = ("--precision", "fp32", "--max-error-rate", 0.5, "--chunk-rows", 4,
            "--scale.workers", 1)  # fmt: skip


def bundle(folder: Path, seed: int) -> Path:
    architecture = zoo.resolve_architecture("small_cnn", {"width": 8})
    torch.manual_seed(seed)
    spec = BundleSpec(
        architecture=architecture,
        classes=list(COLORS),
        preprocess=zoo.get_default_preprocess(architecture),
    )
    save_bundle(str(folder), spec, zoo.build_network(architecture, len(COLORS)).state_dict())
    return folder


class World:
    """The folder of images, as a day changes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(7)
        self.drawn = 0
        self.clock = 1_700_000_000

    def write(self, path: Path, data: bytes | None = None) -> None:
        """A new picture, or these bytes; an hour later than what was written before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.drawn += 1
        if data is None:
            save(draw(list(COLORS)[self.drawn % 3], seed=self.drawn), path)
        else:
            path.write_bytes(data)
        self.clock += 3600
        if isinstance(path, os.PathLike):  # a store keeps its own time and identifies files by ETag
            os.utime(path, (self.clock, self.clock))

    def day(self, number: int, new: int) -> None:
        files = sorted(self.folder.rglob("*.png"), key=str)
        broken = [file for file in files if file.stat().st_size < 100]
        sound = [file for file in files if file not in broken]
        for file in broken[:1]:  # one is repaired
            self.write(file)
        if sound:
            changed, gone, spoilt = self.rng.choice(len(sound), 3, replace=False)
            self.write(sound[changed])
            sound[gone].unlink()
            self.write(sound[spoilt], b"spoilt")
        for i in range(new):
            self.write(self.folder / f"camera-{i % 3}" / f"{number:02d}-{i:02d}.png")


def until_there(output: Path, pattern: str) -> None:
    """Until there is a plan, or a chunk or part in addition to the shards of the plan."""
    wait_for(
        lambda: any("manifest" not in f.relative_to(output).parts for f in output.glob(pattern)), 60
    )


def rows_of(folder: Path) -> dict[str, tuple[Any, ...]]:
    table = parquet(folder / "predictions")
    assert len(set(table["path"].to_pylist())) == table.num_rows
    names = ("status", "predicted_label", "confidence", "topk_labels")
    return {
        row["path"]: tuple(row[name] for name in names)
        for row in table.select(["path", *names]).to_pylist()
    }


@pytest.mark.parametrize(
    ("nights", "place"),
    [
        (4, "s3"),
        pytest.param(10, "s3", marks=pytest.mark.slow),
        pytest.param(10, "disk", marks=pytest.mark.slow),
    ],
    indirect=["place"],
)
def test_nights_come_to_the_result_of_labeling_the_last_state_from_scratch(
    cluster: RayCluster, joined: None, place: Path, nights: int, capsys: pytest.CaptureFixture[str]
) -> None:
    killed, new_model = nights * 4 // 10, nights * 6 // 10
    finished_later = nights >= 10  # than the night after it
    # the short form kills once: after a first chunk; tests of single steps kill after the plan too
    signs = ("_run.json", "**/*-0000*.parquet")[-1 if nights < 10 else 0 :]
    old, new = bundle(place / "old", 1), bundle(place / "new", 2)
    world = World(place / "images")
    labels, manifest = place / "labels", place / "manifest"
    labeled = []
    for number in range(nights):
        world.day(number, {0: 24, killed: 40}.get(number, 6))
        build_manifest(
            ManifestBuildConfig(
                source=str(world.folder), output=str(manifest), overwrite=bool(number)
            )
        )
        words = [
            *("predict", "--manifest", manifest, "--model", new if number >= new_model else old),
            *("--output", f"{labels}/date={{date}}", "--date", f"2026-11-{number + 1:02d}"),
            *("--since", labels, *SETTINGS, "--summary-json", place / "summary.json"),
            *(("--relabel",) if number == new_model else ()),
        ]
        tonight = labels / f"date=2026-11-{number + 1:02d}"
        for sign in signs if number == killed else ():
            with started(*words, env=cluster.environment()) as process:
                until_there(tonight, sign)
                process.send_signal(signal.SIGKILL)
            assert not (tonight / "_SUCCESS").exists()
        if number == killed and finished_later:
            unfinished, there = words, tonight
            labeled.append(0)
            continue
        night = run_here(*words)
        assert night.returncode == 0, night.stderr
        labeled.append(parquet(tonight / "predictions").num_rows)
        if number == killed + 1 and finished_later:
            resumed = run_here(*unfinished)
            assert resumed.returncode == 0, resumed.stderr
            assert (there / "_SUCCESS").exists()
        if number == nights - 1:
            assert main([str(word) for word in words]) == 0  # needs no Ray: in this process
            assert "committed before" in capsys.readouterr().out
            assert json.loads((place / "summary.json").read_text())["exit_code"] == 0
            compact = ["history", "compact", str(labels), "--output", str(place / "latest")]
            assert main(compact) == 0
    images = len(list(world.folder.rglob("*.png")))
    assert labeled[0] == 24
    assert labeled[new_model] > labeled[0]  # everything
    usual = set(range(1, nights)) - {killed, new_model}
    usual -= {killed + 1} if finished_later else set()
    assert (
        max(labeled[number] for number in usual) <= 6 + 5
    )  # new; changed, spoilt, repaired, still broken

    scratch = run_here(
        *("predict", "--manifest", manifest, "--model", new, "--output", place / "scratch"),
        *SETTINGS,
    )
    assert scratch.returncode == 0, scratch.stderr
    found, expected = rows_of(place / "latest"), rows_of(place / "scratch")
    assert len(expected) == images
    assert found == expected
    assert {status for status, *_ in found.values()} == {"ok", "not_an_image"}

    nothing = run_here(
        *("predict", "--manifest", manifest, "--model", new, "--since", place / "latest"),
        *("--output", place / "again", *SETTINGS, "--max-error-rates.not_an_image", 1),
        "--retry-failed",
        *("--summary-json", place / "summary.json", "--reference", place / "scratch"),
    )
    assert nothing.returncode == 0, nothing.stderr
    summary = json.loads((place / "summary.json").read_text())
    assert (summary["exit_code"], set(summary["status"])) == (0, {"not_an_image"})
    again = rows_of(place / "again")
    assert {status for status, *_ in again.values()} == {"not_an_image"}
