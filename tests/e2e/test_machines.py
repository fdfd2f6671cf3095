"""Many machines, of which some are lost, some come, some hang: all on one host, as real raylets.

What a worker dies of is put into it from outside, by a start-up hook of Python's own: the process
gets a real signal while it reads an image with a mark in it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image
from ray.util import placement_group_table

from imgcls.data.decoding.decode import decode_image
from imgcls.data.decoding.preprocess import Preprocess
from tests.conftest import COLORS, draw, write_manifest
from tests.e2e.outputs import assert_exactly_once, committed, table
from tests.processes import (
    ALONE,
    BIN,
    RayCluster,
    family,
    imgcls,
    kill_family,
    machine,
    started,
    title,
    wait_for,
)

pytestmark = pytest.mark.timeout(900)

POISON = b"imgcls-test-poison"
HOOK = f"""
    import os, signal
    from PIL import Image

    real = Image.open

    def deadly(stream, *more, **named):
        if {POISON!r} in stream.getvalue():
            os.kill(os.getpid(), getattr(signal, os.environ["IMGCLS_TEST_POISON"]))
            signal.pause()  # another thread may be the one that dies of it
        return real(stream, *more, **named)

    Image.open = deadly
"""


@pytest.fixture
def poisoned(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """The environment of machines on which an image with the mark sends its reader a signal."""
    folder = tmp_path / "hook"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(HOOK))
    return lambda name: {**with_hook(folder), "IMGCLS_TEST_POISON": name}


def photographs(
    folder: Path, count: int, size: tuple[int, int] = (800, 600), suffix: str = "jpg"
) -> Path:
    """A manifest with a number of rows, of twelve images that take a while to decode."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(12):
        draw(list(COLORS)[i % 3], size, seed=i).save(folder / f"{i}.{suffix}")
    rows = [(f"{i % 12}.{suffix}", str(i)) for i in range(count)]
    return write_manifest(folder / "m.csv", rows, ("path", "id"))


def words(manifest: Path, bundle: Path, output: Path, *more: object) -> list[object]:
    return [
        *("predict", "--manifest", manifest, "--model", bundle, "--output", output),
        *("--max-error-rate", 0.1, "--progress-seconds", 2, *more),
    ]


def durable(output: Path) -> int:
    """Chunks that are there, those in finished parts counted as none."""
    return len(list(output.glob("_staging/part-*/chunk-*.parquet")))


@contextlib.contextmanager
def machines(
    count: int, env: dict[str, str] | None = None
) -> Iterator[tuple[RayCluster, list[subprocess.Popen[bytes]]]]:
    """A head without CPUs, and a number of nodes with one CPU each."""
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(RayCluster.start(cpus=0, env=env))
        yield cluster, [stack.enter_context(machine(cluster, 1, env)) for _ in range(count)]


# ------------------------------------------------------------------ an image that kills


@pytest.mark.parametrize(
    ("name", "gpus"),
    [
        ("SIGSEGV", 0),
        pytest.param("SIGKILL", 0, marks=pytest.mark.cluster),
        pytest.param("SIGSEGV", 1, marks=pytest.mark.cluster),
    ],
)
def test_an_image_that_kills_its_worker_is_one_row_and_all_others_are_labeled(
    name: str,
    gpus: int,
    tmp_path: Path,
    color_bundle: Path,
    poisoned: Callable[[str], dict[str, str]],
) -> None:
    manifest, output = with_poison(tmp_path / "images"), tmp_path / "out"
    order = words(manifest, color_bundle, output, "--chunk-rows", 4, *ALONE)
    if gpus:
        with RayCluster.start(cpus=2, gpus=gpus, env=poisoned(name)) as cluster:
            done = imgcls(*order, env=cluster.environment(), timeout=400)
    else:
        done = imgcls(*order, env=poisoned(name), timeout=400)
    assert done.returncode == 0, done.stderr
    found = assert_exactly_once(output, 200)
    status = found["status"].to_pylist()
    assert [row for row in range(200) if status[row] != "ok"] == [77]
    assert status[77] == "crashed"
    assert "crashed or hung" in found["error"].to_pylist()[77]
    logged = re.search(r"watch   chunk 19: (\d+) workers crashed .* 1 row crashed", done.stdout)
    assert logged is not None, done.stdout
    assert 2 <= int(logged[1]) <= 1 + math.log2(4) + 1


