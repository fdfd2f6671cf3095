"""The labelling job from top to bottom: check, take the lease, plan, work, roll up, commit.

Reads as the order of events. Everything that can be wrong with the request is found before Ray is
asked for anything; everything after the lease can be broken off at any moment and resumed by the
same command.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import ray
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from imgcls import log
from imgcls.cluster import autoscaler, session
from imgcls.config import Section, UnitFloat, requested
from imgcls.data import filesystem, object_store
from imgcls.data.filesystem import MAX_IMAGE_BYTES
from imgcls.data.manifest import ManifestConfig, open_manifest
from imgcls.data.object_store import StorageConfig
from imgcls.data.preprocess import DecodeMode
from imgcls.errors import (
    CrashingImage,
    OutputError,
    RequestError,
    RunFailed,
    TooManyErrors,
)
from imgcls.execution import completed
from imgcls.execution.completed import CompletedChunks
from imgcls.execution.messages import ChunkResult, ChunkTask, PredictSpec
from imgcls.execution.placement import ROLLUP_TASK_CPUS, Placement, ScaleConfig
from imgcls.execution.plan import (
    DEFAULT_CHUNK_ROWS,
    Plan,
    RunIdentity,
    make_plan,
    parse_plan,
    restore_shards,
)
from imgcls.execution.progress import Progress
from imgcls.execution.runner import ChunkRunner, add_resume_hint, wait_for_placement
from imgcls.inference import autotune, commit, gates
from imgcls.inference.autotune import TunedSettings
from imgcls.inference.gates import ErrorStatus
from imgcls.inference.incremental import SinceConfig
from imgcls.inference.keys import TRANSIENT_STATUSES
from imgcls.inference.nightly import NightlyRequest, PredictJob, label_new, load_planned_manifest
from imgcls.inference.nights import OutputSeries, compute_next_sequence, format_date
from imgcls.inference.ray_metrics import RayMetrics
from imgcls.inference.requests import (
    check_columns,
    check_first_image,
    check_resumable,
    check_timeouts,
    is_on_web,
    iter_image_urls,
    read_image_size,
    require_cpu_decoding,
    resolve_settings,
)
from imgcls.log import LogFormat, tell
from imgcls.metrics import PredictionCounts
from imgcls.metrics.formatting import format_summary
from imgcls.models.bundle import Bundle, Precision, load_bundle, require_int8
from imgcls.provenance import build_provenance
from imgcls.runs import layout as names
from imgcls.runs.committed import open_run
from imgcls.runs.lease import DEFAULT_TERM_SECONDS, Lease

if TYPE_CHECKING:
    import pandas as pd


class PredictConfig(Section):
    """Label every image of a manifest."""

    manifest: ManifestConfig
    """What to label."""
    model: str
    """The bundle folder, local or on a store."""
    output: str
    """The folder to write; an unfinished run in it is resumed."""
    top_k: int = Field(default=5, ge=1, le=20)
    """Labels kept per image."""
    threshold: UnitFloat | None = None
    """Accept predictions at least this confident; the bundle's own when not given."""
    embeddings: bool = False
    """Also write the input of the model's final layer."""
    scores: bool = False
    """Also write every class's score."""
    scores_type: Literal["float32", "float16"] = "float32"
    """Type of the written scores. Spark (4.3 and before) cannot read a table with float16."""
    max_error_rate: UnitFloat = 0.01
    """Commit only if at most this share of the rows failed; with since, of those that are new."""
    max_errors: NonNegativeInt | None = None
    """Failed rows allowed whatever their share; default: 10 with since, else 0."""
    max_error_rates: dict[ErrorStatus, UnitFloat] = {}
    """Shares for a status of its own, e.g. missing: 0.05; it does not count above then."""
    reference: str | None = None
    """An earlier run: tell how far predicted classes and confidence have moved from it."""
    max_psi: NonNegativeFloat | None = None
    """Commit only if neither has moved by more than this population stability index."""
    summary_json: str | None = None
    """A file that says in JSON how the run ended, whatever the exit code."""
    since: SinceConfig | None = None
    """Label only what is new, changed or failed since these runs: one run, or a folder of them."""
    relabel: bool = False
    """With since: label again what another bundle has labelled."""
    retry_failed: bool = False
    """With since: try again images that are known to be broken, though they have not changed."""
    date: datetime.date | None = None
    """What {date} in output stands for, today in UTC if none; an earlier day's run goes on so."""
    retry_errors: bool = False
    """Try again the rows that failed in an earlier run on this output."""
    overwrite: bool = False
    """Throw away what is in the output folder and start over."""
    limit: PositiveInt | None = None
    """Label only so many rows from the start of the manifest."""
    decode: DecodeMode | None = None
    """exact: decode JPEGs whole. fast: large ones at reduced size. Default: the bundle's own."""
    precision: Precision = "auto"
    """auto: bf16 where the hardware has it natively. int8: by a bundle prepared for it, on CPUs."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Compile the model; auto: where a trial before a long run finds that it pays."""
    max_pixels: int = Field(default=100_000_000, ge=1, le=178_956_970)
    """Images with more pixels are refused from their header."""
    max_bytes: PositiveInt = MAX_IMAGE_BYTES
    """Maximum size of an image file, in bytes; a larger one is too_large, and not read further."""
    chunk_rows: PositiveInt | None = None
    """Rows per unit of work; chosen from the size of the manifest when not given."""
    part_rows: PositiveInt = 1_000_000
    """Rows per final file at most; fewer when they would exceed 128 MB."""
    progress_seconds: PositiveFloat = 5.0
    """How often a job log gets a line."""
    log: LogFormat = "text"
    """json: an object a line, with the run, and for each chunk its worker, rows and times."""
    lease_seconds: PositiveFloat = DEFAULT_TERM_SECONDS
    """A driver unheard of for so long is taken to be dead."""
    scale: ScaleConfig = ScaleConfig()
    storage: StorageConfig = StorageConfig()


