"""A record that is ready for JSON, and two of them compared value by value."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import imgcls
from imgcls.cluster.node_report import PACKAGES
from imgcls.runs.provenance import build_provenance, list_differences
from tests.conftest import REPOSITORY


def test_a_record_names_what_ran_and_is_ready_for_json() -> None:
    config = {"seed": 1, "data": {"train": "m.csv"}}
    record = json.loads(json.dumps(build_provenance(config)))
    assert record["config"] == config
    assert set(record["versions"]) == set(PACKAGES)
    assert {"created", "git_commit", "host", "python"} <= set(record)


def test_the_version_in_the_code_is_that_of_the_package() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert imgcls.__version__ == project["version"]


def test_a_checkout_that_is_not_installed_has_a_record_too(tmp_path: Path) -> None:
    """As `ray job submit --working-dir` runs it: on PYTHONPATH, and without package metadata."""
    shutil.copytree(REPOSITORY / "imgcls", tmp_path / "checkout" / "imgcls")
    # what pip installed, without the metadata of imgcls and of pillow
    packages = tmp_path / "packages"
    packages.mkdir()
    installed = Path(metadata.distribution("ray").locate_file(""))
    for entry in installed.iterdir():
        if not entry.name.lower().startswith(("imgcls", "__editable__.imgcls", "pillow-")):
            (packages / entry.name).symlink_to(entry)
    code = (
        "import json; from imgcls.runs.provenance import build_provenance; "
        "print(json.dumps(build_provenance({})['versions']))"
    )
    path = os.pathsep.join([str(tmp_path / "checkout"), str(packages)])
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],  # -S: without the installed packages
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    others = {name: metadata.version(name) for name in PACKAGES if name != "imgcls"}
    assert json.loads(done.stdout) == {"imgcls": imgcls.__version__} | others


@pytest.mark.parametrize(
    ("then", "now", "lines"),
    [
        ({}, {}, []),
        ({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 2]}}, []),
        ({"a": 1}, {"a": 2}, ["a: 1 then, 2 now"]),
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 3, "d": 2}}}, ["a.b.c: 1 then, 3 now"]),
        ({"a": 1}, {"b": "x"}, ["a: 1 then, None now", "b: None then, 'x' now"]),
        ({"a": {"b": 1}}, {"a": None}, ["a: {'b': 1} then, None now"]),
        ({"a": [1, 2]}, {"a": [2, 1]}, ["a: [1, 2] then, [2, 1] now"]),
    ],
)
def test_differences_are_listed_by_dotted_key(
    then: dict[str, object], now: dict[str, object], lines: list[str]
) -> None:
    assert list_differences(then, now) == lines
