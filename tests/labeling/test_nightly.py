"""Nights on which everything happens come to what labeling the last state from scratch gives."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from tests.labeling.nightly import Images, Killed, Nightly


@pytest.fixture
def images(tmp_path: Path) -> Images:
    return Images(tmp_path / "images", seed=3)


@pytest.fixture
def nightly(tmp_path: Path, colour_bundle: Path) -> Nightly:
    return Nightly(tmp_path, colour_bundle)


def day(number: int) -> str:
    return f"2026-11-{number:02d}"


def date_folder(nightly: Nightly, number: int) -> Path:
    return nightly.labels / f"date={day(number)}"


@pytest.mark.parametrize("nights", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_any_nights_come_to_what_labeling_the_last_state_from_scratch_gives(
    nightly: Nightly, images: Images, nights: int
) -> None:
    unfinished: list[int] = []
    for number in range(1, nights + 1):
        kind = number % 6
        images.day(number, new=8 if number == 1 else 3, spoilt=6 if number % 12 == 8 else 1)
        if number % 10 == 7:
            nightly.column = lambda rows: pa.array([f"site {rows}"] * rows)  # one more column
        elif number % 10 == 9:
            nightly.column = pa.nulls  # of which one night has no value
        if kind == 5:
            images.write("kept/quiet.png")
        nightly.build(images)
        step = {2: "planned", 4: "labeled", 0: "rolled up"}.get(kind)
        clock = 1 if kind == 3 else 0
        if step is not None:
            with pytest.raises(Killed):
                nightly.predict(day(number), killed=step, clock=clock)
            unfinished.append(number)
            if number % 4:  # else on another night, after later ones
                images.day(number, new=1)
                nightly.build(images)
        if step is None or number % 4:
            assert nightly.predict(day(number), clock=clock)
        if kind == 1:  # once more, and again after something came
            before = sorted(nightly.labels.iterdir())
            nightly.predict(day(number))
            assert sorted(nightly.labels.iterdir()) == before
            images.day(number, new=2)
            nightly.build(images)
            nightly.predict(day(number))
            assert (nightly.labels / f"date={day(number)}.2" / "_SUCCESS").exists()
        if kind == 5:  # a quiet night, then an older one is finished
            nightly.predict(day(number))
            older = [n for n in unfinished if not (date_folder(nightly, n) / "_SUCCESS").exists()]
            for each in older:
                nightly.predict(day(each))
                assert (date_folder(nightly, each) / "_SUCCESS").exists()
        nightly.compact()
    nightly.build(images)
    nightly.predict(day(nights))
    nightly.predict(day(nights))
    expected = nightly.from_scratch()
    assert {row["status"] for row in expected.values()} == {"ok", "not_an_image"}
    assert nightly.compact() == expected
    assert set(expected) == {str(path) for path in images.folder.rglob("*.png")}
