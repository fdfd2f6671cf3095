"""Embeddings of a run by the paths of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from imgcls.runs.committed import open_run
from imgcls.runs.embeddings import gather_embeddings
from tests.runs.embedded import CLASSES, commit_run, save_with_head


def test_paths_are_found_by_the_file_that_they_name(tmp_path: Path) -> None:
    bundle = save_with_head(tmp_path / "bundle", CLASSES, head_seed=1)
    vectors = commit_run(tmp_path / "run", bundle, 20, lost=(6,))
    urls = ["/no/../1.jpg", "file:///x/../2.jpg", "/3.jpg", "//4.jpg", "file:/2.jpg"]
    lacking = ["/5.jpg", "/6.jpg", "/elsewhere.jpg", None]
    found, index, reasons = gather_embeddings(
        open_run(str(tmp_path / "run")), pa.chunked_array([urls, lacking])
    )
    np.testing.assert_array_equal(found[index[:5]], vectors[[1, 2, 3, 4, 2]])
    assert index[5:].tolist() == [-1] * 4
    assert reasons == {
        5: "missing",
        6: "has no embedding, beyond the range of float16",
        7: "is not in the run",
        8: "has no path",
    }
