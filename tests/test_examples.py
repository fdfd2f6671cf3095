"""The files in examples/, and those for Docker and GitHub: read, and checked by our own code."""

from __future__ import annotations

import ast
import fnmatch
import importlib.util
import json
import re
import shlex
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import imgcls
from imgcls import cli, config
from tests.conftest import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def load_command(line: str) -> Any:
    """The settings of an `imgcls` command line."""
    words = shlex.split(line)
    assert words[0] == "imgcls", line
    name = next(
        name
        for name in (" ".join(words[1:3]), words[1])
        if name in cli.COMMANDS
    )  # fmt: skip
    return config.load(cli.COMMANDS[name].load_model(), words[1 + len(name.split()) :])


def read_all(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def test_every_yaml_file_in_the_repository_can_be_read() -> None:
    found = 0
    for pattern in ("*.yaml", ".*.yaml", "*/*.yaml", ".github/**/*.yml"):
        for path in REPOSITORY.glob(pattern):
            if ".venv" not in path.parts:
                assert read_all(path) != [None], path
                found += 1
    assert found > 15


# ------------------------------------------------------------------ nightly runs


@pytest.fixture
def at_examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Within it, the configuration of a night is where the commands look for it."""
    (tmp_path / "nightly.yaml").write_text((EXAMPLES / "nightly.yaml").read_text())
    monkeypatch.chdir(tmp_path)


def test_the_nightly_settings_are_taken_and_have_gates() -> None:
    loaded = load_command(f"imgcls predict --config {EXAMPLES / 'nightly.yaml'}")
    assert loaded.since.path == "s3://photos/labels"
    assert "{date}" in loaded.output
    assert (loaded.max_psi, loaded.max_errors) == (0.25, 10)


@pytest.fixture
def airflow(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Names of Airflow that the DAG imports; its tasks are kept by name, in their order."""
    made: dict[str, list[str]] = {"tasks": [], "order": []}

    class Node:
        def __init__(self, name: str) -> None:
            self.name = name

        def __rshift__(self, other: Node) -> Node:
            made["order"] += [f"{self.name} >> {other.name}"]
            return other

    def task(function: Any) -> Any:
        made["tasks"].append(function.__name__)
        return lambda: Node(function.__name__)

    exceptions, sdk = types.ModuleType("airflow.sdk.exceptions"), types.ModuleType("airflow.sdk")
    exceptions.AirflowException = type("AirflowException", (Exception,), {})  # type: ignore[attr-defined]
    exceptions.AirflowFailException = type("AirflowFailException", (Exception,), {})  # type: ignore[attr-defined]
    sdk.task = task  # type: ignore[attr-defined]
    sdk.dag = lambda **options: lambda function: function  # type: ignore[attr-defined]
    for module in (exceptions, sdk):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "airflow", types.ModuleType("airflow"))
    return made