@dataclass(frozen=True)
class PredictResult:
    """A committed run: where it is and its counts (None when it had been committed before)."""

    output: str
    rows: int
    counts: PredictionCounts | None

    def frame(self) -> pd.DataFrame:
        """The table as pandas has it, all of it in memory: one row per manifest row, in order."""
        import pandas as pd

        parts = filesystem.list_names(filesystem.join(self.output, names.PREDICTIONS_FOLDER))
        frames = []
        for part in sorted(parts):
            with filesystem.open_read(
                filesystem.join(self.output, names.PREDICTIONS_FOLDER, part)
            ) as stream:
                frames.append(pd.read_parquet(stream))
        return pd.concat(frames, ignore_index=True)


def predict(config: PredictConfig | None = None, /, **settings: Any) -> PredictResult:
    """Label a manifest with a bundle and commit the table.

    config:   the whole request, or else
    settings: its keys, as in `label(manifest="photos.csv", model="bundle", output="out")`, nested
        or dotted (`**{"scale.workers": 2}`)
    Raises RequestError when something is wrong with what was asked (nothing was started),
    TooManyErrors when the run finished above max_error_rate (not committed), RunFailed when it
    broke off (run it again to resume).
    """
    config = requested(
        PredictConfig,
        config,
        settings,
        'label(manifest="photos.csv", model="bundle", output="out")',
    )
    log.use(config.log)
    object_store.set_process_settings(config.storage)
    if config.date is None:  # once: midnight may pass meanwhile
        config = config.model_copy(update={"date": datetime.datetime.now(datetime.UTC).date()})
    output = filesystem.absolute(resolve_output(config.output, config.date))
    with (
        gates.report_exit(config.summary_json, output) as outputs,
        session.Interruption().handle_signals() as interruption,
    ):
        return _predict(config, output, interruption, outputs)


