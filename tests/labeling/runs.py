"""Runs in miniature: a manifest on disk, its plan, and the order that a worker would get."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgcls.data.manifest import Manifest, ManifestConfig, open_manifest
from imgcls.labeling.plan import Identity, Plan, make_plan
from imgcls.labeling.work import WorkSpec

CLASSES = ["red", "green", "blue"]


def manifest_of(folder: Path, table: pa.Table, **config: Any) -> Manifest:
    """The table as a Parquet manifest in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.parquet"
    pq.write_table(table, path)
    return open_manifest(ManifestConfig(path=str(path), **config))


def identity_of(manifest: Manifest, **settings: Any) -> Identity:
    return Identity(
        manifest={"fingerprint": manifest.fingerprint(), "path_column": manifest.path_column},
        bundle={"sha256": "b" * 64},
        settings=settings,
    )


def plan_at(
    output: Path,
    manifest: Manifest,
    *,
    chunk_rows: int | None = None,
    part_rows: int = 1_000_000,
    row_bytes: int = 128,
    limit: int | None = None,
    classes: Sequence[str] = CLASSES,
    identity: Identity | None = None,
) -> Plan:
    """Plan a run in an output folder, as `predict` does."""
    return make_plan(
        str(output),
        manifest,
        identity or identity_of(manifest, limit=limit),
        chunk_rows=chunk_rows,
        part_rows=part_rows,
        row_bytes=row_bytes,
        limit=limit,
        provenance={"made by": "a test"},
        classes=list(classes),
    )


def spec_of(output: Path, plan: Plan, manifest: Manifest, bundle: str, **changes: Any) -> WorkSpec:
    """What a worker must know to do the chunks of a plan."""
    spec = WorkSpec(
        output=str(output),
        plan=plan,
        bundle_url=bundle,
        bundle_sha256="",
        path_column=manifest.path_column,
        label_column=manifest.label_column,
        root=manifest.root,
        top_k=2,
        threshold=0.0,
        scores=False,
        embeddings=False,
        precision="fp32",
        compile=False,
        batch_size=8,
        max_pixels=100_000_000,
        fetches=4,
    )
    return dataclasses.replace(spec, **changes)
