"""Exactly once, whatever is killed: drivers, workers, the whole cluster, a full disk, a rival.

The short form runs in `make test`; the long form (20 random moments) is marked `chaos`. Moments are
drawn from a seed that is printed, so that a failure can be run again.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.parquet as pq
import pytest

from imgcls.data.manifests.manifest import ManifestConfig, open_manifest
from tests.conftest import copied, draw, write_manifest
from tests.data.archives import write_tar
from tests.e2e.outputs import assert_exactly_once, committed, table
from tests.processes import (
    ALONE,
    RayCluster,
    family,
    imgcls,
    kill_family,
    run_here,
    started,
    title,
    wait_for,
)

ROWS, CHUNKS, PARTS = 240, 30, 3


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest whose images take long enough to decode that a kill meets work under way."""
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(12):
        draw(("red", "green", "blue")[i % 3], (1600, 1200), seed=i).save(folder / f"{i}.jpg")
    (folder / "broken.jpg").write_bytes((folder / "0.jpg").read_bytes()[:5000])
    names = [f"{i % 12}.jpg" if i % 50 else "broken.jpg" for i in range(ROWS)]
    return write_manifest(folder / "m.csv", [(n, "red", str(i)) for i, n in enumerate(names)],
                          ("path", "label", "id"))  # fmt: skip


