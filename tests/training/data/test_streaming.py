"""Images decoded in every epoch: the requested rows, in order, bad ones reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray

from imgcls.data.decoding import decode
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.training.data import batches
from imgcls.training.data.batches import DecodeSettings
from imgcls.training.data.streaming import StreamedDataset, StreamedImages
from tests.training.rows import draw_rows

SPEC = Preprocess(resize=20, crop=16)
TRAIN, HELD = [1, 2, 4, 5, 7, 8], [0, 3, 6, 9]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return draw_rows(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def source(joined: None, rows: pa.Table) -> StreamedImages:
    return StreamedImages(
        ray.put(rows), DecodeSettings.from_preprocess(SPEC, cropped=True), cpus=1.0
    )


def test_a_split_knows_all_its_rows_before_any_is_decoded(source: StreamedImages) -> None:
    train, held = (StreamedDataset(source, held=held, cpus=1.0) for held in (False, True))
    assert train.labels.tolist() == [row % 3 for row in TRAIN]
    assert held.labels.tolist() == [row % 3 for row in HELD]
    assert (len(train), len(held)) == (6, 4)
    assert list(train.iter_batches([])) == []


@pytest.mark.parametrize(
    ("cpus", "workers", "readers"), [(8.0, 1, 8), (8.0, 4, 8), (6.0, 4, 6), (2.0, 4, 4)]
)
def test_the_readers_of_all_workers_share_the_limit_per_host(
    source: StreamedImages, cpus: float, workers: int, readers: int
) -> None:
    shared = replace(source, cpus=cpus)
    assert StreamedDataset(shared, held=False, cpus=cpus / workers).num_readers == readers


def test_batches_hold_the_requested_rows_in_order(
    source: StreamedImages, rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    # blocks of two rows, so that batches begin and end within them
    monkeypatch.setattr(batches, "MAX_BLOCK_ROWS", 2)
    train = StreamedDataset(source, held=False, cpus=1.0)
    wanted = [np.array([5, 0, 3]), np.array([1]), np.array([2, 4, 5])]
    found = list(train.iter_batches(wanted))
    urls = rows.column("url").to_pylist()
    for asked, batch in zip(wanted, found, strict=True):
        good = [TRAIN[place] for place in asked if TRAIN[place] not in (4, 5)]
        bad = [TRAIN[place] for place in asked if TRAIN[place] in (4, 5)]
        assert batch.labels.tolist() == [row % 3 for row in good]
        for row, pixels in zip(good, batch.pixels, strict=True):
            decoded, _ = decode.decode_image(Path(urls[row]).read_bytes(), source.settings.train)
            np.testing.assert_array_equal(pixels, decoded)
        assert batch.rows.tolist() == good
        status = {4: "not_an_image", 5: "missing"}
        assert [(f.url, f.label, f.held, f.row, f.status) for f in batch.failures] == [
            (urls[row], row % 3, False, row, status[row]) for row in bad
        ]


def test_a_batch_may_have_no_row_or_no_good_one(source: StreamedImages) -> None:
    train = StreamedDataset(source, held=False, cpus=1.0)
    none, bad, good = train.iter_batches([np.zeros(0, np.int64), np.array([2, 3]), np.array([0])])
    assert (len(none.labels), len(none.failures)) == (0, 0)
    assert (len(bad.labels), len(bad.failures)) == (0, 2)
    assert bad.pixels.shape == (0, 3, 20, 20)
    assert good.labels.tolist() == [1]


def test_without_a_requested_row_batches_are_empty(source: StreamedImages) -> None:
    held = StreamedDataset(source, held=True, cpus=1.0)
    empty = list(held.iter_batches([np.zeros(0, np.int64)] * 2))
    assert [len(batch.labels) for batch in empty] == [0, 0]
