"""What a request resolves to before Ray starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imgcls.errors import RequestError
from imgcls.training.config import TrainConfig
from imgcls.training.data.batches import DecodeSettings
from imgcls.training.data.cached import CachedImages
from imgcls.training.setup import check_same_examples, plan_decoding, resolve_setup

ROWS = 30


@pytest.fixture
def config(colors: Callable[..., Path], tmp_path: Path) -> Callable[..., TrainConfig]:
    """Build a request with 30 training images and as many for validation."""
    manifest = str(colors(ROWS))

    def build(**changes: Any) -> TrainConfig:
        return TrainConfig.model_validate(
            {"data": {"train": manifest, "val": manifest}, "output": str(tmp_path / "bundle")}
            | {"model": {"name": "small_cnn", "options": {"width": 8}}, **changes}
        )

    return build


def test_a_batch_larger_than_the_training_set_is_reduced_with_a_note(
    config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert resolve_setup(config(batch_size=ROWS)).config.batch_size == ROWS
    assert capsys.readouterr().out == ""
    assert resolve_setup(config(batch_size=9999)).config.batch_size == ROWS
    note = "note: batch_size reduced from 9999 to the 30 training images\n"
    assert capsys.readouterr().out == note


def test_from_random_weights_the_default_is_scratch(config: Callable[..., TrainConfig]) -> None:
    setup = resolve_setup(config())
    assert setup.strategy == "scratch"
    assert setup.config.optim.lr == 3e-3
    assert setup.head_coefficients == ()


def test_from_weights_the_default_is_a_probe_and_then_a_careful_fine_tuning(
    config: Callable[..., TrainConfig], color_bundle: Path
) -> None:
    weights = str(color_bundle / "model.safetensors")
    model = {"name": "small_cnn", "options": {"width": 8}, "weights": weights}
    setup = resolve_setup(config(model=model))
    assert setup.strategy == "probe_then_finetune"
    assert setup.config.optim.lr == 3e-4
    assert setup.head_coefficients == pytest.approx((1.0,))


@pytest.mark.parametrize(("cache", "expected"), [(None, True), (True, True), (False, False)])
def test_images_that_fit_are_decoded_once_unless_the_request_differs(
    config: Callable[..., TrainConfig], joined: None, cache: bool | None, expected: bool
) -> None:
    setup = resolve_setup(config())
    data = setup.config.data.model_copy(update={"cache": cache})
    setup = replace(setup, config=setup.config.model_copy(update={"data": data}))
    settings, is_cached = plan_decoding(setup)
    assert is_cached is expected
    assert settings.compute_decoded_bytes(setup.examples.rows) > 0


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({"scale": {"num_workers": 2}, "checkpoint_minutes": 1.0}, True),
        ({"seed": 1}, False),
        ({"optim": {"lr": 1e-4}}, False),
        ({"model": {"name": "small_cnn", "options": {"width": 4}}}, False),
    ],
)
def test_two_requests_are_one_training_if_data_settings_and_weights_are_equal(
    config: Callable[..., TrainConfig], changes: dict[str, Any], is_same: bool
) -> None:
    identity = resolve_setup(config()).identity
    assert set(identity) == {"settings", "data", "initial_weights"}
    assert (resolve_setup(config(**changes)).identity == identity) == is_same


def test_images_that_were_decoded_for_other_examples_are_refused(
    config: Callable[..., TrainConfig],
) -> None:
    setup = resolve_setup(config())
    train = setup.config.data.train.path
    images = CachedImages(
        (),
        (),
        DecodeSettings.from_preprocess(setup.preprocess, cropped=False, max_bytes=1_000_000),
        setup.examples.compute_fingerprint(),
    )
    check_same_examples(resolve_setup(config(epochs=3)).examples, images)
    split = resolve_setup(config(data={"train": train, "val_fraction": 0.3})).examples
    with pytest.raises(RequestError, match="other images, labels or scores than when the search"):
        check_same_examples(split, images)
    rows = setup.examples.rows
    swapped = rows.set_column(1, "url", rows["url"].take([*range(1, len(rows)), 0]))
    with pytest.raises(RequestError, match="other images, labels or scores"):
        check_same_examples(replace(setup.examples, rows=swapped), images)
