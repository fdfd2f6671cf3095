"""A start-over (`--overwrite`) or a commit killed midway leaves what any later run mends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.e2e.outputs import assert_exactly_once, committed
from tests.processes import RayCluster, imgcls


def test_a_run_whose_start_over_or_commit_was_broken_off_ends_with_the_same_table(
    cluster: RayCluster, colours: Callable[[int], Path], colour_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = (
        *("predict", "--manifest", colours(60), "--model", colour_bundle, "--output", output),
        *("--chunk-rows", 8, "--part-rows", 16),
    )
    first = imgcls(*command, env=cluster.environment())
    assert first.returncode == 0, first.stderr
    whole = assert_exactly_once(output, 60)

    # what --overwrite removes first, up to a part of the predictions; the shards went at the commit
    (output / "_SUCCESS").unlink()
    for part in (0, 2):
        (output / "predictions" / f"part-{part:05d}.parquet").unlink()
    resumed = imgcls(*command, env=cluster.environment())
    assert resumed.returncode == 0, resumed.stderr
    assert "28 of 60 rows are done" in resumed.stdout
    assert assert_exactly_once(output, 60).equals(whole)

    # killed after _SUCCESS, before the staging area was gone
    (output / "_staging" / "part-00001").mkdir(parents=True)
    shutil.copy(output / "_run.json", output / "_staging" / "part-00001")
    again = imgcls(*command, env=cluster.environment())
    assert again.returncode == 0, again.stderr
    assert "committed before" in again.stdout
    assert committed(output)
    assert not (output / "_staging").exists()

    # committed by a version that did not have these settings yet
    run = json.loads((output / "_run.json").read_text())
    for setting in ("decode", "max_bytes"):
        del run["identity"]["settings"][setting]
    (output / "_run.json").write_text(json.dumps(run))
    older = imgcls(*command, env=cluster.environment())
    assert older.returncode == 0, older.stderr
    assert "committed before" in older.stdout
    other = imgcls(*command, "--top-k", 2, env=cluster.environment())
    assert other.returncode == 2
    assert "settings.top_k: 5 then, 2 now" in other.stderr
