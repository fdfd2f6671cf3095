"""The workers that label images: one process per core, or two stages where there are GPUs.

Torch, and the stages with it, are imported in the workers alone.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from imgcls import log
from imgcls.cluster.imports import pause_collector
from imgcls.cluster.session import DeviceType
from imgcls.errors import BundleError, CrashingImage, first_line
from imgcls.execution.heartbeat import Attempt
from imgcls.execution.messages import ChunkTask, PreparedChunk, StageTimings
from imgcls.execution.worker import ChunkWorker, HeartbeatFn, Job, PreparedChunkWorker
from imgcls.inference.gpu_errors import handle_gpu_errors
from imgcls.inference.specs import PredictSpec
from imgcls.models.bundle import Bundle, read_description

if TYPE_CHECKING:
    from imgcls.inference.stages import PreparedImages

MAX_TRANSFER_BYTES = 512_000_000
"""Maximum size of a chunk's files that are sent to a GPU, in bytes; CPUs decode the others."""


class _ModelLoader:
    """Loads the model of a labeling worker."""

    spec: PredictSpec
    device: DeviceType
    details: dict[str, str]
    _classifier: Any
    _stages: Any

    def load(self, threads: int) -> pa.Schema:
        """Load the model; returns the schema of the prediction columns."""
        spec = self.spec
        self._stages = stages = import_stages()

        import torch

        from imgcls.data.cuda import find_worker_device
        from imgcls.models.classifier import Classifier
        from imgcls.models.large_pages import reserve_large_pages

        torch.set_num_threads(threads)
        if self.device == "cpu":
            reserve_large_pages()
        build = functools.partial(
            Classifier,
            find_unchanged_bundle(spec.bundle_url, spec.bundle_sha256),
            precision=spec.precision,  # type: ignore[arg-type]
            device=find_worker_device(self.device),
            decode=spec.decode,
            compile=spec.compile,
            batch_size=spec.batch_size,
        )
        try:
            self._classifier = build(engine=spec.engine)
        except BundleError as error:
            # the same for each worker of a run: it depends on the network and on versions alone
            if not spec.is_engine_automatic or spec.engine == "torch":
                raise
            self._classifier = build(engine="torch")
            log.emit("note", f"engine torch: {first_line(error)}")
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
    """Classifies chunks on a GPU; decodes there first what CPUs have left for it."""

    def load(self, threads: int) -> pa.Schema:
        """Load the model; a GPU that fails meanwhile ends the process."""
        with handle_gpu_errors(self.spec.batch_size):
            return super().load(threads)

    def process_prepared(
        self, rows: pa.Table, prepared: PreparedChunk, attempt: Attempt
    ) -> pa.Table:
        """Decode what is left, and classify; a GPU that fails ends the process."""
        with handle_gpu_errors(self.spec.batch_size):
            return self._decode_and_classify(rows, prepared, attempt)

    def _decode_and_classify(
        self, rows: pa.Table, prepared: PreparedChunk, attempt: Attempt
    ) -> pa.Table:
        spec, classifier, stages = self.spec, self._classifier, self._stages
        images: PreparedImages = prepared.data
        if images.jpegs:
            for row in attempt.iter_suspect_rows(rows.num_rows):
                if row in images.jpegs:
                    stages.decode_alone(images.jpegs[row], classifier)
            for row, message in attempt.crashed_rows.items():
                images.drop_jpeg(row, CrashingImage(message))
            stages.decode_on_device(images, classifier, prepared.timings)
        else:
            attempt.check_crashes()
        table: pa.Table = stages.classify_prepared(
            spec, classifier, rows, prepared.task, images, prepared.timings
        )
        return table


def prepare_chunk(
    spec: PredictSpec, rows: pa.Table, decode: bool, timings: StageTimings, attempt: Attempt
) -> PreparedImages:
    """First stage where there are GPUs: fetch a chunk's files and decode them.

    decode: whether to decode all of them; otherwise JPEGs for a GPU are verified and left for it
    """
    stages = import_stages()

    import torch

    torch.set_num_threads(1)
    preprocess = read_description(spec.bundle_url).with_decode(spec.decode).spec.preprocess
    max_device_bytes = 0 if decode else MAX_TRANSFER_BYTES
    for row in attempt.iter_suspect_rows(rows.num_rows):
        alone = rows.slice(row, 1)
        stages.prepare_on_cpu(
            spec, alone, preprocess, StageTimings(), max_device_bytes=max_device_bytes
        )
    images: PreparedImages = stages.prepare_on_cpu(
        spec,
        rows,
        preprocess,
        timings,
        attempt.crashed_rows,
        attempt.heartbeat,
        max_device_bytes,
    )
    return images


@functools.cache  # to freeze again would keep the garbage of all chunks before
def import_stages() -> ModuleType:
    """Import torch and the stages of a chunk; returns `imgcls.inference.stages`.

    The collector does not visit what was imported again.
    """
    with pause_collector():
        from imgcls.inference import stages
    gc.freeze()
    return stages


def find_unchanged_bundle(url: str, sha256: str | None) -> Bundle:
    """The bundle that the run started with; raises BundleError when it has changed.

    Its weights are read and verified once, by the classifier.
    """
    bundle = read_description(url)
    if bundle.sha256 != sha256:
        raise BundleError(
            f"bundle {url}: changed while the run was in progress. Restore it, or start over with "
            "--overwrite"
        )
    return bundle


LABELING = Job("labeling", CpuWorker, prepare_chunk, GpuWorker)
"""The job of `imgcls predict`."""
