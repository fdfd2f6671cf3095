"""Images decoded once: each good row in its place, copied only when it is requested."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from imgcls.cluster.ray_data import DataExecution
from imgcls.data.decoding import decode
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.training.data.batches import DecodeSettings, decode_block
from imgcls.training.data.cached import CachedDataset, decode_images, find_store_bytes
from tests.training.rows import draw_rows

SPEC = Preprocess(resize=16, crop=16, mode="squash")
SETTINGS = DecodeSettings.from_preprocess(SPEC, cropped=False)
GOOD = {False: [1, 2, 7, 8], True: [0, 3, 6, 9]}
"""The rows of each split that can be decoded."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return draw_rows(tmp_path_factory.mktemp("images"))


def blocks(rows: pa.Table, *sizes: int) -> list[pa.Table]:
    """Decoded blocks of one split each, cut into these sizes, the last ones first."""
    made = []
    for held in (False, True):
        split = rows.filter(pc.equal(rows.column("held"), held))
        start = 0
        for size in (*sizes, len(split)):
            if start < len(split):
                made.append(decode_block(split.slice(start, size), SETTINGS))
            start += size
    return made[::-1]


def expected(rows: pa.Table, row: int) -> np.ndarray:
    pixels, _ = decode.decode_image(Path(rows.column("url")[row].as_py()).read_bytes(), SPEC)
    return pixels


@pytest.mark.parametrize("sizes", [(), (1,), (2, 1), (1, 1, 1)])
@pytest.mark.parametrize("held", [False, True])
def test_a_split_holds_its_good_rows_in_manifest_order_whichever_block_came_first(
    rows: pa.Table, held: bool, sizes: tuple[int, ...]
) -> None:
    split = CachedDataset(blocks(rows, *sizes), SPEC, held=held)
    assert len(split) == 4
    assert split.labels.tolist() == [row % 3 for row in GOOD[held]]
    for at, row in enumerate(GOOD[held]):
        np.testing.assert_array_equal(split.gather_pixels(np.array([at]))[0], expected(rows, row))


def test_pixels_come_in_the_requested_order_and_as_often(rows: pa.Table) -> None:
    train = CachedDataset(blocks(rows, 2), SPEC, held=False)
    forward = train.gather_pixels(np.arange(4))
    np.testing.assert_array_equal(train.gather_pixels(np.array([3, 1, 1])), forward[[3, 1, 1]])
    assert train.gather_pixels(np.zeros(0, np.int64)).shape == (0, 3, 16, 16)


def test_a_sliced_block_is_read_from_where_it_starts(rows: pa.Table) -> None:
    whole = CachedDataset(blocks(rows), SPEC, held=True)
    block = decode_block(rows.filter(rows.column("held")), SETTINGS)
    parts = CachedDataset([block.slice(0, 1), block.slice(1)], SPEC, held=True)
    np.testing.assert_array_equal(
        parts.gather_pixels(np.arange(4)), whole.gather_pixels(np.arange(4))
    )


def test_changing_a_batch_does_not_change_the_images(rows: pa.Table) -> None:
    train = CachedDataset(blocks(rows), SPEC, held=False)
    before = train.gather_pixels(np.arange(4))
    taken = train.gather_pixels(np.arange(4))
    taken[:] = 0
    np.testing.assert_array_equal(train.gather_pixels(np.arange(4)), before)


def test_a_batch_for_each_set_of_rows(rows: pa.Table) -> None:
    train = CachedDataset(blocks(rows), SPEC, held=False)
    wanted = [np.array([2, 0]), np.zeros(0, np.int64), np.array([3])]
    found = list(train.iter_batches(wanted))
    assert [batch.labels.tolist() for batch in found] == [
        train.labels[each].tolist() for each in wanted
    ]
    np.testing.assert_array_equal(found[0].pixels, train.gather_pixels(wanted[0]))
    assert all(batch.failures == () for batch in found)
    held = CachedDataset(blocks(rows, 1), SPEC, held=True)
    (batch,) = held.iter_batches([np.array([2, 0])])
    assert batch.rows.tolist() == [GOOD[True][2], GOOD[True][0]]


def test_ray_decodes_every_row_once_and_reports_the_bad_ones(joined: None, rows: pa.Table) -> None:
    decoded = decode_images(rows, SETTINGS, cpus=2, execution=DataExecution())
    assert len(decoded.blocks) > 2, "small sets are cut too, so that all CPUs have some"
    bad = [(failure.url, failure.label, failure.held) for failure in decoded.failures]
    assert [(failure.row, failure.status) for failure in decoded.failures] == [
        (4, "not_an_image"), (5, "missing"),
    ]  # fmt: skip
    assert bad == [(rows.column("url")[4].as_py(), 1, False), (None, 2, False)]
    assert "web page" in decoded.failures[0].error
    for held in (False, True):
        split = decoded.load_split(held=held)
        assert len(split) == 4
        for at, row in enumerate(GOOD[held]):
            np.testing.assert_array_equal(
                split.gather_pixels(np.array([at]))[0], expected(rows, row)
            )
    assert find_store_bytes() > 10_000_000
