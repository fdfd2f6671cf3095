"""One loader: defaults < files < command line, all problems reported together, nothing guessed."""

from __future__ import annotations

import datetime
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from imgcls import cli, config, formatting
from imgcls.config import Section, UnitFloat, requested
from imgcls.curation.config import CheckConfig
from imgcls.errors import ConfigError, RequestError
from imgcls.evaluation.config import CompareConfig, EvaluateConfig
from imgcls.inference.predict import PredictConfig
from tests.processes import BIN, REPOSITORY, imgcls


class Optim(Section):
    """How the weights move."""

    lr: PositiveFloat = 3e-4
    """The peak learning rate."""
    weight_decay: float = 0.05
    nesterov: bool = True


class Source(Section):
    """Where rows come from."""

    shorthand: ClassVar[str | None] = "path"

    path: str
    path_column: str = "path"
    limit: int | None = None


class Early(Section):
    patience: int = 3


class Vary(Section):
    shorthand: ClassVar[str | None] = "preset"

    preset: Literal["none", "light"] = "light"
    flip: float | None = 0.5


class Job(Section):
    """What the tests load."""

    name: str = "job"
    epochs: PositiveInt = Field(default=10, le=100)
    mixed: bool = False
    verbose: bool | None = None
    layout: Literal["auto", "cpu", "gpu"] = "auto"
    threshold: float | None = 0.5
    mean: tuple[float, float, float] = (0.1, 0.2, 0.3)
    tags: list[str] = []
    options: dict[str, Any] = {}
    optim: Optim = Optim()
    data: Source | None = None
    early: Early | None = Early()
    vectors: bool | Literal["full", "half"] = False
    weighting: Literal["none", "balanced"] | dict[str, float] = "balanced"
    rates: dict[Literal["too_large", "empty"], UnitFloat] = {}
    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    place: str | None = None
    day: datetime.date | None = None
    vary: Vary = Vary()

    @model_validator(mode="after")
    def _check(self) -> Job:
        if self.name == "forbidden":
            raise ValueError("name forbidden is taken; give another --name")
        return self


def load(*argv: object) -> Job:
    return config.load(Job, [str(a) for a in argv])


def problems(*argv: object, model: type[Section] = Job) -> list[str]:
    """The problems that a command line is refused with, one line each."""
    with pytest.raises(ConfigError) as caught:
        config.load(model, [str(a) for a in argv])
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("the configuration has ")
    return [line.strip() for line in lines]


