"""The check of a data set: every image looked at, then all of them compared; findings and a page.

Brings labelling's passes over images and the room that judges them together, which do not know each
other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import BeforeValidator, NonNegativeInt

from imgcls.config import Names, names, requested
from imgcls.curation.checks import duplicates, label_errors, report, rules
from imgcls.curation.checks.duplicates import DuplicatesConfig
from imgcls.curation.checks.findings import (
    DUPLICATE_ISSUES,
    MODEL_ISSUES,
    DuplicateTest,
    Finding,
    Issue,
    build_issue_table,
)
from imgcls.curation.checks.image_table import BoolArray, ImageTable, IntArray, build_image_table
from imgcls.curation.checks.label_errors import LabelErrorsConfig
from imgcls.curation.checks.rules import RulesConfig
from imgcls.curation.checks.similarity import iterate_groups
from imgcls.curation.examine import ScannedManifest
from imgcls.curation.scan import ScanConfig, scan_manifests
from imgcls.data import filesystem
from imgcls.data.manifest import Manifest, make_paths_absolute, open_manifest
from imgcls.data.preprocess import DecodeMode
from imgcls.data.storage_settings import use_settings
from imgcls.errors import ConfigError, IssuesFound, ManifestError, OutputError
from imgcls.log import tell
from imgcls.models.bundle import load_bundle
from imgcls.runs.layout import write_table

ISSUES_FILE = "issues.parquet"
CHECK_SUMMARY = "summary.json"
CHECK_REPORT = "report.html"
CLEAN_MANIFEST = "clean.parquet"

IssueList = Annotated[list[Issue], BeforeValidator(names)]


class CheckConfig(ScanConfig):
    """Check a data set: bad images, copies, leaks between manifests, labels that look mistaken."""

    against: Names = []
    """Other manifests, such as of the test set: what is in both is a leak."""
    model: str | None = None
    """A bundle: its embeddings find more copies, outliers and labels that look mistaken."""
    decode: DecodeMode | None = None
    """Decode route for the model: exact or fast (default: bundle's)."""
    output: str
    """The folder to write; with drop, NAME.parquet is the clean manifest, and NAME the folder."""
    drop: IssueList = []
    """Write the manifest without rows that have these issues; of copies the first is kept."""
    fail_on: IssueList = []
    """Exit with 3 when there is one of these."""
    rules: RulesConfig = RulesConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()
    labels: LabelErrorsConfig = LabelErrorsConfig()
    gallery: NonNegativeInt = 24
    """Images shown per issue."""


def check(config: CheckConfig | None = None, /, **settings: Any) -> pa.Table:
    """Check a data set; returns its issues (`findings.SCHEMA`), the worst first.

    config:   the whole request, or else
    settings: its keys, as in `check(manifest="train.csv", against="test.csv", output="out")`
    Raises RequestError when something is wrong with what was asked, RunFailed when it broke off
    (run it again to resume), IssuesFound for what `fail_on` names.
    """
    config = requested(CheckConfig, config, settings, 'check(manifest="train.csv", output="out")')
    with use_settings(config.storage):
        return _check(config)


def _check(config: CheckConfig) -> pa.Table:
    _check_request(config)
    output, clean = _resolve_outputs(config)
    manifests = list(_open_manifests(config))
    _check_clean_target(clean, output, manifests, config.overwrite)
    bundle = None
    if config.model is not None:
        bundle = load_bundle(config.model).with_decode(config.decode)
    results = (CHECK_REPORT, CHECK_SUMMARY, ISSUES_FILE, CLEAN_MANIFEST)
    with scan_manifests(config, output, manifests, bundle=bundle, results=results) as (
        examined,
        lease,
    ):
        images = build_image_table((each.manifest, each.read_tables()) for each in examined)
        _check_readable(images)
        findings = [each for each in _find_issues(images, config) if len(each.indices)]
        issues = build_issue_table(images, findings)
        lease.check()
        _write_results(output, images, findings, issues, config)
        if clean is not None:
            _write_clean(clean, images, findings, examined[0], config.drop)
    tell("report", filesystem.join(output, CHECK_REPORT))
    _fail_on_issues(findings, images, config.fail_on)
    return issues


def _check_request(config: CheckConfig) -> None:
    """Raise a ConfigError for issues that are to have consequences and cannot be seen."""
    for key, issues in (("drop", config.drop), ("fail_on", config.fail_on)):
        for issue in issues:
            if issue == "leakage" and not config.against:
                raise ConfigError(f"{key}: leakage is seen beside another manifest; say --against")
            if issue in MODEL_ISSUES and config.model is None:
                raise ConfigError(f"{key}: {issue} is seen by a model; say --model BUNDLE")


def _check_readable(images: ImageTable) -> None:
    """Raise a ManifestError where a leak could not be seen: nothing of a manifest can be read."""
    if len(images.manifests) == 1:
        return
    for number, name in enumerate(images.manifests):
        mine = np.flatnonzero(images.manifest_index == number)
        if not images.is_ok[mine].any():
            error = images.features.column("error")[int(mine[0])].as_py()
            what = "against" if number else "manifest"
            raise ManifestError(
                f"{what} {name}: not one of its images can be read ({error}); see to its paths"
            )


def _find_issues(images: ImageTable, config: CheckConfig) -> Iterator[Finding]:
    yield from rules.apply_rules(images, config.rules)
    yield from duplicates.find_duplicates(images, config.duplicates)
    yield from label_errors.find_label_issues(images, config.labels)


def _resolve_outputs(config: CheckConfig) -> tuple[str, str | None]:
    """The folder of the check, and the file of the clean manifest."""
    output = filesystem.absolute(config.output).rstrip("/")
    if output.endswith(".parquet"):
        if not config.drop:
            raise ConfigError(
                f"output {config.output}: is a file, and without --drop there is no manifest to "
                "write to it; give a folder, or say what to drop"
            )
        return output.removesuffix(".parquet"), output
    return output, filesystem.join(output, CLEAN_MANIFEST) if config.drop else None


def _check_clean_target(
    clean: str | None, output: str, manifests: Sequence[Manifest], overwrite: bool
) -> None:
    """Refuse to replace a table that is no earlier check's."""
    if clean is None or not filesystem.exists(clean):
        return
    if clean in [filesystem.absolute(manifest.source) for manifest in manifests]:
        raise OutputError(f"output {clean}: is a manifest of this check; give another --output")
    if not overwrite and not filesystem.exists(filesystem.join(output, CHECK_SUMMARY)):
        raise OutputError(
            f"output {clean}: is there already; give another --output, or say --overwrite"
        )


def _open_manifests(config: CheckConfig) -> Iterator[Manifest]:
    """The checked one, and those beside it, of which labels may stand in another column."""
    yield open_manifest(config.manifest)
    for path in config.against:
        changes: dict[str, Any] = {"path": path, "format": "auto", "label_column": None}
        if filesystem.is_folder(path):
            changes["root"] = None
        manifest = open_manifest(config.manifest.model_copy(update=changes))
        named = config.manifest.label_column
        if named in manifest.schema.names:
            manifest = replace(manifest, label_column=named)
        yield manifest


def _write_results(
    output: str,
    images: ImageTable,
    findings: Sequence[Finding],
    issues: pa.Table,
    config: CheckConfig,
) -> None:
    write_table(filesystem.join(output, ISSUES_FILE), issues)
    summary = _summarize(images, findings)
    filesystem.write(
        filesystem.join(output, CHECK_SUMMARY), (json.dumps(summary, indent=2) + "\n").encode()
    )
    filesystem.write(
        filesystem.join(output, CHECK_REPORT),
        report.render_check_report(images, findings, summary, config.gallery).encode(),
    )
    for name, count in summary["issues"].items():
        tell("issue", f"{name:<17} {count:>9,} images", issue=name, images=count)


def _summarize(images: ImageTable, findings: Sequence[Finding]) -> dict[str, Any]:
    rows = np.bincount(images.manifest_index, minlength=len(images.manifests))
    return {
        "manifests": [
            {"manifest": name, "rows": int(count)}
            for name, count in zip(images.manifests, rows, strict=True)
        ],
        "issues": {finding.issue: len(finding.indices) for finding in findings},
    }


def _write_clean(
    clean: str,
    images: ImageTable,
    findings: Sequence[Finding],
    examined: ScannedManifest,
    drop: Sequence[Issue],
) -> None:
    """The checked manifest without what is to be dropped, its paths whole."""
    kept = ~find_dropped(images, findings, drop)[images.is_own]
    rows = pa.concat_tables(examined.read_rows())
    rows = make_paths_absolute(examined.manifest, rows).filter(pa.array(kept))
    write_table(clean, rows)
    tell(
        "clean",
        f"{rows.num_rows:,} of {len(kept):,} rows are kept: {clean}",
        rows=rows.num_rows,
        dropped=len(kept) - rows.num_rows,
    )


def find_dropped(
    images: ImageTable, findings: Sequence[Finding], drop: Sequence[Issue]
) -> BoolArray:
    """(N,) bool: the images that have to go for the issues of `drop`."""
    gone = np.zeros(len(images), bool)
    # of copies one stays that is not to go for anything else, so these come last
    for finding in sorted(findings, key=lambda finding: finding.issue in DUPLICATE_ISSUES):
        if finding.issue not in drop:
            continue
        at = finding.indices
        if finding.issue in DUPLICATE_ISSUES and finding.group is not None:
            there = images.is_own[at] & ~gone[at]
            at = _find_redundant(at[there], finding.group[there], finding.is_duplicate)
        gone[at] = True
    return gone


def _find_redundant(at: IntArray, group: IntArray, alike: DuplicateTest | None) -> IntArray:
    """Those of each group that are alike to one before them which stays."""
    found = [np.empty(0, np.int64)]
    for places in iterate_groups(group):
        rest = at[places]
        while len(rest) > 1:
            first, rest = rest[:1], rest[1:]
            copy = np.ones(len(rest), bool) if alike is None else alike(first, rest)[0]
            found.append(rest[copy])
            rest = rest[~copy]
    return np.concatenate(found)


def _fail_on_issues(
    findings: Sequence[Finding], images: ImageTable, fail_on: Sequence[Issue]
) -> None:
    found = []
    for finding in findings:
        count = int(images.is_own[finding.indices].sum())
        if finding.issue in fail_on and count:
            first = images.path[int(finding.indices[0])].as_py()
            found.append(f"{count:,} images with {finding.issue}, such as {first}")
    if found:
        raise IssuesFound(f"{'; '.join(found)} (--fail-on {','.join(fail_on)})")