def with_poison(folder: Path) -> Path:
    """A manifest of 200 small images, of which row 77 kills who reads it."""
    manifest = photographs(folder, 200, (64, 48))
    poison(folder / "0.jpg", folder / "bad.jpg")
    lines = manifest.read_text().splitlines()
    lines[1 + 77] = "bad.jpg,77"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def poison(source: Path, target: Path) -> None:
    """Write an image with the mark, and with EXIF data, which Pillow reads."""
    with Image.open(source) as image:
        exif = image.getexif()
        exif[ExifTags.Base.Orientation] = 1
        image.save(target, exif=exif)
    target.write_bytes(target.read_bytes() + POISON)


@pytest.mark.cluster
def test_a_check_survives_an_image_that_kills_its_worker(
    tmp_path: Path, poisoned: Callable[[str], dict[str, str]]
) -> None:
    manifest, output = with_poison(tmp_path / "images"), tmp_path / "out"
    with RayCluster.start(cpus=2, env=poisoned("SIGSEGV")) as cluster:
        order = ("manifest", "check", manifest, "--output", output, "--scale.workers", 1)
        done = imgcls(*order, env=cluster.environment(), timeout=400)
    assert done.returncode == 0, done.stderr
    issues = pq.read_table(output / "issues.parquet").to_pylist()
    (found,) = [row for row in issues if row["issue"] == "unreadable"]
    assert found["row"] == 77
    assert found["detail"].startswith("crashed: the worker crashed or hung")


@pytest.mark.cluster
def test_when_every_image_kills_the_run_ends_with_an_error_that_names_it(
    tmp_path: Path, color_bundle: Path, poisoned: Callable[[str], dict[str, str]]
) -> None:
    manifest = photographs(tmp_path / "images", 12, (64, 48))
    for image in (tmp_path / "images").glob("*.jpg"):
        poison(image, image)
    with RayCluster.start(cpus=2, env=poisoned("SIGKILL")) as cluster:
        order = words(manifest, color_bundle, tmp_path / "out", "--scale.crash-retries", 0)
        done = imgcls(*order, env=cluster.environment(), timeout=400)
    assert done.returncode == 1
    assert "chunk 0 (rows 0 to 11)" in done.stderr
    assert "the images are not the cause" in done.stderr


# ------------------------------------------------------------------ a worker that hangs


def test_a_worker_that_hangs_is_killed_and_another_one_processes_its_chunk(
    tmp_path: Path, color_bundle: Path, cluster: RayCluster
) -> None:
    manifest, output = photographs(tmp_path / "images", 400), tmp_path / "out"
    # longer than the start of a worker may take without progress on a busy machine
    timeout = ("--scale.worker-timeout-s", 15)
    order = words(manifest, color_bundle, output, "--chunk-rows", 8, *timeout)
    with started(*order, env=cluster.environment()) as driver:
        wait_for(lambda: durable(output) > 2)
        # not one that is still starting: without that one the other is soon done with all
        stopped = next(w for w in cluster.workers("ray::Map") if "__init__" not in title(w))
        stopped.send_signal(signal.SIGSTOP)
        out, err = driver.communicate(timeout=300)
        assert driver.returncode == 0, err
        # by the watchdog, or by Ray a moment after the driver has exited
        wait_for(lambda: is_dead(stopped))
    # stopped between two chunks, it has none; then no worker makes progress, and it is replanned
    message = (
        r"watch   chunk \d+ \(rows .*\): worker .* made no progress for|no worker has made progress"
    )
    assert re.search(message, out) is not None, out
    assert_exactly_once(output, 400)


@pytest.mark.cluster
def test_a_worker_that_hangs_between_two_chunks_is_killed_too(
    tmp_path: Path, color_bundle: Path
) -> None:
    manifest, output = photographs(tmp_path / "images", 400), tmp_path / "out"
    stopped = tmp_path / "stopped"
    with RayCluster.start(cpus=2, env=stopping(tmp_path / "hook", stopped)) as cluster:
        order = words(
            manifest, color_bundle, output, "--chunk-rows", 8, "--scale.worker-timeout-s", 5,
        )  # fmt: skip
        done = imgcls(*order, env=cluster.environment(), timeout=300)
        assert done.returncode == 0, done.stderr
        with contextlib.suppress(psutil.NoSuchProcess):
            worker = psutil.Process(int(stopped.read_text()))
            wait_for(lambda: is_dead(worker))
    assert re.search(r"no worker has made progress for \d+ s; replanning", done.stdout) is not None
    assert_exactly_once(output, 400)


