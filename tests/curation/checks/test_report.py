"""The report of a check."""

from __future__ import annotations

from pathlib import Path

from imgcls.curation.checks import rules
from imgcls.curation.checks.findings import ISSUES
from imgcls.curation.checks.report import ISSUE_DESCRIPTIONS, build_section, render_check_report
from imgcls.curation.config import RulesConfig
from tests.curation.pictures import images_of


def test_every_issue_has_a_description() -> None:
    assert set(ISSUE_DESCRIPTIONS) == set(ISSUES)


def test_names_from_a_manifest_are_escaped_on_the_page(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>.jpg"
    images = images_of(tmp_path, [(name, b"nothing", "<b>x</b>")])
    findings = [f for f in rules.apply_rules(images, RulesConfig()) if len(f.indices)]
    summary = {"manifests": [{"manifest": "<i>m</i>", "rows": 1}]}
    sections = [build_section(images, each, 24) for each in findings]
    page = render_check_report(images, findings, summary, sections)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.jpg" in page
    assert "<i>m</i>" not in page
