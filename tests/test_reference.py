"""Help pages, the reference of all keys, the type stub and shell completion."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from imgcls import LAZY_EXPORTS, cli, config, reference
from imgcls.config import Section
from imgcls.curation.config import CheckConfig
from tests.conftest import REPOSITORY
from tests.processes import BIN
from tests.test_config import Job


def help_of(model: type[Section], width: int = 100) -> list[str]:
    return reference.format_help(model, prog="imgcls job", width=width).splitlines()


def test_keys_have_types_meanings_choices_and_short_forms() -> None:
    keys = {key.name: key for key in reference.list_keys(CheckConfig)}
    assert keys["output"].default == "required"
    assert keys["gallery"].default == "default 24"
    assert keys["rules.min-sharpness"].section == "rules"
    assert keys["manifest.path"].shorthand == "manifest"
    assert keys["decode"].choices == ("exact", "fast")


def test_help_shows_every_key_once_with_its_default_and_meaning() -> None:
    lines = help_of(Job)
    for key, _, section in config.iter_fields(Job):
        start = f"  --{key.replace('_', '-')} "
        assert sum(line.startswith(start) for line in lines) == (key != section), key
    text = "\n".join(lines)
    assert "--optim.lr NUMBER  (default 0.0003)\n      The peak learning rate." in text
    assert "--layout auto|cpu|gpu  (default auto)" in text
    assert "--data.path TEXT  (required where data is given)" in text
    assert "      Short form: --vary none|light" in lines
    assert "optim: How the weights move." in lines


def test_required_keys_come_first_and_the_models_own_before_its_sections() -> None:
    lines = help_of(CheckConfig)
    required, options = lines.index("Required:"), lines.index("Options:")
    assert required < lines.index("  --output TEXT  (required)") < options
    headings = [line for line in lines if line[:1].isalpha() and line.endswith((".", ":"))]
    assert headings[:3] == ["Settings files:", "Required:", "Options:"]
    assert len(headings) == len(set(headings))


@pytest.mark.parametrize("width", [60, 80])
def test_help_is_wrapped_to_the_terminal(width: int) -> None:
    for name, command in cli.COMMANDS.items():
        model = command.load_model()
        text = reference.format_help(
            model, prog=f"imgcls {name}", example=command.example, width=width
        )
        for line in text.splitlines():
            # a key and its choices stay on one line, which is made to be searched
            assert len(line) <= width or line.startswith(("  --", "usage:")), line


def test_the_reference_is_generated_from_the_code() -> None:
    written = (REPOSITORY / "docs" / "reference.md").read_text()
    assert written == reference.render_reference(cli.COMMANDS), (
        "run imgcls reference > docs/reference.md"
    )


def read_keys(page: str, heading: str) -> dict[str, str]:
    """Keys of the table below a heading of the reference, with their types."""
    part = page.partition(f"# {heading}\n")[2].partition("\n#")[0]
    return dict(re.findall(r"^\| `([^`]+)` \| (.*?) \| ", part, re.MULTILINE))


def test_the_reference_has_every_key_of_every_command_and_shared_ones_once() -> None:
    page = reference.render_reference(cli.COMMANDS)
    assert page.count("| `retry-timeout-s` |") == 1
    for name, command in cli.COMMANDS.items():
        listed = read_keys(page, f"imgcls {name}")
        if name == "tune":
            assert not set(listed) & set(read_keys(page, "imgcls train"))
            listed |= read_keys(page, "imgcls train")
        for key, kind in list(listed.items()):
            if linked := re.search(r"\[(.+?)\]\(#", kind):
                below = read_keys(page, linked[1])
                assert below, linked[1]
                listed |= {f"{key}.{each}": each for each in below}
        keys = {key.name for key in reference.list_keys(command.load_model())}
        assert keys == {key for key, kind in listed.items() if "](#" not in kind}, name


def test_the_type_stub_is_generated_from_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reference", "--format", "stub"]) == 0
    stub = REPOSITORY / "imgcls" / "__init__.pyi"
    assert capsys.readouterr().out == stub.read_text(), (
        "run imgcls reference --format stub > imgcls/__init__.pyi"
    )
    for name in LAZY_EXPORTS:
        assert f" {name}(" in stub.read_text() or f" as {name}\n" in stub.read_text()


def test_a_type_checker_sees_classes_keys_and_their_types() -> None:
    program = (
        "from pathlib import Path\n"
        "import imgcls\n"
        "reveal_type(imgcls.Classifier)\n"
        'imgcls.train(data="m.csv", output=Path("out"), optim={"lr": 1e-3}, epochs=2)\n'
        'imgcls.train(data="m.csv", output="out", epoch=2)\n'
        'imgcls.label(manifest="m.csv", model="b", output="out", top_k="many")\n'
    )
    # not in a file, whose errors mypy would print from its cache under an earlier path
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    assert "Revealed type" in done.stdout, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("<string>")]
    assert "imgcls.models.classifier.Classifier" in lines[0]
    errors = [line.removeprefix("<string>") for line in lines if " error: " in line]
    assert all(line.startswith((":5:", ":6:")) for line in errors), errors
    assert any('"epoch"' in line and '"epochs"' in line for line in errors)
    assert any(line.startswith(":6:") for line in errors)


# ------------------------------------------------------------------ completion

QUESTIONS = [
    ("imgcls pre", ["predict"]),
    ("imgcls manifest ", ["build", "check", "fetch", "split", "stats"]),
    ("imgcls predict --scale.lay", ["--scale.layout"]),
    ("imgcls predict --scale.layout g", ["gpu", "gpu_decode"]),
    ("imgcls manifest check --manifest.path-", ["--manifest.path-column"]),
]

BASH = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); COMPREPLY=(); _imgcls
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("completion")
    made = {}
    for shell in ("bash", "zsh", "fish"):
        made[shell] = folder / shell
        made[shell].write_text(reference.render_completion(cli.COMMANDS, shell))
    return made


@pytest.mark.parametrize(("line", "expected"), QUESTIONS)
def test_bash_completes(line: str, expected: list[str], scripts: dict[str, Path]) -> None:
    words = " ".join([*line.split(), *(['""'] if line.endswith(" ") else [])])
    code = BASH.format(script=scripts["bash"], words=words)
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == expected


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize(("line", "expected"), QUESTIONS)
def test_fish_completes(line: str, expected: list[str], scripts: dict[str, Path]) -> None:
    code = f"source {scripts['fish']}; complete -C '{line}'"
    done = subprocess.run(["fish", "-c", code], capture_output=True, text=True, check=True)
    assert sorted(each.split("\t")[0] for each in done.stdout.splitlines()) == expected


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_takes_the_script(scripts: dict[str, Path]) -> None:
    code = f"autoload -U compinit; compinit -D; source {scripts['zsh']}; whence -w _imgcls"
    done = subprocess.run(["zsh", "-fc", code], capture_output=True, text=True, check=True)
    assert done.stdout == "_imgcls: function\n"


def test_the_command_prints_the_scripts(scripts: dict[str, Path]) -> None:
    done = subprocess.run(
        [BIN / "imgcls", "completion", "bash"], capture_output=True, text=True, check=True
    )
    assert done.stdout == scripts["bash"].read_text()
