"""The workers that label images: one process per core, or two stages where there are GPUs.

Torch, and the stages with it, are imported in the workers alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from imgcls.cluster.session import DeviceType
from imgcls.errors import BundleError, CrashingImage
from imgcls.execution.heartbeat import Attempt
from imgcls.execution.messages import ChunkTask, PreparedChunk, StageTimings
from imgcls.execution.worker import ChunkWorker, HeartbeatFn, Job, PreparedChunkWorker
from imgcls.inference.gpu_errors import handle_gpu_errors
from imgcls.inference.specs import PredictSpec
from imgcls.models.bundle import Bundle, load_bundle, read_description

MAX_TRANSFER_BYTES = 512_000_000
"""Maximum size of a chunk's files that are sent to a GPU, in bytes; CPUs decode a larger chunk."""


class _ModelLoader:
    """Loads the model of a labeling worker."""

    spec: PredictSpec
    device: DeviceType
    details: dict[str, str]
    _classifier: Any
    _stages: Any

    def load(self, threads: int) -> pa.Schema:
        """Load the model; returns the schema of the prediction columns."""
        import torch

        from imgcls.data.cuda import find_worker_device
        from imgcls.inference import stages
        from imgcls.models.classifier import Classifier

        torch.set_num_threads(threads)
        spec = self.spec
        self._stages = stages
        self._classifier = Classifier(
            load_unchanged_bundle(spec.bundle_url, spec.bundle_sha256),
            precision=spec.precision,  # type: ignore[arg-type]
            engine=spec.engine,
            device=find_worker_device(self.device),
            decode=spec.decode,
            compile=spec.compile,
            batch_size=spec.batch_size,
        )
        self.details = {
            "precision": self._classifier.precision,
            "engine": self._classifier.engine,
        }
        return stages.build_schema(spec, self._classifier)


class CpuWorker(_ModelLoader, ChunkWorker[PredictSpec]):
    """Labels whole chunks, in one process per core."""

    def process(
        self,
        rows: pa.Table,
        task: ChunkTask,
        timings: StageTimings,
        crashed_rows: Mapping[int, str],
        heartbeat: HeartbeatFn,
    ) -> pa.Table:
        """Fetch, decode and classify."""
        table: pa.Table = self._stages.predict_chunk(
            self.spec, self._classifier, rows, task, timings, crashed_rows, heartbeat
        )
        return table


class GpuWorker(_ModelLoader, PreparedChunkWorker[PredictSpec]):
    """Classifies chunks on a GPU; decodes them there first where CPUs have not."""

    def load(self, threads: int) -> pa.Schema:
        """Load the model; a GPU that fails meanwhile ends the process."""
        with handle_gpu_errors(self.spec.batch_size):
            return super().load(threads)

    def process_prepared(
        self, rows: pa.Table, prepared: PreparedChunk, attempt: Attempt
    ) -> pa.Table:
        """Classify pixels, or decode and classify files; a GPU that fails ends the process."""
        with handle_gpu_errors(self.spec.batch_size):
            return self._decode_and_classify(rows, prepared, attempt)

    def _decode_and_classify(
        self, rows: pa.Table, prepared: PreparedChunk, attempt: Attempt
    ) -> pa.Table:
        spec, classifier, stages = self.spec, self._classifier, self._stages
        images = prepared.data
        if isinstance(images, list):
            for row in attempt.iter_suspect_rows(rows.num_rows):
                alone = images[row : row + 1]
                stages.prepare_on_device(spec, alone, classifier, StageTimings())
            crashed = attempt.crashed_rows
            images = [
                CrashingImage(crashed[row]) if row in crashed else file
                for row, file in enumerate(images)
            ]
            images = stages.prepare_on_device(spec, images, classifier, prepared.timings)
        else:
            attempt.check_crashes()
        table: pa.Table = stages.classify_prepared(
            spec, classifier, rows, prepared.task, images, prepared.timings
        )
        return table


def prepare_chunk(
    spec: PredictSpec, rows: pa.Table, decode: bool, timings: StageTimings, attempt: Attempt
) -> Any:
    """First stage where there are GPUs: fetch a chunk's files; decode them if `decode` is set.

    Returns the files, or `PreparedImages` where they are decoded or too large to be sent.
    """
    from imgcls.inference import stages

    if not decode:
        for row in attempt.iter_suspect_rows(rows.num_rows):
            list(stages.fetch_images(spec, rows.slice(row, 1)))
        files = _fetch_files(stages.fetch_images(spec, rows, attempt.crashed_rows), attempt)
        if files is not None:
            return files
    import torch

    torch.set_num_threads(1)
    preprocess = read_description(spec.bundle_url).with_decode(spec.decode).spec.preprocess
    for row in attempt.iter_suspect_rows(rows.num_rows):
        stages.prepare_on_cpu(spec, rows.slice(row, 1), preprocess, StageTimings())
    return stages.prepare_on_cpu(
        spec, rows, preprocess, timings, attempt.crashed_rows, attempt.heartbeat
    )


def _fetch_files(files: Iterator[Any], attempt: Attempt) -> list[Any] | None:
    """A chunk's files for a GPU to decode; None where they exceed MAX_TRANSFER_BYTES."""
    fetched, size = [], 0
    for file in files:
        size += len(file) if isinstance(file, bytes) else 0
        if size > MAX_TRANSFER_BYTES:
            return None
        fetched.append(file)
        attempt.heartbeat()
    return fetched


def load_unchanged_bundle(url: str, sha256: str | None) -> Bundle:
    """Load the bundle that the run started with; raises BundleError when it has changed."""
    bundle = load_bundle(url)
    if bundle.sha256 != sha256:
        raise BundleError(
            f"bundle {url}: changed while the run was in progress. Restore it, or start over with "
            "--overwrite"
        )
    return bundle


LABELING = Job("labeling", CpuWorker, prepare_chunk, GpuWorker)
"""The job of `imgcls predict`."""