def written(folder: Path, text: str, name: str = "job.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


# ------------------------------------------------------------------ what options may look like


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--epochs", "3"), {"epochs": 3}),
        (("--epochs=3",), {"epochs": 3}),
        (("--optim.lr", "1e-3"), {"optim": {"lr": 1e-3}}),
        (("--optim.lr=1e-3",), {"optim": {"lr": 1e-3}}),
        (("--optim.weight-decay", "-1"), {"optim": {"weight_decay": -1.0}}),
        (("--optim.weight_decay", "0"), {"optim": {"weight_decay": 0.0}}),
        (("--mixed",), {"mixed": True}),
        (("--mixed", "true"), {"mixed": True}),
        (("--mixed", "False"), {"mixed": False}),
        (("--mixed=false",), {"mixed": False}),
        (("--no-mixed",), {"mixed": False}),
        (("--verbose",), {"verbose": True}),
        (("--no-verbose",), {"verbose": False}),
        (("--verbose", "null"), {"verbose": None}),
        (("--vectors",), {"vectors": True}),
        (("--vectors", "half"), {"vectors": "half"}),
        (("--vectors=half",), {"vectors": "half"}),
        (("--vectors", "false"), {"vectors": False}),
        (("--no-vectors",), {"vectors": False}),
        (("--vectors", "--epochs", "4"), {"vectors": True, "epochs": 4}),
        (("--optim.nesterov", "--epochs", "4"), {"optim": {"nesterov": True}, "epochs": 4}),
        (("--threshold", "null"), {"threshold": None}),
        (("--threshold=none",), {"threshold": None}),
        (("--mean", "[0.5, 0.5, 0.5]"), {"mean": (0.5, 0.5, 0.5)}),
        (("--tags", "[a, 'b c', 7]"), {"tags": ["a", "b c", "7"]}),
        (("--tags=[]",), {"tags": []}),
        (("--options", "{width: 8, a: {b: [1]}}"), {"options": {"width": 8, "a": {"b": [1]}}}),
        (("--name", "007"), {"name": "007"}),
        (("--name", "1e3"), {"name": "1e3"}),
        (("--name", "yes"), {"name": "yes"}),
        (("--name", ""), {"name": ""}),
        (("--name", "-"), {"name": "-"}),
        (("--name", "a=b: c # d"), {"name": "a=b: c # d"}),
        (("--name=--odd",), {"name": "--odd"}),
        (("--name", "[unclosed"), {"name": "[unclosed"}),
        (("--name", "{date}"), {"name": "{date}"}),
        (("--name", "[a, b]"), {"name": "[a, b]"}),
        (("--name", "none"), {"name": "none"}),
        (("--place", "{date}"), {"place": "{date}"}),
        (("--place", "none"), {"place": None}),
        (("--weighting.hot-dog", "2"), {"weighting": {"hot-dog": 2.0}}),
        (("--weighting.img.v2-a", "2", "--weighting.b=3"), {"weighting": {"img.v2-a": 2, "b": 3}}),
        (("--rates.too-large", "0.5"), {"rates": {"too_large": 0.5}}),
        (("--options.drop-rate", "1", "--options.a.b", "2"),
         {"options": {"drop_rate": 1, "a": {"b": 2}}}),
        (("--early", "null"), {"early": None}),
        (("--epochs", "1", "--epochs", "2"), {"epochs": 2}),
    ],
)  # fmt: skip
def test_an_option_sets_its_dotted_key(argv: tuple[str, ...], expected: dict[str, Any]) -> None:
    assert load(*argv) == Job.model_validate(expected)


def test_dotted_keys_below_a_map_add_to_it_and_keep_their_types(tmp_path: Path) -> None:
    file = written(tmp_path, "options: {width: 8, depth: 2}")
    found = load(
        *("--config", file, "--options.width", "16", "--options.dropout", "0.3"),
        *("--options.act", "relu", "--options.bias", "false"),
    )
    assert found.options == {
        "width": 16, "depth": 2, "dropout": 0.3, "act": "relu", "bias": False,
    }  # fmt: skip


def test_a_map_given_whole_replaces_the_files(tmp_path: Path) -> None:
    file = written(tmp_path, "options: {width: 8, depth: 2}")
    assert load("--config", file, "--options", "{dropout: 0.1}").options == {"dropout": 0.1}


# ------------------------------------------------------------------ who wins


def test_the_command_line_wins_over_files_and_later_files_over_earlier_ones(tmp_path: Path) -> None:
    first = written(
        tmp_path, "epochs: 1\noptim: {lr: 0.1, weight-decay: 0.1}\nname: first", "a.yaml"
    )
    second = written(tmp_path, "optim: {lr: 0.2}\nname: second", "b.yaml")
    found = load("--name", "typed", "--config", first, "--config", second)
    assert found.epochs == 1
    assert found.name == "typed"
    assert found.optim == Optim(lr=0.2, weight_decay=0.1)
    assert found.threshold == Job().threshold