def is_dead(process: psutil.Process) -> bool:
    """Ended; a zombie until its parent has read its exit status."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def stopping(folder: Path, stopped: Path) -> dict[str, str]:
    """The environment of machines on which the first worker to end a chunk stops, at none."""
    hook = f"""
        import os, signal, sys
        from importlib.machinery import PathFinder

        class Stopping:
            def find_spec(self, name, path=None, target=None):
                if name != "imgcls.execution.heartbeat":
                    return None
                spec = PathFinder.find_spec(name, path)
                execute = spec.loader.exec_module
                spec.loader.exec_module = lambda module: (execute(module), patch(module))
                return spec

        def patch(module):
            complete = module.Attempt.complete

            def stop(attempt):
                complete(attempt)
                if "/process-" in attempt._key and not os.path.exists({str(stopped)!r}):
                    with open({str(stopped)!r}, "w") as file:
                        file.write(str(os.getpid()))
                    os.kill(os.getpid(), signal.SIGSTOP)

            module.Attempt.complete = stop

        sys.meta_path.insert(0, Stopping())
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(hook))
    return with_hook(folder)


def with_hook(folder: Path) -> dict[str, str]:
    """The environment of machines whose Pythons begin with what is in a folder."""
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


# ------------------------------------------------------------------ machines that go and come


@pytest.mark.cluster
def test_what_a_lost_machine_had_in_hand_is_done_by_the_others(
    tmp_path: Path, color_bundle: Path
) -> None:
    manifest, output = photographs(tmp_path / "images", 600), tmp_path / "out"
    with machines(2) as (cluster, (lost, _)):
        order = words(manifest, color_bundle, output, "--chunk-rows", 8)
        with started(*order, env=cluster.environment()) as driver:
            wait_for(lambda: durable(output) > 3)
            kill_family(lost.pid)
            _, err = driver.communicate(timeout=200)
            assert driver.returncode == 0, err
    assert_exactly_once(output, 600)


@pytest.mark.cluster
@pytest.mark.parametrize("chunks", [0, 4])
def test_when_the_last_machine_is_lost_the_run_continues_with_the_next_one(
    chunks: int, tmp_path: Path, color_bundle: Path
) -> None:
    manifest, output = photographs(tmp_path / "images", 300), tmp_path / "out"
    with machines(1) as (cluster, (lost,)):
        order = words(manifest, color_bundle, output, "--chunk-rows", 8)
        with started(*order, env=cluster.environment()) as driver:
            # its worker has begun to load the model
            wait_for(lambda: any("ray::Map" in title(p) for p in family(lost.pid)), every=0.05)
            wait_for(lambda: durable(output) >= chunks)
            kill_family(lost.pid)
            assert chunks or not durable(output)
            time.sleep(30)
            # it also writes its progress while no chunk is finished
            assert json.loads((output / "_progress.json").read_bytes())["rows"] == 300
            with machine(cluster, 1):
                out, err = driver.communicate(timeout=200)
                assert driver.returncode == 0, err
    assert "lost 1 of 1 node; no worker is making progress; replanning" in out
    assert "waiting  for nodes: the cluster has 0 CPUs" in out
    assert_exactly_once(output, 300)


@pytest.mark.cluster
def test_without_a_machine_a_run_waits_and_continues_when_one_joins(
    tmp_path: Path, color_bundle: Path
) -> None:
    manifest, output = photographs(tmp_path / "images", 40), tmp_path / "out"
    with RayCluster.start(cpus=0) as cluster:
        order = words(manifest, color_bundle, output)
        refused = imgcls(*order, "--scale.resource-timeout-s", 3, env=cluster.environment())
        assert refused.returncode == 2
        assert "the cluster has 0 CPUs" in refused.stderr
        assert "waited 3 s for nodes" in refused.stderr
        with started(*order, env=cluster.environment()) as driver:
            time.sleep(8)
            with machine(cluster, 1):
                out, err = driver.communicate(timeout=200)
                assert driver.returncode == 0, err
    assert "waiting  for nodes: the cluster has 0 CPUs" in out
    assert_exactly_once(output, 40)


