"""Plots can be opened, show the measured values, and have the same bytes each time."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from imgcls.training.plots import (
    draw_curves,
    draw_lr_range,
    draw_parallel_coordinates,
    smooth_curve,
)

SVG = "{http://www.w3.org/2000/svg}"
NAN = math.nan


def epochs(count: int, *, probe: bool = False, **changes: Any) -> pd.DataFrame:
    number = np.arange(0 if probe else 1, count + 1)
    history = pd.DataFrame(
        {
            "epoch": number,
            "phase": ["probe" if n == 0 else "train" for n in number],
            "train_loss": 2 / (number + 1),
            "train_accuracy": 1 - 0.5 / (number + 1),
            "val_loss": 2.2 / (number + 1),
            "val_accuracy": 0.9 - 0.5 / (number + 1),
            "lr": [NAN if n == 0 else 1e-3 / n for n in number],
        }
    )
    return history.assign(**changes)


def words(svg: bytes) -> list[str]:
    """Every text of a picture, as a reader may search it."""
    return ["".join(text.itertext()).strip() for text in ET.fromstring(svg).iter(f"{SVG}text")]


def drawn(history: pd.DataFrame, best: int = 1) -> list[str]:
    """Draws both formats, checks that they open and are not blank, and returns the words."""
    files = draw_curves(history, best)
    assert set(files) == {"curves.png", "curves.svg"}
    image = Image.open(io.BytesIO(files["curves.png"]))
    image.load()
    assert image.width >= 1000
    assert image.height >= 400
    colors = image.convert("RGB").getcolors(1 << 24) or []
    assert len(colors) > 10
    return words(files["curves.svg"])


def test_three_panels_with_units_and_the_best_epoch() -> None:
    found = drawn(epochs(8, probe=True), best=7)
    assert {"Loss", "Accuracy", "Learning rate", "nats per image"} < set(found)
    assert found.count("epoch") == 3
    assert found.count("training") == found.count("validation") == 2
    assert "best: 83.8 %, epoch 7" in found
    assert "best: 0.275, epoch 7" in found
    assert "probe: 40.0 %" in found
    assert any(word.endswith(" %") and word[0].isdigit() for word in found)


def test_the_same_history_gives_the_same_bytes() -> None:
    history = epochs(5, probe=True)
    assert draw_curves(history, 3) == draw_curves(history.copy(), 3)
    assert draw_curves(history, 3) != draw_curves(history, 4)
    rates, losses = [1e-5, 1e-4, 1e-3, 1e-2], [2.0, 1.5, 1.0, 3.0]
    assert draw_lr_range(rates, losses, 1e-3) == draw_lr_range(rates, losses, 1e-3)


@pytest.mark.parametrize("probe", [False, True])
def test_a_single_epoch_is_visible(probe: bool) -> None:
    found = drawn(epochs(1, probe=probe))
    assert "best: 65.0 %, epoch 1" in found
    assert "0.50" not in found, "there is no half epoch"


def test_a_probe_alone_is_visible() -> None:
    found = drawn(epochs(0, probe=True), best=0)
    assert "probe: 40.0 %" in found
    assert "Learning rate" not in found
    assert not {"training", "validation"} & set(found)


def test_training_values_that_were_not_measured_are_left_out() -> None:
    found = drawn(epochs(4, train_loss=NAN, train_accuracy=NAN))
    assert "training" not in found
    assert "validation" in found


@pytest.mark.parametrize("how", ["absent", "NaN"])
def test_without_learning_rates_there_is_no_panel_for_them(how: str) -> None:
    history = epochs(4).drop(columns="lr") if how == "absent" else epochs(4, lr=NAN)
    found = drawn(history)
    assert "Learning rate" not in found
    assert found.count("epoch") == 2


def test_the_columns_of_phase_and_of_whole_splits_may_be_absent() -> None:
    found = drawn(epochs(4, probe=True).drop(columns=["phase", "train_loss", "train_accuracy"]))
    assert "probe: 40.0 %" in found


def test_many_epochs_are_lines_without_dots() -> None:
    def dots(count: int) -> int:
        svg = ET.fromstring(draw_curves(epochs(count), 1)["curves.svg"])
        return sum(1 for _ in svg.iter(f"{SVG}use"))

    assert dots(500) < 80 < dots(30)
    assert "best: 89.9 %, epoch 499" in drawn(epochs(500), best=499)


def test_one_bad_epoch_does_not_flatten_the_others() -> None:
    loss = [1000.0] + [1 / n for n in range(1, 10)]
    assert "\N{MINUS SIGN}" in "".join(drawn(epochs(10, train_loss=loss))), "powers of ten"
    assert "\N{MINUS SIGN}" not in "".join(drawn(epochs(10)))


def test_accuracy_axis_ends_at_100_percent() -> None:
    found = drawn(epochs(4, val_accuracy=1.0, train_accuracy=1.0))
    shares = [float(word[:-2]) for word in found if word[:1].isdigit() and word.endswith(" %")]
    assert max(shares) == 100


def test_the_range_test_marks_its_suggestion() -> None:
    rates = np.geomspace(1e-6, 1, 50)
    losses = np.concatenate([np.linspace(2, 1, 40), [5, 50, 1e9, NAN, math.inf], [NAN] * 5])
    files = draw_lr_range(list(rates), list(losses), 3.2e-3)
    assert set(files) == {"lr_range.png", "lr_range.svg"}
    Image.open(io.BytesIO(files["lr_range.png"])).load()
    found = words(files["lr_range.svg"])
    assert {"Learning rate range test", "learning rate", "suggested: 0.0032"} < set(found)
    assert not any("1000" in word or "1e" in word for word in found), "the end sets no scale"


def test_a_range_test_without_a_finite_loss_is_drawn() -> None:
    files = draw_lr_range([1e-3, 1e-2], [NAN, NAN], 1e-3)
    assert "suggested: 0.001" in words(files["lr_range.svg"])


def test_smoothing_keeps_the_minimum_where_it_is() -> None:
    noise = np.random.default_rng(0).normal(0, 0.02, 201)
    values = np.abs(np.linspace(-1, 1, 201)) + noise
    smooth = smooth_curve(values)
    assert abs(int(smooth.argmin()) - 100) <= 4
    assert np.abs(np.diff(smooth)).mean() < np.abs(np.diff(values)).mean()
    assert smooth_curve(np.full(50, 3.0)) == pytest.approx(3.0)
    assert smooth_curve(np.array([1.0, 2.0])).tolist() == [1.0, 2.0]


def test_drawing_leaves_the_global_state_alone() -> None:
    script = (
        "import sys\n"
        "import matplotlib, pandas as pd\n"
        "before = matplotlib.rcParams['font.size'], matplotlib.rcParams['svg.hashsalt']\n"
        "from imgcls.training.plots import draw_curves\n"
        "draw_curves(pd.DataFrame({'epoch': [1], 'val_loss': [1.0], 'val_accuracy': [0.5]}), 1)\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "after = matplotlib.rcParams['font.size'], matplotlib.rcParams['svg.hashsalt']\n"
        "assert after == before\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_trials_of_a_search_are_lines_over_its_axes() -> None:
    results = pd.DataFrame(
        {
            "optim.lr": [1e-3, 1e-1, 1e-5],
            "augment.preset": ["none", "light", "none"],
            "val_loss": [0.3, 1.2, np.nan],
        }
    )
    axes = {"optim.lr": True, "augment.preset": False}
    files = draw_parallel_coordinates(results, axes, "val_loss")
    assert files == draw_parallel_coordinates(results, axes, "val_loss")  # the same bytes each time
    text = files["trials.svg"].decode()
    for word in ("optim.lr", "augment.preset", "val_loss", "none", "light", "0.001", "2 trials"):
        assert word in text
    assert "1e-05" not in text  # of a trial without a result
    assert files["trials.png"].startswith(b"\x89PNG")


def test_the_second_panel_of_a_multilabel_model_is_its_map() -> None:
    mean = [0.1 * n for n in range(1, 6)]
    found = drawn(epochs(5, val_mean_average_precision=mean), best=4)
    assert {"Mean average precision", "mean over classes"} < set(found)
    assert "Accuracy" not in found
    assert "best: 40.0 %, epoch 4" in found
    assert found.count("training") == 1
    one_label = drawn(epochs(5, val_mean_average_precision=NAN))
    assert "Accuracy" in one_label