@given(st.lists(st.sampled_from(["a.yaml", "b.yaml", "line"]), max_size=6, unique=True))
def test_precedence_holds_key_by_key(
    tmp_path_factory: pytest.TempPathFactory, layers: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("layers")
    values = {"a.yaml": (1, 0.1), "b.yaml": (2, None), "line": (None, 0.3)}
    argv: list[str] = []
    for layer in layers:
        epochs, rate = values[layer]
        if layer == "line":
            argv += ["--optim.lr", str(rate)]
            continue
        tree: dict[str, Any] = {"epochs": epochs}
        if rate is not None:
            tree["optim"] = {"lr": rate}
        argv += ["--config", str(written(folder, yaml.safe_dump(tree), layer))]
    files = [layer for layer in layers if layer != "line"]
    found = load(*argv)
    assert found.epochs == (values[files[-1]][0] if files else 10)
    assert found.optim.lr == (0.3 if "line" in layers else 0.1 if "a.yaml" in files else 3e-4)


def test_the_environment_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("epochs", "EPOCHS", "JOB_EPOCHS", "IMGCLS_EPOCHS", "optim.lr", "OPTIM__LR"):
        monkeypatch.setenv(key, "7")
    assert load() == Job()
    assert load("--name", "$HOME ${HOME}").name == "$HOME ${HOME}"


def test_a_loaded_configuration_cannot_be_changed() -> None:
    found = load()
    with pytest.raises(ValidationError):
        found.epochs = 5  # type: ignore[misc]
    with pytest.raises(ValidationError):
        found.optim.lr = 5.0  # type: ignore[misc]


# ------------------------------------------------------------------ sections with a shorthand


@pytest.mark.parametrize(
    "argv",
    [
        ("--data", "rows.csv", "--data.path-column", "file"),
        ("--data.path-column", "file", "--data", "rows.csv"),
        ("--data.path", "rows.csv", "--data.path-column=file"),
        ("--data={path: rows.csv, path-column: file}",),
        ("--data", "other.csv", "--data.path_column", "file", "--data", "rows.csv"),
    ],
)
def test_a_bare_value_sets_the_sections_main_key_in_any_order(argv: tuple[str, ...]) -> None:
    assert load(*argv).data == Source(path="rows.csv", path_column="file")


@pytest.mark.parametrize(
    "text", ["data: rows.csv", "data: {path: rows.csv}", "data:\n  path: rows.csv"]
)
def test_a_bare_value_in_a_file_takes_dotted_overrides(tmp_path: Path, text: str) -> None:
    file = written(tmp_path, text)
    expected = Source(path="rows.csv", path_column="file")
    assert load("--config", file, "--data.path-column", "file").data == expected
    assert load("--data.path-column", "file", "--config", file).data == expected
    assert load("--config", file, "--data", "new.csv").data == Source(path="new.csv")


def test_a_bare_value_keeps_the_files_other_keys(tmp_path: Path) -> None:
    file = written(tmp_path, "data: {path: rows.csv, path_column: file}")
    assert load("--config", file, "--data", "new.csv").data == Source(
        path="new.csv", path_column="file"
    )


def test_a_number_may_be_a_bare_value(tmp_path: Path) -> None:
    assert load("--config", written(tmp_path, "data: 2024")).data == Source(path="2024")


# ------------------------------------------------------------------ what is refused, and how


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("lr", "optim.lr"),
        ("optim.rl", "optim.lr"),
        ("optim.learning-rate", None),
        ("optimizer.lr", "optim.lr"),
        ("epoch", "epochs"),
        ("weight-decay", "optim.weight_decay"),
        ("patience", "early.patience"),
        ("no-epochs", "epochs"),
        ("path-colunm", "data.path_column"),
        ("xyzzy", None),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(key: str, nearest: str | None) -> None:
    (problem,) = problems(f"--{key}", "3")
    assert problem.startswith(f"{key.replace('-', '_')}: unknown key; ")
    if nearest is None:
        assert problem.endswith("see --help for the valid keys")
    else:
        assert f"did you mean {nearest}" in problem


def test_unknown_keys_of_a_file_are_named_to_the_last_part(tmp_path: Path) -> None:
    file = written(tmp_path, "optim: {rate: 1, momentun: 2}\nextra: {a: 1, b: {c: 2}}\n7: x")
    found = problems("--config", file)
    keys = [problem.partition(":")[0] for problem in found]
    assert keys == ["optim.rate", "optim.momentun", "extra.a", "extra.b.c", "7"]


def test_all_problems_are_reported_together_by_dotted_path(tmp_path: Path) -> None:
    file = written(tmp_path, "layout: tpu\noptim: {lr: fast, nesterov: maybe}\nlr: 3")
    found = problems(
        *("--config", file, "--config", tmp_path / "none.yaml"),
        *("--epochs", "0", "--threshold", "high", "--mean", "[1, 2]", "--data.limit", "x"),
        *("stray", "--early.patience"),
    )
    text = "\n".join(found)
    for start in (
        f"--config {tmp_path / 'none.yaml'}: No such file",
        "'stray': options are written --KEY VALUE",
        "--early.patience: needs a value",
        "epochs: Input should be greater than 0; found '0'",
        "layout: Input should be 'auto', 'cpu' or 'gpu'; found 'tpu'",
        "threshold: ",
        "mean.2: ",
        "optim.lr: ",
        "optim.nesterov: ",
        "data.path: is required; give --data.path VALUE",
        "data.limit: ",
        "lr: unknown key; did you mean optim.lr?",
    ):
        assert any(problem.startswith(start) for problem in found), (start, text)
    assert len(found) == 12, text


@pytest.mark.parametrize("argv", [("--vectors", "quarter"), ("--vectors=quarter",)])
def test_a_wrong_choice_of_an_option_that_needs_none_is_one_problem(argv: tuple[str, ...]) -> None:
    assert problems(*argv) == [
        "vectors: Input should be true, false, 'full' or 'half'; found 'quarter'"
    ]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ("--weighting", "inverse"),
            [
                "weighting: Input should be a valid dictionary, 'none' or 'balanced'; found "
                "'inverse'"
            ],
        ),
        (
            ("--weighting", "{a: 1, str: many}"),
            [
                "weighting.str: Input should be a valid number, unable to parse string as a "
                "number; found 'many'"
            ],
        ),
        (
            ("--weighting.float", "many"),
            [
                "weighting.float: Input should be a valid number, unable to parse string as a "
                "number; found 'many'"
            ],
        ),
        (
            ("--workers", "x"),
            ["workers: Input should be a valid integer or a valid tuple; found 'x'"],
        ),
        (("--workers", "0"), ["workers: Input should be greater than 0; found '0'"]),
        (("--workers", "[0, 1]"), ["workers.0: Input should be greater than 0; found 0"]),
        (
            ("--rates.lost", "0.5"),
            ["rates.lost: Input should be 'too_large' or 'empty'; found 'lost'"],
        ),
    ],
)
def test_a_wrong_value_of_a_field_of_several_types_is_one_problem_without_their_names(
    argv: tuple[str, ...], expected: list[str]
) -> None:
    assert problems(*argv) == expected


