from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from imgcls.data import images
from imgcls.data.preprocess import Preprocess
from imgcls.training.ingest import ImageSet, decode_chunk
from tests.conftest import COLOURS, draw

SPEC = Preprocess(resize=16, crop=16, mode="squash")


@pytest.fixture
def rows(tmp_path: Path) -> pa.Table:
    """Ten rows, every third held out; row 4 is no image and row 5 has no path."""
    urls: list[str | None] = []
    for i in range(10):
        file = tmp_path / f"{i}.png"
        draw(list(COLOURS)[i % 3], seed=i).save(file)
        urls.append(str(file))
    (tmp_path / "4.png").write_bytes(b"<html>")
    urls[5] = None
    return pa.table(
        {
            "row": pa.array(range(10), pa.int64()),
            "url": pa.array(urls, pa.string()),
            "label": pa.array([i % 3 for i in range(10)], pa.int64()),
            "held": [i % 3 == 0 for i in range(10)],
        }
    )


def test_a_bad_image_is_a_row_with_its_reason(rows: pa.Table) -> None:
    errors = decode_chunk(rows, SPEC).column("error").to_pylist()
    assert [i for i, error in enumerate(errors) if error is not None] == [4, 5]
    assert "web page" in errors[4]
    assert "null" in errors[5]


def test_splits_hold_their_good_rows_in_manifest_order_whichever_block_came_first(
    rows: pa.Table,
) -> None:
    blocks = [decode_chunk(rows.slice(start, 4), SPEC) for start in (8, 0, 4)]
    train = ImageSet(blocks, SPEC, held=False)
    held = ImageSet(blocks, SPEC, held=True)
    assert train.labels.tolist() == [1, 2, 1, 2]  # rows 1, 2, 7 and 8
    assert held.labels.tolist() == [0, 0, 0, 0]
    urls = rows.column("url").to_pylist()
    for at, row in enumerate((0, 3, 6, 9)):
        expected, _ = images.decode(Path(urls[row]).read_bytes(), SPEC)
        np.testing.assert_array_equal(held.pixels(np.array([at]))[0], expected)


def test_pixels_come_in_the_order_asked_for(rows: pa.Table) -> None:
    train = ImageSet([decode_chunk(rows, SPEC)], SPEC, held=False)
    forward = train.pixels(np.arange(len(train)))
    backward = train.pixels(np.arange(len(train))[::-1])
    np.testing.assert_array_equal(forward, backward[::-1])


def test_a_sliced_block_is_read_from_where_it_starts(rows: pa.Table) -> None:
    whole = ImageSet([decode_chunk(rows, SPEC)], SPEC, held=True)
    block = decode_chunk(rows, SPEC)
    parts = ImageSet([block.slice(0, 5), block.slice(5)], SPEC, held=True)
    everything = np.arange(len(whole))
    np.testing.assert_array_equal(parts.pixels(everything), whole.pixels(everything))
