"""The documentation site, typed by a reader who has only the built pages and a checkout.

Commands and their outputs are read from the HTML, page after page: the installation in a fresh
virtual environment, the demo, the tutorial, evaluation, nightly runs and the service.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from tests.conftest import COLORS, SHARED, draw
from tests.processes import REPOSITORY, free_port, kill_family, wait_for
from tests.s3 import environment as environment_of_store
from tests.site import Step, build_site, read_steps

WEIGHTS = SHARED / "weights" / "squeezenet1_0-imagenet.pth"
"""Weights that a reader has; without them their block is not run."""
NOT_TYPED = {
    "make venv": "the tools for development, which run this test",
    "docker": "needs Docker",
    "15 2 * * *": "a line for cron, not for a shell",
    "python - <<'PYTHON'\nfrom airflow": "a task of a DAG, for Airflow",
}
"""Blocks that are not run, by their first words, with the reason."""

MEASURED = re.compile(r"\d[\d.,]*(?: ?(?:s|ms|min|h|[MGk]i?B|B|images/s)\b)")
MEMORY = re.compile(r"\d[\d.]* of \d[\d.]* GiB")
FOLDER = re.compile(r"(?<![\w.:/])/(?:[\w.-]+/)+")
"""The folder of an absolute path: that in which a page is typed."""
VARYING = re.compile(
    r"waiting \d+%|best: epoch \d+|date=\d{4}-\d\d-\d\d|"
    r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d\S*|\b[0-9a-f]{8,}\b|:\d{4,5}\b"
)
NUMBER = re.compile(r"\d+\.\d+(?:e-?\d+)?")


def normalize(line: str) -> str:
    """A line without folders, times, sizes, dates, hashes and ports."""
    line = MEMORY.sub("#", FOLDER.sub("", line))
    return " ".join(VARYING.sub("#", MEASURED.sub("#", line)).split())


def is_like(shown: str, printed: str) -> bool:
    """Whether a line is as shown; decimals may differ by 12, or by 0.4 if both are at most 1."""
    shown, printed = normalize(shown), normalize(printed)
    if NUMBER.sub("#", shown) != NUMBER.sub("#", printed):
        return False
    pairs = zip(map(float, NUMBER.findall(shown)), map(float, NUMBER.findall(printed)), strict=True)
    return all(abs(a - b) <= (12 if max(a, b) > 1 else 0.4) for a, b in pairs)


def find_missing(shown: str, printed: str) -> str | None:
    """The first shown line that the output lacks, in order; `...` stands for any lines."""
    lines = iter(printed.splitlines())
    for line in shown.splitlines():
        if line.strip("│ ") not in ("", "...") and not any(is_like(line, each) for each in lines):
            return line
    return None


def test_output_is_compared_but_for_times_and_small_differences() -> None:
    shown = "...\nlabeled  60\naccuracy  96.67%  (88.6 to 99.0)\ndone in 3 s: /home/me/out\n"
    printed = "start\nlabeled 60\nnote\naccuracy 95.00% (86.3 to 98.3)\ndone in 12 s: /tmp/x/out\n"
    assert find_missing(shown, printed) is None
    assert find_missing(shown, printed.replace("60", "59")) == "labeled  60"
    assert find_missing(shown, printed.replace("95.00", "80.00")) == shown.splitlines()[2]
    assert find_missing("b\na\n", "a\nb\n") == "a"


@dataclass
class Terminal:
    """A shell whose folder and environment are those that the last commands left.

    printed: the outputs of all its commands
    """

    folder: Path
    environment: dict[str, str]
    port: int = field(default_factory=free_port)
    printed: str = ""

    def run(self, commands: str) -> str:
        """Run commands to their end; what they print."""
        state = self.folder / ".terminal"
        done = subprocess.run(
            ["bash", "-euc", f"{commands}\n{{ pwd; env -0; }} > {shlex.quote(str(state))}"],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}"
        folder, _, variables = state.read_text().partition("\n")
        state.unlink()
        self.folder = Path(folder)
        self.environment = dict(
            each.split("=", 1) for each in variables.rstrip("\0").split("\0") if "=" in each
        )
        self.printed += done.stdout
        return done.stdout

    @contextlib.contextmanager
    def started(self, command: str, shown: str) -> Iterator[None]:
        """A command that runs until Ctrl-C, after it printed what the page shows."""
        log = self.folder / "started.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command} --http.port {self.port}"],
                cwd=self.folder,
                env=self.environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_for(
                lambda: (
                    process.poll() is not None
                    or ("ready" in log.read_text() and not find_missing(shown, log.read_text()))
                ),
                180,
            )
            assert process.poll() is None, log.read_text()
            yield
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0, log.read_text()
        finally:
            kill_family(process.pid)
            process.wait()

    def type(
        self, steps: Sequence[Step], before: Callable[[Step], Step] = lambda step: step
    ) -> None:
        """Save the files of a page, run its commands, and compare what they print.

        before: prepares what the page assumes for a step; returns the step to type
        """
        with contextlib.ExitStack() as stack:
            for step in steps:
                if step.commands.startswith(tuple(NOT_TYPED)):
                    continue
                step = before(replace(step, commands=self._with_port(step.commands)))
                if step.file:
                    (self.folder / step.file).write_text(step.commands)
                    continue
                commands, serve, others = _split_serve(step.commands)
                printed = self.run(commands) if commands else ""
                if serve:
                    shown = self._with_port(step.output)
                    stack.enter_context(self.started(serve, shown))
                    if others:
                        self.run(others)
                else:
                    missing = find_missing(step.output, printed)
                    assert missing is None, f"{commands}\nlacks {missing!r}:\n{printed}"

    def _with_port(self, text: str) -> str:
        return text.replace(":8000", f":{self.port}")


def _split_serve(commands: str) -> tuple[str, str, str]:
    """Commands before, `imgcls serve` of, and commands after a block."""
    found = re.search(r"^imgcls serve (?!.*--detach).*$", commands, re.MULTILINE)
    if found is None:
        return commands, "", ""
    return commands[: found.start()], found[0], commands[found.end() :].strip()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Step]]:
    """The steps of a page of the built site."""
    site = build_site(tmp_path_factory.mktemp("site"))
    return lambda name: read_steps(site / "docs" / f"{name}.html")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as a reader clones it, without what this one has built."""
    folder = tmp_path_factory.mktemp("reader") / "imgcls"
    left_out = (".git", ".venv", "build", "dist", "demo", "bench-results", "wandb", "mlruns")
    shutil.copytree(
        REPOSITORY, folder, ignore=shutil.ignore_patterns(*left_out, ".*_cache", "*.egg-info")
    )
    return folder


