"""A killed and resumed training gets the weights of an undisturbed one: driver, worker, cluster.

The short form runs in `make test`; the long form (random moments) is marked `chaos`. Moments are
drawn from a seed that is printed, so that a failure can be repeated.
"""

from __future__ import annotations

import contextlib
import io
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import ray
import safetensors.torch
from PIL import Image
from upath import UPath

from imgcls.models.classifier import Classifier
from imgcls.training.checkpoints import Checkpoints, TrainProgress
from tests.conftest import copied, write_manifest
from tests.e2e.outputs import parquet
from tests.processes import (
    BIN,
    RayCluster,
    imgcls,
    kill_family,
    machine,
    run_here,
    started,
    wait_for,
)
from tests.s3 import bucket, url

pytestmark = pytest.mark.timeout(600)

ROWS, VAL_ROWS, EPOCHS, BATCH = 400, 197, 5, 8
LONG = 12
"""Epochs of the run that is killed at random moments."""
PATIENCE = 240
"""Timeout of every wait, in seconds, on a busy machine."""


@pytest.fixture(scope="module", params=[pytest.param("disk", marks=pytest.mark.slow), "s3"])
def place(
    request: pytest.FixtureRequest, endpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A folder on disk or on an object store, for all files."""
    if request.param == "disk":
        yield UPath(tmp_path_factory.mktemp("place"))
        return
    with pytest.MonkeyPatch.context() as patch, bucket(endpoint, patch):
        yield UPath(url("place"), use_listings_cache=False)


@pytest.fixture
def output(place: Path, request: pytest.FixtureRequest) -> Path:
    return place / request.node.name.partition("[")[0] / "bundle"


@pytest.fixture(scope="module")
def digits(place: Path) -> Path:
    from sklearn.datasets import load_digits

    data = load_digits()
    folder = place / "digits"
    folder.mkdir()
    rows, files = [], {}
    for i in np.random.default_rng(0).permutation(len(data.target))[: ROWS + VAL_ROWS]:
        pixels = (data.images[i] * 255 / 16).round().astype(np.uint8)
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "PNG")
        files[(folder / f"{i}.png").path] = sink.getvalue()
        rows.append((f"{i}.png", str(data.target[i])))
    folder.fs.pipe(files)  # many requests at a time
    write_manifest(folder / "train.csv", rows[:ROWS], ("path", "label"))
    write_manifest(folder / "val.csv", rows[ROWS:], ("path", "label"))
    return folder


def arguments(digits: Path, output: Path, epochs: int = EPOCHS) -> list[object]:
    return [
        *("train", "--data.train", digits / "train.csv", "--data.val", digits / "val.csv"),
        *("--model.name", "small_cnn", "--model.options", "{width: 16}", "--epochs", epochs),
        *("--batch-size", BATCH, "--optim.lr", 3e-3, "--augment.preset", "standard"),
        *("--augment.hflip", 0, "--precision", "fp32", "--scale.num-workers", 2),
        *("--scale.max-failures", 3, "--output", output),
    ]


@pytest.fixture(scope="module")
def reference(digits: Path, joined: None, place: Path) -> Path:
    """The bundle of an undisturbed run."""
    output = place / "reference" / "bundle"
    done = run_here(*arguments(digits, output))
    assert done.returncode == 0, done.stderr
    return output


def read_progress(output: Path) -> TrainProgress:
    """The progress of the newest saved state."""
    saved = Checkpoints(str(output)).list_states()
    return saved[0].progress if saved else TrainProgress()


def count_epochs(output: Path) -> int:
    """Number of saved epochs; all of them once there is a bundle."""
    return LONG if is_finished(output) else len(read_progress(output).history)


def is_finished(output: Path) -> bool:
    return (output / "bundle.json").exists()


class Command:
    """A running `imgcls train` command; collects its output."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._readers = [
            threading.Thread(target=into.extend, args=(stream,), daemon=True)
            for stream, into in ((process.stdout, self.lines), (process.stderr, self.errors))
        ]
        for reader in self._readers:
            reader.start()

    @classmethod
    @contextlib.contextmanager
    def running(cls, words: list[object], cluster: RayCluster, **env: str) -> Iterator[Command]:
        with started(*words, env=cluster.environment() | env) as process:
            yield cls(process)

    def until_epoch(self, output: Path, epochs: int) -> None:
        """Wait until this many epochs are saved."""
        wait_for(lambda: count_epochs(output) >= epochs or self.has_ended, PATIENCE, every=0.5)
        assert not self.has_ended, self.errors

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> int:
        """Wait for the end; returns the exit code."""
        code = self.process.wait(2 * PATIENCE)
        for reader in self._readers:
            reader.join(10)
        return code

    def find_resumes(self) -> list[tuple[int, int]]:
        """(epoch, step) of each resume of a worker group."""
        return find_resumes(self.lines)


