"""The sdist and the wheel: what is in them, and an installation that runs outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from imgcls import __version__
from tests.conftest import draw
from tests.e2e.outputs import assert_exactly_once
from tests.processes import ALONE, REPOSITORY, RayCluster

BUILD = """
import sys, tarfile
from setuptools import build_meta
folder = sys.argv[1]
name = build_meta.build_sdist(folder)
with tarfile.open(f"{folder}/{name}") as archive:
    archive.extractall(folder, filter="data")
"""
BUILD_WHEEL = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def run(
    *command: object, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program that does not see the checkout."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean | (env or {}),
        capture_output=True,
        text=True,
        check=False,
    )


@dataclass(frozen=True)
class Distributions:
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """An sdist of the checkout, and a wheel of the unpacked sdist, as `python -m build` makes."""
    folder, source = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copy(REPOSITORY / "constraints.txt", source)
    for name in ("imgcls", "jobs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
    done = run(sys.executable, "-c", BUILD, folder, cwd=source)
    assert done.returncode == 0, done.stderr
    unpacked = folder / f"imgcls-{__version__}"
    done = run(sys.executable, "-c", BUILD_WHEEL, folder, cwd=unpacked)
    assert done.returncode == 0, done.stderr
    [wheel] = folder.glob("*.whl")
    return Distributions(folder / f"imgcls-{__version__}.tar.gz", wheel)


@pytest.fixture(scope="module")
def installed(built: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel, and sees the packages of this one.

    A folder that a .pth file adds has no .pth files read: the checkout is not among them.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    options = ("--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", *options)
    done = run(*pip, built.wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    [packages] = (folder / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_the_wheel_has_every_file_of_the_package_and_no_other(built: Distributions) -> None:
    package = REPOSITORY / "imgcls"
    files = {
        f"imgcls/{file.relative_to(package).as_posix()}"
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {"imgcls/py.typed", "imgcls/__init__.pyi", "imgcls/templates/page.html.j2"} < files
    with zipfile.ZipFile(built.wheel) as wheel:
        names = wheel.namelist()
        assert {name for name in names if ".dist-info/" not in name} == files
        [entries] = (name for name in names if name.endswith("/entry_points.txt"))
        assert b"imgcls = imgcls.cli:main" in wheel.read(entries)
        assert any(name.endswith("/LICENSE") for name in names)


def test_the_sdist_has_what_a_build_and_a_job_need_and_no_tests(built: Distributions) -> None:
    root = f"imgcls-{__version__}"
    with tarfile.open(built.sdist) as archive:
        names = {name.removeprefix(f"{root}/") for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints.txt"} < names
    assert {"jobs/predict.py", "jobs/predict.yaml", "imgcls/py.typed"} < names
    assert not [name for name in names if name.startswith("tests/")]


def test_the_installed_command_predicts_outside_of_the_checkout(
    installed: Path, cluster: RayCluster, color_bundle: Path, tmp_path: Path
) -> None:
    done = run(installed / "imgcls", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: imgcls COMMAND" in done.stdout
    code = "import imgcls; print(imgcls.__file__)"
    place = run(installed / "python", "-c", code, cwd=tmp_path).stdout
    assert place.startswith(str(installed.parent))
    (tmp_path / "images").mkdir()
    for index, color in enumerate(("red", "green", "blue")):
        draw(color, seed=index).save(tmp_path / "images" / f"{color}.png")
    done = run(
        *(installed / "imgcls", "predict", "--manifest", "images", "--model", color_bundle),
        *("--output", "out", *ALONE),
        cwd=tmp_path,
        env=cluster.environment(),
    )
    assert done.returncode == 0, done.stderr
    assert_exactly_once(tmp_path / "out", 3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_installed_demo_runs_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    done = run(installed / "imgcls", "demo", cwd=tmp_path, env={"RAY_ADDRESS": "local"})
    assert done.returncode == 0, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["demo"]
    assert_exactly_once(tmp_path / "demo" / "predictions", 359)