def _predict(
    config: PredictConfig, output: str, interruption: session.Interruption, outputs: list[str]
) -> PredictResult:
    listed = open_manifest(config.manifest)
    listed = replace(listed, _compute_fingerprint=functools.cache(listed.fingerprint))
    bundle = load_bundle(config.model).with_decode(config.decode)
    if bundle.spec.preprocess.decode == "exact":
        config = require_cpu_decoding(config)
    if config.precision == "int8":
        if config.compile == "always":
            raise RequestError("compile: a network in int8 is not compiled; give one of the two")
        tell("int8", require_int8(bundle).describe_cost())
    check_columns(listed)
    check_timeouts(config, output, listed)
    check_first_image(listed, config.max_bytes)

    def label(job: PredictJob) -> PredictResult:
        check_resumable(job.output, config)
        outputs.append(job.output)
        started = time.monotonic()
        lease = Lease.acquire(job.output, config.lease_seconds)
        try:
            with add_resume_hint(job.output, lease):
                run = _PredictRun(config, job, bundle, lease, interruption, started)
                return run.run()
        finally:
            autoscaler.cancel_request()
            lease.release()

    def committed(place: str, rows: int) -> PredictResult:
        outputs.append(place)
        _remove_staging(place)  # after a kill at the end
        return PredictResult(place, rows, None)

    if config.since is None:
        return label(
            PredictJob(
                output,
                listed,
                build_run_entries=lambda: {"sequence": compute_next_sequence(output, None)},
            )
        )
    request = NightlyRequest(
        series=OutputSeries(config.output, config.date),
        since=config.since,
        manifest=listed,
        bundle_sha256=bundle.sha256,
        settings=resolve_settings(config, bundle),
        relabel=config.relabel,
        retry_failed=config.retry_failed,
        retry_errors=config.retry_errors,
        overwrite=config.overwrite,
    )
    return label_new(request, label, committed)


