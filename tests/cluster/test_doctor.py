"""The checklist of `imgcls doctor`, on this machine, on a real cluster and on real stores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from platform import python_version
from typing import Any

import pytest
import ray
from ray import cloudpickle

import imgcls
from imgcls.cluster import doctor, node_report
from imgcls.cluster.node_checks import (
    CheckedNode,
    DoctorResult,
    check_clocks,
    check_disk,
    check_gpus,
    check_memory,
    check_shared_memory,
    check_versions,
    compute_skew,
)
from imgcls.cluster.node_report import NodeReport, Space
from tests import s3 as store
from tests.processes import RayCluster, free_port, machine, run_here

GIB = 1 << 30


def lines(text: str, check: str) -> list[tuple[str, str]]:
    """Status and message of the lines of one check."""
    words = (line.split(maxsplit=2) for line in text.splitlines())
    return [(each[0], each[2]) for each in words if len(each) == 3 and each[1] == check]


def space(free: float, total: float = 100.0) -> Space:
    return {"total": int(total * GIB), "free": int(free * GIB)}


def report(**changes: Any) -> NodeReport:
    """The report of a node without a problem."""
    good: dict[str, Any] = {
        "host": "a", "python": "3.11.2", "versions": node_report.find_versions(),
        "shared_memory": space(40, 50), "memory": space(60), "disk": space(60),
        "has_nvidia_driver": False, "gpus": None, "storage": None,
    }  # fmt: skip
    return good | changes  # type: ignore[return-value]


def node(name: str = "10.0.0.2", gpus: float = 0, cpus: float = 16) -> CheckedNode:
    return CheckedNode(name, "id", cpus, gpus, "/tmp/ray", 30.0 * GIB)


# ------------------------------------------------------------------ rules


@pytest.mark.parametrize(
    ("check", "changes", "status", "message"),
    [
        (check_memory, {"memory": space(5)}, "warning", "5.0 of 100.0 GiB free. "),
        (check_memory, {"memory": space(8, 15)}, "warning", "for 16 CPUs"),
        (check_memory, {}, "ok", "60.0 of 100.0 GiB free"),
        (check_shared_memory, {"shared_memory": space(0.06, 0.06)}, "warning", "takes 30.0 GiB"),
        (check_shared_memory, {"shared_memory": space(1, 50)}, "failed", "1.0 of 50.0 GiB"),
        (check_shared_memory, {"shared_memory": None}, "warning", "has no /dev/shm"),
        (check_shared_memory, {}, "ok", "in /dev/shm"),
        (check_disk, {"disk": space(4)}, "failed", "/tmp/ray"),
        (check_disk, {"disk": space(3, 40)}, "warning", "3.0 of 40.0 GiB free"),
        (check_disk, {}, "ok", "60.0 of 100.0 GiB free"),
    ],
)
def test_space_that_runs_out_is_named_with_the_node(
    check: Any, changes: dict[str, Any], status: str, message: str
) -> None:
    found: list[DoctorResult] = list(check({node(): report(**changes)}))
    [result] = found
    assert (result.status, bool(result.fix)) == (status, status != "ok")
    text = f"{result.message}. {result.fix}"
    assert message in text
    assert ("10.0.0.2" in text) == (status != "ok")


@pytest.mark.parametrize(
    ("counted", "gpus", "status", "message"),
    [
        (0, None, "ok", "none"),
        (1, {"cuda": None, "names": [], "fault": None}, "failed", "torch is built for CPUs only"),
        (2, {"cuda": "13.0", "names": ["NVIDIA L4"], "fault": None}, "failed", "torch finds 1"),
        (0, {"cuda": "13.0", "names": ["NVIDIA L4"], "fault": None}, "warning", "--num-gpus=1"),
        (0, {"cuda": None, "names": [], "fault": None}, "warning", "torch finds no GPU"),
        (1, {"cuda": "13.0", "names": ["NVIDIA L4"], "fault": None}, "ok", "without a JPEG"),
        (1, {"cuda": "13.0", "names": ["NVIDIA A100-SXM4-80GB"], "fault": None}, "ok", ", with a"),
        (1, {"cuda": "13.0", "names": ["RTX A3000"], "fault": None}, "ok", "without a JPEG"),
        (1, {"cuda": "13.0", "names": ["NVIDIA L4"], "fault": "no nvJPEG"}, "warning", "no nvJPEG"),
        (1, {"error": "OSError: libcudart"}, "failed", "libcudart"),
    ],
)
def test_gpus_as_ray_counts_them_are_compared_with_those_of_torch(
    counted: int, gpus: dict[str, Any] | None, status: str, message: str
) -> None:
    [result] = check_gpus({node(gpus=counted): report(gpus=gpus)})
    assert result.status == status
    assert message in f"{result.message}. {result.fix}"


def test_a_gpu_that_torch_does_not_find_is_named() -> None:
    found = node_report._read_gpus()  # in a process of its own
    assert set(found) == {"cuda", "names", "fault"}, found
    more = len(found["names"]) + 1
    [result] = check_gpus({node(gpus=more): report(gpus=found)})
    assert (result.status, f"torch finds {more - 1} " in result.message) == ("failed", True)


def test_versions_that_change_results_fail_and_others_warn() -> None:
    here = node_report.find_versions()
    reports = {
        node("a"): report(),
        node("b"): report(versions={**here, "torch": "2.11.0", "imgcls": None}),
        node("c"): report(versions={**here, "pillow": "1.0"}),
        node("d"): report(python="3.12.1"),
    }
    results = list(check_versions("3.11.2", here, reports))
    assert [result.status for result in results] == ["failed", "warning", "failed", "ok"]
    assert f"torch 2.11.0 (here {here['torch']})" in results[0].message
    assert "imgcls is missing" in results[0].message
    assert results[0].fix == (
        f"Run there: pip install torch=={here['torch']}; install the same imgcls on it, or run "
        "this command as a job that brings it"
    )
    assert results[2].fix == "Use Python 3.11.2 on it"
    assert results[3].message.startswith("1 node: Python 3.11.2, imgcls ")


def test_only_a_skew_that_is_certain_counts() -> None:
    assert compute_skew(105, began=100, ended=110) == 0
    assert compute_skew(120, began=100, ended=110) == 10
    assert compute_skew(95, began=100, ended=110) == -5
    assert compute_skew(99.4, began=100, ended=110, resolution=1) == 0  # a time in whole seconds
    [one] = check_clocks({"a": 0.0, "b": -6.0}, None)
    assert (one.status, one.message) == ("warning", "b: its clock is 6 s behind this machine's")
    assert [each.status for each in check_clocks({"a": 1.0}, 1000.0)] == ["failed"]
    assert [each.status for each in check_clocks({"a": 1.0}, -1.0)] == ["ok"]
    assert list(check_clocks({}, None)) == []


# ------------------------------------------------------------------ this machine


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")


@pytest.mark.usefixtures("without_ray")
def test_without_ray_this_machine_is_checked_and_what_is_not_is_named(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "out"
    done = run_here("doctor", "--storage", out)
    assert done.returncode in (0, 2), done.stderr  # by the machine's memory and disk
    [(status, message)] = lines(done.stdout, "ray")
    assert (status, "--start-ray" in message) == ("skipped", True)
    [(status, message)] = lines(done.stdout, "versions")
    assert (status, f"imgcls {imgcls.__version__}" in message) == ("ok", True)
    [(status, message)] = lines(done.stdout, "storage")
    assert (status, message.startswith(f"{out}: write, read, list")) == ("ok", True)
    assert {"memory", "shm", "disk", "gpus", "clocks"} < {
        line.split()[1] for line in done.stdout.splitlines()
    }
    assert list(tmp_path.iterdir()) == []  # not even the folders that were missing
    assert not ray.is_initialized()


@pytest.mark.usefixtures("without_ray")
def test_a_folder_without_write_permission_fails_and_exits_2(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        # root may write anywhere; a file where a folder is needed refuses root, too
        (tmp_path / "out").write_text("")
    else:
        (tmp_path / "out").mkdir(mode=0o555)
    done = run_here("doctor", "--storage", tmp_path / "out", "--json-lines")
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"]) == (2, False)
    [line] = [check for check in found["checks"] if check["check"] == "storage"]
    assert line["status"] == "failed"
    assert line["message"].startswith(f"{tmp_path / 'out'}: write: ")
    assert line["fix"]
    assert "failed. Correct what the lines name" in done.stderr


@pytest.mark.usefixtures("without_ray")
def test_a_store_needs_each_of_its_permissions(
    s3: Any, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_here("doctor", "--storage", store.url("out"))
    assert [status for status, _ in lines(done.stdout, "storage")] == ["ok"]
    assert lines(done.stdout, "clocks") == [("ok", "the storage: within 5 s of this machine's")]
    assert store.keys(s3) == []
    if store.REAL is None:
        allowed = ["s3:PutObject", "s3:GetObject"]
        with store.user(endpoint, allowed, monkeypatch), store.checking_permissions(endpoint):
            done = run_here("doctor", "--storage", store.url("out"))
        assert done.returncode == 2
        [(status, message)] = lines(done.stdout, "storage")
        assert (status, "list: " in message) == ("failed", True)


@pytest.mark.usefixtures("without_ray")
def test_a_store_that_overwrites_what_exists_fails(
    s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from imgcls.data.storage import filesystem

    def overwrite(url: str, data: bytes) -> bool:
        filesystem.write(url, data)
        return True

    monkeypatch.setattr(filesystem, "create", overwrite)
    done = run_here("doctor", "--storage", store.url("out"))
    [(status, message)] = lines(done.stdout, "storage")
    assert (status, done.returncode) == ("failed", 2)
    assert "create only if absent: " in message
    assert "ignores If-None-Match" in message
    assert store.keys(s3) == []


def test_a_cluster_that_does_not_answer_fails_and_this_machine_is_checked() -> None:
    address = f"127.0.0.1:{free_port()}"
    done = run_here("doctor", "--address", address)
    assert done.returncode == 2
    [(status, message)] = lines(done.stdout, "ray")
    assert status == "failed"
    assert message.startswith(f"--address={address}: no Ray cluster answers at {address}")
    assert lines(done.stdout, "memory")


# ------------------------------------------------------------------ a cluster


@pytest.fixture
def other_versions(tmp_path: Path) -> dict[str, str]:
    """The environment of a node with another torchvision, and without imgcls."""
    folder = tmp_path / "packages"
    (folder / "imgcls").mkdir(parents=True)
    (folder / "imgcls" / "__init__.py").write_text("raise ImportError('no imgcls')\n")
    metadata = folder / "torchvision-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    return {"PYTHONPATH": str(folder)}


READ = """
import json, pickle, sys
from pathlib import Path
read, storage = pickle.loads(Path(sys.argv[1]).read_bytes())
print(json.dumps(read("/tmp", False, storage, "a")))
"""


def test_a_process_without_imgcls_reads_its_report(
    other_versions: dict[str, str], tmp_path: Path
) -> None:
    task = {"folder": "/x", "settings": {}, "name": "driver", "content": b""}
    with doctor._send_by_value():
        (tmp_path / "task").write_bytes(cloudpickle.dumps((node_report.read_node, task)))
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "task")],
        env={**os.environ, **other_versions},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"] == node_report.find_versions() | {"imgcls": None, "torchvision": "0.1"}
    assert "imgcls cannot be imported there (no imgcls)" in found["storage"]
    assert found["memory"]["total"] > found["memory"]["free"] > 0


def read_checks(done: subprocess.CompletedProcess[str]) -> dict[str, list[tuple[str, str]]]:
    """Status and message of each line, by check."""
    by_check: dict[str, list[tuple[str, str]]] = {}
    for check in json.loads(done.stdout)["checks"]:
        by_check.setdefault(check["check"], []).append((check["status"], check["message"]))
    return by_check


def test_every_node_of_a_cluster_is_checked(joined: None, tmp_path: Path) -> None:
    done = run_here("doctor", "--storage", tmp_path / "out", "--json-lines")
    found = read_checks(done)
    address = ray.get_runtime_context().gcs_address
    assert found["ray"] == [("ok", f"{ray.__version__} at {address}, 1 node")]
    [(status, message)] = found["versions"]
    assert (status, message.partition(",")[0]) == ("ok", f"1 node: Python {python_version()}")
    assert [status for status, _ in found["storage"]] == ["ok", "ok"]
    assert found["storage"][1][1] == "1 node: read and create files"
    assert found["clocks"][0][1].startswith("1 node and the storage: within 5 s")
    [node] = json.loads(done.stdout)["nodes"]
    assert node["id"] == ray.get_runtime_context().get_node_id()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_nodes_with_other_versions_are_named(
    cluster: RayCluster, joined: None, other_versions: dict[str, str], tmp_path: Path
) -> None:
    with machine(cluster, 0, env=other_versions):
        done = run_here("doctor", "--storage", tmp_path / "out", "--json-lines")
    assert done.returncode == 2, done.stderr
    found = read_checks(done)
    assert found["ray"][0][1].endswith(", 2 nodes")
    bad, good = found["versions"]
    assert (bad[0], good[0]) == ("failed", "ok")
    # Ray puts the driver's working directory, with imgcls in it, before the node's own path
    assert "torchvision 0.1 (here " in bad[1]
    assert good[1].startswith("1 node: Python ")
    assert [status for status, _ in found["storage"]] == ["ok", "ok"]
    assert found["storage"][1][1] == "2 nodes: read and create files"
    assert found["clocks"][0][1].startswith("2 nodes and the storage: within 5 s")
    assert not (tmp_path / "out").exists()