@pytest.fixture(scope="module")
def installed(checkout: Path, pages: Callable[[str], list[Step]]) -> Terminal:
    """A terminal in which the page about the installation was typed."""
    home = checkout.parent / "home"
    home.mkdir()
    own = ("RAY_", "PYTHON", "IMGCLS_", "AWS_", "OMP_", "VIRTUAL_ENV", "COVERAGE")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    # its Ray sessions are left alone by those of other tests, and leave them alone
    terminal = Terminal(checkout, {**clean, "HOME": str(home), "RAY_ADDRESS": "local"})
    terminal.type(pages("installation"))
    return terminal


@pytest.fixture(scope="module")
def demonstrated(installed: Terminal, pages: Callable[[str], list[Step]]) -> Terminal:
    """The same terminal, in which the demo was run as on its page."""
    terminal = replace(installed)
    terminal.type(pages("demo")[:1])
    return terminal


def copy_results(terminal: Terminal, folder: Path) -> Terminal:
    """A terminal in another folder with the results of the demo, for a page that adds to them."""
    for name in ("jobs", "manifests", "demo"):
        shutil.copytree(terminal.folder / name, folder / name)
    return replace(terminal, folder=folder, port=free_port())


pytestmark = pytest.mark.timeout(3600)


@pytest.mark.slow
def test_the_installation_can_be_typed(installed: Terminal, checkout: Path) -> None:
    assert installed.run("which imgcls").strip() == f"{checkout}/.venv/bin/imgcls"
    where = installed.run("(cd / && python -c 'import imgcls; print(imgcls.__file__)')").strip()
    assert where.startswith(f"{checkout}/.venv/lib/")


@pytest.mark.slow
def test_the_demo_can_be_typed(
    demonstrated: Terminal, pages: Callable[[str], list[Step]], tmp_path: Path
) -> None:
    copy_results(demonstrated, tmp_path).type(pages("demo")[1:])


@pytest.mark.slow
def test_the_tutorial_can_be_typed(
    installed: Terminal, pages: Callable[[str], list[Step]], tmp_path: Path
) -> None:
    steps = [
        step
        for step in pages("tutorial")
        if WEIGHTS.exists() or WEIGHTS.name.partition("-")[0] not in step.commands
    ]
    if WEIGHTS.exists():
        shutil.copyfile(WEIGHTS, tmp_path / "squeezenet1_0.pth")
    replace(installed, folder=tmp_path).type(steps)


