"""The check of a data set: every image looked at, then all of them compared; findings and a page.

Brings labelling's passes over images and the room that judges them together, which do not know each
other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import BeforeValidator, NonNegativeInt

from imgcls.config import Names, build, names
from imgcls.data import storage, stores
from imgcls.data.manifest import Manifest, ManifestConfig, open_manifest, with_whole_paths
from imgcls.errors import ConfigError, IssuesFound, ManifestError, OutputError
from imgcls.labeling.examine import Examined
from imgcls.log import tell
from imgcls.looking import LookConfig, looked
from imgcls.models.bundle import load_bundle
from imgcls.output import write_table
from imgcls.quality import copies, labels, page, rules
from imgcls.quality.copies import CopiesConfig
from imgcls.quality.findings import COPIES, Finding, Issue, table_of
from imgcls.quality.images import Flags, Images, gathered
from imgcls.quality.labels import LabelsConfig
from imgcls.quality.rules import RulesConfig

ISSUES_FILE = "issues.parquet"
SUMMARY = "summary.json"
REPORT = "report.html"
CLEAN = "clean.parquet"

Issues = Annotated[list[Issue], BeforeValidator(names)]


class CheckConfig(LookConfig):
    """Check a data set: bad images, copies, leaks between manifests, labels that look mistaken."""

    against: Names = []
    """Other manifests, such as of the test set: what is in both is a leak."""
    model: str | None = None
    """A bundle: its embeddings find more copies, outliers and labels that look mistaken."""
    output: str
    """The folder to write; with drop, NAME.parquet is the clean manifest, and NAME the folder."""
    drop: Issues = []
    """Write the manifest without rows that have these issues; of copies the first is kept."""
    fail_on: Issues = []
    """Exit with 3 when there is one of these."""
    rules: RulesConfig = RulesConfig()
    copies: CopiesConfig = CopiesConfig()
    labels: LabelsConfig = LabelsConfig()
    gallery: NonNegativeInt = 24
    """Images shown per issue."""


def check(config: CheckConfig | None = None, /, **settings: Any) -> pa.Table:
    """Check a data set; returns its issues (`findings.SCHEMA`), the worst first.

    config:   the whole request, or else
    settings: its keys, as in `check(manifest="train.csv", against="test.csv", output="out")`
    Raises RequestError when something is wrong with what was asked, RunFailed when it broke off
    (run it again to resume), IssuesFound for what `fail_on` names.
    """
    config = build(CheckConfig, settings) if config is None else config
    stores.use(config.storage)
    output, clean = _outputs(config)
    manifests = [open_manifest(each) for each in _manifests(config)]
    _check_clean(clean, output, manifests, config.overwrite)
    bundle = None if config.model is None else load_bundle(config.model)
    results = (REPORT, SUMMARY, ISSUES_FILE, CLEAN)
    with looked(config, output, manifests, bundle=bundle, results=results) as (examined, lease):
        images = gathered((each.manifest, each.tables()) for each in examined)
        _check_readable(images)
        findings = [each for each in _findings(images, config) if len(each.at)]
        issues = table_of(images, findings)
        lease.check()
        _write(output, images, findings, issues, config)
        if clean is not None:
            _write_clean(clean, images, findings, examined[0], config.drop)
    tell("report", storage.join(output, REPORT))
    _gate(findings, images, config.fail_on)
    return issues


def _check_readable(images: Images) -> None:
    """Raise a ManifestError where a leak could not be seen: nothing of a manifest can be read."""
    for number, name in enumerate(images.manifests[1:], 1):
        mine = np.flatnonzero(images.manifest == number)
        if not images.ok[mine].any():
            error = images.facts.column("error")[int(mine[0])].as_py()
            raise ManifestError(
                f"against {name}: not one of its images can be read ({error}); see to its paths"
            )


def _findings(images: Images, config: CheckConfig) -> Iterator[Finding]:
    yield from rules.judged(images, config.rules)
    yield from copies.found(images, config.copies)
    yield from labels.suspected(images, config.labels)


def _outputs(config: CheckConfig) -> tuple[str, str | None]:
    """The folder of the check, and the file of the clean manifest."""
    output = storage.absolute(config.output).rstrip("/")
    if output.endswith(".parquet"):
        if not config.drop:
            raise ConfigError(
                f"output {config.output}: is a file, and without --drop there is no manifest to "
                "write to it; give a folder, or say what to drop"
            )
        return output.removesuffix(".parquet"), output
    return output, storage.join(output, CLEAN) if config.drop else None


def _check_clean(
    clean: str | None, output: str, manifests: Sequence[Manifest], overwrite: bool
) -> None:
    """Refuse to replace a table that is no earlier check's."""
    if clean is None or not storage.exists(clean):
        return
    if clean in [storage.absolute(manifest.source) for manifest in manifests]:
        raise OutputError(f"output {clean}: is a manifest of this check; give another --output")
    if not overwrite and not storage.exists(storage.join(output, SUMMARY)):
        raise OutputError(
            f"output {clean}: is there already; give another --output, or say --overwrite"
        )


