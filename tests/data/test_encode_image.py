"""Images as JPEG bytes and as data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from imgcls.data.encode_image import encode_data_uri, encode_jpeg


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_and_its_data_uri_are_the_image(mode: str) -> None:
    image = Image.fromarray(np.full((9, 16), 200, np.uint8)).convert(mode)
    data = encode_jpeg(image, 90)
    assert encode_data_uri(image, 90) == "data:image/jpeg;base64," + base64.b64encode(data).decode()
    with Image.open(io.BytesIO(data)) as found:
        assert (found.format, found.mode, found.size) == ("JPEG", mode, (16, 9))
        assert np.abs(np.asarray(found).astype(int) - 200).max() <= 2
