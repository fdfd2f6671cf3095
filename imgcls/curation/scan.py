"""Every image of some manifests looked at, into a folder: how checks and descriptions begin."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import ClassVar

from pydantic import Field, PositiveFloat, PositiveInt

from imgcls.cluster import interrupts, session
from imgcls.config import Section
from imgcls.curation.examine import ScannedManifest, scan_manifest
from imgcls.data import filesystem
from imgcls.data.filesystem import MAX_IMAGE_BYTES
from imgcls.data.manifest import Manifest, ManifestConfig
from imgcls.data.storage_settings import StorageConfig
from imgcls.errors import OutputError
from imgcls.execution.placement import ScaleConfig
from imgcls.execution.runner import add_resume_hint
from imgcls.models.bundle import Bundle
from imgcls.runs import layout
from imgcls.runs.lease import LEASE_FOLDER, Lease

SCAN_FOLDER = "_looks"


class ScanConfig(Section):
    """What to look at, and how."""

    positional: ClassVar[tuple[str, ...]] = ("manifest",)

    manifest: ManifestConfig
    """The images."""
    output: str
    """The folder to write."""
    max_pixels: int = Field(default=100_000_000, ge=1, le=178_956_970)
    """Images with more pixels are refused from their header."""
    max_bytes: PositiveInt = MAX_IMAGE_BYTES
    """Maximum size of an image file, in bytes; a larger one is too_large, and not read further."""
    overwrite: bool = False
    """Throw away what is in the output folder and start over."""
    progress_seconds: PositiveFloat = 5.0
    """How often a job log gets a line."""
    scale: ScaleConfig = ScaleConfig()
    storage: StorageConfig = StorageConfig()


@contextlib.contextmanager
def scan_manifests(
    config: ScanConfig,
    output: str,
    manifests: Sequence[Manifest],
    *,
    bundle: Bundle | None = None,
    results: Sequence[str],
    beside: Sequence[str] = (),
) -> Iterator[tuple[list[ScannedManifest], Lease]]:
    """Look at all images that an earlier run into the same folder has not looked at.

    results: the names of what is to be written to the folder while its lease is held
    beside:  of what else may be there, and is left alone
    Raises OutputError when the folder holds anything else.
    """
    _check_output(output, (*results, *beside))
    if config.overwrite:
        _check_inputs(output, results, manifests)
    with interrupts.Interruption().handle_signals() as interruption:
        lease = Lease.acquire(output)
        try:
            if config.overwrite:
                for name in (*results, SCAN_FOLDER):
                    filesystem.remove(filesystem.join(output, name))
            with add_resume_hint(output, lease):
                session.connect()
                examined = [
                    scan_manifest(
                        manifest,
                        filesystem.join(output, SCAN_FOLDER, str(number)),
                        bundle=bundle,
                        max_pixels=config.max_pixels,
                        max_bytes=config.max_bytes,
                        scale=config.scale,
                        progress_seconds=config.progress_seconds,
                        lease=lease,
                        interruption=interruption,
                    )
                    for number, manifest in enumerate(manifests)
                ]
            yield examined, lease
            # asked again it looks again: images may have been mended
            filesystem.remove(filesystem.join(output, SCAN_FOLDER))
        finally:
            lease.release()


def _check_inputs(output: str, results: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """Raise an OutputError where starting over would remove what is to be read."""
    going = {filesystem.join(output, name) for name in results}
    for manifest in manifests:
        read = going.intersection(filesystem.absolute(file) for file in manifest.files)
        if read:
            raise OutputError(
                f"output {output}: --overwrite would remove {min(read)}, which is to be read; give "
                "another --output"
            )


def _check_output(output: str, results: Sequence[str]) -> None:
    layout.check_output_writable(output)
    others = set(filesystem.list_names(output)) - {SCAN_FOLDER, LEASE_FOLDER, *results}
    if others:
        raise OutputError(
            f"output {output}: holds other files ({min(others)}); give another --output"
        )