@pytest.mark.cluster
@pytest.mark.parametrize("job", ["predict", "train"])
def test_an_autoscaler_is_asked_for_a_first_machine_and_for_all_that_the_work_is_worth(
    job: str, tmp_path: Path, color_bundle: Path, colors: Callable[..., Path]
) -> None:
    """The test is the autoscaler, on a head such as `ray up` leaves behind."""
    group = {"resources": {"CPU": 1}, "max_workers": 2}
    groups = {"head": {"resources": {"CPU": 0}, "max_workers": 0}, "cpu": group}
    config = {"available_node_types": groups, "head_node_type": "head", "max_workers": 2}
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(config))
    output = tmp_path / "out"
    if job == "predict":
        manifest = photographs(tmp_path / "images", 3000)
        order = words(manifest, color_bundle, output, "--chunk-rows", 8)
    else:
        order = ["train", "--data.train", colors(60), "--output", output, "--epochs", 1]
        order += ["--model.name", "small_cnn", "--batch-size", 16]

    def asked() -> list[dict[str, float]]:
        waiting = [g for g in placement_group_table().values() if g["state"] == "PENDING"]
        return [bundle for g in waiting for bundle in g["bundles"].values()]

    with RayCluster.start(cpus=0) as cluster, cluster.joined():
        environment = {**cluster.environment(), "HOME": str(tmp_path)}
        with started(*order, env=environment) as driver:
            wait_for(lambda: asked() == [{"CPU": 1}], 120)
            with machine(cluster, 1):
                wait_for(lambda: asked() == [], 120)
                if job == "predict":
                    wait_for(lambda: asked() == [{"CPU": 1}], 120)  # and one more
                out, err = driver.communicate(timeout=300)
                assert driver.returncode == 0, err
        assert "waiting  for nodes: " in out
        wait_for(lambda: asked() == [])
    if job == "predict":
        assert_exactly_once(output, 3000)


# ------------------------------------------------------------------ long


@pytest.mark.cluster
def test_a_machine_that_joins_is_used_if_that_saves_more_than_it_costs(
    tmp_path: Path, color_bundle: Path
) -> None:
    images, output = tmp_path / "images", tmp_path / "out"
    rows = worth(photographs(images, 12, (1200, 900), "png").parent, seconds=260)
    manifest = photographs(images, rows, (1200, 900), "png")
    with machines(1) as (cluster, _):
        order = words(manifest, color_bundle, output, "--chunk-rows", 16)
        with started(*order, env=cluster.environment()) as driver:
            wait_for(lambda: durable(output) > 20, 120)
            with machine(cluster, 1):
                out, err = driver.communicate(timeout=800)
                assert driver.returncode == 0, err
    assert "1 node joined: 2 workers instead of 1 worker; replanning" in out
    assert_exactly_once(output, rows)


def worth(folder: Path, seconds: float) -> int:
    """Number of images like those in a folder that one core decodes in a given time."""
    blobs = [file.read_bytes() for file in folder.glob("*.png")]
    began = time.process_time()
    for blob in blobs:
        decode_image(blob, Preprocess())
    return int(seconds * len(blobs) / (time.process_time() - began))


@pytest.mark.cluster
def test_machines_removed_and_added_five_times_change_nothing(
    tmp_path: Path, color_bundle: Path
) -> None:
    manifest = photographs(tmp_path / "images", 3000, (1200, 900), "png")
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    order = words(manifest, color_bundle, tmp_path / "alone", "--chunk-rows", 16)
    with RayCluster.start(cpus=2) as cluster:
        assert imgcls(*order, env=cluster.environment()).returncode == 0
    alone = assert_exactly_once(tmp_path / "alone", 3000)
    output = tmp_path / "out"
    order = words(manifest, color_bundle, output, "--chunk-rows", 16)
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(RayCluster.start(cpus=0))
        there = [stack.enter_context(machine(cluster, 1)) for _ in range(3)]
        with started(*order, env=cluster.environment()) as driver:
            for step in range(5):
                wanted = durable(output) + rng.randrange(5, 15)
                wait_for(lambda n=wanted: durable(output) >= n or committed(output), 200)
                lost = there.pop(rng.randrange(len(there)))
                kill_family(lost.pid)
                print(f"  machine {step} lost at {durable(output)} of 188 chunks")
                time.sleep(rng.uniform(0, 3))
                there.append(stack.enter_context(machine(cluster, 1)))
            out, err = driver.communicate(timeout=600)
            assert driver.returncode == 0, err
    print(out)
    assert assert_exactly_once(output, 3000).equals(alone)