def find_resumes(lines: list[str]) -> list[tuple[int, int]]:
    """(epoch, step) of each resume of a worker group."""
    found = (re.match(r"resuming: epoch (\d+)(?:, step (\d+) of \d+)?", line) for line in lines)
    return [(int(match[1]), int(match[2] or 0)) for match in found if match]


def assert_as_undisturbed(output: Path, reference: Path, digits: Path) -> None:
    """A complete bundle with the same curves and weights, and no leftover files."""
    names = {path.name for path in output.iterdir()}
    assert names == {path.name for path in reference.iterdir()}
    here, there = (
        parquet(folder / "history.parquet").to_pandas() for folder in (output, reference)
    )
    assert here.epoch.tolist() == there.epoch.tolist()
    assert set(here.train_rows) == {ROWS}
    assert set(here.val_rows) == {VAL_ROWS}
    for column in ("train_loss", "val_loss", "lr"):
        np.testing.assert_allclose(here[column], there[column], rtol=1e-4, err_msg=column)
    for column in ("train_accuracy", "val_accuracy"):
        np.testing.assert_allclose(here[column], there[column], atol=2 / VAL_ROWS, err_msg=column)
    ours, theirs = (
        safetensors.torch.load((folder / "model.safetensors").read_bytes())
        for folder in (output, reference)
    )
    for key in theirs:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-3, atol=1e-4, err_msg=key)
    with (digits / "val.csv").open() as stream:
        rows = pd.read_csv(stream, dtype=str)
    classifier = Classifier.load(str(output), precision="fp32", device="cpu")
    predictions = classifier.predict([str(digits / path) for path in rows.path])
    right = sum(p.label == label for p, label in zip(predictions, rows.label, strict=True))
    best = there.val_accuracy[there.val_loss.idxmin()]
    assert right / VAL_ROWS == pytest.approx(best, abs=2 / VAL_ROWS)
    assert right / VAL_ROWS > 0.9


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_run_resumes_by_itself(
    digits: Path, reference: Path, cluster: RayCluster, output: Path
) -> None:
    with Command.running(arguments(digits, output), cluster) as command:
        command.until_epoch(output, 2)
        workers = cluster.workers("RayTrainWorker")
        assert len(workers) == 2
        workers[0].kill()
        assert command.end() == 0, command.errors
    ((epoch, _),) = command.find_resumes()
    assert epoch >= 3
    logged = [line.split()[1] for line in command.lines if line.startswith("epoch ")]
    # an epoch whose state was not yet written when the worker died is repeated and logged again
    assert list(dict.fromkeys(logged)) == [f"{n}/{EPOCHS}" for n in range(1, EPOCHS + 1)]
    assert len(logged) <= EPOCHS + 1
    assert_as_undisturbed(output, reference, digits)


@pytest.fixture(scope="module")
def interrupted_run(digits: Path, cluster: RayCluster, place: Path) -> Path:
    """The output of a run whose driver was killed, between two epochs or within one."""
    output = place / "interrupted" / "bundle"
    with Command.running(arguments(digits, output), cluster) as command:
        command.until_epoch(output, 2)
        command.process.kill()
        command.end()
    # workers exit a moment after their driver, and may save once more
    wait_for(lambda: not cluster.workers("RayTrainWorker"), PATIENCE)
    assert not is_finished(output)
    return output


def test_a_killed_driver_loses_no_epoch(
    digits: Path, reference: Path, interrupted_run: Path, joined: None, output: Path
) -> None:
    copied(interrupted_run, output)
    done = count_epochs(output)
    leftover = output / "_train" / "ray" / "0123456789ab"
    leftover.mkdir(parents=True)
    (leftover / "checkpoint_manager_snapshot.json").write_text('{"ray_version": "2.60.0", "chec')
    resumed = run_here(*arguments(digits, output))
    assert resumed.returncode == 0, resumed.stderr
    ((epoch, _),) = find_resumes(resumed.stdout.splitlines())
    assert epoch == done + 1
    assert_as_undisturbed(output, reference, digits)