@pytest.mark.usefixtures("at_examples")
def test_the_airflow_dag_runs_three_commands_and_retries_only_what_may_succeed(
    airflow: dict[str, list[str]],
) -> None:
    spec = importlib.util.spec_from_file_location("dag", EXAMPLES / "nightly_airflow.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert airflow["tasks"] == ["build", "predict", "compact"]
    assert airflow["order"] == ["build >> predict", "predict >> compact"]
    for line in (module.BUILD, module.PREDICT.format(date="2026-11-22"), module.COMPACT):
        load_command(line.replace("/srv/labels/", ""))
    for code, error in ((1, "AirflowException"), (2, "AirflowFailException"), (3, "AirflowFail")):
        with pytest.raises(Exception, match=f"exit code {code}: ") as raised:
            module.run(f"{sys.executable} -c 'raise SystemExit({code})'")
        assert type(raised.value).__name__.startswith(error)
    module.run(f"{sys.executable} -c pass")


@pytest.mark.usefixtures("at_examples")
def test_the_argo_workflow_runs_three_commands_and_retries_only_what_may_succeed() -> None:
    [workflow] = read_all(EXAMPLES / "nightly_argo.yaml")
    assert (workflow["apiVersion"], workflow["kind"]) == ("argoproj.io/v1alpha1", "CronWorkflow")
    spec = workflow["spec"]["workflowSpec"]
    templates = {template["name"]: template for template in spec["templates"]}
    steps = [step for [step] in templates[spec["entrypoint"]]["steps"]]
    assert [step["name"] for step in steps] == ["build", "predict", "compact"]
    for step in steps:
        assert step["template"] == "imgcls"
        [parameter] = step["arguments"]["parameters"]
        date = re.sub(r"\{\{workflow\.creationTimestamp\.[Ymd]\}\}", "11", parameter["value"])
        load_command(date.replace("11-11-11", "2026-11-22").replace("/config/", ""))
    command = templates["imgcls"]
    assert command["inputs"]["parameters"] == [{"name": "command"}]
    assert command["container"]["args"] == ["exec {{inputs.parameters.command}}"]
    mounted = {mount["name"] for mount in command["container"]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in (*spec["volumes"], *command["volumes"])}
    condition = command["retryStrategy"]["expression"]
    codes = {0, 1, 2, 3, -1}
    python = condition.replace("asInt(lastRetry.exitCode)", "code").replace("&&", "and")
    retried = {code for code in codes if eval(python, {"code": code})}
    assert retried == {0, 1, -1}


# ------------------------------------------------------------------ notebooks


def code_cells(notebook: Path) -> list[str]:
    body = json.loads(notebook.read_text(encoding="utf-8"))
    assert (body["nbformat"], len({cell["id"] for cell in body["cells"]})) == (
        4, len(body["cells"]),
    )  # fmt: skip
    return ["".join(cell["source"]) for cell in body["cells"] if cell["cell_type"] == "code"]


def imported(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Modules that code imports, with the names that it takes from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from ((str(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_compiles_imports_what_exists_and_has_no_outputs(notebook: Path) -> None:
    cells = code_cells(notebook)
    assert len(cells) > 4
    for code in cells:
        tree = ast.parse(code)
        for module, name in imported(tree):
            assert importlib.util.find_spec(module) is not None, module
            if name is not None and module.startswith("imgcls."):
                assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
        for node in ast.walk(tree):  # imgcls.train and others
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "imgcls":
                assert node.attr in imgcls.__all__
    body = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in body["cells"]:
        assert not cell.get("outputs"), "clear the outputs before the notebook is committed"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    body = nbformat.read(notebook, as_version=4)
    nbformat.validate(body)
    client = nbclient.NotebookClient(body, timeout=600, resources={"metadata": {"path": tmp_path}})
    client.execute()
    shown = [output for cell in body.cells for output in cell.get("outputs", [])]
    assert len(shown) > 4
    assert not [output for output in shown if output.output_type == "error"]


# ------------------------------------------------------------------ installation, Docker, GitHub


def test_the_table_of_extras_is_that_of_the_package() -> None:
    page = (REPOSITORY / "docs" / "installation.md").read_text()
    table = page.partition("| extra | for |")[2].partition("\n\n")[0]
    listed = re.findall(r"^\| `([\w-]+)` \| \S", table, re.MULTILINE)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert sorted(listed) == sorted(project["optional-dependencies"])


def test_extras_that_the_documentation_names_exist() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    for page in (REPOSITORY / "docs").glob("*.md"):
        for names in re.findall(r"'(?:imgcls|\.)\[([\w,-]+)\]'", page.read_text()):
            assert set(names.split(",")) <= extras, (page.name, names)


def test_versions_in_the_installation_are_those_of_the_package() -> None:
    page = (REPOSITORY / "docs" / "installation.md").read_text()
    named = re.findall(r"imgcls[:-](\d+\.\d+\.\d+)", page)
    assert set(named) == {imgcls.__version__}


def instructions(file: Path) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile, with continued lines joined."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line
    ]


def test_the_image_is_built_from_files_that_docker_is_sent() -> None:
    patterns = (REPOSITORY / ".dockerignore").read_text().split("\n")
    sent = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    assert all((REPOSITORY / name).exists() for name in sent)
    steps = instructions(REPOSITORY / "Dockerfile")
    copied = [word for name, rest in steps if name == "COPY" for word in rest.split()[:-1]]
    assert set(copied) <= {*sent, "."}
    assert not [name for name in sent if fnmatch.fnmatch(name, "tests*")]
    declared = {rest.partition("=")[0] for name, rest in steps if name == "ARG"}
    used = {name for _, rest in steps for name in re.findall(r"\$\{?([A-Z_]+)", rest)}
    assert declared == used
    [user] = [rest for name, rest in steps if name == "USER"]
    assert user != "root"


def test_the_compose_file_is_consistent_and_its_commands_are_taken() -> None:
    file = REPOSITORY / "compose.yaml"
    [compose] = read_all(file)
    services = compose["services"]
    volumes = {
        volume.partition(":")[0]
        for service in services.values()
        for volume in service.get("volumes", [])
    }
    assert volumes == set(compose["volumes"])
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")  # the credentials are in the file
    store, user = services["store"]["environment"], services["imgcls"]["environment"]
    assert store["MINIO_ROOT_USER"] == user["AWS_ACCESS_KEY_ID"]
    assert store["MINIO_ROOT_PASSWORD"] == user["AWS_SECRET_ACCESS_KEY"]
    compile(services["buckets"]["command"][0], "buckets", "exec")
    head = file.read_text().partition("\nx-imgcls")[0].replace("\\\n#", "")
    commands = re.findall(r"compose run --rm (imgcls .*)", head)
    assert len(commands) == 3
    for line in commands:
        load_command(line)


def test_continuous_integration_runs_the_script_of_the_repository() -> None:
    [workflow] = read_all(REPOSITORY / ".github" / "workflows" / "ci.yml")
    steps = workflow["jobs"]["checks"]["steps"]
    assert steps[-1] == {"run": ".ci/run"}
    assert workflow["permissions"] == {"contents": "read"}


def test_issue_forms_have_what_github_requires() -> None:
    for file in sorted((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml")):
        [form] = read_all(file)
        if file.stem == "config":
            continue
        assert {"name", "description", "body"} <= set(form)
        ids = [part["id"] for part in form["body"]]
        assert len(set(ids)) == len(ids)
        assert all(part["attributes"]["label"] for part in form["body"])