class _PredictRun:
    """One driver's pass over a run: the state that its steps share."""

    def __init__(
        self,
        config: PredictConfig,
        job: PredictJob,
        bundle: Bundle,
        lease: Lease,
        interruption: session.Interruption,
        started: float,
    ) -> None:
        self.config = config
        self.job = job
        self.output = job.output
        self.manifest = job.manifest
        self.bundle = bundle
        self.lease = lease
        self.interruption = interruption
        self.started = started
        self.reference = open_run(config.reference) if config.reference is not None else None
        self.resumed = False
        self.precision: set[str] = set()
        self.stage_seconds: dict[str, float] = {}
        self.steady_rate: float | None = None

    def run(self) -> PredictResult:
        config = self.config
        if config.overwrite or (self.job.start_over and not names.is_committed(self.output)):
            names.remove_run(self.output)
        # how fast the driver before was is not how fast this one is
        filesystem.remove(filesystem.join(self.output, names.PROGRESS_FILE))
        stored = names.load_run(self.output)
        if stored is not None:
            self._check_identity(stored)
            if names.is_committed(self.output) and not config.retry_errors:
                rows = parse_plan(stored).rows
                _remove_staging(self.output)  # after a kill at the end
                tell("committed", f"{self.output}: committed before, {rows:,} rows; nothing to do")
                return PredictResult(self.output, rows, None)
        session.connect()
        self.chunk_bytes = self._estimate_chunk_bytes()
        layout = wait_for_placement(config.scale, self.interruption, self.chunk_bytes)
        for reason in layout.reasons:
            tell("layout", reason)
        self.plan = parse_plan(stored) if stored is not None else self._make_plan()
        self.resumed = stored is not None
        run = names.load_run(self.output)
        assert run is not None
        log.use(config.log, run_id=self.plan.run_id)
        layout, self.choice = self._tune(run, layout)
        spec = self._build_spec(run, self.choice)
        counts = self._run_first_pass(spec, layout)
        if self.resumed and config.retry_errors:
            counts = self._retry_rows(spec, layout, None) or counts
        elif self.resumed and config.since is not None and "refused" in run:
            # it is asked for again after a gate refused it: what may have passed is tried again
            counts = self._retry_rows(spec, layout, TRANSIENT_STATUSES) or counts
        return self._commit(run, counts)

    def _check_identity(self, stored: dict[str, Any]) -> None:
        identity = self._build_identity()
        if names.is_committed(self.output) and not self.config.retry_errors:
            # a run of an earlier version has no values of settings that were added since
            known = stored["identity"]["settings"]
            settings = {key: value for key, value in identity.settings.items() if key in known}
            identity = replace(identity, settings=settings)
        differences = identity.find_differences(stored["identity"])
        if differences:
            lines = "\n".join(f"  {line}" for line in differences)
            raise OutputError(
                f"output {self.output}: holds another run:\n{lines}\n"
                "give another --output, or start over with --overwrite"
            )

    def _make_plan(self) -> Plan:
        config, classes = self.config, self.bundle.spec.classes
        score_bytes = 2 if config.scores_type == "float16" else 4
        row_bytes = 128 + score_bytes * len(classes) * config.scores + 8192 * config.embeddings
        comparison = self.job.comparison
        try:
            if comparison is not None:
                comparison.write_tables(self.output)
            plan = make_plan(
                self.output,
                self.manifest,
                self._build_identity(),
                chunk_rows=config.chunk_rows,
                part_rows=config.part_rows,
                row_bytes=row_bytes,
                limit=config.limit,
                provenance=build_provenance(config.model_dump(mode="json", exclude={"storage"})),
                classes=classes,
                may_be_empty=config.since is not None,
                # after a first night, a few new rows may all have labels of new classes
                any_labels=comparison is not None and bool(comparison.past_runs.committed),
                notes=self.job.build_run_entries(),
            )
        except RequestError:
            filesystem.remove(filesystem.join(self.output, names.STAGING_FOLDER))
            raise
        tell(
            "plan",
            f"{plan.rows:,} rows in {plan.num_chunks:,} chunks of {plan.chunk_rows}, "
            f"{plan.num_parts:,} final {'file' if plan.num_parts == 1 else 'files'}",
            **asdict(plan),
        )
        if comparison is not None:
            run = names.load_run(self.output)
            assert run is not None
            self.manifest = load_planned_manifest(self.output, run, self.manifest)
            comparison.close()
        return plan

    def _build_identity(self) -> RunIdentity:
        manifest = self.manifest
        return RunIdentity(
            manifest={
                "fingerprint": manifest.fingerprint(),
                "path_column": manifest.path_column,
                "label_column": manifest.label_column,
                "root": manifest.root,
            },
            bundle={"sha256": self.bundle.sha256},
            settings=resolve_settings(self.config, self.bundle),
        )

    def _tune(self, run: dict[str, Any], layout: Placement) -> tuple[Placement, TunedSettings]:
        """What the run chose when it began, or chooses now: by a trial, where it is a long one."""
        config = self.config
        kept = TunedSettings(**run["chosen"]) if "chosen" in run else None
        choice = kept or TunedSettings(layout.batch_size, config.compile == "always")
        may_compile = "never" if config.precision == "int8" else config.compile
        asked = autotune.plan_benchmark(config.scale, may_compile, layout, self.plan.rows, kept)
        if asked is not None:
            case = autotune.BenchmarkInput(
                bundle_url=filesystem.absolute(self.bundle.url),
                decode=self.bundle.spec.preprocess.decode,
                precision=config.precision,
                rows=self.plan.rows // layout.workers,
                urls=tuple(
                    itertools.islice(iter_image_urls(self.manifest), autotune.BENCHMARK_IMAGES)
                ),
                storage=object_store.current_settings(),
                max_bytes=config.max_bytes,
            )
            patience = autoscaler.WaitTimeout(config.scale.resource_timeout_s)
            answer = autotune.run_benchmark(
                asked,
                case,
                layout,
                self.interruption,
                lambda waited: patience.check(waited, "a worker's trial"),
            )
            decided, reasons = autotune.choose_settings(answer, case.rows)
            choice = replace(decided, compile=decided.compile or choice.compile)
            for reason in reasons:
                tell("trial", reason)
            if asked.decode:
                choice, reason = autotune.balance_decoding(answer, layout, choice)
                tell("trial", reason)
        if kept is None:
            run["chosen"] = asdict(choice)
            names.write_run(self.output, run)
        return autotune.apply_decode_split(layout, choice), choice

    def _build_spec(self, run: dict[str, Any], choice: TunedSettings) -> PredictSpec:
        settings, manifest = run["identity"]["settings"], self.manifest
        return PredictSpec(
            output=self.output,
            plan=self.plan,
            bundle_url=filesystem.absolute(self.bundle.url),
            bundle_sha256=self.bundle.sha256,
            path_column=manifest.path_column,
            label_column=manifest.label_column,
            root=manifest.root,
            top_k=settings["top_k"],
            thresholds=tuple(self.bundle.spec.resolve_thresholds(self.config.threshold)),
            scores=bool(settings["scores"]),
            scores_type=settings["scores"] or "float32",
            embeddings=settings["embeddings"],
            decode=settings["decode"],
            precision=settings["precision"],
            compile=choice.compile,
            batch_size=choice.batch_size,
            max_pixels=settings["max_pixels"],
            max_bytes=settings["max_bytes"],
            io_concurrency=self.config.scale.io_concurrency,
            storage=object_store.current_settings(),
            session="",  # each pass has its own
            crash_retries=self.config.scale.crash_retries,
            is_on_web=is_on_web(manifest),
        )

    def _estimate_chunk_bytes(self) -> int:
        """What a chunk takes on its way to a GPU: its pixels, or its files where those are more."""
        side = self.bundle.spec.preprocess.crop
        each = 3 * side * side
        may_come = [] if session.is_private_session() else autoscaler.find_max_nodes() or []
        if any(node.gpus for node in [*session.list_nodes(), *may_come]):
            sizes = [
                read_image_size(url)
                for url in itertools.islice(iter_image_urls(self.manifest), SAMPLED_FILES)
            ]
            read = [size for size in sizes if size <= self.config.max_bytes]
            each = max(each, sum(read) // max(1, len(read)))
        return each * (self.config.chunk_rows or DEFAULT_CHUNK_ROWS)

    def _run_first_pass(self, spec: PredictSpec, layout: Placement) -> PredictionCounts:
        """Do every chunk that is not durable, roll parts up as they complete, count them all."""
        book = CompletedChunks.load(self.output, self.plan)
        todo = book.list_remaining()
        if len(book.parts) < self.plan.num_parts:
            restore_shards(self.output, self.manifest, self.plan)
        if book.rows_done:
            tell("resume", f"{book.rows_done:,} of {self.plan.rows:,} rows are done")
        counting = PartRollup(self, spec)
        for part in sorted(book.parts):
            counting.count(part)
        for part in book.list_complete_parts():
            counting.roll_up(book, part)
        for done_chunk in self._run_chunks(spec, layout, todo, self.plan.rows, book.rows_done):
            whole = book.add(done_chunk)
            if whole is not None:
                counting.roll_up(book, whole)
        if not self.plan.rows:
            completed.write_empty_part(self.output, self.plan, self._build_empty_table(spec))
        return counting.finish(book)

    def _build_empty_table(self, spec: PredictSpec) -> pa.Table:
        """The table of a night on which there was nothing to do."""
        added = names.build_prediction_schema(
            labelled=spec.label_column is not None,
            scores=len(self.bundle.spec.classes) if spec.scores else None,
            scores_type=spec.scores_type,
            embedding=_find_embedding_width(self.bundle) if spec.embeddings else None,
        )
        return pa.schema([*self.manifest.schema, *added]).empty_table()

    def _retry_rows(
        self, spec: PredictSpec, layout: Placement, statuses: Collection[str] | None
    ) -> PredictionCounts | None:
        """Do failed rows, all or those of some statuses, again; exchange the parts they are in."""
        completed.remove_retries(self.output, self.plan)
        labelled = (spec.label_column,) if spec.label_column is not None else ()
        todo = completed.list_failed_rows(
            self.output, self.plan, [spec.path_column, *labelled], statuses
        )
        if not todo:
            return None
        rows = sum(len(work.offsets or ()) for work in todo)
        tell("retry", f"{rows:,} rows that failed before")
        filesystem.remove(filesystem.join(self.output, names.SUCCESS_FILE))
        for _ in self._run_chunks(spec, layout, todo, rows, 0):
            pass
        counting = PartRollup(self, spec)
        for part in range(self.plan.num_parts):
            mine = [work for work in todo if self.plan.part_of(work.chunk) == part]
            if mine:
                self.lease.check()
                completed.merge_retries(self.output, self.plan, part, mine)
            counting.count(part)
        return counting.finish(None)

    def _run_chunks(
        self, spec: PredictSpec, layout: Placement, todo: Sequence[ChunkTask], total: int, done: int
    ) -> Iterator[int]:
        if not todo:
            return
        passes = ChunkRunner(
            spec,
            self.config.scale,
            self.interruption,
            lambda fits: autotune.apply_decode_split(fits, self.choice),
            self.chunk_bytes,
        )
        telemetry = RayMetrics(self.plan.run_id)
        progress, kept = Progress(total, done, self.config.progress_seconds), time.monotonic()
        try:
            for receipt in passes.run(layout, todo):
                if receipt is None:
                    progress.tick()
                else:
                    self.precision.add(receipt.precision)
                    progress.add(receipt)
                    telemetry.record_chunk(receipt)
                    _log_chunk(receipt)
                    self.lease.check()
                    yield receipt.task.chunk
                if time.monotonic() - kept > PROGRESS_WRITE_SECONDS:
                    kept = time.monotonic()
                    self.lease.check()
                    telemetry.set_progress(progress.snapshot())
                    names.write_progress(self.output, progress.snapshot())
            telemetry.set_progress(
                progress.snapshot()
            )  # else a gauge stays at what was left before
        finally:
            progress.close()
            self.steady_rate = progress.steady_rate
            for stage, spent in progress.timings.seconds().items():
                self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + spent

    def _commit(self, run: dict[str, Any], counts: PredictionCounts) -> PredictResult:
        """Check the table against the manifest, write the metrics, pass the gate, mark success."""
        if counts.rows != self.plan.rows:
            raise RunFailed(
                f"output {self.output}: {counts.rows:,} rows are written, the manifest has "
                f"{self.plan.rows:,}; nothing was committed, start over with --overwrite"
            )
        self.lease.check()
        summary = commit.write_metric_tables(
            self.output,
            self.plan,
            counts,
            top_k=self.config.top_k,
            path_column=self.manifest.path_column,
        )
        if log.is_json():
            for row in summary.to_pylist():
                tell("metric", f"{row['metric']} {row['value']}", **row)
        else:
            log.show(format_summary(summary))
        self._check_errors(run, counts)
        if self.reference is not None:
            gates.check_drift(self.output, counts, self.reference, self.config.max_psi)
        for folder in (names.PREDICTIONS_FOLDER, names.METRICS_FOLDER, ""):
            filesystem.remove_temporary_files(filesystem.join(self.output, folder))
        self.lease.check()
        commit.write_success(
            self.output,
            run=run,
            counts=counts,
            seconds={"wall": time.monotonic() - self.started, **self.stage_seconds},
            steady_rate=self.steady_rate,
            precision=sorted(self.precision),
        )
        _remove_staging(self.output)
        tell("committed", f"{counts.rows:,} rows: {self.output}", rows=counts.rows)
        return PredictResult(self.output, counts.rows, counts)

    def _check_errors(self, run: dict[str, Any], counts: PredictionCounts) -> None:
        """Pass the gate on failed rows, or note in the run that it did not."""
        config = self.config
        allowed = config.max_errors
        if allowed is None:
            allowed = 0 if config.since is None else DEFAULT_MAX_ERRORS
        repeated = gates.count_repeated_failures(self.output, self.plan, self.manifest.path_column)
        try:
            gates.check_error_rates(
                self.output,
                counts,
                config.max_error_rate,
                config.max_error_rates,
                max_errors=allowed,
                repeated=repeated,
            )
        except TooManyErrors as error:
            names.write_run(self.output, run | {"refused": str(error)})
            raise
        if "refused" in run:
            del run["refused"]
            names.write_run(self.output, run)


def _log_chunk(done: ChunkResult) -> None:
    """What a log system or a worried person wants of a chunk that has come back."""
    if done.crashes:
        crashed = done.status.get(CrashingImage.status, 0)
        tell(
            "watch",
            f"chunk {done.task.chunk}: {done.crashes} workers died at it or were lost; it is done, "
            f"{crashed} of its rows {CrashingImage.status}",
        )
    if log.is_json():
        seconds = {name: round(value, 3) for name, value in done.timings.seconds().items()}
        tell(
            "chunk",
            f"chunk {done.task.chunk} is durable",
            chunk=done.task.chunk,
            worker=done.worker,
            node=done.worker.partition("/")[0],
            rows=done.rows,
            status=done.status,
            deaths=done.crashes,
            seconds=seconds,
        )


DEFAULT_MAX_ERRORS = 10
"""With --since: a night may be so small that one broken image is a large share of it."""
PROGRESS_WRITE_SECONDS = 10.0
"""So often the output is told how far the run is."""
SAMPLED_FILES = 16
"""From the start of the manifest, to know how large the images are."""
MAX_DRIVER_ROWS = 50_000
"""So few rows the driver counts by itself, sooner than Ray has a process ready for it."""


class PartRollup:
    """Rolls parts up and counts them on the cluster, beside the labelling, merging as they end."""

    def __init__(self, run: _PredictRun, spec: PredictSpec) -> None:
        self._run = run
        self._label_column = spec.label_column
        self._classes = run.bundle.spec.classes
        self._own = run.plan.rows <= MAX_DRIVER_ROWS
        self._rolling: dict[ray.ObjectRef, int] = {}
        self._counting: set[ray.ObjectRef] = set()
        self._total = PredictionCounts.empty(self._classes)
        if self._own:
            return
        self._shared_classes: Any = ray.put(self._classes)
        remote = ray.remote(num_cpus=ROLLUP_TASK_CPUS, max_retries=3)
        self._roll_up = remote(object_store.bind_settings(completed.roll_up))
        self._count = remote(object_store.bind_settings(completed.count_part))

    def count(self, part: int) -> None:
        """Count a part that is durable."""
        output, label_column = self._run.output, self._label_column
        if self._own:
            self._total += completed.count_part(output, part, label_column, self._classes)
            return
        task = self._count.remote(output, part, label_column, self._shared_classes)
        self._counting.add(task)

    def roll_up(self, book: CompletedChunks, part: int) -> None:
        """Start to roll a part up; parts that have ended meanwhile are entered in the ledger."""
        run = self._run
        run.lease.check()
        given = (run.output, run.plan, part, self._label_column)
        if self._own:
            self._total += completed.roll_up(*given, self._classes)
            book.mark_rolled_up(part)
            return
        self._rolling[self._roll_up.remote(*given, self._shared_classes)] = part
        self._collect(book, wait=False)

    def finish(self, book: CompletedChunks | None) -> PredictionCounts:
        """Wait for what is under way; the counts of all parts together."""
        self._collect(book, wait=True)
        return self._total

    def _collect(self, book: CompletedChunks | None, *, wait: bool) -> None:
        patience, last = (
            autoscaler.WaitTimeout(self._run.config.scale.resource_timeout_s),
            time.monotonic(),
        )
        while self._rolling or self._counting:
            pending = [*self._rolling, *self._counting]
            ready, _ = ray.wait(pending, timeout=0.2 if wait else 0)
            self._run.interruption.check()
            if not ready and not wait:
                return
            if ready:
                last = time.monotonic()
            patience.check(time.monotonic() - last, f"{len(pending)} parts that are rolled up")
            for task in ready:
                self._total += ray.get(task)
                part = self._rolling.pop(task, None)
                self._counting.discard(task)
                if part is not None and book is not None:
                    book.mark_rolled_up(part)


def resolve_output(output: str, date: datetime.date | None) -> str:
    """The output folder with {date} written out as YYYY-MM-DD."""
    return output.replace("{date}", format_date(date))


def _find_embedding_width(bundle: Bundle) -> int:
    from imgcls.models import zoo  # and torch, which no other step of the driver needs

    network = zoo.build_network(bundle.spec.architecture, len(bundle.spec.classes))
    return zoo.get_embedding_width(network)


def _remove_staging(output: str) -> None:
    """Remove what a committed run needs no more."""
    for name in (names.STAGING_FOLDER, names.PROGRESS_FILE):
        filesystem.remove(filesystem.join(output, name))