@pytest.mark.slow
def test_a_stopped_run_saves_within_its_epoch_and_resumes_there(
    digits: Path, reference: Path, cluster: RayCluster, output: Path
) -> None:
    with Command.running(arguments(digits, output), cluster) as command:
        command.until_epoch(output, 2)
        command.process.send_signal(signal.SIGTERM)
        assert command.end() == 1
    assert "stopped by SIGTERM; state saved, rerun the same command to resume" in command.errors[-1]
    assert not is_finished(output)
    assert not (output / "_lease").exists()
    saved = read_progress(output)
    assert saved.epoch == len(saved.history) + 1
    assert saved.step > 0

    other = imgcls(*arguments(digits, output), "--optim.lr", 1e-3, env=cluster.environment())
    assert other.returncode == 2
    assert "settings.optim.lr: 0.003 then, 0.001 now" in other.stderr
    assert "--overwrite" in other.stderr

    with Command.running(arguments(digits, output), cluster) as command:
        assert command.end() == 0, command.errors
    assert command.find_resumes() == [(saved.epoch, saved.step)]
    assert_as_undisturbed(output, reference, digits)


@pytest.mark.slow
def test_a_truncated_state_is_skipped_for_the_one_before(
    digits: Path, reference: Path, interrupted_run: Path, cluster: RayCluster, output: Path
) -> None:
    copied(interrupted_run, output)
    newest, before, *_ = Checkpoints(str(output)).list_states()
    state = output / "_train" / f"state-{newest.number:06d}.pt"
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    # and a partly written marker of the next state
    marker = output / "_train" / f"state-{newest.number + 1:06d}.json"
    marker.write_text('{"number": 9, "sha')
    with Command.running(arguments(digits, output), cluster) as command:
        assert command.end() == 0, command.errors
    assert command.find_resumes() == [(before.progress.epoch, before.progress.step)]
    assert_as_undisturbed(output, reference, digits)


@pytest.mark.slow
def test_a_node_about_to_be_preempted_makes_the_workers_save_at_once(
    digits: Path, output: Path
) -> None:
    words = [*arguments(digits, output, 400), "--checkpoint-minutes", 60]
    watcher = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1"}
    with (
        RayCluster.start(cpus=2, fork=True) as cluster,
        Command.running(words, cluster, **watcher) as command,
    ):
        command.until_epoch(output, 1)
        with cluster.joined():
            (node,) = ray.nodes()
        subprocess.run(
            [
                *(str(BIN / "ray"), "drain-node", "--address", cluster.address),
                *("--node-id", node["NodeID"], "--deadline-remaining-seconds", "600"),
                *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
            ],
            check=True,
        )
        states = Checkpoints(str(output))
        wait_for(
            lambda: any(state.progress.step for state in states.list_states()), PATIENCE, every=0.1
        )
        assert not command.has_ended


@pytest.mark.slow
def test_waiting_for_workers_is_logged_and_ends_at_the_timeout(digits: Path, output: Path) -> None:
    words = [*arguments(digits, output), "--scale.num-workers", 1, "--scale.cpus-per-worker", 2]
    with RayCluster.start(cpus=2, fork=True) as cluster, cluster.joined():
        kind: Any = ray.remote(num_cpus=1)(Busy)
        other = kind.remote()  # as another job would
        ray.get(other.there.remote())
        done = imgcls(
            *(*words, "--scale.resource-timeout-s", 40),
            env=cluster.environment(),
            timeout=PATIENCE,
        )
    assert done.returncode == 1
    line = r"waiting  for training workers, 1 x \(2 CPU\), \d+ of at most 40 s; the cluster has 1 "
    assert re.search(line, done.stdout), done.stdout
    assert "(scale.resource_timeout_s) for training workers" in done.stderr
    assert not is_finished(output)


class Busy:
    """An actor that keeps its reserved CPU."""

    def there(self) -> None: ...