def arguments(manifest: Path, bundle: Path, output: Path) -> list[object]:
    return [
        *("predict", "--manifest", manifest, "--model", bundle, "--output", output),
        *("--chunk-rows", ROWS // CHUNKS, "--part-rows", ROWS // PARTS),
        *("--max-error-rate", 0.1, "--lease-seconds", 5),
    ]


@pytest.fixture(scope="module")
def reference(
    photographs: Path, color_bundle: Path, joined: None, tmp_path_factory: pytest.TempPathFactory
) -> pa.Table:
    """The table of an undisturbed run."""
    output = tmp_path_factory.mktemp("reference") / "out"
    done = run_here(*arguments(photographs, color_bundle, output), *ALONE)
    assert done.returncode == 0, done.stderr
    return assert_exactly_once(output, ROWS)


@pytest.fixture
def there(photographs: Path, color_bundle: Path, place: Path) -> tuple[Path, Path, Path]:
    """Manifest, bundle and output, all on a disk or all on a store."""
    if isinstance(place, os.PathLike):
        return photographs, color_bundle, place / "out"
    manifest = copied(photographs.parent, place / "photographs") / photographs.name
    return manifest, copied(color_bundle, place / "bundle"), place / "out"


def assert_as_left_alone(output: Path, reference: pa.Table) -> None:
    """The same table, except for image paths in errors; no files are left over."""
    found = assert_exactly_once(output, ROWS)
    if isinstance(output, os.PathLike):
        assert found.equals(reference)
    assert found.drop_columns(["error"]).equals(reference.drop_columns(["error"]))
    assert not [name for name in names_of(output) if name.startswith(("_staging", "_lease"))]


@dataclass(frozen=True)
class Kill:
    """The process to kill, `delay` seconds after `chunks` more chunks have become durable.

    target: driver, worker, cluster, or session: a driver with a Ray session of its own
    """

    target: str
    chunks: int
    delay: float


def names_of(output: Path) -> list[str]:
    """The files below an output folder."""
    names = (file.relative_to(output).as_posix() for file in output.rglob("*"))
    return [name for name in names if name.endswith((".parquet", "_SUCCESS"))]


def kill_and_restart(
    manifest: Path,
    bundle: Path,
    output: Path,
    kills: list[Kill],
    first: RayCluster,
    more: tuple[object, ...] = (),
) -> list[str]:
    """Start the command, kill it, restart it; then let it end. Returns the state at each kill.

    more: arguments of the runs that are killed
    """
    met = []
    command = arguments(manifest, bundle, output)
    with contextlib.ExitStack() as stack:
        cluster = first
        for kill in kills:
            before = durable(names_of(output))
            env = {} if kill.target == "session" else cluster.environment()
            with started(*command, *more, env=env) as driver:
                until_durable(output, before + kill.chunks)
                time.sleep(kill.delay)
                met.append(f"{kill.target} at {durable(names_of(output))} of {CHUNKS} chunks")
                if kill.target == "driver":
                    driver.kill()
                elif kill.target == "worker":
                    killed = cluster.workers("ray::Map")[:1]
                    for worker in killed:
                        worker.kill()
                    until_durable(output, durable(names_of(output)) + 2 if killed else 0)
                    driver.kill()
                elif kill.target == "session":
                    kill_with_private_session(driver)
                else:
                    cluster.kill()
                    driver.kill()
                    cluster = stack.enter_context(RayCluster.start(cpus=2, fork=True))
        if cluster is first:
            last = run_here(*command, *ALONE)
        else:
            last = imgcls(*command, *ALONE, env=cluster.environment())
        assert last.returncode == 0, last.stderr
    return met


def kill_with_private_session(driver: subprocess.Popen[str]) -> None:
    """Kill a driver without a cluster; the servers of its own Ray session end with it."""
    children = psutil.Process(driver.pid).children(recursive=True)
    servers = [p for p in children if p.name() in ("raylet", "gcs_server")]
    driver.kill()
    driver.wait()
    gone, alive = psutil.wait_procs(servers, timeout=30)
    assert (len(gone), alive) == (2, [])
    for process in children:
        kill_family(process.pid)


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def until_durable(output: Path, chunks: int) -> None:
    def reached() -> bool:
        names = names_of(output)
        return durable(names) >= min(CHUNKS, chunks) or "_SUCCESS" in names

    wait_for(reached, timeout=300)


def durable(names: list[str]) -> int:
    """Chunks that are staged or rolled up."""
    parts = {name for name in names if re.fullmatch(r"predictions/part-\d+\.parquet", name)}
    rolled = {Path(name).stem for name in parts}
    staged = re.compile(r"_staging/(part-\d+)/chunk-[^/]+\.parquet")
    found = [match[1] for name in names if (match := staged.fullmatch(name))]
    return sum(part not in rolled for part in found) + len(parts) * CHUNKS // PARTS


@pytest.mark.parametrize(
    ("place", "targets"),
    [
        pytest.param("disk", ("driver", "cluster"), marks=pytest.mark.slow),
        ("s3", ("worker", "session")),
    ],
    indirect=["place"],
)
def test_a_run_killed_again_and_again_ends_with_the_table_of_one_left_alone(
    there: tuple[Path, Path, Path],
    reference: pa.Table,
    targets: tuple[str, ...],
    cluster: RayCluster,
) -> None:
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    kills = [Kill(target, rng.randrange(1, 8), rng.uniform(0, 0.5)) for target in targets]
    with contextlib.ExitStack() as stack:
        if "cluster" in targets:
            cluster = stack.enter_context(RayCluster.start(cpus=2, fork=True))
        met = kill_and_restart(*there, kills, cluster)
    print(f"seed {seed}:", *met, sep="\n  ")
    assert_as_left_alone(there[2], reference)


def test_a_killed_run_over_an_archive_and_a_table_with_images_is_resumed(
    photographs: Path,
    reference: pa.Table,
    color_bundle: Path,
    cluster: RayCluster,
    tmp_path: Path,
) -> None:
    names = pv.read_csv(photographs)["path"].to_pylist()
    files = {name: (photographs.parent / name).read_bytes() for name in dict.fromkeys(names)}
    write_tar(tmp_path / "images.tar", files)
    half = ROWS // 2
    values = pa.array([files[name] for name in names[half:]], pa.binary())
    pq.write_table(pa.table({"image": values}), tmp_path / "images.parquet", row_group_size=50)
    opened = open_manifest(ManifestConfig(path=str(tmp_path / "images.parquet")))
    members = [path for batch in opened.batches() for path in batch["image"].to_pylist()]
    paths = [f"tar://images.tar#{name}" for name in names[:half]] + members
    rows = [(path, "red", str(i)) for i, path in enumerate(paths)]
    manifest = write_manifest(tmp_path / "m.csv", rows, ("path", "label", "id"))
    output = tmp_path / "out"
    kills = [Kill("driver", 8, 0.1)]
    print(*kill_and_restart(manifest, color_bundle, output, kills, cluster, ALONE))
    found = assert_exactly_once(output, ROWS)
    different = ["path", "error"]
    assert found.drop_columns(different).equals(reference.drop_columns(different))


TARGETS = ("driver", "worker", "cluster", "driver", "worker")


def random_kills(rng: random.Random, targets: Sequence[str]) -> list[Kill]:
    """Half of them strike in the first seconds: start-up, planning and resuming."""
    return [
        Kill(target, 0, rng.uniform(0.2, 9))
        if rng.random() < 0.5
        else Kill(target, rng.randrange(1, 20), rng.uniform(0, 1))
        for target in targets
    ]


@pytest.mark.chaos
@pytest.mark.parametrize("targets", [("driver",), ("worker",), ("cluster",), TARGETS])
def test_twenty_kills_at_random_moments(
    targets: tuple[str, ...], there: tuple[Path, Path, Path], reference: pa.Table
) -> None:
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    manifest, bundle, output = there
    met: list[str] = []
    rounds = 0
    while len(met) < 20:
        kills = random_kills(rng, [targets[i % len(targets)] for i in range(5)])
        rounds += 1
        output = output.parent / f"out-{rounds}"
        with RayCluster.start(cpus=2, fork=True) as cluster:
            met += kill_and_restart(manifest, bundle, output, kills, cluster)
        assert_as_left_alone(output, reference)
    print(f"seed {seed}, {rounds} tables, all equal:", *met, sep="\n  ")


@pytest.mark.parametrize(
    ("number", "place"),
    [pytest.param(signal.SIGTERM, "disk", marks=pytest.mark.slow), (signal.SIGINT, "s3")],
    indirect=["place"],
)
def test_a_stopped_run_ends_cleanly_and_resumes(
    number: signal.Signals,
    there: tuple[Path, Path, Path],
    reference: pa.Table,
    cluster: RayCluster,
) -> None:
    output = there[2]
    command = arguments(*there)
    with started(*command, *ALONE, env=cluster.environment()) as driver:
        until_durable(output, 3)
        driver.send_signal(number)
        _, err = driver.communicate(timeout=30)
    assert driver.returncode == 1
    assert "rerun the same command to resume" in err
    assert not (output / "_lease").exists()
    assert not committed(output)
    again = run_here(*command, *ALONE)
    assert again.returncode == 0, again.stderr
    assert "rows are done" in again.stdout
    assert_as_left_alone(output, reference)


def test_of_two_drivers_on_one_output_one_is_refused_and_nothing_is_harmed(
    there: tuple[Path, Path, Path], reference: pa.Table, cluster: RayCluster
) -> None:
    output = there[2]
    command = [*arguments(*there), *ALONE]
    env = cluster.environment()
    with started(*command, env=env) as one, started(*command, env=env) as two:
        ended = {name: p.communicate(timeout=240) for name, p in (("one", one), ("two", two))}
        codes = sorted([one.returncode, two.returncode])
    assert codes == [0, 2], ended
    refused = ended["one" if one.returncode == 2 else "two"][1]
    assert "is locked by" in refused
    assert_as_left_alone(output, reference)


def stop_between_requests(pid: int) -> None:
    """SIGSTOP, at a moment when the process keeps the test's object store from no other request.

    The store does one request at a time, and would wait for the rest of a stopped client's.
    """
    for _ in range(20):
        os.kill(pid, signal.SIGSTOP)
        # a thread that waits for a core within a call, such as connect, first ends that call
        wait_for(lambda: are_threads_stopped(pid), every=0.01)
        if answers(os.environ.get("AWS_ENDPOINT_URL")):
            return
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.1)
    raise TimeoutError("the object store does not answer")


