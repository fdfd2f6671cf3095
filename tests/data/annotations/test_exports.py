"""An option that an export cannot have an effect on is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgcls.data.annotations.exports import read_export
from imgcls.errors import RequestError


def test_unchanged_predictions_are_not_left_out_of_a_format_without_them(tmp_path: Path) -> None:
    export = tmp_path / "labels.csv"
    export.write_text("path,label\n/a.jpg,cat\n")
    with pytest.raises(RequestError, match="skip_unchanged: has no effect on the format csv"):
        read_export(str(export), "auto", several=False, skip_unchanged=True)
