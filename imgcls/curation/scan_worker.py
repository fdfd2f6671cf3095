"""The workers that scan images for checks and statistics, one process per core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from imgcls.data.decoding.preprocess import DecodeMode
from imgcls.execution.messages import ChunkTask, StageTimings
from imgcls.execution.worker import ChunkWorker, HeartbeatFn, Job
from imgcls.inference.specs import ImageSpec
from imgcls.inference.workers import find_unchanged_bundle, import_stages
from imgcls.models.bundle import EngineName


@dataclass(frozen=True, kw_only=True)
class ScanSpec(ImageSpec):
    """A run that computes features of the images; with a bundle, their embeddings too."""

    bundle_url: str | None
    bundle_sha256: str | None
    decode: DecodeMode | None
    engine: EngineName = "torch"


class ScanWorker(ChunkWorker[ScanSpec]):
    """Computes the features of a chunk's images."""

    def load(self, threads: int) -> pa.Schema:
        """Load the model, if there is one."""
        import_stages()

        import torch

        from imgcls.curation import scan_stage
        from imgcls.models.classifier import Classifier

        torch.set_num_threads(threads)
        self._scan_chunk = scan_stage.scan_chunk
        self._classifier: Classifier | None = None
        if self.spec.bundle_url is not None:
            bundle = find_unchanged_bundle(self.spec.bundle_url, self.spec.bundle_sha256)
            self._classifier = Classifier(
                bundle, decode=self.spec.decode, engine=self.spec.engine, device=self.device
            )
            self.details = {
                "precision": self._classifier.precision,
                "engine": self._classifier.engine,
            }
        classifier = self._classifier
        return scan_stage.scan_schema(None if classifier is None else classifier.embedding_width)

    def process(
        self,
        rows: pa.Table,
        task: ChunkTask,
        timings: StageTimings,
        crashed_rows: Mapping[int, str],
        heartbeat: HeartbeatFn,
    ) -> pa.Table:
        """Fetch the images, compute their features, and their embeddings if there is a model."""
        return self._scan_chunk(
            self.spec, self._classifier, rows, task, timings, crashed_rows, heartbeat
        )


SCAN = Job("scan", ScanWorker)
"""The job that checks and statistics begin with."""