def test_a_check_of_the_whole_model_has_its_own_message() -> None:
    assert problems("--name", "forbidden") == ["name forbidden is taken; give another --name"]


def test_one_problem_is_counted_as_one() -> None:
    with pytest.raises(ConfigError, match=r"^the configuration has one problem:\n"):
        load("--epochs", "x")


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (("--config",), "--config: needs a value"),
        (("--epochs",), "--epochs: needs a value"),
        (("--epochs", "--mixed"), "--epochs: needs a value"),
        (("--options.width",), "--options.width: needs a value"),
        (("--epochs.x", "1"), "epochs: Input should be a valid integer; found {'x': 1}"),
        (("--mixed", "perhaps"), "'perhaps': options are written --KEY VALUE"),
        (("-e", "3"), "'-e': options are written --KEY VALUE"),
        (("--",), "'--': options are written --KEY VALUE"),
    ],
)
def test_a_malformed_command_line_is_explained(argv: tuple[str, ...], problem: str) -> None:
    assert problem in problems(*argv)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1, 2", "not YAML: "),
        ("a: b: c", "not YAML: "),
        ("\tepochs: 1", "not YAML: "),
        ("epochs: !!python/object/apply:os.getcwd []", "not YAML: "),
        ("day: 2025-02-30", "a date or number is invalid: day is out of range for month; correct"),
        ("epochs: 1\n\nepochs: 2", "line 3: 'epochs' is already set in line 1; merge the two, or"),
        ("optim: {lr: 1,\n  lr: 2}", "line 2: 'lr' is already set in line 1"),
        ("optim: {lr: 1}\nearly: null\noptim: {nesterov: no}", "line 3: 'optim' is already set"),
        ("- epochs\n- 3", "expected keys and values, found list"),
        ("just text", "expected keys and values, found str"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_by_name(
    tmp_path: Path, text: str, problem: str
) -> None:
    file = written(tmp_path, text)
    (found,) = problems("--config", file)
    assert found.startswith(f"--config {file}: {problem}")


def test_a_key_that_is_set_with_a_dash_and_with_an_underscore_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, "optim: {weight-decay: 1, weight_decay: 2}")
    with pytest.raises(ConfigError, match="decay: is set as 'weight-decay' and as 'weight_decay'"):
        load("--config", file)


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    (found,) = problems("--config", tmp_path)
    assert found == f"--config {tmp_path}: Is a directory; give the path of a YAML file"
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    (found,) = problems("--config", binary)
    assert found.startswith(f"--config {binary}: not YAML: ")