def write_tables(folder: Path) -> None:
    """The tables of a reader: test images of two sites, labels that came later, training images."""
    with (folder / "demo" / "digits-test.csv").open() as stream:
        rows = [{**row, "path": f"demo/{row['path']}"} for row in csv.DictReader(stream)]
    for name, columns in (
        ("test.csv", ("path", "label", "camera", "site")),
        ("truth.csv", ("path", "label")),
        ("train.csv", ("path", "label")),
    ):
        with (folder / name).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns, extrasaction="ignore")
            writer.writeheader()
            for number, row in enumerate(rows):
                writer.writerow({**row, "camera": number % 3, "site": "ab"[number % 2]})


def write_multilabel_bundle(folder: Path, bundle: Path) -> None:
    """A bundle for several labels per image, with a manifest of its validation images."""
    shutil.copytree(bundle, folder)
    rows: list[dict[str, object]] = []
    for number in range(60):
        file = folder / f"{number}.png"
        names = [name for bit, name in enumerate(COLORS) if number >> bit & 1]
        draw(names[0] if names else "red", seed=number).save(file)
        rows.append({"path": str(file), "label": names})
    pq.write_table(pa.Table.from_pylist(rows), folder / "validation.parquet")


@pytest.mark.slow
def test_evaluation_can_be_typed(
    demonstrated: Terminal,
    pages: Callable[[str], list[Step]],
    multilabel_bundle: Path,
) -> None:
    # not in a copy: a run has the absolute paths of its images
    terminal, folder = replace(demonstrated), demonstrated.folder
    write_tables(folder)
    shutil.copytree(folder / "demo" / "bundle", folder / "bundle")

    def prepare(step: Step) -> Step:
        if step.section == "several-labels-per-image" and (folder / "bundle").exists():
            shutil.rmtree(folder / "bundle")
            write_multilabel_bundle(folder / "bundle", multilabel_bundle)
        if "yesterday/" in step.commands:
            for name in ("yesterday", "tonight"):
                shutil.copytree(folder / "out", folder / name)
        # sections are alternatives, which write to the same folders
        for output in re.findall(r"--output ((?:val|calibrated|train)/)", step.commands):
            shutil.rmtree(folder / output, ignore_errors=True)
        return step

    terminal.type(pages("evaluation"), prepare)


@pytest.mark.slow
def test_nightly_runs_can_be_typed(
    demonstrated: Terminal,
    pages: Callable[[str], list[Step]],
    endpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store_environment = environment_of_store(endpoint)
    for name, value in store_environment.items():
        monkeypatch.setenv(name, value)
    store = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    for name in ("photos", "models"):
        store.makedirs(name, exist_ok=True)
    store.put(f"{demonstrated.folder}/demo/bundle/", "models/current/", recursive=True)
    for name in ("3", "7"):
        store.put(
            f"{demonstrated.folder}/demo/digits/test/{name}/",
            f"photos/incoming/{name}/",
            recursive=True,
        )

    def prepare(step: Step) -> Step:
        if "duckdb" in step.commands:
            for name in ("labels", "latest"):
                store.get(f"photos/{name}/", f"{tmp_path}/{name}/", recursive=True)
        return step

    terminal = replace(
        demonstrated, folder=tmp_path, environment=demonstrated.environment | store_environment
    )
    try:
        terminal.type(pages("nightly"), prepare)
    finally:
        for name in ("photos", "models"):
            store.rm(name, recursive=True)


@pytest.mark.slow
def test_the_service_can_be_typed(
    demonstrated: Terminal, pages: Callable[[str], list[Step]], tmp_path: Path
) -> None:
    terminal = copy_results(demonstrated, tmp_path)
    terminal.printed = ""
    for number, name in enumerate(("cat", "dog")):
        draw("red", (64, 64), seed=number).save(tmp_path / f"{name}.jpg")

    def prepare(step: Step) -> Step:
        keys = re.findall(r"imgcls_[\w-]{16,}", terminal.printed)
        commands = step.commands.replace("imgcls_...", keys[-1] if keys else "")
        commands = commands.replace("curl ", "curl --silent --show-error --fail-with-body ")
        return replace(
            step,
            commands=re.sub(r"\bkey\)", 'os.environ["KEY"])', commands).replace(
                "<<'PYTHON'\n", "<<'PYTHON'\nimport os\n"
            ),
        )

    terminal.type(pages("serving"), prepare)
    assert terminal.printed.count('"predictions":') == 3
    assert '"explanation":' in terminal.printed
