"""A run resumes from its newest complete state, whatever happened to the states after it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from imgcls.errors import BundleError, OutputError, StorageError
from imgcls.training.checkpoints import (
    CHECKPOINT_FOLDER,
    IDENTITY_FILE,
    KEPT_STATES,
    Checkpoints,
    TrainProgress,
)
from imgcls.training.epoch_metrics import EpochMetrics


def epoch(number: int) -> EpochMetrics:
    return EpochMetrics(number, 0.4, 0.9, 1.0, 0.5 + number / 100, 1e-3, 1234.4, 4.13, 100, 10, 0.5)


def build_progress(epochs: int, best: int | None = None) -> TrainProgress:
    history = tuple(epoch(number) for number in range(1, epochs + 1))
    return TrainProgress(epoch=epochs + 1, history=history, best=best)


def state(number: int) -> dict[str, Any]:
    """A state like that of a TrainStep, with the number in it."""
    return {
        "network": {"weight": torch.full((3, 2), float(number))},
        "average": None,
        "optimizer": {
            "state": {0: {"step": torch.tensor(float(number))}},
            "param_groups": [{"betas": (0.9, 0.99), "params": [0], "fused": True}],
        },
        "scaler": {},
    }


def weights(number: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((3, 2), float(number))}


def saved(output: Path, numbers: range, best: tuple[int, ...] = (1,)) -> Path:
    """A folder with these states, those in `best` with better weights than any before."""
    checkpoints = Checkpoints(str(output))
    last = None
    for number in numbers:
        last = number - 1 if number in best else last
        kept = weights(number) if number in best else None
        checkpoints.save(build_progress(number, last), state(number), kept)
    checkpoints.wait_until_saved()
    return output / CHECKPOINT_FOLDER


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def found(output: Path) -> float:
    """The number of the state that a new process resumes from."""
    latest = Checkpoints(str(output)).load_latest()
    assert latest is not None
    number = float(latest[1]["network"]["weight"][0, 0])
    assert latest[0].number == number
    assert latest[0].progress.history[-1].epoch == number
    return number


# ------------------------------------------------------------------ writing and reading


def test_a_state_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    assert checkpoints.load_latest() is None
    where = replace(build_progress(3, best=1), step=17, totals=(1.5, 2.0, 30.0, 0.1, 0.2, 0.0))
    checkpoints.save(where, state(1), weights(7))
    checkpoints.wait_until_saved()
    latest = Checkpoints(str(tmp_path)).load_latest()
    assert latest is not None
    found, tensors = latest
    assert found.progress == where
    assert found.progress.best_epoch == epoch(2)
    assert torch.equal(tensors["network"]["weight"], state(1)["network"]["weight"])
    assert tensors["optimizer"]["param_groups"] == state(1)["optimizer"]["param_groups"]
    assert tensors["optimizer"]["state"][0]["step"] == 1
    best = Checkpoints(str(tmp_path)).load_best_weights(found)
    assert torch.equal(best["weight"], weights(7)["weight"])


def test_the_predictions_of_the_best_epoch_are_kept_as_long_as_its_weights(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    for number in range(1, 6):
        best = weights(number) if number in (1, 3) else None
        data = None if best is None else b"predictions %d" % number
        checkpoints.save(build_progress(number, number // 3), state(number), best, data)
    checkpoints.wait_until_saved()
    kept = {name for name in names(tmp_path / CHECKPOINT_FOLDER) if name.startswith("best")}
    assert kept == {"best-000003.safetensors", "best-000003.parquet"}
    latest = Checkpoints(str(tmp_path)).load_latest()
    assert latest is not None
    assert checkpoints.load_best_predictions(latest[0]) == b"predictions 3"
    (tmp_path / CHECKPOINT_FOLDER / "best-000003.parquet").unlink()  # as in earlier versions
    assert checkpoints.load_best_predictions(latest[0]) is None


def test_the_probe_whose_rate_is_no_number_comes_back_too(tmp_path: Path) -> None:
    probe = replace(epoch(0), phase="probe", lr=float("nan"))
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(TrainProgress(epoch=1, history=(probe,), best=0), state(1), weights(1))
    checkpoints.wait_until_saved()
    ((back,),) = (each.progress.history for each in Checkpoints(str(tmp_path)).list_states())
    assert repr(back) == repr(probe)


def test_a_state_without_best_weights_has_none_to_give(tmp_path: Path) -> None:
    saved(tmp_path, range(1, 2), best=())
    latest = Checkpoints(str(tmp_path)).load_latest()
    assert latest is not None
    with pytest.raises(BundleError, match="holds no weights yet"):
        Checkpoints(str(tmp_path)).load_best_weights(latest[0])


def test_numbers_go_on_after_a_restart(tmp_path: Path) -> None:
    folder = saved(tmp_path, range(1, 4))
    checkpoints = Checkpoints(str(tmp_path))
    assert checkpoints.load_latest() is not None
    checkpoints.save(build_progress(4, 0), state(4), None)
    checkpoints.wait_until_saved()
    assert {"state-000004.pt", "state-000003.pt", "best-000001.safetensors"} <= names(folder)
    assert found(tmp_path) == 4
    latest = Checkpoints(str(tmp_path)).load_latest()
    assert latest is not None
    assert latest[0].best == "best-000001.safetensors", "the best of before the restart stays"


def test_only_the_last_states_are_kept_and_the_best_weights_of_each(tmp_path: Path) -> None:
    folder = saved(tmp_path, range(1, 8), best=(1, 3, 6))
    assert KEPT_STATES == 2
    assert names(folder) == {
        "state-000006.json", "state-000006.pt", "state-000007.json", "state-000007.pt",
        "best-000006.safetensors",
    }  # fmt: skip
    folder = saved(tmp_path / "other", range(1, 7), best=(1, 3, 6))
    assert {name for name in names(folder) if name.startswith("best")} == {
        "best-000003.safetensors", "best-000006.safetensors",
    }  # fmt: skip


def test_pruning_leaves_other_files_and_the_state_that_is_being_written(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.start_run({"seed": 1})
    folder = saved(tmp_path, range(1, 5))
    for name in ("state-000009.pt", "best-000009.safetensors"):
        (folder / name).write_bytes(b"its marker is still to come")
    (folder / "trackers.json").write_bytes(b"of no state")
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(build_progress(5, 0), state(5), None)
    checkpoints.wait_until_saved()
    kept = {IDENTITY_FILE, "trackers.json", "state-000009.pt", "best-000009.safetensors"}
    assert kept <= names(folder)
    assert not (folder / "state-000003.pt").exists()


# ------------------------------------------------------------------ what a kill leaves


def cut_short(folder: Path) -> None:
    path = folder / "state-000003.pt"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    path = folder / "state-000003.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty_marker(folder: Path) -> None:
    (folder / "state-000003.json").write_bytes(b"")


def cut_marker(folder: Path) -> None:
    path = folder / "state-000003.json"
    path.write_text(path.read_text()[:-40])


def foreign_marker(folder: Path) -> None:
    (folder / "state-000003.json").write_text('{"number": 3}')


@pytest.mark.parametrize(
    "damage",
    [
        cut_short,
        flip_a_bit,
        empty_marker,
        cut_marker,
        foreign_marker,
        lambda folder: (folder / "state-000003.pt").unlink(),
        lambda folder: (folder / "state-000003.pt").write_bytes(b""),
        lambda folder: (folder / "state-000003.json").unlink(),
        lambda folder: (folder / "best-000003.safetensors").unlink(),
    ],
    ids=[
        "cut short", "damaged", "empty marker", "cut marker", "foreign marker", "no state",
        "empty state", "no marker", "no best weights",
    ],
)  # fmt: skip
def test_an_incomplete_state_is_skipped_for_the_one_before(
    tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    folder = saved(tmp_path, range(1, 4), best=(1, 3))
    assert found(tmp_path) == 3
    damage(folder)
    assert found(tmp_path) == 2
    checkpoints = Checkpoints(str(tmp_path))
    latest = checkpoints.load_latest()
    assert latest is not None
    assert torch.equal(checkpoints.load_best_weights(latest[0])["weight"], weights(1)["weight"])


def test_without_a_complete_state_the_run_starts_over(tmp_path: Path) -> None:
    folder = saved(tmp_path, range(1, 3))
    for name in ("state-000001.pt", "state-000002.pt"):
        (folder / name).write_bytes(b"")
    assert Checkpoints(str(tmp_path)).load_latest() is None


def test_workers_can_agree_on_an_older_state(tmp_path: Path) -> None:
    saved(tmp_path, range(1, 4))
    latest = Checkpoints(str(tmp_path)).load_latest(at_most=2)
    assert latest is not None
    assert latest[0].number == 2
    assert Checkpoints(str(tmp_path)).load_latest(at_most=1) is None, "it was pruned"


class Trap:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_reading_a_state_runs_no_code(tmp_path: Path) -> None:
    folder = saved(tmp_path, range(1, 2))
    path, marker = folder / "state-000001.pt", folder / "state-000001.json"
    torch.save({"network": Trap(tmp_path / "sprung")}, path)
    body = json.loads(marker.read_text())
    body["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    marker.write_text(json.dumps(body))
    with pytest.raises(Exception, match=r"[Ww]eights only|weights_only"):
        Checkpoints(str(tmp_path)).load_latest()
    assert not (tmp_path / "sprung").exists()


def test_an_error_while_writing_is_raised_by_the_next_save(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    checkpoints = Checkpoints(str(tmp_path / "output"))
    checkpoints.folder = str(tmp_path / "file" / CHECKPOINT_FOLDER)
    checkpoints.save(build_progress(1), state(1), None)
    with pytest.raises(StorageError):
        checkpoints.save(build_progress(2), state(2), None)
    checkpoints.wait_until_saved()


# ------------------------------------------------------------------ the run's identity


def test_a_run_is_recognized_by_its_identity(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    assert checkpoints.read_identity() is None
    checkpoints.start_run({"settings": {"seed": 1}, "data": {"data.train": "é"}})
    identity = Checkpoints(str(tmp_path)).read_identity()
    assert identity == {"settings": {"seed": 1}, "data": {"data.train": "é"}}


def test_beginning_clears_what_another_run_left(tmp_path: Path) -> None:
    folder = saved(tmp_path, range(1, 6), best=(1, 5))
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.start_run({"seed": 2})
    assert names(folder) == {IDENTITY_FILE}
    assert checkpoints.load_latest() is None
    checkpoints.save(build_progress(1), state(1), None)
    checkpoints.wait_until_saved()
    (only,) = Checkpoints(str(tmp_path)).list_states()
    assert (only.number, only.best) == (1, None)


def test_a_damaged_identity_is_refused_with_the_way_out(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.start_run({"seed": 1})
    (tmp_path / CHECKPOINT_FOLDER / IDENTITY_FILE).write_text('{"se')
    with pytest.raises(OutputError, match=r"run\.json is damaged .*--overwrite"):
        checkpoints.read_identity()


def test_resuming_removes_damaged_states_so_that_none_replaces_a_good_one(tmp_path: Path) -> None:
    folder = saved(tmp_path, range(1, 4), best=(1, 3))
    (folder / "state-000003.pt").write_bytes(b"cut short")
    checkpoints = Checkpoints(str(tmp_path))
    found = checkpoints.load_latest()
    assert found is not None
    assert found[0].number == 2
    checkpoints.discard_after(2)
    checkpoints.save(build_progress(3, 0), state(4), None)
    checkpoints.wait_until_saved()
    assert [each.number for each in Checkpoints(str(tmp_path)).list_states()] == [4, 2]
    assert "best-000001.safetensors" in names(folder)
    assert "best-000003.safetensors" not in names(folder)


def test_the_keys_of_a_marker_file_are_stable(tmp_path: Path) -> None:
    folder = saved(tmp_path, range(1, 2))
    body = json.loads((folder / "state-000001.json").read_text())
    assert list(body) == ["number", "sha256", "best", "standing"]
    assert list(body["standing"]) == ["epoch", "step", "totals", "history", "best"]
