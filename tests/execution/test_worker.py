"""Prepared chunks on their way from the tasks on CPUs to the workers of GPUs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from imgcls.execution.messages import ChunkTask, PreparedChunk, StageTimings
from imgcls.execution.worker import pack_prepared, unpack_prepared

PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)


def prepare(data: Any) -> PreparedChunk:
    return PreparedChunk(ChunkTask(3), data, StageTimings(fetch=2.0), crashes=1)


def test_pixels_are_packed_and_unpacked_without_a_copy() -> None:
    batch = pack_prepared(prepare({"pixels": PIXELS}))
    memory = np.frombuffer(batch.column("arrays")[0].values.buffers()[2], np.uint8)
    assert np.shares_memory(memory, PIXELS)
    found = unpack_prepared(batch)
    assert np.shares_memory(memory, found.data["pixels"])
    assert np.array_equal(found.data["pixels"], PIXELS)
    assert not found.data["pixels"].flags.writeable
    assert (found.task, found.timings, found.crashes) == (ChunkTask(3), StageTimings(fetch=2.0), 1)


@pytest.mark.parametrize("data", [[], [b"a file", b""], [PIXELS, PIXELS[1] + 1], [PIXELS[:0]]])
def test_every_prepared_chunk_is_a_row_of_the_same_schema(data: list[Any]) -> None:
    batch = pack_prepared(prepare(data))
    assert batch.schema == pack_prepared(prepare(PIXELS)).schema
    two = pa.concat_tables([pack_prepared(prepare([PIXELS + 7])), batch]).combine_chunks()
    for found in (unpack_prepared(batch), unpack_prepared(two.slice(1))):
        assert len(found.data) == len(data)
        for value, expected in zip(found.data, data, strict=True):
            assert np.array_equal(value, expected)