def test_a_date_that_there_is_not_is_a_problem_of_its_key() -> None:
    for value in ("2025-02-30", "[2025-02-30]"):
        (problem,) = problems("--day", value)
        assert problem.startswith("day: Input should be a valid date")
    (problem,) = problems("--tags", "[2025-02-30]")
    assert problem.startswith("tags: ")


def test_a_file_may_merge_maps_and_override_their_keys(tmp_path: Path) -> None:
    text = (
        "data: &a {path: x, limit: 1}\noptions:\n  b: &b {<<: *a, limit: 2}\n  c: {<<: *b, path: y}"
    )
    found = load("--config", written(tmp_path, text))
    assert found.options == {"b": {"path": "x", "limit": 2}, "c": {"path": "y", "limit": 2}}


@pytest.mark.parametrize("text", ["", "# nothing\n", "optim:\n  # lr: 1\n"])
def test_an_empty_file_or_heading_sets_nothing(tmp_path: Path, text: str) -> None:
    assert load("--config", written(tmp_path, text)) == Job()


def test_a_wrong_configuration_is_a_wrong_request() -> None:
    assert issubclass(ConfigError, RequestError)
    assert ConfigError.exit_code == 2


# ------------------------------------------------------------------ printing and help


def printed(*argv: object, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        load(*argv)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_print_config_shows_every_key_and_loads_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--optim.lr", "1e-3", "--data", "rows.csv", "--tags", "['007', 'null', '1e-3']")
    text = printed(*argv, "--print-config", capsys=capsys)
    assert load("--config", written(tmp_path, text)) == load(*argv)
    keys = set(leaves(yaml.safe_load(text)))
    assert {key for key, _, _ in config.iter_fields(Job)} - {"data", "vary"} == keys


def test_print_config_of_a_wrong_configuration_is_refused() -> None:
    assert problems("--print-config", "--epochs", "x")


# YAML 1.1 takes these three for line breaks
_TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\x85\u2028\u2029"), max_size=30
)


@given(
    name=_TEXT.filter(lambda text: text != "forbidden"),
    tags=st.lists(_TEXT, max_size=4),
    lr=st.floats(min_value=1e-300, max_value=1e300),
    options=st.dictionaries(
        _TEXT, st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | _TEXT
    ),
    data=st.none() | st.builds(Source, path=_TEXT.filter(bool), limit=st.none() | st.integers()),
)
def test_any_configuration_survives_print_config(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    tags: list[str],
    lr: float,
    options: dict[str, Any],
    data: Source | None,
) -> None:
    job = Job(name=name, tags=tags, options=options, optim=Optim(lr=lr), data=data)
    file = tmp_path_factory.mktemp("dump") / "job.yaml"
    file.write_bytes(config.dump(job).encode())
    assert load("--config", file) == job


