"""Scan of manifests: the features of every image, computed on the cluster into an output folder.

The first step of `manifest check`, `manifest stats` and `manifest build --contents`. A scan is run
and resumed as a prediction run is: finished chunks in the staging folder are not scanned again. Its
results are read where the workers wrote them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.cluster import interrupts, session
from imgcls.curation.config import ScanConfig
from imgcls.curation.scan_worker import SCAN, ScanSpec
from imgcls.data.manifests.manifest import Manifest
from imgcls.data.storage import filesystem, storage_settings
from imgcls.errors import OutputError
from imgcls.execution.completed import read_chunk_table
from imgcls.execution.plan import Plan, RunIdentity, make_plan, parse_plan, read_shard_chunk
from imgcls.execution.runner import (
    Driver,
    JobRun,
    add_resume_hint,
    load_completed,
    wait_for_placement,
)
from imgcls.inference.requests import is_on_web
from imgcls.models.bundle import Bundle, EngineName
from imgcls.runs import layout
from imgcls.runs.lease import LEASE_FOLDER, Lease
from imgcls.runs.provenance import build_provenance

SCAN_FOLDER = "_looks"
"""Folder of a scan below the output, until the results are written."""
PART_ROWS = 1_000_000


@dataclass(frozen=True)
class ScannedManifest:
    """A manifest with the features of all its images."""

    output: str
    manifest: Manifest
    plan: Plan

    def read_rows(self) -> Iterator[pa.Table]:
        """The rows of the manifest, chunk by chunk, in order."""
        for part in range(self.plan.num_parts):
            with filesystem.open_read(layout.shard_url(self.output, part)) as stream:
                shard = pq.ParquetFile(stream)
                for index in range(len(self.plan.chunks_of(part))):
                    yield read_shard_chunk(shard, self.plan, index)

    def read_tables(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        """The rows of the manifest and the features of their images, chunk by chunk, in order."""
        for chunk, rows in enumerate(self.read_rows()):
            part = self.plan.part_of(chunk)
            url = layout.chunk_url(self.output, part, chunk, self.plan.run_id)
            yield rows, read_chunk_table(url)


@dataclass(frozen=True)
class HeldOutput:
    """An output folder while its lease is held, and the stop request of the command."""

    url: str
    lease: Lease
    interruption: interrupts.Interruption


@contextlib.contextmanager
def hold_output(output: str, allowed: Sequence[str] | None = None) -> Iterator[HeldOutput]:
    """Hold the lease on an output folder; within the block, signals interrupt and release it.

    allowed: names of the files that the folder may contain besides those of a scan; None for any
    Raises OutputLocked when another driver holds it, OutputError when it cannot be written or
    contains another file.
    """
    layout.check_output_writable(output)
    if allowed is not None:
        _check_content(output, allowed)
    with interrupts.Interruption().handle_signals() as interruption:
        lease = Lease.acquire(output)
        try:
            yield HeldOutput(output, lease, interruption)
        finally:
            lease.release()


@contextlib.contextmanager
def scan_manifests(
    config: ScanConfig,
    output: HeldOutput,
    manifests: Sequence[Manifest],
    *,
    bundle: Bundle | None = None,
    engine: EngineName = "torch",
    results: Sequence[str],
) -> Iterator[list[ScannedManifest]]:
    """Scan all images that an earlier run into the same folder has not scanned.

    The scan is removed when the block ends without an error.

    bundle:  computes the embeddings too
    engine:  runs its network
    results: names of the files that the caller writes to the folder; removed with `overwrite`
    """
    if config.overwrite:
        _check_inputs(output.url, results, manifests)
        for name in (*results, SCAN_FOLDER):
            filesystem.remove(filesystem.join(output.url, name))
    with add_resume_hint(output.url, output.lease):
        session.connect()
        scanned = [
            scan_manifest(
                manifest,
                filesystem.join(output.url, SCAN_FOLDER, str(number)),
                config,
                bundle=bundle,
                engine=engine,
                lease=output.lease,
                interruption=output.interruption,
            )
            for number, manifest in enumerate(manifests)
        ]
    yield scanned
    # the next run scans again: images may have been replaced
    filesystem.remove(filesystem.join(output.url, SCAN_FOLDER))


def _check_inputs(output: str, results: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """Raise an OutputError where starting over would remove a manifest that is to be read."""
    removed = {filesystem.join(output, name) for name in results}
    for manifest in manifests:
        read = removed.intersection(filesystem.absolute(file) for file in manifest.files)
        if read:
            raise OutputError(
                f"output {output}: --overwrite would remove {min(read)}, which is a manifest to "
                "read; pass another --output"
            )


def _check_content(output: str, allowed: Sequence[str]) -> None:
    others = set(filesystem.list_names(output)) - {SCAN_FOLDER, LEASE_FOLDER, *allowed}
    if others:
        raise OutputError(
            f"output {output}: contains other files ({min(others)}); pass another --output"
        )


def scan_manifest(
    manifest: Manifest,
    output: str,
    config: ScanConfig,
    *,
    bundle: Bundle | None,
    engine: EngineName,
    lease: Lease,
    interruption: interrupts.Interruption,
) -> ScannedManifest:
    """Scan the images of one manifest into a folder of its own; Ray must be connected.

    Raises OutputError when the folder contains another run, RunFailed when it was interrupted.
    """
    plan = _load_or_make_plan(manifest, output, _build_identity(manifest, config, bundle, engine))
    completed = load_completed(output, plan, manifest)
    if remaining := completed.list_remaining():
        placement = wait_for_placement(SCAN, config.scale, interruption)
        spec = _build_spec(manifest, output, config, plan, bundle, engine, placement.batch_size)
        driver = Driver(output, lease, interruption, config.scale, config.progress_seconds)
        run = JobRun(SCAN, spec, driver)
        for _ in run.run(placement, remaining, total=plan.rows, done=completed.rows_done):
            pass
    return ScannedManifest(output, manifest, plan)


def _build_identity(
    manifest: Manifest, config: ScanConfig, bundle: Bundle | None, engine: EngineName
) -> RunIdentity:
    described = manifest.describe_identity()
    for key in ("label_column", "label_columns"):  # a scan reads no labels
        described.pop(key, None)
    return RunIdentity(
        manifest=described,
        bundle={"sha256": None if bundle is None else bundle.sha256},
        settings={
            "max_pixels": config.max_pixels,
            "max_bytes": config.max_bytes,
            "decode": None if bundle is None else bundle.spec.preprocess.decode,
            # null, as for a scan of a version without engines, which is resumed
            "engine": None if bundle is None or engine == "auto" else engine,
            "robots_opt_outs": sorted(config.storage.robots_opt_outs) or None,
        },
    )


def _load_or_make_plan(manifest: Manifest, output: str, identity: RunIdentity) -> Plan:
    """The plan of an earlier run of the same identity, else a new one."""
    stored = layout.load_run(output)
    if stored is None:
        return make_plan(
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
    identity.check_same_run(output, stored["identity"])
    return parse_plan(stored)


def _build_spec(
    manifest: Manifest,
    output: str,
    config: ScanConfig,
    plan: Plan,
    bundle: Bundle | None,
    engine: EngineName,
    batch_size: int,
) -> ScanSpec:
    return ScanSpec(
        output=output,
        plan=plan,
        path_column=manifest.path_column,
        root=manifest.root,
        batch_size=batch_size,
        max_pixels=config.max_pixels,
        max_bytes=config.max_bytes,
        io_concurrency=config.scale.io_concurrency,
        storage=storage_settings.current_settings(),
        session="",  # each pass has its own
        crash_retries=config.scale.crash_retries,
        is_on_web=is_on_web(manifest),
        bundle_url=None if bundle is None else filesystem.absolute(bundle.url),
        bundle_sha256=None if bundle is None else bundle.sha256,
        decode=None if bundle is None else bundle.spec.preprocess.decode,
        engine=engine,
    )