def are_threads_stopped(pid: int) -> bool:
    states = [
        (task / "stat").read_text().rpartition(")")[2].split()[0]
        for task in Path(f"/proc/{pid}/task").iterdir()
    ]
    return all(state == "T" for state in states)


def answers(endpoint: str | None) -> bool:
    if endpoint is None:
        return True
    try:
        urllib.request.urlopen(endpoint, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it wants a signature
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "place", [pytest.param("disk", marks=pytest.mark.slow), "s3"], indirect=True
)
def test_a_zombie_driver_that_lost_its_lease_publishes_nothing(
    there: tuple[Path, Path, Path], reference: pa.Table, cluster: RayCluster
) -> None:
    output = there[2]
    command = arguments(*there)
    # a Ray session of its own: a stopped driver keeps the CPUs of the cluster that it is on
    with started(*command, *ALONE) as zombie:
        until_durable(output, 3)
        stop_between_requests(zombie.pid)
        for record in (output / "_lease").iterdir():
            # as if the holder were on a machine that cannot be asked whether it is alive
            record.write_text(record.read_text().replace('"machine": "', '"machine": "other-'))
        heir = run_here(*command, *ALONE)
        assert heir.returncode == 0, heir.stderr
        assert_as_left_alone(output, reference)
        committed_table = table(output)
        workers = [process for process in family(zombie.pid) if "ray::Map" in title(process)]
        os.kill(zombie.pid, signal.SIGCONT)
        _, err = zombie.communicate(timeout=60)
        # its workers end a moment after it, and may write once more
        wait_for(lambda: not any(is_alive(process) for process in workers))
    assert zombie.returncode == 1, err
    assert "the lease on the output was lost" in err
    assert table(output).equals(committed_table)
    assert committed(output)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_fails_clearly_and_resumes_once_there_is_room(
    photographs: Path, color_bundle: Path, reference: pa.Table, cluster: RayCluster, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk:
        filler = disk / "filler"
        # room for the plan, but not for the chunks of a single part, however soon those are joined
        filler.write_bytes(b"x" * 2_040_000)
        command = arguments(photographs, color_bundle, disk / "out")
        full = imgcls(*command, *ALONE, env=cluster.environment())
        assert full.returncode == 1, (full.stdout, full.stderr)
        assert "no space left" in full.stderr
        assert not committed(disk / "out")
        filler.unlink()
        again = run_here(*command, *ALONE)
        assert again.returncode == 0, again.stderr
        assert assert_exactly_once(disk / "out", ROWS).equals(reference)