def groups(command: Command) -> list[str]:
    """Number of workers of each group that trained."""
    found = (re.match(r"training: (\d) workers? on", line) for line in command.lines)
    return [match[1] for match in found if match]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_elastic_run_that_loses_a_node_ends_as_accurate_as_an_undisturbed_one(
    digits: Path, cluster: RayCluster, output: Path
) -> None:
    def words(output: Path) -> list[object]:
        return [*arguments(digits, output, LONG), "--scale.num-workers", "[1, 2]"]

    alone = output.parent / "alone"
    done = imgcls(*words(alone), env=cluster.environment(), timeout=2 * PATIENCE)
    assert done.returncode == 0, done.stderr
    with (
        RayCluster.start(cpus=1) as shrinking,
        machine(shrinking, 1) as lost,
        Command.running(words(output), shrinking) as command,
    ):
        command.until_epoch(output, 2)
        kill_family(lost.pid)
        assert command.end() == 0, command.errors
        assert groups(command) == ["2", "1"]
    here, there = (parquet(folder / "history.parquet").to_pandas() for folder in (output, alone))
    assert here.epoch.tolist() == there.epoch.tolist() == list(range(1, LONG + 1))
    assert set(here.train_rows) == {ROWS}
    assert set(here.val_rows) == {VAL_ROWS}
    # another number of workers draws other augmentations: within 5 points, 10 of the 197 images
    last, other = here.val_accuracy.iloc[-1], there.val_accuracy.iloc[-1]
    assert last == pytest.approx(other, abs=0.05)
    assert last > 0.9


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_elastic_run_shrinks_and_grows_with_its_cluster(digits: Path, output: Path) -> None:
    epochs = 400
    words = [*arguments(digits, output, epochs), "--scale.num-workers", "[1, 2]"]

    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(RayCluster.start(cpus=1))
        with machine(cluster, 1) as lost, Command.running(words, cluster) as command:
            command.until_epoch(output, 2)
            assert groups(command) == ["2"]
            kill_family(lost.pid)
            wait_for(lambda: groups(command)[-1:] == ["1"] or command.has_ended, PATIENCE)
            command.until_epoch(output, count_epochs(output) + 2)
            stack.enter_context(machine(cluster, 1))
            wait_for(lambda: groups(command)[-1:] == ["2"] or command.has_ended, PATIENCE)
            command.until_epoch(output, count_epochs(output) + 2)
            command.process.send_signal(signal.SIGTERM)
            assert command.end() == 1, command.errors
    history = read_progress(output).history
    assert [epoch.epoch for epoch in history] == list(range(1, len(history) + 1))
    assert {(epoch.train_rows, epoch.val_rows) for epoch in history} == {(ROWS, VAL_ROWS)}
    assert history[-1].val_accuracy > 0.8


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_a_run_killed_at_random_moments_gets_the_same_weights(digits: Path, output: Path) -> None:
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    print(f"seed {seed}", flush=True)
    targets = ["driver", "worker", "cluster", "driver", "worker", "cluster"]
    rng.shuffle(targets)
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(RayCluster.start(cpus=2, fork=True))
        alone = output.parent / "alone"
        done = imgcls(*arguments(digits, alone, LONG), env=cluster.environment(), timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        began = time.monotonic()
        words = arguments(digits, output, LONG)
        for target in targets:
            with Command.running(words, cluster) as command:
                # a third of the kills occur while it starts, resumes or decodes
                if rng.random() < 1 / 3:
                    time.sleep(rng.uniform(0.5, 15))
                else:
                    command.until_epoch(output, min(LONG - 1, count_epochs(output) + 1))
                    time.sleep(rng.uniform(0, 1.5))
                at = read_progress(output)
                print(f"  {target} after epoch {len(at.history)}, {time.monotonic() - began:.0f} s")
                if target == "worker":
                    for worker in cluster.workers("RayTrainWorker")[:1]:
                        worker.kill()
                    wanted = min(LONG - 1, count_epochs(output) + 1)
                    wait_for(
                        lambda c=command, n=wanted: count_epochs(output) >= n or c.has_ended,
                        PATIENCE,
                    )
                elif target == "cluster":
                    cluster.kill()
                command.process.kill()
                command.end()
            if target == "cluster":
                cluster = stack.enter_context(RayCluster.start(cpus=2, fork=True))
        last = imgcls(*words, env=cluster.environment(), timeout=2 * PATIENCE)
        assert last.returncode == 0, last.stderr
    assert_as_undisturbed(output, alone, digits)