@given(name=_TEXT.filter(lambda text: text != "forbidden"))
def test_any_text_can_be_given_on_the_command_line(name: str) -> None:
    assert load(f"--name={name}").name == name


# ------------------------------------------------------------------ the word none


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--weighting", "none"), {"weighting": "none"}),
        (("--weighting=none",), {"weighting": "none"}),
        (("--weighting", "{a: 2}"), {"weighting": {"a": 2.0}}),
        (("--vary", "none"), {"vary": {"preset": "none"}}),
        (("--vary.preset", "none"), {"vary": {"preset": "none"}}),
        (("--vary", "none", "--vary.flip", "none"), {"vary": {"preset": "none", "flip": None}}),
    ],
)
def test_none_is_a_word_where_it_is_one_of_the_choices_and_no_value_elsewhere(
    argv: tuple[str, ...], expected: dict[str, Any]
) -> None:
    assert load(*argv) == Job.model_validate(expected)


@pytest.mark.parametrize("word", ["null", "None"])
def test_other_words_for_no_value_are_not_the_choice_none(word: str) -> None:
    (problem, *_) = problems("--weighting", word)
    assert problem.startswith("weighting")


@pytest.mark.parametrize(
    "argv",
    [
        ["--augment", "none", "--loss.class-weights", "none", "--model.weights", "none"],
        ["--augment.preset=none", "--loss.class_weights=none", "--model.weights=null"],
    ],
)
def test_training_takes_none_where_it_is_a_choice(argv: list[str]) -> None:
    from imgcls.training.config import TrainConfig

    required = ["--data.train", "m.csv", "--output", "o"]
    found = config.load(TrainConfig, [*required, *argv])
    assert (found.augment.preset, found.loss.class_weights) == ("none", "none")
    assert found.model.weights is None


# ------------------------------------------------------------------ the shipped job and command


@pytest.mark.parametrize("job", sorted(file.stem for file in (REPOSITORY / "jobs").glob("*.yaml")))
def test_every_shipped_yaml_loads_and_shows_every_key(job: str) -> None:
    file = REPOSITORY / "jobs" / f"{job}.yaml"
    command = cli.COMMANDS[job]
    model = command.load_model()
    loaded = config.load(model, ["--config", str(file)])
    shown = set(leaves(yaml.safe_load(file.read_text(encoding="utf-8"))))
    taken = set(leaves(loaded.model_dump(exclude_none=job == "tune")))
    if job == "tune":  # all keys of a training are in train.yaml
        shown, taken = ({k for k in keys if k.startswith("tune.")} for keys in (shown, taken))
        taken.add("tune.max_concurrent")
    assert shown == taken


def test_the_shipped_predict_yaml_has_the_true_defaults() -> None:
    file = REPOSITORY / "jobs" / "predict.yaml"
    loaded = config.load(PredictConfig, ["--config", str(file)])
    required = {"manifest": loaded.manifest.path, "model": loaded.model, "output": loaded.output}
    assert loaded == PredictConfig.model_validate(required)


def test_the_command_refuses_a_wrong_configuration_with_exit_code_2(tmp_path: Path) -> None:
    file = written(tmp_path, "top_kk: 3\nscale: {workers: many}")
    done = imgcls("predict", "--config", file, "--workers", "2", "--max-error-rate", "1.5")
    assert done.returncode == 2
    assert done.stdout == ""
    first, *lines = done.stderr.splitlines()
    assert first == "imgcls predict: the configuration has 7 problems:"
    keys = [line.strip().partition(":")[0] for line in lines]
    assert keys == [
        "manifest", "model", "output", "max_error_rate", "scale.workers", "top_kk", "workers",
    ]  # fmt: skip
    assert "did you mean top_k?" in done.stderr
    assert "did you mean scale.workers?" in done.stderr


