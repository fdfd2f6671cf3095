"""The package as a program that imports it sees it: public names, and where it is found."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import imgcls


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
    )


def test_dir_lists_the_public_names() -> None:
    assert set(imgcls.__all__) <= set(dir(imgcls))
    assert {"Classifier", "label", "train"} <= set(dir(imgcls))


def test_a_clone_named_imgcls_does_not_shadow_the_package(tmp_path: Path) -> None:
    clone = tmp_path / "imgcls"  # as a clone: the package is one folder further down
    (clone / "imgcls").mkdir(parents=True)
    (clone / "pyproject.toml").touch()
    done = run("from imgcls import __version__, label; print(__version__)", tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{imgcls.__version__}\n"), done.stderr


def test_an_import_of_the_package_is_quick_and_silent(tmp_path: Path) -> None:
    done = run("import sys, imgcls; assert 'torch' not in sys.modules", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_files_have_500_lines_at_most_and_functions_60() -> None:
    """`manifest.py` is the only longer file."""
    long = []
    for file in Path(imgcls.__file__).parent.rglob("*.py"):
        text = file.read_text()
        if len(text.splitlines()) > 500 and file.name != "manifest.py":
            long.append(str(file))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno >= 60:
                    long.append(f"{file}: {node.name}")
    assert long == []


def test_no_public_name_stands_for_two_things() -> None:
    package = Path(imgcls.__file__).parent
    places: dict[str, list[str]] = {}
    for file in sorted(package.rglob("*.py")):
        for node in ast.parse(file.read_text()).body:
            is_defined = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if is_defined and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(file.relative_to(package)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
