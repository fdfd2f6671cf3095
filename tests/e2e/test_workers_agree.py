"""The same global batch reaches the same accuracy with any number of workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from imgcls import demo
from tests.processes import RayCluster, imgcls

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_two_workers_reach_the_accuracy_of_one_over_three_seeds(
    cluster: RayCluster, tmp_path: Path
) -> None:
    train, held = demo.write_digits(tmp_path)
    accuracy: dict[int, list[float]] = {1: [], 2: []}
    for workers, reached in accuracy.items():
        for seed in range(3):
            bundle = tmp_path / f"{workers}-{seed}"
            done = imgcls(
                *("train", "--data.train", train, "--data.val", held, "--model.name", "small_cnn"),
                *("--augment", "light", "--augment.hflip", 0, "--epochs", 6, "--seed", seed),
                *("--scale.num-workers", workers, "--scale.cpus-per-worker", 0.5),
                *("--output", bundle),
                env=cluster.environment(),
            )
            assert done.returncode == 0, done.stderr
            history = pd.read_parquet(bundle / "history.parquet")
            reached.append(float(history["val_accuracy"].iloc[-1]))
    print(f"\nvalidation accuracy of the last epoch over 3 seeds: {accuracy}")
    one, two = (np.array(values) for values in accuracy.values())
    assert one.mean() > 0.95
    # 359 images: the accuracy of one run alone has a standard error of 0.8 points at 97 %
    assert abs(one.mean() - two.mean()) < 0.012