def test_the_command_prints_its_resolved_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--manifest", "m.csv", "--model", "b", "--output", "o", "--no-scores"]
    assert cli.main(["predict", *argv, "--print-config"]) == 0
    printed_ = capsys.readouterr().out
    assert PredictConfig.model_validate(yaml.safe_load(printed_)) == config.load(
        PredictConfig, argv
    )


@pytest.mark.parametrize("argv", [["--help"], [], ["--version"], ["no-such-job"]])
def test_the_commands_own_help_imports_nothing_heavy(argv: list[str]) -> None:
    script = (
        "import sys\n"
        "from imgcls.cli import main\n"
        f"code = main({argv!r})\n"
        "heavy = {'ray', 'torch', 'torchvision', 'matplotlib', 'pandas', 'pyarrow', 'numpy'}\n"
        "heavy |= {'grpc', 'aiohttp', 'fsspec'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert "AssertionError" not in done.stderr
    assert done.returncode == (0 if argv and argv[0].startswith("--") else 2)


def test_no_command_needs_torch_or_ray_to_refuse_a_wrong_key() -> None:
    script = (
        "import sys\n"
        "from imgcls.cli import COMMANDS, main\n"
        "heavy = {'ray', 'torch', 'torchvision', 'matplotlib', 'pandas', 'duckdb', 'fastapi'}\n"
        "for name in COMMANDS:\n"
        "    assert main([*name.split(), '--nonsense.key', '1']) == 2, name\n"
        "    assert not heavy & set(sys.modules), (name, heavy & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("nonsense.key: unknown key") == len(cli.COMMANDS)


def test_the_installed_command_lists_its_jobs() -> None:
    assert (BIN / "imgcls").exists()
    done = imgcls("--help")
    assert done.returncode == 0
    for name in cli.COMMANDS:
        assert f"  {name} " in done.stdout


def test_a_bare_on_in_a_file_is_the_key_on(tmp_path: Path) -> None:
    file = written(tmp_path, "predictions: out\nlabels: late.csv\non: camera\nslice_by: [site]")
    loaded = config.load(EvaluateConfig, ["--config", str(file)])
    assert (loaded.on, loaded.slice_by) == ("camera", ["site"])
    listed = config.load(EvaluateConfig, ["--slice-by", "camera,site"])
    assert listed.slice_by == ["camera", "site"]


def test_positional_keys_may_go_without_their_names() -> None:
    loaded = config.load(CompareConfig, ["a", "--fail-if-worse", "0.5pt", "b"])
    assert (loaded.run_a, loaded.run_b, loaded.fail_if_worse) == ("a", "b", "0.5pt")
    with pytest.raises(ConfigError, match="'c': options are written --KEY VALUE"):
        config.load(CompareConfig, ["a", "b", "c"])
    with pytest.raises(ConfigError, match=r"run_b: is required"):
        config.load(CompareConfig, ["a"])


@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("train", "data"),
        ("tune", "data"),
        ("predict", "manifest"),
        ("evaluate", "predictions"),
        ("export", "model"),
        ("serve", "model"),
        ("manifest check", "manifest"),
    ],
)
def test_the_main_argument_of_a_command_needs_no_name(
    command: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed_configs = []
    for words in (["main-argument"], [f"--{key}", "main-argument"]):
        others = ["--model", "b"] if command == "predict" else []
        output = [] if command in ("serve", "evaluate") else ["--output", "o"]
        arguments = [*command.split(), *words, *others, *output, "--print-config"]
        assert cli.main(arguments) == 0
        printed_configs.append(capsys.readouterr().out)
    assert printed_configs[0] == printed_configs[1]
    assert "main-argument" in printed_configs[0]


def test_a_list_is_given_word_by_word_or_with_commas() -> None:
    def against(*words: str) -> list[str]:
        return config.load(CheckConfig, ["m.csv", "--output", "o", *words]).against

    assert against("--against", "a.csv", "b.csv") == ["a.csv", "b.csv"]
    assert against("--against", "a.csv,b.csv") == ["a.csv", "b.csv"]
    assert against("--against", "a.csv") == ["a.csv"]
    assert against("--against=a.csv") == ["a.csv"]
    assert against("--against", "a.csv", "b.csv", "--overwrite") == ["a.csv", "b.csv"]
    # a list takes all words that follow, and what goes without a name stands before it
    words = ["--manifest", "m.csv", "--output", "o", "--against", "a.csv", "b.csv"]
    for order in (words, [*words[4:], *words[:4]]):
        loaded = config.load(CheckConfig, order)
        assert (loaded.manifest.path, loaded.against) == ("m.csv", ["a.csv", "b.csv"])
    with pytest.raises(ConfigError, match="manifest: is required"):
        config.load(CheckConfig, ["--against", "a.csv", "m.csv", "--output", "o"])
    with pytest.raises(ConfigError, match=r"'n\.csv': options are written"):
        config.load(CheckConfig, ["--manifest", "m.csv", "n.csv", "--output", "o"])


def test_an_old_key_is_refused_with_its_new_name() -> None:
    assert problems(
        *("--manifest", "m", "--model", "b", "--output", "o", "--scale.host-share", 0.5),
        *("--storage.deadline_seconds", 3),
        model=PredictConfig,
    ) == [
        "scale.host_share: was renamed; use scale.cpu_decode_fraction",
        "storage.deadline_seconds: was renamed; use storage.retry_timeout_s",
    ]
    assert problems("m", "--output", "o", "--copies.seed", 3, model=CheckConfig) == [
        "copies.seed: was renamed; use duplicates.seed"
    ]


def test_every_renamed_key_exists_under_its_new_name_and_not_under_the_old() -> None:
    keys, sections = set(), set()
    for command in cli.COMMANDS.values():
        fields = [key for key, _, _ in config.iter_fields(command.load_model())]
        keys.update(fields)
        sections.update(key.rpartition(".")[0] for key in fields)
    for old, new in formatting.RENAMED_KEYS.items():
        assert new in keys | sections, new
        assert old not in keys | sections, old


# ------------------------------------------------------------------ calls from Python


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("label", 'label(manifest="photos.csv", model="bundle", output="out")'),
        ("train", 'train(data="photos/", output="bundle")'),
        ("evaluate", 'evaluate(predictions="out")'),
        ("check", 'check(manifest="train.csv", output="out")'),
    ],
)
def test_a_first_argument_that_is_no_configuration_is_refused(function: str, call: str) -> None:
    import imgcls

    with pytest.raises(ConfigError, match=f"^{function}: the first argument is 'x'") as caught:
        getattr(imgcls, function)("x")
    assert call in str(caught.value)


def test_a_configuration_and_keys_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="call: got a Job and the keys epochs"):
        requested(Job, Job(), {"epochs": 3}, "call(epochs=3)")
    assert requested(Job, Job(), {}, "call(epochs=3)") == Job()


def test_paths_and_numbers_of_numpy_are_settings(tmp_path: Path) -> None:
    import numpy as np

    found = requested(Job, None, {"epochs": np.int64(3), "name": tmp_path}, "call()")
    assert (found.epochs, found.name) == (3, str(tmp_path))


def test_a_table_is_no_setting() -> None:
    import pandas as pd

    with pytest.raises(ConfigError, match="name: is a DataFrame; write it to a CSV or Parquet"):
        requested(Job, None, {"name": pd.DataFrame({"path": ["a"]})}, "call()")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"output": ""}, "  output: is empty"), ({"manifest": ""}, "  manifest: path: is empty")],
)
def test_an_empty_path_is_not_the_current_folder(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.build(PredictConfig, {"manifest": "m.csv", "model": "b", "output": "o", **changes})
