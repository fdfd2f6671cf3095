"""The `imgcls` command: finds the job, loads its configuration, turns errors into exit codes.

Each job's room is imported only when it is called, so that `imgcls --help` answers at once.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from imgcls import __version__, config
from imgcls.errors import ConfigError, ImgclsError, Interrupted

SUMMARY = "--summary-json"


@dataclass(frozen=True)
class Command:
    """A job: where its configuration and its function are, what it is for, and a call of it.

    example: can be run after `imgcls demo`, where the repository is
    """

    summary: str
    module: str
    config: str
    function: str
    example: str


COMMANDS = {
    "train": Command(
        "train a model, write a bundle",
        "imgcls.training.train",
        "TrainConfig",
        "train",
        "imgcls train --data.train demo/digits-train.csv --model.name small_cnn --epochs 2 "
        "--augment.hflip 0 --output demo/small",
    ),
    "tune": Command(
        "search the best settings of a training",
        "imgcls.training.tune",
        "TuneConfig",
        "tune",
        "imgcls tune --config jobs/tune.yaml --data.train demo/digits-train.csv "
        "--tune.trials 2 --epochs 1 --augment.hflip 0 --output demo/search",
    ),
    "predict": Command(
        "label every image of a manifest",
        "imgcls.inference.predict",
        "PredictConfig",
        "predict",
        "imgcls predict --manifest demo/digits-test.csv --model demo/bundle --output "
        "demo/labels --scores --embeddings",
    ),
    "status": Command(
        "tell how far a labelling run is, from its output alone",
        "imgcls.inference.status",
        "StatusConfig",
        "status",
        "imgcls status demo/labels",
    ),
    "evaluate": Command(
        "judge predictions: metrics with intervals, slices, a report",
        "imgcls.evaluation.evaluate",
        "EvaluateConfig",
        "evaluate",
        "imgcls evaluate --predictions demo/labels",
    ),
    "compare": Command(
        "tell which of two runs is better, and where",
        "imgcls.evaluation.compare",
        "CompareConfig",
        "compare",
        "imgcls compare demo/predictions demo/labels",
    ),
    "calibrate": Command(
        "make confidence trustworthy and choose thresholds, into a new bundle",
        "imgcls.evaluation.calibrate",
        "CalibrateConfig",
        "calibrate",
        "imgcls calibrate --model demo/bundle --predictions demo/labels --output demo/calibrated",
    ),
    "report": Command(
        "write report.html for a run or a trained bundle",
        "imgcls.evaluation.report",
        "ReportConfig",
        "write_report",
        "imgcls report demo/bundle",
    ),
    "serve": Command(
        "label images over HTTP, with a page to try it on",
        "imgcls.serving.serve",
        "ServeConfig",
        "serve",
        "imgcls serve --model demo/bundle",
    ),
    "key new": Command(
        "make an API key for `serve`",
        "imgcls.serving.api_keys",
        "NewKeyConfig",
        "create_key",
        "imgcls key new --file demo/keys.yaml --name me",
    ),
    "history compact": Command(
        "merge many runs into one table with the newest row of each image",
        "imgcls.inference.history",
        "CompactConfig",
        "compact",
        "imgcls history compact demo/labels --output demo/latest",
    ),
    "manifest build": Command(
        "list a folder or a bucket into a manifest",
        "imgcls.curation.build",
        "ManifestBuildConfig",
        "build_manifest",
        "imgcls manifest build demo/digits/test --output demo/listed --labels --contents",
    ),
    "manifest stats": Command(
        "tell what a data set is made of, with a contact sheet per class",
        "imgcls.curation.stats",
        "StatsConfig",
        "compute_stats",
        "imgcls manifest stats demo/digits-train.csv --output demo/stats",
    ),
    "manifest split": Command(
        "split a manifest into train, val and test, or into folds",
        "imgcls.curation.split",
        "SplitConfig",
        "split_manifest",
        "imgcls manifest split demo/digits-train.csv --output demo/split",
    ),
    "manifest check": Command(
        "find bad images, copies, leaks and labels that look mistaken",
        "imgcls.curation.check",
        "CheckConfig",
        "check",
        "imgcls manifest check demo/digits-train.csv --against demo/digits-test.csv "
        "--output demo/check",
    ),
    "model import": Command(
        "make a bundle from plain weights",
        "imgcls.models.import_weights",
        "ImportConfig",
        "import_model",
        "imgcls model import --arch resnet18 --weights resnet18.pth --classes "
        "imagenet.txt --output imagenet",
    ),
    "model quantize": Command(
        "make a bundle that can be run in int8, and tell what that costs",
        "imgcls.evaluation.quantize",
        "QuantizeConfig",
        "quantize_bundle",
        "imgcls model quantize --model demo/bundle --manifest demo/digits-train.csv "
        "--output demo/int8",
    ),
    "model list": Command(
        "list the architectures",
        "imgcls.models.import_weights",
        "ListModelsConfig",
        "list_models",
        "imgcls model list --contains resnet",
    ),
    "export": Command(
        "write a bundle as ONNX, a torch.export program or TorchScript",
        "imgcls.models.export",
        "ExportConfig",
        "export_bundle",
        "imgcls export --model demo/bundle --output demo/exported",
    ),
    "demo": Command(
        "train on handwritten digits, label the test set",
        "imgcls.demo",
        "DemoConfig",
        "demo",
        "imgcls demo",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code.

    0 done; 1 failed, can be resumed; 2 the request was wrong; 3 finished above max_error_rate.
    """
    with _quiet_pipe() as broken:
        code = _main(list(sys.argv[1:] if argv is None else argv))
    return BROKEN_PIPE if broken else code


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"imgcls {__version__}")
        return 0
    name, rest = _command(arguments)
    if name is None:
        print(f"imgcls: no command {arguments[0]!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    return run(name, rest)


BROKEN_PIPE = 141
"""Exit code when the reader of stdout is gone, as of a command that SIGPIPE ended: 128 + 13."""


@contextlib.contextmanager
def _quiet_pipe() -> Iterator[list[BrokenPipeError]]:
    """End without a traceback when the reader of stdout is gone, as in `imgcls --help | head -1`.

    Yields a list that then holds the error. A pipe that breaks elsewhere is raised as usual.
    """
    broken: list[BrokenPipeError] = []
    try:
        yield broken
        sys.stdout.flush()
    except BrokenPipeError as error:
        if not _stdout_is_broken():
            raise
        broken.append(error)
        # or the interpreter, which flushes at its end, complains again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stdout_is_broken() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except (OSError, ValueError):  # it is no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def run(name: str, argv: Sequence[str]) -> int:
    """Run one job with its options; the scripts in jobs/ are this and nothing more."""
    code = 0
    with _quiet_pipe() as broken:
        code = _run(name, argv)
    code = BROKEN_PIPE if broken else code
    if "imgcls.cluster.session" in sys.modules:
        sys.modules["imgcls.cluster.session"].end_session(code)
    return code


def _run(name: str, argv: Sequence[str]) -> int:
    command = COMMANDS[name]
    _escape_what_cannot_be_shown()
    try:
        module = importlib.import_module(command.module)
        function: Callable[[Any], object] = getattr(module, command.function)
        settings = config.load(
            getattr(module, command.config),
            argv,
            prog=f"imgcls {name}",
            example=command.example,
            description=(function.__doc__ or command.summary).strip().splitlines()[0],
        )
        function(settings)
    except Interrupted as error:
        print(f"imgcls {name}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except ImgclsError as error:
        print(f"imgcls {name}: {error}", file=sys.stderr, flush=True)
        if isinstance(error, ConfigError):
            _summarize_config_error(name, argv, error)
        return error.exit_code
    except SystemExit as error:
        return int(error.code or 0)
    except KeyboardInterrupt:
        print(f"imgcls {name}: stopped", file=sys.stderr, flush=True)
        return 1
    return 0


def _escape_what_cannot_be_shown() -> None:
    """Print characters that the terminal's encoding lacks as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _summarize_config_error(name: str, argv: Sequence[str], error: ConfigError) -> None:
    """Write `--summary-json` of a command whose settings could not be read."""
    options = [word.replace("_", "-") for word in argv]
    files = [file for option, file in zip(options, argv[1:], strict=False) if option == SUMMARY]
    files += [
        word.partition("=")[2]
        for option, word in zip(options, argv, strict=True)
        if option.startswith(f"{SUMMARY}=")
    ]
    if name == "predict" and files:
        gates = importlib.import_module("imgcls.inference.gates")
        gates.write_summary(files[-1], {"exit_code": error.exit_code, "error": str(error)})


def _command(arguments: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, arguments[words:]
    return None, arguments


def _usage() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [
        "usage: imgcls COMMAND [--config FILE.yaml] [--KEY VALUE ...]",
        "",
        "Distributed batch image classification on Ray.",
        "",
        *(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()),
        "",
        "`imgcls COMMAND --help` lists a command's keys.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