# ------------------------------------------------------------------ hosts of their own


class Hosts:
    """Network namespaces on one bridge, each as a host with an address of its own."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._bridge = f"ib{os.getpid() % 10000}"
        run("ip", "link", "add", self._bridge, "type", "bridge")
        stack.callback(run, "ip", "link", "del", self._bridge)
        run("ip", "link", "set", self._bridge, "up")

    def add(self, number: int) -> str:
        """A host; returns its name."""
        name, cable = f"{self._bridge}h{number}", f"{self._bridge}c{number}"
        run("ip", "netns", "add", name)
        self._stack.callback(run, "ip", "netns", "del", name)
        run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", cable, "master", self._bridge, "up")
        for words in (
            f"addr add {self.address(number)}/24 dev eth0",
            "link set eth0 up",
            "link set lo up",
        ):
            run("ip", "-n", name, *words.split())
        return name

    def cut_off(self, number: int) -> None:
        run("ip", "link", "set", f"{self._bridge}c{number}", "down")

    def address(self, number: int) -> str:
        return f"10.177.0.{number}"


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextlib.contextmanager
def raylet(host: str, address: str, *more: str, folder: str) -> Iterator[subprocess.Popen[bytes]]:
    """`ray start` on a host."""
    command = [
        *("ip", "netns", "exec", host, str(BIN / "ray"), "start", "--block"),
        *("--disable-usage-stats", f"--node-ip-address={address}", *more),
        "--object-store-memory=200000000",
    ]
    with open(f"{folder}/{host}.log", "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        log = Path(output.name)
        wait_for(lambda: b"Ray runtime started" in log.read_bytes(), 60)
        yield process
    finally:
        kill_family(process.pid)
        process.wait()


@pytest.mark.cluster
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_a_host_that_is_cut_off_is_done_without_and_what_it_writes_late_changes_nothing(
    tmp_path: Path, color_bundle: Path
) -> None:
    manifest, output = photographs(tmp_path / "images", 1200), tmp_path / "out"
    order = words(manifest, color_bundle, tmp_path / "alone", "--chunk-rows", 8)
    assert imgcls(*order).returncode == 0
    folder = tempfile.mkdtemp(prefix="imgcls-ray-", dir="/tmp")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        hosts = Hosts(stack)
        head = hosts.add(1)
        stack.enter_context(
            raylet(
                head,
                hosts.address(1),
                "--head",
                "--port=6399",
                "--num-cpus=0",
                f"--temp-dir={folder}",
                "--include-dashboard=false",
                folder=folder,
            )
        )
        there = {}
        for number in (2, 3):
            name, joined = hosts.add(number), f"--address={hosts.address(1)}:6399"
            there[number] = stack.enter_context(
                raylet(name, hosts.address(number), joined, "--num-cpus=1", folder=folder)
            )
        command = [
            *("ip", "netns", "exec", head, str(BIN / "imgcls")),
            *map(str, words(manifest, color_bundle, output, "--chunk-rows", 8)),
        ]
        environment = {**os.environ, "RAY_ADDRESS": f"{hosts.address(1)}:6399"}
        driver = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        stack.callback(kill_family, driver.pid)
        wait_for(lambda: durable(output) > 10, 120)
        (zombie,) = (p for p in family(there[3].pid) if "ray::Map" in title(p))
        zombie.send_signal(signal.SIGSTOP)  # in the middle of a chunk
        hosts.cut_off(3)
        _, err = driver.communicate(timeout=600)
        assert driver.returncode == 0, err
        found = assert_exactly_once(output, 1200)
        before = (output / "_SUCCESS").read_bytes()
        with contextlib.suppress(psutil.NoSuchProcess):
            zombie.send_signal(signal.SIGCONT)
        time.sleep(5)
        assert table(output).equals(found)
        assert (output / "_SUCCESS").read_bytes() == before
    assert found.equals(table(tmp_path / "alone"))