def _manifests(config: CheckConfig) -> Iterator[ManifestConfig]:
    yield config.manifest
    for path in config.against:
        changes: dict[str, Any] = {"path": path, "format": "auto"}
        if storage.is_folder(path):
            changes["root"] = None
        yield config.manifest.model_copy(update=changes)


def _write(
    output: str,
    images: Images,
    findings: Sequence[Finding],
    issues: pa.Table,
    config: CheckConfig,
) -> None:
    write_table(storage.join(output, ISSUES_FILE), issues)
    summary = _summary(images, findings)
    storage.write(storage.join(output, SUMMARY), (json.dumps(summary, indent=2) + "\n").encode())
    storage.write(
        storage.join(output, REPORT),
        page.of_check(images, findings, summary, config.gallery).encode(),
    )
    for name, count in summary["issues"].items():
        tell("issue", f"{name:<17} {count:>9,} images", issue=name, images=count)


def _summary(images: Images, findings: Sequence[Finding]) -> dict[str, Any]:
    rows = np.bincount(images.manifest, minlength=len(images.manifests))
    return {
        "manifests": [
            {"manifest": name, "rows": int(count)}
            for name, count in zip(images.manifests, rows, strict=True)
        ],
        "issues": {finding.issue: len(finding.at) for finding in findings},
    }


def _write_clean(
    clean: str,
    images: Images,
    findings: Sequence[Finding],
    examined: Examined,
    drop: Sequence[Issue],
) -> None:
    """The checked manifest without what is to be dropped, its paths whole."""
    kept = ~dropped(images, findings, drop)[images.own]
    rows = pa.concat_tables(examined.rows())
    rows = with_whole_paths(examined.manifest, rows).filter(pa.array(kept))
    write_table(clean, rows)
    tell(
        "clean",
        f"{rows.num_rows:,} of {len(kept):,} rows are kept: {clean}",
        rows=rows.num_rows,
        dropped=len(kept) - rows.num_rows,
    )


def dropped(images: Images, findings: Sequence[Finding], drop: Sequence[Issue]) -> Flags:
    """(N,) bool: the images that have to go for the issues of `drop`."""
    gone = np.zeros(len(images), bool)
    # of copies one stays that is not to go for anything else, so these come last
    for finding in sorted(findings, key=lambda finding: finding.issue in COPIES):
        if finding.issue not in drop:
            continue
        at = finding.at
        if finding.issue in COPIES and finding.group is not None:
            there = images.own[at] & ~gone[at]
            _, first = np.unique(finding.group[there], return_index=True)
            at = np.delete(at[there], first)
        gone[at] = True
    return gone


def _gate(findings: Sequence[Finding], images: Images, fail_on: Sequence[Issue]) -> None:
    found = []
    for finding in findings:
        count = int(images.own[finding.at].sum())
        if finding.issue in fail_on and count:
            first = images.path[int(finding.at[0])].as_py()
            found.append(f"{count:,} images with {finding.issue}, such as {first}")
    if found:
        raise IssuesFound(f"{'; '.join(found)} (--fail-on {','.join(fail_on)})")
