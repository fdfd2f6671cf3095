"""Examining a manifest's images: facts of each row, by the same passes over the same chunks.

Survives what labelling survives, and is resumed as that is: what stands in `_staging` is not done
again. Nothing is labelled or rolled up; the facts are read where the workers wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.cluster import interrupts
from imgcls.curation.scan_worker import SCAN, ScanSpec
from imgcls.data import filesystem, storage_settings
from imgcls.data.manifest import Manifest
from imgcls.execution.placement import ScaleConfig
from imgcls.execution.plan import Plan, RunIdentity, make_plan, parse_plan
from imgcls.execution.runner import Driver, JobRun, load_completed, wait_for_placement
from imgcls.inference.requests import is_on_web
from imgcls.models.bundle import Bundle
from imgcls.runs import layout as names
from imgcls.runs.lease import Lease
from imgcls.runs.provenance import build_provenance

PART_ROWS = 1_000_000


@dataclass(frozen=True)
class ScannedManifest:
    """A manifest whose images have all been looked at."""

    output: str
    manifest: Manifest
    plan: Plan

    def read_rows(self) -> Iterator[pa.Table]:
        """The manifest's rows, chunk by chunk, in order."""
        for part in range(self.plan.num_parts):
            with filesystem.open_read(names.shard_url(self.output, part)) as stream:
                shard = pq.ParquetFile(stream)
                for group in range(len(self.plan.chunks_of(part))):
                    yield shard.read_row_group(group)

    def read_tables(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        """Chunk by chunk, in order: the manifest's rows, and the facts of their images."""
        for chunk, rows in enumerate(self.read_rows()):
            part = self.plan.part_of(chunk)
            url = names.chunk_url(self.output, part, chunk, self.plan.run_id)
            with filesystem.open_read(url) as file:
                yield rows, pq.read_table(file)


def scan_manifest(
    manifest: Manifest,
    output: str,
    *,
    bundle: Bundle | None,
    max_pixels: int,
    max_bytes: int,
    scale: ScaleConfig,
    progress_seconds: float,
    lease: Lease,
    interruption: interrupts.Interruption,
) -> ScannedManifest:
    """Look at every image of a manifest that has not been looked at in an earlier run.

    output: a folder of its own; Ray is connected to already
    bundle: have its embeddings too
    Raises OutputError when the folder holds another run, RunFailed when it broke off.
    """
    decode = None if bundle is None else bundle.spec.preprocess.decode
    identity = RunIdentity(
        manifest={
            "fingerprint": manifest.fingerprint(),
            "path_column": manifest.path_column,
            "root": manifest.root,
        },
        bundle={"sha256": None if bundle is None else bundle.sha256},
        settings={"max_pixels": max_pixels, "max_bytes": max_bytes, "decode": decode},
    )
    stored = names.load_run(output)
    if stored is not None:
        identity.check_same_run(output, stored["identity"])
    plan = (
        parse_plan(stored)
        if stored is not None
        else make_plan(
            output,
            manifest,
            identity,
            chunk_rows=None,
            part_rows=PART_ROWS,
            row_bytes=128,
            limit=None,
            provenance=build_provenance({}),
            classes=None,
        )
    )
    completed = load_completed(output, plan, manifest)
    if remaining := completed.list_remaining():
        placement = wait_for_placement(SCAN, scale, interruption)
        spec = ScanSpec(
            output=output,
            plan=plan,
            path_column=manifest.path_column,
            root=manifest.root,
            batch_size=placement.batch_size,
            max_pixels=max_pixels,
            max_bytes=max_bytes,
            io_concurrency=scale.io_concurrency,
            storage=storage_settings.current_settings(),
            session="",  # each pass has its own
            crash_retries=scale.crash_retries,
            is_on_web=is_on_web(manifest),
            bundle_url=None if bundle is None else filesystem.absolute(bundle.url),
            bundle_sha256=None if bundle is None else bundle.sha256,
            decode=decode,
        )
        driver = Driver(output, lease, interruption, scale, progress_seconds)
        results = JobRun(SCAN, spec, driver).run(
            placement, remaining, total=plan.rows, done=completed.rows_done
        )
        for _ in results:
            pass
    return ScannedManifest(output, manifest, plan)
