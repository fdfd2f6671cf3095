"""The command itself: what it lists, what it refuses, and the exit codes that schedulers read."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from imgcls import __version__, cli, config, errors
from imgcls.data.storage import storage_settings
from tests.conftest import draw
from tests.processes import free_port, imgcls


def test_help_lists_every_command_and_how_to_go_on() -> None:
    done = imgcls("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name, command in cli.COMMANDS.items():
        assert any(
            line.split(maxsplit=len(name.split())) == [*name.split(), command.summary]
            for line in done.stdout.splitlines()
        ), name
    assert "`imgcls COMMAND --help` lists the keys of a command." in done.stdout


def test_the_version_is_that_of_the_package() -> None:
    done = imgcls("--version")
    assert (done.returncode, done.stdout) == (0, f"imgcls {__version__}\n")


def test_it_is_a_module_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "imgcls", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"imgcls {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "unbuffered"), [("--help", ""), ("--help", "1"), ("predict --help", "")]
)
def test_a_reader_that_is_gone_ends_it_quietly(arguments: str, unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "imgcls", *arguments.split()],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (cli.BROKEN_PIPE, b"")


@pytest.mark.parametrize("arguments", ["--help", "predict --help", "model list"])
def test_output_that_cannot_be_written_is_a_failure(arguments: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "imgcls", *arguments.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    message = "imgcls: cannot write to stdout: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, message)


@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)])
def test_standard_streams_may_be_closed(closed: tuple[int, ...], tmp_path: Path) -> None:
    opened = tmp_path / "opened"
    program = (
        "import os, sys\n"
        "from imgcls import cli, reference\n"
        "status = cli.main(['model', 'list', '--contains', 'resnet18'])\n"
        f"with open({str(opened)!r}, 'w') as file:\n"
        "    print(file.fileno() > 2, *map(os.get_inheritable, range(3)), file=file)\n"
        "    print(sys.stdin, sys.stdout, sys.stderr, file=sys.stderr)\n"
        "sys.exit(status)\n"
    )
    closing = " ".join(f"{number}>&-" for number in closed)
    done = subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" {closing}', sys.executable, program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "" if 1 in closed else "resnet18\n")
    assert opened.read_text() == "True True True True\n"


def test_a_pipe_that_breaks_elsewhere_is_no_quiet_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise BrokenPipeError("a socket")

    monkeypatch.setattr(cli, "_main", broken)
    with pytest.raises(BrokenPipeError, match="a socket"):
        cli.main(["train"])


@pytest.mark.parametrize(
    ("argv", "named", "listed"),
    [
        (("predicct",), "'predicct'; did you mean 'predict'?", "  predict "),
        (("model", "frob"), "'model frob'", "  model list "),
        (
            ("manifest", "buld"),
            "'manifest buld'; did you mean 'manifest build'?",
            "  manifest build ",
        ),
        (("manifst", "build"), "'manifst'; did you mean 'manifest build'?", "  predict "),
        (("",), "''", "  predict "),
    ],
)
def test_an_unknown_command_is_refused_with_the_known_ones(
    argv: tuple[str, ...], named: str, listed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"no command {named}" in captured.err
    assert listed in captured.err


@pytest.mark.parametrize("group", ["manifest", "model", "key", "history"])
def test_the_help_of_a_group_lists_its_commands(
    group: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["help", group]) == 0
    as_help = capsys.readouterr().out
    assert cli.main([group, "--help"]) == 0
    listed = capsys.readouterr().out
    assert as_help == listed
    assert cli.main([group]) == 2
    assert capsys.readouterr().out == listed
    for name, command in cli.COMMANDS.items():
        assert (command.summary in listed) == name.startswith(f"{group} "), name


def test_no_command_at_all_is_a_wrong_request_that_shows_the_way(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([]) == 2
    assert "usage: imgcls COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_commands_help_lists_every_key_that_it_takes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    command = cli.COMMANDS[name]
    model = command.load_model()
    unnamed = "".join(f"{each.rpartition('.')[2].upper()} " for each in model.positional)
    assert text.startswith(f"usage: imgcls {name} {unnamed}[--config FILE.yaml]")
    lines = text.splitlines()
    for key, field, section in config.iter_fields(model):
        if key != section:
            [at] = [
                i
                for i, line in enumerate(lines)
                if line.startswith(f"  --{key.replace('_', '-')} ")
            ]
            assert ("(required" in lines[at]) == field.is_required()


def test_predicts_help_through_the_real_command_needs_no_cluster_and_no_keys() -> None:
    done = imgcls("predict", "--help", env={"RAY_ADDRESS": "127.0.0.1:1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "Label the images of a manifest with a bundle and commit the table." in done.stdout
    assert "--scale.layout auto|cpu|gpu|gpu_decode  (default auto)" in done.stdout
    assert "--manifest.path TEXT  (required)" in done.stdout


def test_what_print_config_prints_is_a_file_that_gives_the_same_again(tmp_path: Path) -> None:
    first = imgcls(
        *("predict", "--manifest", "a b.csv", "--manifest.delimiter", ";", "--model", "bundle"),
        *("--output", "s3://bucket/out", "--top-k", 3, "--threshold", 0.25, "--scores"),
        *("--limit", 10, "--scale.workers", 2, "--print-config"),
    )
    assert (first.returncode, first.stderr) == (0, "")
    settings = yaml.safe_load(first.stdout)
    assert settings["manifest"] == {
        "path": "a b.csv", "format": "auto", "path_column": "path", "image_column": None,
        "label_column": None, "label_delimiter": None, "label_columns": [], "drop_columns": [],
        "root": None, "delimiter": ";",
        "encoding": "utf-8", "escape": None,
    }  # fmt: skip
    assert (settings["threshold"], settings["scores"], settings["scale"]["workers"]) == (
        0.25,
        True,
        2,
    )
    file = tmp_path / "again.yaml"
    file.write_text(first.stdout, encoding="utf-8")
    again = imgcls("predict", "--config", file, "--print-config")
    assert (again.returncode, again.stdout) == (0, first.stdout)


# ------------------------------------------------------------------ exit codes

CODES = {
    errors.RequestError: 2, errors.ConfigError: 2, errors.ManifestError: 2, errors.BundleError: 2,
    errors.OutputError: 2, errors.OutputLocked: 2, errors.ResourcesError: 2, errors.RunFailed: 1,
    errors.Interrupted: 1, errors.StorageError: 1, errors.StorageMissing: 1,
    errors.StorageFull: 1, errors.TooManyErrors: 3, errors.ImgclsError: 1, KeyboardInterrupt: 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "code"), CODES.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_each_kind_of_error_has_its_exit_code_and_no_traceback(
    kind: type[BaseException], code: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def job(settings: object) -> None:
        """Fail."""
        raise kind("here is why")

    module = importlib.import_module("imgcls.models.import_weights")
    monkeypatch.setattr(module, "list_models", job)
    assert cli.main(["model", "list"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    wanted = "stopped" if kind is KeyboardInterrupt else "here is why"
    assert captured.err == f"imgcls model list: {wanted}\n"


def test_a_defect_of_ours_is_not_hidden_behind_an_exit_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def job(settings: object) -> None:
        """Fail."""
        raise ZeroDivisionError

    module = importlib.import_module("imgcls.models.import_weights")
    monkeypatch.setattr(module, "list_models", job)
    with pytest.raises(ZeroDivisionError):
        cli.main(["model", "list"])


def test_a_command_that_does_its_job_exits_0() -> None:
    done = imgcls("model", "list")
    assert done.returncode == 0, done.stderr
    assert "small_cnn" in done.stdout


# ------------------------------------------------------------------ what a scheduler sees


@pytest.mark.parametrize("command", ["predict", "embed"])
@pytest.mark.parametrize("words", ["--summary-json {}", "--summary_json={}", "--config c.yaml"])
def test_a_wrong_setting_is_in_the_summary_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.json"
    Path("c.yaml").write_text(f"summary-json: {file}\nstorage: {{anon: true, an-on: 1}}\n")
    assert cli.main([command, *words.format(file).split(), "--max-error-rate", "7"]) == 2
    summary = json.loads(file.read_text())
    assert (summary["exit_code"], summary["rows"], summary["status"]) == (2, 0, {})
    assert "max_error_rate" in summary["error"]


@pytest.fixture
def own_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nobody")
    before = storage_settings.current_settings()
    yield
    storage_settings.set_process_settings(before)


@pytest.mark.usefixtures("own_store")
@pytest.mark.parametrize("key", ["manifest", "model", "output"])
def test_a_store_that_cannot_be_reached_exits_1_and_a_file_that_is_not_there_2(
    key: str, tmp_path: Path, color_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.csv").write_text("path\na.jpg\n")
    good = {
        "manifest": str(tmp_path / "m.csv"), "model": str(color_bundle),
        "output": str(tmp_path / "out"),
    }  # fmt: skip
    file = tmp_path / "run.json"

    def predict(**changes: str) -> int:
        words = [word for name, value in (good | changes).items() for word in (f"--{name}", value)]
        store = ["--storage.endpoint-url", f"http://127.0.0.1:{free_port()}"]
        store += ["--storage.retry-timeout-s", "0.5", "--summary-json", str(file)]
        return cli.main(["predict", *words, *store])

    assert predict(**{key: "s3://bucket/it"}) == 1
    summary = json.loads(file.read_text())
    assert summary["exit_code"] == 1
    assert "a later try may succeed" in summary["error"]
    if key != "output":
        assert predict(**{key: str(tmp_path / "absent")}) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_terminal_without_a_character_gets_an_escape(tmp_path: Path) -> None:
    (tmp_path / "é").mkdir()
    for path in ("a.jpg", "b.jpg"):
        draw("red").save(tmp_path / "é" / path)
    built = subprocess.run(
        [
            *(sys.executable, "-m", "imgcls.cli", "manifest", "build", str(tmp_path / "é")),
            *("--output", str(tmp_path / "é-listed")),
        ],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert (built.returncode, built.stderr) == (0, b"")
    assert rb"2 images: " in built.stdout
    assert rb"\xe9-listed" in built.stdout
