"""Bytes to pixels to batches: a bad image is reported and left out, and rows keep their order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from imgcls.data.decoding import decode
from imgcls.data.decoding.preprocess import Preprocess
from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from imgcls.training.data.batches import (
    MAX_BLOCK_BYTES,
    MAX_BLOCK_ROWS,
    PREFETCH_BATCHES,
    Batch,
    DecodeSettings,
    compute_block_rows,
    decode_block,
    prefetch,
    view_pixels,
)
from tests.training.rows import draw_rows

SPEC = Preprocess(resize=16, crop=16, mode="squash")
SETTINGS = DecodeSettings.from_preprocess(SPEC, cropped=False)


@pytest.fixture
def rows(tmp_path: Path) -> pa.Table:
    return draw_rows(tmp_path)


def split(rows: pa.Table, *, held: bool) -> pa.Table:
    return rows.filter(pc.equal(rows.column("held"), held))


# ------------------------------------------------------------------ how splits are decoded


def test_images_that_are_cropped_at_random_are_decoded_with_their_margin() -> None:
    spec = Preprocess(resize=256, crop=224)
    settings = DecodeSettings.from_preprocess(spec, cropped=True)
    assert (settings.train.crop, settings.train.resize) == (256, 256)
    assert settings.val == spec == settings.for_split(held=True)
    assert settings.for_split(held=False) == settings.train
    assert DecodeSettings.from_preprocess(spec, cropped=False).train == spec


@pytest.mark.parametrize("mode", ["pad", "squash"])
def test_without_a_margin_both_splits_are_decoded_alike(mode: str) -> None:
    spec = Preprocess(resize=256, crop=224, mode=mode)
    assert DecodeSettings.from_preprocess(spec, cropped=True) == DecodeSettings(spec, spec)


def test_decoded_bytes_follow_the_settings_of_each_split(rows: pa.Table) -> None:
    settings = DecodeSettings.from_preprocess(Preprocess(resize=20, crop=16), cropped=True)
    assert settings.compute_decoded_bytes(rows) == 6 * 3 * 20 * 20 + 4 * 3 * 16 * 16


def test_blocks_stay_below_their_limits() -> None:
    assert compute_block_rows(Preprocess(resize=16, crop=16)) == MAX_BLOCK_ROWS
    large = compute_block_rows(Preprocess(resize=1000, crop=1000))
    assert large * 3_000_000 <= MAX_BLOCK_BYTES < (large + 1) * 3_000_000
    assert compute_block_rows(Preprocess(resize=9000, crop=9000)) == 1


# ------------------------------------------------------------------ decoding


def test_a_bad_image_is_a_row_with_its_reason(rows: pa.Table) -> None:
    decoded = decode_block(split(rows, held=False), SETTINGS)
    errors = dict(
        zip(decoded.column("row").to_pylist(), decoded.column("error").to_pylist(), strict=True)
    )
    assert [row for row, error in errors.items() if error is not None] == [4, 5]
    assert "web page" in errors[4]
    assert "null" in errors[5]


def test_each_split_is_decoded_with_its_own_settings(rows: pa.Table) -> None:
    settings = DecodeSettings.from_preprocess(Preprocess(resize=20, crop=16), cropped=True)
    for held, side in ((False, 20), (True, 16)):
        decoded = decode_block(split(rows, held=held), settings).combine_chunks()
        (batch,) = decoded.to_batches()
        pixels = view_pixels(batch, settings.for_split(held=held))
        assert pixels.shape == (len(decoded), 3, side, side)
        url = decoded.column("url")[0].as_py()
        expected, _ = decode.decode_image(Path(url).read_bytes(), settings.for_split(held=held))
        np.testing.assert_array_equal(pixels[0], expected)


def test_images_in_a_table_are_decoded_in_any_order_as_files_are(
    rows: pa.Table, tmp_path: Path
) -> None:
    files = [
        Path(url).read_bytes() if url and Path(url).exists() else None
        for url in rows["url"].to_pylist()
    ]
    pq.write_table(pa.table({"image": files}), tmp_path / "t.parquet", row_group_size=3)
    manifest = open_manifest(ManifestConfig(path=str(tmp_path / "t.parquet")))
    urls = pa.Table.from_batches(manifest.batches())["image"]
    own = rows.set_column(rows.schema.get_field_index("url"), "url", urls)
    for held in (False, True):
        order = np.random.default_rng(0).permutation(split(rows, held=held).num_rows)
        expected = decode_block(split(rows, held=held).take(order), SETTINGS)
        found = decode_block(split(own, held=held).take(order), SETTINGS)
        assert found["pixels"].equals(expected["pixels"])
        assert found["error"].is_null().equals(expected["error"].is_null())


def test_a_slice_of_a_block_holds_its_own_pixels(rows: pa.Table) -> None:
    (batch,) = decode_block(split(rows, held=True), SETTINGS).combine_chunks().to_batches()
    whole = view_pixels(batch, SPEC)
    np.testing.assert_array_equal(view_pixels(batch.slice(2, 1), SPEC), whole[2:3])
    np.testing.assert_array_equal(view_pixels(batch.slice(1), SPEC), whole[1:])


# ------------------------------------------------------------------ prefetched batches


def batch(number: int) -> Batch:
    return Batch(np.zeros((1, 3, 2, 2), np.uint8), np.array([number]))


def numbers(batches: Iterator[Batch]) -> list[int]:
    return [int(each.labels[0]) for each in batches]


def find_producers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_batches_come_in_order_and_all_of_them() -> None:
    assert numbers(prefetch(batch(i) for i in range(20))) == list(range(20))
    assert numbers(prefetch(iter(()))) == []


def test_batches_are_prefetched_but_not_many() -> None:
    limit = 1 + PREFETCH_BATCHES + 1  # taken, in the queue, and waiting for a place in it
    reached, exceeded = threading.Event(), threading.Event()

    def source() -> Iterator[Batch]:
        for i in range(20):
            if i == limit - 1:
                reached.set()
            if i == limit:
                exceeded.set()
            yield batch(i)

    batches = prefetch(source())
    next(batches)
    assert reached.wait(60)
    assert not exceeded.wait(0.3)
    batches.close()


def test_a_failure_is_raised_where_the_batch_is_requested() -> None:
    def source() -> Iterator[Batch]:
        yield batch(0)
        raise ZeroDivisionError("in the thread")

    batches = prefetch(source())
    assert int(next(batches).labels[0]) == 0
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        next(batches)


def test_closed_batches_leave_no_thread_behind() -> None:
    before = set(find_producers())
    batches = prefetch(batch(i) for i in range(1000))
    next(batches)
    (producer,) = set(find_producers()) - before
    batches.close()
    producer.join(60)
    assert not producer.is_alive()
