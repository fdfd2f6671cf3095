"""The `imgcls` command: finds the command, loads its configuration, maps errors to exit codes.

The modules of a command's configuration import neither torch nor Ray, and its function is imported
once the configuration is valid, so that help pages and wrong keys are answered at once.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import select
import sys
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from imgcls import LAZY_EXPORTS, __version__, config, log, reference
from imgcls.cluster.imports import pause_collector, skip_collection_at_exit
from imgcls.config import Section
from imgcls.errors import ConfigError, ImgclsError, Interrupted
from imgcls.formatting import suggest_names
from imgcls.reference import Command

COMMANDS = {
    "train": Command(
        "train a network on labeled images and write a bundle",
        "imgcls.training.config.TrainConfig",
        "imgcls.inference.students.train_student",
        "imgcls train --data.train demo/digits-train.csv --model.name small_cnn --epochs 2 "
        "--augment.hflip 0 --output demo/small",
        workers="training",
    ),
    "tune": Command(
        "search hyperparameters over many trainings",
        "imgcls.training.search_space.TuneConfig",
        "imgcls.training.tune.tune",
        "imgcls tune --config jobs/tune.yaml --data.train demo/digits-train.csv "
        "--tune.trials 2 --epochs 1 --augment.hflip 0 --output demo/search",
        workers="training",
    ),
    "predict": Command(
        "label the images of a manifest with a bundle and commit the table",
        "imgcls.inference.config.PredictConfig",
        "imgcls.inference.predict.predict",
        "imgcls predict --manifest demo/digits-test.csv --model demo/bundle --output "
        "demo/labels --scores --embeddings",
        workers="labeling",
    ),
    "embed": Command(
        "compute the embeddings of images, with any backbone",
        "imgcls.inference.config.EmbedConfig",
        "imgcls.inference.embed.embed",
        "imgcls embed demo/digits-test.csv --model demo/bundle --output demo/embedded",
        workers="labeling",
    ),
    "relabel": Command(
        "label a run with another head or by labeled images, from its embeddings",
        "imgcls.inference.config.RelabelConfig",
        "imgcls.inference.relabel.relabel",
        "imgcls relabel demo/labels --model demo/calibrated --output demo/relabeled",
    ),
    "publish": Command(
        "add a committed run to a Delta or Iceberg table, or to a data set on Hugging Face",
        "imgcls.publishing.config.PublishConfig",
        "imgcls.publishing.publish.publish",
        "imgcls publish demo/labels --to delta:demo/table",
    ),
    "status": Command(
        "show the progress of a run, from its output folder",
        "imgcls.inference.status.StatusConfig",
        "imgcls.inference.status.status",
        "imgcls status demo/labels",
    ),
    "evaluate": Command(
        "evaluate predictions: metrics with confidence intervals, slices, a report",
        "imgcls.evaluation.config.EvaluateConfig",
        "imgcls.evaluation.evaluate.evaluate",
        "imgcls evaluate --predictions demo/labels",
    ),
    "compare": Command(
        "compare two runs over the same images",
        "imgcls.evaluation.config.CompareConfig",
        "imgcls.evaluation.compare.compare",
        "imgcls compare demo/predictions demo/labels",
    ),
    "calibrate": Command(
        "calibrate probabilities and choose thresholds, into a new bundle",
        "imgcls.evaluation.config.CalibrateConfig",
        "imgcls.evaluation.calibrate.calibrate",
        "imgcls calibrate --model demo/bundle --predictions demo/labels --output demo/calibrated",
    ),
    "report": Command(
        "write report.html for a run or a trained bundle",
        "imgcls.evaluation.config.ReportConfig",
        "imgcls.evaluation.report.write_report",
        "imgcls report demo/bundle",
    ),
    "runs": Command(
        "list all runs, bundles and evaluations in a folder, or show the lineage of one",
        "imgcls.evaluation.config.RunsConfig",
        "imgcls.evaluation.overview.show.show_runs",
        "imgcls runs demo --html demo/runs.html",
    ),
    "select": Command(
        "select the rows of a run that are most useful to label next",
        "imgcls.evaluation.config.SelectConfig",
        "imgcls.evaluation.select.select",
        "imgcls select demo/labels --count 20 --diverse --include-labeled --output demo/next",
    ),
    "similar": Command(
        "find the images of a run that are similar to given ones",
        "imgcls.evaluation.config.SimilarConfig",
        "imgcls.evaluation.similar.find_similar",
        "imgcls similar demo/labels --to demo/digits/test/3/0059.png --k 5",
    ),
    "serve": Command(
        "serve a model over HTTP, with a demo page",
        "imgcls.serving.config.ServeConfig",
        "imgcls.serving.serve.serve",
        "imgcls serve --model demo/bundle",
        workers="labeling",
    ),
    "key new": Command(
        "create an API key for `serve`",
        "imgcls.serving.api_keys.NewKeyConfig",
        "imgcls.serving.api_keys.create_key",
        "imgcls key new --file demo/keys.yaml --name me",
    ),
    "history compact": Command(
        "merge many runs into one table with the newest row of each image",
        "imgcls.inference.history.CompactConfig",
        "imgcls.inference.history.compact",
        "imgcls history compact demo/labels --output demo/latest",
    ),
    "manifest build": Command(
        "build a manifest from a folder, a bucket or a table",
        "imgcls.curation.config.ManifestBuildConfig",
        "imgcls.curation.build.build_manifest",
        "imgcls manifest build demo/digits/test --output demo/listed --labels --contents",
    ),
    "manifest fetch": Command(
        "store the images of a list of URLs in Parquet files or WebDataset archives",
        "imgcls.curation.config.FetchConfig",
        "imgcls.curation.fetch.fetch",
        "imgcls manifest fetch demo/digits-test.csv --output demo/fetched",
    ),
    "manifest stats": Command(
        "describe a data set: classes, sizes, formats, sample images per class",
        "imgcls.curation.config.StatsConfig",
        "imgcls.curation.stats.compute_stats",
        "imgcls manifest stats demo/digits-train.csv --output demo/stats",
    ),
    "manifest split": Command(
        "split a manifest into train, val and test, or into folds",
        "imgcls.curation.config.SplitConfig",
        "imgcls.curation.split.split_manifest",
        "imgcls manifest split demo/digits-train.csv --output demo/split",
    ),
    "manifest check": Command(
        "find bad images, duplicates, leaks and suspicious labels",
        "imgcls.curation.config.CheckConfig",
        "imgcls.curation.check.check",
        "imgcls manifest check demo/digits-train.csv --against demo/digits-test.csv "
        "--output demo/check",
        workers="labeling",
    ),
    "labels import": Command(
        "merge labels from a labeling tool onto a manifest",
        "imgcls.curation.config.LabelsImportConfig",
        "imgcls.curation.import_labels.import_labels",
        "imgcls labels import demo/digits-test.csv --images demo/digits-test.csv "
        "--onto demo/digits-train.csv --output demo/merged.parquet",
    ),
    "model import": Command(
        "make a bundle from a weights file",
        "imgcls.models.config.ImportConfig",
        "imgcls.models.import_weights.import_model",
        "imgcls model import --arch resnet18 --weights resnet18.pth --classes "
        "imagenet.txt --output imagenet",
    ),
    "model zero-shot": Command(
        "make a classifier from class names, with a model of open_clip",
        "imgcls.models.config.ZeroShotConfig",
        "imgcls.models.zero_shot.make_zero_shot",
        "imgcls model zero-shot --arch open_clip:ViT-B-32 --weights clip.safetensors "
        '--classes "cat,dog" --output zero-shot',
    ),
    "model quantize": Command(
        "calibrate a bundle for int8 on CPUs and measure the loss of accuracy",
        "imgcls.evaluation.config.QuantizeConfig",
        "imgcls.evaluation.quantize.quantize_bundle",
        "imgcls model quantize --model demo/bundle --manifest demo/digits-train.csv "
        "--output demo/int8",
    ),
    "model list": Command(
        "list the architectures",
        "imgcls.models.config.ListModelsConfig",
        "imgcls.models.import_weights.list_models",
        "imgcls model list --contains resnet",
    ),
    "export": Command(
        "export a bundle to ONNX, torch.export or TorchScript",
        "imgcls.models.config.ExportConfig",
        "imgcls.models.export.export_bundle",
        "imgcls export --model demo/bundle --output demo/exported",
    ),
    "doctor": Command(
        "check a machine or a Ray cluster, and the storage for outputs",
        "imgcls.cluster.config.DoctorConfig",
        "imgcls.cluster.doctor.doctor",
        "imgcls doctor --storage demo",
    ),
    "demo": Command(
        "train on handwritten digits and label the test set",
        "imgcls.demo.DemoConfig",
        "imgcls.demo.demo",
        "imgcls demo",
        workers="training",
    ),
    "completion": Command(
        "print a completion script for bash, zsh or fish",
        "imgcls.cli.CompletionConfig",
        "imgcls.cli.print_completion",
        "imgcls completion bash",
    ),
    "reference": Command(
        "print every key of every command as Markdown",
        "imgcls.cli.ReferenceConfig",
        "imgcls.cli.print_reference",
        "imgcls reference",
    ),
}


class CompletionConfig(Section):
    """Shell completion."""

    positional: ClassVar[tuple[str, ...]] = ("shell",)

    shell: reference.Shell
    """The shell to complete in."""


def print_completion(config: CompletionConfig) -> None:
    """Print a completion script for a shell, to be evaluated in its start file."""
    print(reference.render_completion(COMMANDS, config.shell), end="")


class ReferenceConfig(Section):
    """The reference of all keys."""

    format: Literal["markdown", "stub"] = "markdown"
    """markdown: docs/reference.md. stub: the type stub of the package, imgcls/__init__.pyi."""


def print_reference(config: ReferenceConfig) -> None:
    """Print every key of every command as Markdown."""
    if config.format == "markdown":
        print(reference.render_reference(COMMANDS), end="")
        return
    by_function = {each.function: each for each in COMMANDS.values()}
    commands = {name: by_function.get(".".join(at)) for name, at in LAZY_EXPORTS.items()}
    functions = {name: each for name, each in commands.items() if each is not None}
    others = {name: at for name, at in LAZY_EXPORTS.items() if commands[name] is None}
    print(reference.render_stub(functions, others), end="")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit code.

    0: done. 1: failed, may be resumed. 2: wrong request, nothing was started. 3: finished, but a
    quality gate failed, such as max_error_rate.
    """
    _open_closed_streams()
    with _end_without_output() as failed:
        code = _main(list(sys.argv[1:] if argv is None else argv))
    return failed[0] if failed else code


