"""Check of a data set: scans every image, compares all of them, and writes the issues and a page.

The scan runs on the cluster; the checks in `checks` run on its results, on the driver.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from imgcls import log
from imgcls.config import requested
from imgcls.curation.checks import duplicates, label_errors, report, rules
from imgcls.curation.checks.class_counts import count_classes
from imgcls.curation.checks.findings import (
    DUPLICATE_ISSUES,
    MODEL_ISSUES,
    DuplicateTest,
    Finding,
    build_issue_table,
)
from imgcls.curation.checks.image_table import BoolArray, ImageTable, IntArray, build_image_table
from imgcls.curation.checks.report import IssueSection
from imgcls.curation.checks.similarity import iterate_groups
from imgcls.curation.config import CheckConfig, Issue
from imgcls.curation.outputs import check_not_read_again
from imgcls.curation.scan import ScannedManifest, hold_output, scan_manifests
from imgcls.data.manifests.label_columns import find_label_columns, is_list
from imgcls.data.manifests.manifest import (
    Manifest,
    ManifestConfig,
    make_paths_absolute,
    open_manifest,
)
from imgcls.data.manifests.options import DEFAULT_KEYS
from imgcls.data.storage import filesystem
from imgcls.data.storage.storage_settings import use_settings
from imgcls.errors import ConfigError, IssuesFound, ManifestError, OutputError
from imgcls.formatting import format_counts
from imgcls.models.bundle import load_bundle
from imgcls.models.openvino_package import check_engine
from imgcls.runs.layout import write_table

if TYPE_CHECKING:
    import pandas

ISSUES_FILE = "issues.parquet"
CHECK_SUMMARY = "summary.json"
CHECK_REPORT = "report.html"
CLEAN_MANIFEST = "clean.parquet"
_MAX_LOGGED_CLASSES = 20


@dataclass(frozen=True)
class CheckResult:
    """Result of `imgcls.check`.

    A notebook shows it as counts per issue with pictures of the worst images. Libraries that read
    Arrow streams (pandas, polars, DuckDB) accept it as the table of issues.

    Attributes
    ----------
    issues : pyarrow.Table
        One row per image and issue, the worst of each issue first: `manifest`, `row`, `path`,
        `label`, `issue`, `score` (float32 in [0, 1], 1 is the worst), `group`, `detail`.
    counts : dict of str to int
        Number of images per issue, over all manifests.
    rows : int
        Number of rows of the checked manifest.
    report : str
        Path or URL of report.html.
    clean : str or None
        Path or URL of the manifest without the dropped rows.
    """

    issues: pa.Table
    counts: dict[str, int]
    rows: int
    report: str
    clean: str | None = None
    _sections: Sequence[IssueSection] = field(default=(), repr=False, compare=False)

    def to_pandas(self) -> pandas.DataFrame:
        """The table of issues as a pandas DataFrame."""
        return self.issues.to_pandas()

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.issues.__arrow_c_stream__(requested_schema)

    def __repr__(self) -> str:
        counts = format_counts(self.counts, "no issues")
        return f"CheckResult({self.rows:,} rows: {counts}; {self.report})"

    def _repr_html_(self) -> str:
        return report.render_check_result(self._sections, self.rows, self.report)


def check(config: CheckConfig | None = None, /, **settings: Any) -> CheckResult:
    """Check a data set for bad images, duplicates, leaks and label errors.

    Parameters
    ----------
    config : CheckConfig, optional
        The whole configuration; pass either this or `settings`.
    **settings
        Configuration keys, such as `manifest`, `against`, `model`, `output` and `drop`; see
        `imgcls manifest check --help`.

    Returns
    -------
    CheckResult
        The issues, also written to the output folder as issues.parquet, summary.json and
        report.html.

    Raises
    ------
    RequestError
        If a key, a manifest, the bundle or the output folder is wrong.
    RunFailed
        If the scan of the images was interrupted; the same call resumes it.
    IssuesFound
        If an issue of `fail_on` was found; the results are written before.

    Examples
    --------
    >>> import imgcls
    >>> result = imgcls.check(  # doctest: +SKIP
    ...     manifest="train.csv", against="test.csv", output="checked"
    ... )
    >>> result.counts  # doctest: +SKIP
    {'near-duplicates': 6, 'leakage': 1}
    """
    config = requested(CheckConfig, config, settings, 'check(manifest="train.csv", output="out")')
    with use_settings(config.storage):
        return _check(config)


def _check(config: CheckConfig) -> CheckResult:
    _check_request(config)
    output, clean = _resolve_outputs(config)
    manifests = list(_open_manifests(config))
    _check_clean_target(clean, output, manifests, config.overwrite)
    bundle = None
    if config.model is not None:
        bundle = load_bundle(config.model).with_decode(config.decode)
        check_engine(config.engine)
    results = (CHECK_REPORT, CHECK_SUMMARY, ISSUES_FILE, CLEAN_MANIFEST)
    with (
        hold_output(output, results) as held,
        scan_manifests(
            config, held, manifests, bundle=bundle, engine=config.engine, results=results
        ) as scanned,
    ):
        images = build_image_table((each.manifest, each.read_tables()) for each in scanned)
        _check_readable(images, scanned)
        findings = [each for each in _find_issues(images, config) if len(each.indices)]
        held.lease.check()
        result = _write_results(output, clean, images, findings, config)
        if clean is not None:
            _write_clean(clean, images, findings, scanned[0], config.drop)
    log.emit("report", result.report)
    _fail_on_issues(findings, images, config.fail_on)
    return result


def _check_request(config: CheckConfig) -> None:
    """Raise a ConfigError for issues in `drop` and `fail_on` that the request cannot find."""
    for key, issues in (("drop", config.drop), ("fail_on", config.fail_on)):
        for issue in issues:
            if issue == "leakage" and not config.against:
                raise ConfigError(f"{key}: leakage requires another manifest; pass --against")
            if issue in MODEL_ISSUES and config.model is None:
                raise ConfigError(f"{key}: {issue} requires a model; pass --model BUNDLE")


def _check_readable(images: ImageTable, scanned: Sequence[ScannedManifest]) -> None:
    """Raise a ManifestError where no image of a manifest can be read, so no leak can be found.

    The manifest's scan is removed: the next run must read its images again.
    """
    if len(images.manifests) == 1:
        return
    for number, name in enumerate(images.manifests):
        indices = np.flatnonzero(images.manifest_index == number)
        if not images.is_ok[indices].any():
            error = images.features.column("error")[int(indices[0])].as_py()
            key = "against" if number else "manifest"
            filesystem.remove(scanned[number].output)
            raise ManifestError(
                f"{key} {name}: none of its images can be read ({error}); check its paths"
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
                f"output {config.output}: is a file, and without --drop no manifest is written; "
                "pass a folder, or the issues to --drop"
            )
        return output.removesuffix(".parquet"), output
    return output, filesystem.join(output, CLEAN_MANIFEST) if config.drop else None


def _check_clean_target(
    clean: str | None, output: str, manifests: Sequence[Manifest], overwrite: bool
) -> None:
    """Refuse a part of a checked manifest, and a table that an earlier check did not write."""
    if clean is None:
        return
    for manifest in manifests:
        check_not_read_again([clean], manifest)
    if not filesystem.exists(clean):
        return
    if clean in [filesystem.absolute(manifest.source) for manifest in manifests]:
        raise OutputError(f"output {clean}: is a manifest of this check; pass another --output")
    if not overwrite and not filesystem.exists(filesystem.join(output, CHECK_SUMMARY)):
        raise OutputError(f"output {clean}: exists already; pass another --output, or --overwrite")


def _open_manifests(config: CheckConfig) -> Iterator[Manifest]:
    """The checked manifest, then those of `against`, whose label columns may have other names."""
    yield open_manifest(config.manifest)
    for path in config.against:
        changes: dict[str, Any] = {
            "path": path,
            "format": "auto",
            "label_column": None,
            "label_delimiter": None,
            "label_columns": [],
        }
        if filesystem.is_folder(path):
            changes["root"] = None
        manifest = open_manifest(config.manifest.model_copy(update=changes))
        yield _use_label_options(manifest, config.manifest)


def _use_label_options(manifest: Manifest, config: ManifestConfig) -> Manifest:
    """Read the labels of another manifest by the options of the checked one, where it can be."""
    schema = manifest.schema
    if classes := [name for name in config.label_columns if name in schema.names]:
        changes: dict[str, Any] = {"label_columns": classes, "label_delimiter": None}
    else:
        is_plural = config.label_delimiter is not None and "label" not in schema.names
        name = config.label_column or ("labels" if is_plural else "label")
        if name not in schema.names:
            return manifest
        is_text = not is_list(schema.field(name).type)
        changes = {
            "label_column": name,
            "label_columns": [],
            "label_delimiter": config.label_delimiter if is_text else None,
        }
    options = config.model_copy(update={"path": manifest.source, **changes})
    columns = find_label_columns(options, schema, DEFAULT_KEYS)
    if columns is not None:
        return replace(manifest, label_column=None, label_columns=columns)
    return replace(manifest, label_column=changes["label_column"], label_columns=None)


def _write_results(
    output: str,
    clean: str | None,
    images: ImageTable,
    findings: Sequence[Finding],
    config: CheckConfig,
) -> CheckResult:
    issues = build_issue_table(images, findings)
    write_table(filesystem.join(output, ISSUES_FILE), issues)
    summary = _summarize(images, findings, config.labels.min_positives)
    filesystem.write(
        filesystem.join(output, CHECK_SUMMARY), (json.dumps(summary, indent=2) + "\n").encode()
    )
    sections = [report.build_section(images, finding, config.gallery) for finding in findings]
    page = report.render_check_report(images, findings, summary, sections)
    filesystem.write(filesystem.join(output, CHECK_REPORT), page.encode())
    for name, count in summary["issues"].items():
        unit = "image" if count == 1 else "images"
        log.emit("issue", f"{name:<17} {count:>9,} {unit}", issue=name, images=count)
    _log_class_issues(summary.get("classes", []))
    return CheckResult(
        issues=issues,
        counts=summary["issues"],
        rows=summary["manifests"][0]["rows"],
        report=filesystem.join(output, CHECK_REPORT),
        clean=clean,
        _sections=sections,
    )


def _log_class_issues(issues: Sequence[dict[str, str]]) -> None:
    for each in issues[:_MAX_LOGGED_CLASSES]:
        text = f"{each['issue']:<17} {each['name']!r}: {each['detail']}"
        log.emit("class", text, issue=each["issue"], name=each["name"])
    if len(issues) > _MAX_LOGGED_CLASSES:
        log.emit("class", f"{len(issues) - _MAX_LOGGED_CLASSES} more in {CHECK_SUMMARY}")


def _summarize(
    images: ImageTable, findings: Sequence[Finding], min_positives: int
) -> dict[str, Any]:
    """The content of summary.json; `classes` only for a multi-label manifest."""
    rows = np.bincount(images.manifest_index, minlength=len(images.manifests))
    summary: dict[str, Any] = {
        "manifests": [
            {"manifest": name, "rows": int(count)}
            for name, count in zip(images.manifests, rows, strict=True)
        ],
        "issues": {finding.issue: len(finding.indices) for finding in findings},
    }
    if images.targets is not None:
        counts = count_classes(images.targets[images.is_own], images.classes)
        summary["classes"] = [asdict(each) for each in counts.find_issues(min_positives)]
    return summary


def _write_clean(
    clean: str,
    images: ImageTable,
    findings: Sequence[Finding],
    scanned: ScannedManifest,
    drop: Sequence[Issue],
) -> None:
    """Write the checked manifest without the dropped rows, with absolute paths."""
    kept = ~find_dropped(images, findings, drop)[images.is_own]
    rows = pa.concat_tables(scanned.read_rows())
    rows = make_paths_absolute(scanned.manifest, rows).filter(pa.array(kept))
    write_table(clean, rows)
    log.emit(
        "clean",
        f"{rows.num_rows:,} of {len(kept):,} rows kept: {clean}",
        rows=rows.num_rows,
        dropped=len(kept) - rows.num_rows,
    )


def find_dropped(
    images: ImageTable, findings: Sequence[Finding], drop: Sequence[Issue]
) -> BoolArray:
    """(N,) bool: the images to drop for the issues of `drop`."""
    dropped = np.zeros(len(images), bool)
    # duplicates come last: the image that is kept must not be dropped for another issue
    for finding in sorted(findings, key=lambda finding: finding.issue in DUPLICATE_ISSUES):
        if finding.issue not in drop:
            continue
        indices = finding.indices
        if finding.issue in DUPLICATE_ISSUES and finding.group is not None:
            left = images.is_own[indices] & ~dropped[indices]
            indices = _find_redundant(indices[left], finding.group[left], finding.is_duplicate)
        dropped[indices] = True
    return dropped


def _find_redundant(
    indices: IntArray, group: IntArray, is_duplicate: DuplicateTest | None
) -> IntArray:
    """The images of each group that are duplicates of an earlier image, which is kept."""
    redundant = [np.empty(0, np.int64)]
    for members in iterate_groups(group):
        rest = indices[members]
        while len(rest) > 1:
            first, rest = rest[:1], rest[1:]
            same = (
                np.ones(len(rest), bool) if is_duplicate is None else is_duplicate(first, rest)[0]
            )
            redundant.append(rest[same])
            rest = rest[~same]
    return np.concatenate(redundant)


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
