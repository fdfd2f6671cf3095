"""The job of `imgcls predict` from top to bottom: check, lease, plan, run, roll up, commit.

The functions are in the order of events. Everything that can be wrong with the request is found
before Ray starts. Everything after the lease can be interrupted at any moment and is resumed by the
same command.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa

from imgcls import log
from imgcls.cluster import interrupts, session
from imgcls.config import requested
from imgcls.data.manifests.manifest import Manifest
from imgcls.data.storage import filesystem, storage_settings
from imgcls.errors import RequestError, RunFailed
from imgcls.execution.placement import Placement
from imgcls.execution.plan import DEFAULT_CHUNK_ROWS, Plan, RunIdentity, make_plan, parse_plan
from imgcls.execution.runner import (
    Driver,
    JobRun,
    add_resume_hint,
    load_completed,
    wait_for_placement,
)
from imgcls.formatting import format_count
from imgcls.inference import autotune, commit, rollup
from imgcls.inference.autotune import TunedSettings
from imgcls.inference.benchmark import BENCHMARK_IMAGES, BenchmarkInput
from imgcls.inference.config import PredictConfig as PredictConfig
from imgcls.inference.known_images import TRANSIENT_STATUSES
from imgcls.inference.nightly import NightlyRequest, PredictJob, label_new, load_planned_manifest
from imgcls.inference.nights import OutputSeries, compute_next_sequence, format_date
from imgcls.inference.publish_runs import publish_runs
from imgcls.inference.ray_metrics import RayMetrics
from imgcls.inference.registered_runs import build_model_entries
from imgcls.inference.requests import (
    check_identity,
    check_request,
    check_resumable,
    estimate_image_bytes,
    estimate_row_bytes,
    is_on_web,
    iter_image_urls,
    limit_chunk_rows,
    open_reference,
    resolve_settings,
)
from imgcls.inference.result import PredictResult as PredictResult
from imgcls.inference.rollup import PartRollup
from imgcls.inference.specs import (
    PredictSpec,
    build_run_schema,
    find_embedding_type,
    find_embedding_width,
)
from imgcls.inference.workers import LABELING
from imgcls.models.bundle import Bundle
from imgcls.models.device_support import check_device
from imgcls.models.tasks import find_task
from imgcls.runs import layout
from imgcls.runs.lease import Lease
from imgcls.runs.provenance import build_provenance
from imgcls.runs.table_counts import RunCounts, TableCounter, describe_task


def predict(config: PredictConfig | None = None, /, **settings: Any) -> PredictResult:
    """Label the images of a manifest with a bundle and commit the table.

    Parameters
    ----------
    config : PredictConfig, optional
        The whole request, instead of `settings`.
    **settings
        The keys of `imgcls predict`, nested or dotted (`**{"scale.workers": 2}`). `manifest`,
        `model` and `output` are required.

    Returns
    -------
    PredictResult
        Where the table is, its number of rows and its counts. With `since`, of the newest run.

    Raises
    ------
    RequestError
        The request is wrong; nothing was started.
    TooManyErrors
        The run finished, but a quality gate refused to commit it.
    RunFailed
        The run was interrupted. Call it again to resume.

    Examples
    --------
    >>> import imgcls
    >>> result = imgcls.label(  # doctest: +SKIP
    ...     manifest="photos.csv", model="bundle", output="out"
    ... )
    >>> result.to_pandas()[["path", "predicted_label", "confidence"]]  # doctest: +SKIP
    """
    example = 'label(manifest="photos.csv", model="bundle", output="out")'
    config = requested(PredictConfig, config, settings, example)
    if config.date is None:  # only once: midnight may pass meanwhile
        config = config.model_copy(update={"date": datetime.datetime.now(datetime.UTC).date()})
    output = filesystem.absolute(resolve_output(config.output, config.date))
    with (
        storage_settings.use_settings(config.storage),
        commit.report_exit(config.summary_json, output) as outputs,
        interrupts.Interruption().handle_signals() as interruption,
    ):
        config, manifest, bundle = check_request(config, output)
        label = functools.partial(_label_job, config, bundle, interruption, outputs)
        if config.since is None:
            result = label(_build_job(output, manifest))
        else:
            result = _label_new(config, manifest, bundle, label, outputs)
        publish_runs(config, outputs)
        if config.explain:
            from imgcls.inference.explanations import explain_runs

            explain_runs(bundle, outputs, config.explain, interruption, config.lease_seconds)
        return result


def resolve_output(output: str, date: datetime.date | None) -> str:
    """The output folder with {date} replaced by YYYY-MM-DD."""
    return output.replace("{date}", format_date(date))


def _build_job(output: str, manifest: Manifest) -> PredictJob:
    """The run of the whole manifest."""
    return PredictJob(
        output,
        manifest,
        build_run_entries=lambda: {"sequence": compute_next_sequence(output, None)},
    )


def _label_new(
    config: PredictConfig,
    manifest: Manifest,
    bundle: Bundle,
    label: Callable[[PredictJob], PredictResult],
    outputs: list[str],
) -> PredictResult:
    """With `since`: label what earlier runs lack."""
    assert config.since is not None
    request = NightlyRequest(
        series=OutputSeries(config.output, config.date),
        since=config.since,
        manifest=manifest,
        bundle_sha256=bundle.sha256,
        settings=resolve_settings(config, bundle),
        relabel=config.relabel,
        retry_failed=config.retry_failed,
        retry_errors=config.retry_errors,
        overwrite=config.overwrite,
        task=bundle.spec.task,
    )

    def return_committed(output: str, rows: int) -> PredictResult:
        outputs.append(output)
        commit.remove_staging(output)  # after a kill at the end
        return PredictResult(output, rows, None)

    return label_new(request, label, return_committed)


def _label_job(
    config: PredictConfig,
    bundle: Bundle,
    interruption: interrupts.Interruption,
    outputs: list[str],
    job: PredictJob,
) -> PredictResult:
    """Start or resume one run while holding the lease on its output."""
    check_resumable(job.output, config)
    outputs.append(job.output)
    started_at = time.monotonic()
    lease = Lease.acquire(job.output, config.lease_seconds)
    try:
        with add_resume_hint(job.output, lease):
            driver = Driver(job.output, lease, interruption, config.scale, config.progress_seconds)
            return _PredictRun(config, job, bundle, driver, started_at).run()
    finally:
        lease.release()


class _PredictRun:
    """One driver's work on a run: the state that its steps share."""

    def __init__(
        self,
        config: PredictConfig,
        job: PredictJob,
        bundle: Bundle,
        driver: Driver,
        started_at: float,
    ) -> None:
        self.config = config
        self.job = job
        self.output = job.output
        self.manifest = job.manifest
        self.bundle = bundle
        self.driver = driver
        self.started_at = started_at
        self.classes = bundle.spec.classes if config.has_predictions else []
        self.task = find_task(bundle.spec)
        self.model_entries = {**describe_task(self.task.name), **build_model_entries(bundle)}
        self.reference = open_reference(config, bundle)

    def run(self) -> PredictResult:
        """Plan or resume the run, label what is missing, commit."""
        config, output = self.config, self.output
        if config.overwrite or (self.job.start_over and not layout.is_committed(output)):
            layout.remove_run(output)
        # the rate of an earlier driver is not that of this one
        filesystem.remove(filesystem.join(output, layout.PROGRESS_FILE))
        stored = layout.load_run(output)
        if stored is not None:
            check_identity(config, self.manifest, output, self._build_identity(), stored)
            if layout.is_committed(output) and not (
                config.retry_errors and commit.has_failed_rows(output)
            ):
                return self._return_committed(stored)
        session.connect()
        image_bytes = estimate_image_bytes(config, self.manifest, self.bundle)
        self.driver = replace(self.driver, image_bytes=image_bytes)
        chunk_rows = config.chunk_rows or DEFAULT_CHUNK_ROWS
        if stored is not None:
            chunk_rows = parse_plan(stored).chunk_rows
        placement = wait_for_placement(
            LABELING, config.scale, self.driver.interruption, image_bytes * chunk_rows
        )
        check_device(config.precision, config.engine, placement.device)
        self.plan = parse_plan(stored) if stored is not None else self._make_plan(placement)
        run = layout.load_run(output)
        assert run is not None
        with log.context(run_id=self.plan.run_id):
            return self._run_chunks(run, placement, is_resumed=stored is not None)

    def _run_chunks(
        self, run: dict[str, Any], placement: Placement, *, is_resumed: bool
    ) -> PredictResult:
        """Label the remaining chunks, retry failed rows if requested, commit."""
        config = self.config
        tuned = self._tune(run, placement)
        placement = tuned.apply_to(placement)
        self.spec = self._build_spec(run, tuned)
        self.job_run = JobRun(
            LABELING,
            self.spec,
            self.driver,
            adapt=tuned.apply_to,
            observers=[RayMetrics(self.plan.run_id)],
        )
        counts = self._run_first_pass(placement)
        if is_resumed and config.retry_errors:
            counts = self._retry_rows(placement, None) or counts
        elif is_resumed and config.since is not None and "refused" in run:
            # a quality gate refused it before: rows that may succeed now are retried
            counts = self._retry_rows(placement, TRANSIENT_STATUSES) or counts
        return self._commit(run, counts)

    def _build_identity(self) -> RunIdentity:
        return RunIdentity(
            manifest=self.manifest.describe_identity(),
            bundle={"sha256": self.bundle.sha256},
            settings=resolve_settings(self.config, self.bundle),
        )

    def _return_committed(self, stored: dict[str, Any]) -> PredictResult:
        rows = parse_plan(stored).rows
        commit.remove_staging(self.output)  # after a kill at the end
        done = "no row failed, nothing to retry" if self.config.retry_errors else "nothing to do"
        text = f"{self.output}: committed before, {format_count(rows, 'row')}; {done}"
        log.emit("committed", text)
        return PredictResult(self.output, rows, None)

    def _make_plan(self, placement: Placement) -> Plan:
        """Plan the run: write the manifest shards and `_run.json`."""
        config, classes = self.config, self.classes
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
                row_bytes=estimate_row_bytes(config, self.bundle),
                limit=config.limit,
                provenance=build_provenance(config.model_dump(mode="json", exclude={"storage"})),
                classes=classes if config.has_predictions else None,
                max_chunk_rows=limit_chunk_rows(config, self.bundle),
                # batches of a GPU are larger than the smallest chunks
                workers=placement.workers if placement.device == "cpu" else 1,
                may_be_empty=config.since is not None,
                # after a first night, a few new rows may all have labels of new classes
                any_labels=comparison is not None and bool(comparison.past_runs.committed),
                notes={**self.job.build_run_entries(), **self.model_entries},
            )
        except RequestError:
            filesystem.remove(filesystem.join(self.output, layout.STAGING_FOLDER))
            raise
        log.emit(
            "plan",
            f"{format_count(plan.rows, 'row')} in {format_count(plan.num_chunks, 'chunk')} of "
            f"{plan.chunk_rows}, {format_count(plan.num_parts, 'final file')}",
            **asdict(plan),
        )
        if comparison is not None:
            run = layout.load_run(self.output)
            assert run is not None
            self.manifest = load_planned_manifest(self.output, run, self.manifest)
            comparison.close()
        return plan

    @functools.cached_property
    def counter(self) -> TableCounter:
        """Counts the rows of the table, whose manifest is that of the plan."""
        if not self.config.has_predictions:
            return TableCounter(())
        return TableCounter.from_manifest(self.manifest, self.classes, self.task.name)

    def _tune(self, run: dict[str, Any], placement: Placement) -> TunedSettings:
        """The automatic settings: those that the run has stored, else chosen and stored now."""
        config = self.config

        def build_input(rows_per_worker: int) -> BenchmarkInput:
            urls = itertools.islice(iter_image_urls(self.manifest), BENCHMARK_IMAGES)
            return BenchmarkInput(
                bundle_url=filesystem.absolute(self.bundle.url),
                decode=self.bundle.spec.preprocess.decode,
                precision=config.precision,
                rows=rows_per_worker,
                urls=tuple(urls),
                storage=storage_settings.current_settings(),
                max_bytes=config.max_bytes,
            )

        tuned = autotune.tune_settings(
            run.get("chosen"),
            config.scale,
            "never" if config.precision == "int8" else config.compile,
            placement,
            self.plan.rows,
            build_input,
            self.driver.interruption,
            engine=config.engine,
            precision=config.precision,
        )
        if "chosen" not in run:
            run["chosen"] = tuned.to_json()
            layout.write_run(self.output, run)
        return tuned

    def _build_spec(self, run: dict[str, Any], tuned: TunedSettings) -> PredictSpec:
        settings, manifest = run["identity"]["settings"], self.manifest
        return PredictSpec(
            output=self.output,
            plan=self.plan,
            bundle_url=filesystem.absolute(self.bundle.url),
            bundle_sha256=self.bundle.sha256,
            path_column=manifest.path_column,
            label_column=self.counter.label_column,
            root=manifest.root,
            top_k=settings["top_k"],
            thresholds=tuple(self.bundle.spec.resolve_thresholds(self.config.threshold)),
            scores=bool(settings["scores"]),
            scores_type=settings["scores"] or "float32",
            embeddings=find_embedding_type(settings["embeddings"]),
            has_predictions=self.config.has_predictions,
            decode=settings["decode"],
            precision=settings["precision"],
            engine=tuned.engine,
            is_engine_automatic=self.config.engine == "auto",
            compile=tuned.compile,
            batch_size=tuned.batch_size,
            max_pixels=settings["max_pixels"],
            max_bytes=settings["max_bytes"],
            io_concurrency=self.config.scale.io_concurrency,
            storage=storage_settings.current_settings(),
            session="",  # each pass has its own
            crash_retries=self.config.scale.crash_retries,
            is_on_web=is_on_web(manifest),
        )

    def _run_first_pass(self, placement: Placement) -> RunCounts:
        """Process every chunk that is not written, roll parts up as they complete, count all."""
        completed = load_completed(self.output, self.plan, self.manifest)
        parts = PartRollup(self.driver, self.plan, self.counter)
        remaining, done = completed.list_remaining(), completed.rows_done
        for part in sorted(completed.parts):
            parts.count(part)
        for part in completed.list_complete_parts():
            parts.roll_up(completed, part)
        for result in self.job_run.run(placement, remaining, total=self.plan.rows, done=done):
            finished = completed.add(result.task.chunk)
            if finished is not None:
                parts.roll_up(completed, finished)
        if not self.plan.rows:
            rollup.write_empty_part(self.output, self.plan, self._build_empty_table())
        return parts.finish(completed)

    def _build_empty_table(self) -> pa.Table:
        """The table of a run without rows, as of a night with nothing new."""
        width = find_embedding_width(self.bundle) if self.spec.embeddings else None
        added = build_run_schema(self.spec, self.bundle.spec, width)
        return pa.schema([*self.manifest.schema, *added]).empty_table()

    def _retry_rows(
        self, placement: Placement, statuses: Collection[str] | None
    ) -> RunCounts | None:
        """Process failed rows again, all or those with some statuses; replace them in their parts.

        Returns the counts of the whole run; None when there is no such row.
        """
        output, plan = self.output, self.plan
        rollup.remove_retries(output, plan)
        label = self.spec.label_column
        columns = [self.spec.path_column, *([label] if label is not None else [])]
        tasks = rollup.list_failed_rows(output, plan, columns, statuses)
        if not tasks:
            return None
        rows = sum(len(task.offsets or ()) for task in tasks)
        log.emit("retry", f"{format_count(rows, 'row')} that failed before")
        filesystem.remove(filesystem.join(output, layout.SUCCESS_FILE))
        for _ in self.job_run.run(placement, tasks, total=rows):
            pass
        parts = PartRollup(self.driver, self.plan, self.counter)
        for part in range(plan.num_parts):
            retried = [task for task in tasks if plan.part_of(task.chunk) == part]
            if retried:
                self.driver.lease.check()
                rollup.merge_retries(output, plan, part, retried)
            parts.count(part)
        return parts.finish(None)

    def _commit(self, run: dict[str, Any], counts: RunCounts) -> PredictResult:
        """Check the table against the manifest, write metrics, check the gates, mark success."""
        config, output, plan, lease = self.config, self.output, self.plan, self.driver.lease
        if counts.rows != plan.rows:
            raise RunFailed(
                f"output {output}: {format_count(counts.rows, 'row')} written, but the manifest "
                f"has {plan.rows:,}; nothing was committed. Start over with --overwrite"
            )
        lease.check()
        path_column = self.manifest.path_column
        summary = commit.write_metric_tables(
            output, plan, counts, top_k=config.top_k, path_column=path_column
        )
        if config.has_predictions:
            commit.log_metrics(summary)
        limits = commit.ErrorLimits(
            config.max_error_rate,
            config.max_error_rates,
            config.max_errors,
            is_incremental=config.since is not None,
        )
        with commit.store_refusal(run, output):
            commit.check_errors(output, plan, counts, path_column, limits)
            commit.check_drift(output, counts, self.reference, config.max_psi)
            commit.check_ood_share(output, counts, config.max_ood_share)
        lease.check()
        job_run = self.job_run
        commit.write_success(
            output,
            run=run,
            counts=counts,
            seconds={"wall": time.monotonic() - self.started_at, **job_run.stage_seconds},
            steady_rate=job_run.steady_rate,
            precision=sorted(job_run.details.get("precision", ())),
            engine=sorted(job_run.details.get("engine", ())),
        )
        commit.remove_staging(output)
        log.emit("committed", f"{format_count(counts.rows, 'row')}: {output}", rows=counts.rows)
        return PredictResult(output, counts.rows, counts)