def _main(arguments: list[str]) -> int:
    if arguments[:1] == ["help"] and len(arguments) > 1:
        return _main([*arguments[1:], "--help"])
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"imgcls {__version__}")
        return 0
    name, rest = _command(arguments)
    if name is not None:
        return run(name, rest)
    group = arguments[0]
    if group in reference.list_groups(COMMANDS):
        if len(arguments) == 1 or arguments[1] in ("-h", "--help"):
            print(_usage(group))
            return 0 if len(arguments) > 1 else 2
        wrong, usage = " ".join(arguments[:2]), _usage(group)
    else:
        wrong, usage = group, _usage()
    near = suggest_names(" ".join(arguments[:2]), COMMANDS, form="{!r}", limit=1)
    near = near or suggest_names(wrong, COMMANDS, form="{!r}", limit=1)
    hint = f"; {near}" if near else ""
    print(f"imgcls: no command {wrong!r}{hint}\n\n{usage}", file=sys.stderr)
    return 2


def _open_closed_streams() -> None:
    """Open /dev/null in place of standard streams that are closed, as in `imgcls ... 2>&-`.

    Python has None for them, and the files that are opened next would have their numbers.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is its own
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", closefd=False))


BROKEN_PIPE = 141
"""Exit code when the reader of stdout is gone, as of a command that SIGPIPE ended: 128 + 13."""


@contextlib.contextmanager
def _end_without_output() -> Iterator[list[int]]:
    """End without a traceback when stdout cannot be written, as in `imgcls --help | head -1`.

    Yields a list that then holds the exit code. Errors of other files are raised as usual.
    """
    failed: list[int] = []
    try:
        yield failed
        sys.stdout.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_reader_gone():
            failed.append(BROKEN_PIPE)
        elif _is_full():
            print(f"imgcls: cannot write to stdout: {error.strerror}", file=sys.stderr, flush=True)
            failed.append(1)
        else:
            raise
        # or the interpreter, which flushes at its end, complains again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_reader_gone() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except (OSError, ValueError):  # it is no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _is_full() -> bool:
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def run(name: str, argv: Sequence[str]) -> int:
    """Run a command with its options and return the exit code; scripts in jobs/ call this."""
    code = 0
    _open_closed_streams()
    skip_collection_at_exit()
    with _end_without_output() as failed, log.command_handler() as handler:
        code = _run(name, argv, handler)
    code = failed[0] if failed else code
    if "imgcls.cluster.session" in sys.modules:
        sys.modules["imgcls.cluster.session"].end_session(code)
    if "imgcls.cluster.worker_forks" in sys.modules:
        sys.modules["imgcls.cluster.worker_forks"].discard_forks()
    return code


def _run(name: str, argv: Sequence[str], handler: log.CommandHandler) -> int:
    command = COMMANDS[name]
    _escape_what_cannot_be_shown()
    try:
        with pause_collector():
            model = command.load_model()
        if any(word in ("-h", "--help") for word in argv):
            print(
                reference.format_help(
                    model,
                    prog=f"imgcls {name}",
                    description=f"{command.summary[0].upper()}{command.summary[1:]}.",
                    example=command.example,
                )
            )
            return 0
        settings = config.load(model, argv)
        handler.is_json = getattr(settings, "log", "text") == "json"
        if command.workers is not None:
            forks = importlib.import_module("imgcls.cluster.worker_forks")
            forks.prepare_forks(training=command.workers == "training")
        with pause_collector():
            function = command.load_function()
        function(settings)
    except Interrupted as error:
        print(f"imgcls {name}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except ImgclsError as error:
        print(f"imgcls {name}: {error}", file=sys.stderr, flush=True)
        if isinstance(error, ConfigError):
            _summarize_config_error(error)
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


def _summarize_config_error(error: ConfigError) -> None:
    """Write `summary_json` of a command whose settings are wrong."""
    file = error.settings.get("summary_json")
    if isinstance(file, str):
        commit = importlib.import_module("imgcls.inference.commit")
        commit.write_summary(file, {"exit_code": error.exit_code, "error": str(error)})


def _command(arguments: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, arguments[words:]
    return None, arguments


def _usage(group: str = "") -> str:
    """The commands, or those of a group, such as `manifest`."""
    names = [name for name in COMMANDS if not group or name.startswith(f"{group} ")]
    width = max(len(name) for name in names)
    lines = [
        f"usage: imgcls {f'{group} ' if group else ''}COMMAND [--config FILE.yaml] "
        "[--KEY VALUE ...]",
        "",
        "Distributed batch image classification on Ray." if not group else f"{group} commands:",
        "",
        *(f"  {name:<{width}}  {COMMANDS[name].summary}" for name in names),
        "",
        f"`imgcls {f'{group} ' if group else ''}COMMAND --help` lists the keys of a command.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
