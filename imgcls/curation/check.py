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
from imgcls.curation.checks.duplicates import CopiesConfig
from imgcls.curation.checks.findings import COPIES, OF_A_MODEL, Alike, Finding, Issue, table_of
from imgcls.curation.checks.image_table import Flags, Images, Ints, gathered
from imgcls.curation.checks.label_errors import LabelsConfig
from imgcls.curation.checks.rules import RulesConfig
from imgcls.curation.checks.similarity import members
from imgcls.curation.examine import Examined
from imgcls.curation.scan import LookConfig, looked
from imgcls.data import filesystem, object_store
from imgcls.data.manifest import Manifest, open_manifest, with_whole_paths
from imgcls.data.preprocess import Decode
from imgcls.errors import ConfigError, IssuesFound, ManifestError, OutputError
from imgcls.log import tell
from imgcls.models.bundle import load_bundle
from imgcls.runs.layout import write_table

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
    decode: Decode | None = None
    """Decode route for the model: exact or fast (default: bundle's)."""
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
    config = requested(CheckConfig, config, settings, 'check(manifest="train.csv", output="out")')
    object_store.use(config.storage)
    _check_asked(config)
    output, clean = _outputs(config)
    manifests = list(_manifests(config))
    _check_clean(clean, output, manifests, config.overwrite)
    bundle = None
    if config.model is not None:
        bundle = load_bundle(config.model).with_decode(config.decode)
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
    tell("report", filesystem.join(output, REPORT))
    _gate(findings, images, config.fail_on)
    return issues


def _check_asked(config: CheckConfig) -> None:
    """Raise a ConfigError for issues that are to have consequences and cannot be seen."""
    for key, issues in (("drop", config.drop), ("fail_on", config.fail_on)):
        for issue in issues:
            if issue == "leakage" and not config.against:
                raise ConfigError(f"{key}: leakage is seen beside another manifest; say --against")
            if issue in OF_A_MODEL and config.model is None:
                raise ConfigError(f"{key}: {issue} is seen by a model; say --model BUNDLE")


def _check_readable(images: Images) -> None:
    """Raise a ManifestError where a leak could not be seen: nothing of a manifest can be read."""
    if len(images.manifests) == 1:
        return
    for number, name in enumerate(images.manifests):
        mine = np.flatnonzero(images.manifest == number)
        if not images.ok[mine].any():
            error = images.facts.column("error")[int(mine[0])].as_py()
            what = "against" if number else "manifest"
            raise ManifestError(
                f"{what} {name}: not one of its images can be read ({error}); see to its paths"
            )


def _findings(images: Images, config: CheckConfig) -> Iterator[Finding]:
    yield from rules.judged(images, config.rules)
    yield from duplicates.found(images, config.copies)
    yield from label_errors.suspected(images, config.labels)


def _outputs(config: CheckConfig) -> tuple[str, str | None]:
    """The folder of the check, and the file of the clean manifest."""
    output = filesystem.absolute(config.output).rstrip("/")
    if output.endswith(".parquet"):
        if not config.drop:
            raise ConfigError(
                f"output {config.output}: is a file, and without --drop there is no manifest to "
                "write to it; give a folder, or say what to drop"
            )
        return output.removesuffix(".parquet"), output
    return output, filesystem.join(output, CLEAN) if config.drop else None


def _check_clean(
    clean: str | None, output: str, manifests: Sequence[Manifest], overwrite: bool
) -> None:
    """Refuse to replace a table that is no earlier check's."""
    if clean is None or not filesystem.exists(clean):
        return
    if clean in [filesystem.absolute(manifest.source) for manifest in manifests]:
        raise OutputError(f"output {clean}: is a manifest of this check; give another --output")
    if not overwrite and not filesystem.exists(filesystem.join(output, SUMMARY)):
        raise OutputError(
            f"output {clean}: is there already; give another --output, or say --overwrite"
        )


def _manifests(config: CheckConfig) -> Iterator[Manifest]:
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


def _write(
    output: str,
    images: Images,
    findings: Sequence[Finding],
    issues: pa.Table,
    config: CheckConfig,
) -> None:
    write_table(filesystem.join(output, ISSUES_FILE), issues)
    summary = _summary(images, findings)
    filesystem.write(
        filesystem.join(output, SUMMARY), (json.dumps(summary, indent=2) + "\n").encode()
    )
    filesystem.write(
        filesystem.join(output, REPORT),
        report.of_check(images, findings, summary, config.gallery).encode(),
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
            at = _copies(at[there], finding.group[there], finding.alike)
        gone[at] = True
    return gone


def _copies(at: Ints, group: Ints, alike: Alike | None) -> Ints:
    """Those of each group that are alike to one before them which stays."""
    found = [np.empty(0, np.int64)]
    for places in members(group):
        rest = at[places]
        while len(rest) > 1:
            first, rest = rest[:1], rest[1:]
            copy = np.ones(len(rest), bool) if alike is None else alike(first, rest)[0]
            found.append(rest[copy])
            rest = rest[~copy]
    return np.concatenate(found)


def _gate(findings: Sequence[Finding], images: Images, fail_on: Sequence[Issue]) -> None:
    found = []
    for finding in findings:
        count = int(images.own[finding.at].sum())
        if finding.issue in fail_on and count:
            first = images.path[int(finding.at[0])].as_py()
            found.append(f"{count:,} images with {finding.issue}, such as {first}")
    if found:
        raise IssuesFound(f"{'; '.join(found)} (--fail-on {','.join(fail_on)})")
