"""A later run completes a start-over (`--overwrite`) or a commit that was killed midway."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from imgcls.cli import main
from tests.e2e.outputs import assert_exactly_once, committed
from tests.processes import run_here


def test_a_run_whose_start_over_or_commit_was_killed_ends_with_the_same_table(
    joined: None,
    colors: Callable[[int], Path],
    color_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    command = (
        *("predict", "--manifest", colors(60), "--model", color_bundle, "--output", output),
        *("--chunk-rows", 8, "--part-rows", 16),
    )
    first = run_here(*command)
    assert first.returncode == 0, first.stderr
    whole = assert_exactly_once(output, 60)

    # --overwrite removes these first, then other parts; the commit had removed the shards
    (output / "_SUCCESS").unlink()
    for part in (0, 2):
        (output / "predictions" / f"part-{part:05d}.parquet").unlink()
    resumed = run_here(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert "28 of 60 rows are done" in resumed.stdout
    assert assert_exactly_once(output, 60).equals(whole)

    # killed after _SUCCESS, before the staging folder was removed
    (output / "_staging" / "part-00001").mkdir(parents=True)
    shutil.copy(output / "_run.json", output / "_staging" / "part-00001")
    words = [str(word) for word in command]  # a committed run needs no Ray, so no other process
    assert main(words) == 0
    assert "committed before" in capsys.readouterr().out
    assert committed(output)
    assert not (output / "_staging").exists()

    # no row failed, so there is nothing to retry
    before = {file: file.read_bytes() for file in sorted(output.rglob("*")) if file.is_file()}
    gate = ["--reference", str(output), "--max-psi", "0"]
    assert main([*words, "--retry-errors", *gate]) == 0
    assert "60 rows; no row failed, nothing to retry" in capsys.readouterr().out
    after = {file: file.read_bytes() for file in sorted(output.rglob("*")) if file.is_file()}
    assert after == before

    # committed by a version without these settings
    run = json.loads((output / "_run.json").read_text())
    for setting in ("decode", "max_bytes"):
        del run["identity"]["settings"][setting]
    (output / "_run.json").write_text(json.dumps(run))
    assert main(words) == 0
    assert "committed before" in capsys.readouterr().out
    assert main([*words, "--top-k", "2"]) == 2
    assert "settings.top_k: 5 then, 2 now" in capsys.readouterr().err

    # read in another way, the same bytes are other rows
    latin = [*words, "--manifest.encoding", "latin-1"]
    assert main([*latin, "--manifest.escape", "\\"]) == 2
    error = capsys.readouterr().err
    assert "manifest.encoding: None then, 'iso8859-1' now" in error
    assert r"manifest.escape: None then, '\\' now" in error
    assert main([*words, "--manifest.encoding", "UTF8"]) == 0
    # committed by a version that stored the encoding in the configuration alone
    run["provenance"]["config"]["manifest"]["encoding"] = "latin-1"
    (output / "_run.json").write_text(json.dumps(run))
    assert main(latin) == 0
    assert main(words) == 2
    assert "manifest.encoding: 'iso8859-1' then, None now" in capsys.readouterr().err
