"""The job of `imgcls relabel`: label a committed run again, from its embeddings.

No image is read, and Ray is not needed. Part by part, the manifest columns of the run are kept and
its predictions replaced; a run that was interrupted is resumed at its first missing part.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from imgcls import log
from imgcls.cluster import interrupts
from imgcls.config import requested
from imgcls.data.manifests.image_urls import resolve_urls
from imgcls.data.manifests.manifest import normalize_labels
from imgcls.data.manifests.schemas import conform_table, widen_types
from imgcls.data.storage import filesystem, storage_settings
from imgcls.errors import OK, RequestError
from imgcls.execution.plan import Plan, RunIdentity, parse_plan
from imgcls.execution.runner import add_resume_hint
from imgcls.formatting import format_count
from imgcls.inference import commit, rollup
from imgcls.inference.config import RelabelConfig
from imgcls.inference.labelers import HeadLabeler, Labeler, NeighborLabeler
from imgcls.inference.nights import compute_next_sequence
from imgcls.inference.registered_runs import keep_relabel_version
from imgcls.inference.result import PredictResult
from imgcls.metrics.columns import encode_classes
from imgcls.runs import layout
from imgcls.runs.committed import CommittedRun, open_run
from imgcls.runs.lease import Lease
from imgcls.runs.provenance import build_provenance
from imgcls.runs.schema import build_prediction_schema, list_prediction_columns
from imgcls.runs.table_counts import RunCounts, describe_task, merge_counts

NO_EMBEDDING = "not_finite"
_NO_EMBEDDING_ERROR = "the run has no embedding of it, beyond the range of float16"
_BATCH_ROWS = 16_384
_BATCH_SCORES = 8_000_000
_MAX_PARTS = 4
"""Parts that are labeled at a time: each takes the memory of a batch, and one file is read."""
_SOURCE_KEYS = ("run_id", "committed")


def relabel(config: RelabelConfig | None = None, /, **settings: Any) -> PredictResult:
    """Label a committed run with another head or by labeled images, from its embeddings.

    Parameters
    ----------
    config : RelabelConfig, optional
        The whole request, instead of `settings`.
    **settings
        The keys of `imgcls relabel`. `source`, `output` and one of `model` and `labels` are
        required.

    Returns
    -------
    PredictResult
        Where the table is, its number of rows and its counts.

    Raises
    ------
    RequestError
        The run has no embeddings, or they are not those of the bundle's network or of the labeled
        images.
    RunFailed
        The run was interrupted. Call it again to resume.

    Examples
    --------
    >>> import imgcls
    >>> imgcls.relabel(source="out", model="newer", output="again")  # doctest: +SKIP
    """
    config = requested(
        RelabelConfig, config, settings, 'relabel(source="out", model="newer", output="again")'
    )
    with (
        storage_settings.use_settings(config.storage),
        interrupts.Interruption().handle_signals() as interruption,
    ):
        run = open_run(config.source)
        _check_source(run)
        output = filesystem.absolute(config.output)
        kept = keep_relabel_version(config, output)
        labeler = (HeadLabeler if config.labels is None else NeighborLabeler)(kept, run)
        if output == run.url:
            raise RequestError("output: is the run to label again; pass another --output")
        layout.check_output_writable(output)
        lease = Lease.acquire(output)
        try:
            with add_resume_hint(output, lease):
                return _Relabeling(config, run, labeler, output, lease, interruption).run()
        finally:
            lease.release()


def _check_source(run: CommittedRun) -> None:
    """Raise RequestError for a run that cannot be labeled again."""
    if run.merged_runs:
        raise RequestError(
            f"{run.url}: is a history of several runs; label the runs again one by one, then "
            "merge them with `imgcls history compact`"
        )
    run.check_embeddings()


class _Relabeling:
    """One relabeling: the state that its steps share."""

    def __init__(
        self,
        config: RelabelConfig,
        run: CommittedRun,
        labeler: Labeler,
        output: str,
        lease: Lease,
        interruption: interrupts.Interruption,
    ) -> None:
        self._config = config
        self._source = run
        self._labeler = labeler
        self._output = output
        self._lease = lease
        self._interruption = interruption
        self._top_k = config.top_k or run.top_k
        self._counter = replace(
            run, classes=tuple(labeler.classes), task=labeler.task.name
        ).create_counter()
        self._has_scores = config.scores or labeler.task.needs_scores
        kind = run.schema.field("embedding").type
        self._schema = build_prediction_schema(
            labeled=self._counter.label_column is not None,
            has_label_sets=labeler.label_sets is not None,
            has_ood=labeler.ood_detector is not None,
            scores=len(labeler.classes) if self._has_scores else None,
            scores_type=config.scores_type,
            embedding=kind.list_size if config.embeddings else None,
            embedding_type="float16" if pa.types.is_float16(kind.value_type) else "float32",
            task=labeler.task,
        )
        own = set(run.schema.names) - set(list_prediction_columns(run.schema))
        taken = [name for name in self._schema.names if name in own]
        if taken:
            raise RequestError(
                f"{run.url}: column {taken[0]!r} of its manifest is now an output column; predict "
                f"the images again with --manifest.drop-columns {','.join(taken)}"
            )

    def run(self) -> PredictResult:
        """Label every part that is missing, count all, commit."""
        started_at = time.monotonic()
        output, identity = self._output, self._build_identity()
        if self._config.overwrite:
            layout.remove_run(output)
        stored = layout.load_run(output)
        if stored is not None:
            identity.check_same_run(output, stored["identity"])
            if layout.is_committed(output):
                rows = self._source.rows
                log.emit(
                    "committed",
                    f"{output}: committed before, {format_count(rows, 'row')}; nothing to do",
                )
                return PredictResult(output, rows, None)
        plan = replace(parse_plan(self._source.run_record), run_id=identity.compute_run_id())
        record = self._write_record(identity, plan) if stored is None else stored
        counts = self._counter.empty()
        for part in self._label_parts(plan):
            counts = merge_counts(counts, part)
        return self._commit(record, plan, counts, started_at)

    def _build_identity(self) -> RunIdentity:
        then = self._source.run_record["identity"]
        config = self._config
        settings = {k: v for k, v in then["settings"].items() if k != "has_predictions"}
        return RunIdentity(
            manifest=then["manifest"],
            bundle={"sha256": self._labeler.sha256},
            settings={
                **settings,
                "top_k": self._top_k,
                "threshold": self._labeler.threshold,
                "scores": config.scores_type if self._has_scores else False,
                "embeddings": then["settings"]["embeddings"] if config.embeddings else False,
                # after `predict --retry-errors`, the same run has other rows and another commit
                "relabeled": {name: self._source.success_record[name] for name in _SOURCE_KEYS},
            },
        )

    def _write_record(self, identity: RunIdentity, plan: Plan) -> dict[str, Any]:
        record = {
            "identity": asdict(identity),
            "plan": asdict(plan),
            "classes": self._labeler.classes,
            "provenance": build_provenance(
                # the manifest is that of the run; its other settings are shown in reports
                self._source.provenance["config"]
                | {"model": self._labeler.model}
                | {"relabel": self._config.model_dump(mode="json", exclude={"storage"})}
            ),
            "sequence": compute_next_sequence(self._output, None),
            **describe_task(self._labeler.task.name),
            **self._labeler.model_entries,
        }
        layout.write_run(self._output, record)
        return record

    def _label_parts(self, plan: Plan) -> Iterator[RunCounts]:
        """The counts of the parts, in order; several are labeled at a time."""
        files = self._source.files
        cores = len(os.sched_getaffinity(0))
        threads = max(1, min(_MAX_PARTS, cores, len(files)))
        pool = storage_settings.create_thread_pool(threads, "relabel")
        before = torch.get_num_threads()
        torch.set_num_threads(max(1, cores // threads))  # each thread has a team of them
        try:
            yield from pool.map(partial(self._label_part, plan), range(len(files)), files)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)

    def _label_part(self, plan: Plan, part: int, url: str) -> RunCounts:
        self._lease.check()
        target = layout.part_url(self._output, part)
        if filesystem.exists(target):
            return rollup.count_part(self._output, part, self._counter)
        counts = self._counter.empty()
        with filesystem.open_write(target) as stream:
            for table in rollup.write_row_groups(stream, self._label_batches(url), plan):
                counts = merge_counts(counts, self._counter.count(table))
            self._lease.check()
        return counts

    def _label_batches(self, url: str) -> Iterator[pa.Table]:
        with filesystem.open_read(url) as stream:
            file = pq.ParquetFile(stream)
            rows = max(1, min(_BATCH_ROWS, _BATCH_SCORES // len(self._labeler.classes)))
            tables = (pa.Table.from_batches([each]) for each in file.iter_batches(rows))
            for table in tables if file.metadata.num_rows else [file.schema_arrow.empty_table()]:
                self._interruption.check()
                yield self._label(conform_table(table, widen_types(table.schema), url))

    def _label(self, table: pa.Table) -> pa.Table:
        """The manifest columns of a table, with the new predictions."""
        embedding = table["embedding"].combine_chunks()
        has_embedding = embedding.is_valid().to_numpy(zero_copy_only=False)
        vectors = embedding.flatten().to_numpy(zero_copy_only=False, writable=True)
        urls = None
        if self._labeler.needs_urls:
            paths = table[self._source.path_column].filter(pa.array(has_embedding))
            urls = resolve_urls(paths, self._source.root)
        width = embedding.type.list_size
        vectors = vectors.reshape(-1, width)
        scores = self._labeler.compute_scores(vectors, urls)
        codes = None
        if self._counter.label_column is not None:
            labels = normalize_labels(table[self._counter.label_column])
            labels = pa.chunked_array([labels])
            codes = encode_classes(labels, self._labeler.classes)[has_embedding]
        detector = self._labeler.ood_detector
        columns: dict[str, pa.Array | pa.ChunkedArray] = dict(
            self._labeler.task.build_columns(
                scores,
                self._labeler.classes,
                self._labeler.thresholds,
                top_k=self._top_k,
                codes=codes,
                label_sets=self._labeler.label_sets,
                ood=None if detector is None else detector.classify(vectors),
                scores_type=self._config.scores_type if self._has_scores else None,
            )
        )
        place = pa.array(np.cumsum(has_embedding) - 1, mask=~has_embedding)
        columns = {name: column.take(place) for name, column in columns.items()}
        columns["accepted"] = pc.fill_null(columns["accepted"], False)
        status = table["status"].cast(pa.string())
        is_lost = pc.and_(pc.equal(status, OK), pa.array(~has_embedding))
        columns["status"] = pc.if_else(is_lost, NO_EMBEDDING, status).dictionary_encode()
        columns["error"] = pc.if_else(is_lost, _NO_EMBEDDING_ERROR, table["error"])
        kept = table.drop_columns(list_prediction_columns(self._source.schema))
        for field in self._schema:
            column = columns[field.name] if field.name in columns else table[field.name]
            kept = kept.append_column(field, column.cast(field.type))
        return kept

    def _commit(
        self, record: dict[str, Any], plan: Plan, counts: RunCounts, started_at: float
    ) -> PredictResult:
        output, path_column = self._output, self._source.path_column
        summary = commit.write_metric_tables(
            output, plan, counts, top_k=self._top_k, path_column=path_column
        )
        commit.log_metrics(summary)
        self._lease.check()
        commit.write_success(
            output,
            run=record,
            counts=counts,
            seconds={"wall": time.monotonic() - started_at},
            steady_rate=None,
            precision=self._source.success_record["precision"],
            engine=[f"torch {torch.__version__}"],
        )
        log.emit("committed", f"{format_count(counts.rows, 'row')}: {output}", rows=counts.rows)
        return PredictResult(output, counts.rows, counts)
