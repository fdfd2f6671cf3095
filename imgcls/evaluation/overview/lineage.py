"""Lineage of an output: a tree of the runs, bundles and manifests that it was made from.

Bundles are found by their hash. Runs are found by their path, and shown if they are the ones that
the record means; a link that no hash verifies is marked. Manifests are opened to see whether they
are unchanged, and who labeled their images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from imgcls.data.storage import filesystem
from imgcls.data.storage.credentials import hide_credentials
from imgcls.evaluation.overview.entry import Kind, RunEntry
from imgcls.evaluation.overview.label_provenance import Facts, describe_manifest
from imgcls.evaluation.overview.links import ExpectedRun, describe_path_link, find_embedded_run
from imgcls.evaluation.overview.overview import RunList, escape_text, format_headline
from imgcls.evaluation.overview.readers import read_bundle_entry
from imgcls.evaluation.overview.records import get_section, get_text
from imgcls.formatting import format_count, format_duration, format_share
from imgcls.models.bundle import REGISTRY_PREFIX, is_registry_uri

MAX_MERGED = 10
"""Runs of a history that are shown, the newest ones."""
_MAX_DEPTH = 20
_HASH_DIGITS = 64
_UNKNOWN_RUN = ExpectedRun()


@dataclass(frozen=True)
class LineageNode:
    """An output, a manifest or weights, with what it was made from; texts have no credentials.

    relation: how its parent uses it, such as "model"; empty for the root
    title:    kind and path
    facts:    name and value
    """

    relation: str
    title: str
    facts: tuple[tuple[str, str], ...] = ()
    children: tuple[LineageNode, ...] = ()

    def __post_init__(self) -> None:
        facts = tuple((name, hide_credentials(value)) for name, value in self.facts)
        object.__setattr__(self, "facts", facts)
        object.__setattr__(self, "title", hide_credentials(self.title))

    def to_json(self) -> dict[str, Any]:
        """The tree as JSON values."""
        return {
            "relation": self.relation,
            "title": self.title,
            "facts": dict(self.facts),
            "children": [child.to_json() for child in self.children],
        }


class LineageBuilder:
    """Builds the trees of outputs in a folder.

    image: absolute path of an image to look up in training manifests; None looks up none
    """

    def __init__(self, runs: RunList, image: str | None = None) -> None:
        self._runs = runs
        self._image = image
        self._manifests: dict[str, Facts] = {}
        self._bundles: dict[str, RunEntry] = {}
        for entry in runs.entries:
            if entry.kind == "bundle" and entry.bundle_sha256 is not None:
                self._bundles.setdefault(entry.bundle_sha256, entry)

    def build(
        self,
        entry: RunEntry,
        relation: str = "",
        above: tuple[str, ...] = (),
        link: str | None = None,
    ) -> LineageNode:
        """The tree of an output.

        above: URLs of the outputs that it is part of
        link:  how its parent found it, if no hash verifies that
        """
        facts = [] if link is None else [("link", link)]
        facts += _list_facts(entry)
        if entry.url in above or len(above) >= _MAX_DEPTH:
            return LineageNode(relation, _build_title(entry), (("shown above", "yes"),))
        inner = (*above, entry.url)
        children = list(self._iter_children(entry, inner))
        return LineageNode(relation, _build_title(entry), tuple(facts), tuple(children))

    def _iter_children(self, entry: RunEntry, above: tuple[str, ...]) -> Iterator[LineageNode]:
        if entry.state in ("damaged", "foreign"):
            return
        if entry.kind == "bundle":
            yield from self._iter_bundle_parents(entry, above)
        elif entry.kind == "history":
            yield from self._iter_merged(entry, above)
        elif entry.kind in ("predictions", "embeddings"):
            yield from self._iter_run_parents(entry, above)
        elif entry.kind in ("training", "tune"):
            yield from self._iter_search_parents(entry, above)
        else:
            expected = ExpectedRun.from_record(entry.record)
            yield from self._follow(get_text(entry.record, "run"), "run", above, expected)
            for name in ("run_a", "run_b"):
                yield from self._follow(get_text(entry.record, name), name, above)

    def _iter_run_parents(self, entry: RunEntry, above: tuple[str, ...]) -> Iterator[LineageNode]:
        config = get_section(entry.record, "provenance", "config")
        relabel = config.get("relabel")
        labels = None
        if isinstance(relabel, Mapping):
            settings = get_section(entry.record, "identity", "settings")
            expected = ExpectedRun.from_record(settings.get("relabeled"))
            yield from self._follow(get_text(relabel, "source"), "source", above, expected)
            labels = relabel.get("labels")
        if isinstance(labels, Mapping):
            yield self._build_manifest("labels", labels, None)
        else:
            yield self._find_model(entry, above)
        # of `--since`, the run's own fingerprint is that of the rows that were new
        fingerprint = get_text(entry.record, "since", "listed") or entry.fingerprint
        yield self._build_manifest("data", config.get("manifest"), fingerprint)
        yield from self._follow(get_text(config, "reference"), "reference", above)

    def _iter_merged(self, entry: RunEntry, above: tuple[str, ...]) -> Iterator[LineageNode]:
        merged = get_section(entry.record, "identity").get("merged")
        urls = [each for each in merged if isinstance(each, str)] if merged else []
        for url in reversed(urls[-MAX_MERGED:]):
            yield from self._follow(url, "merged run", above)
        if len(urls) > MAX_MERGED:
            more = format_count(len(urls) - MAX_MERGED, "older run")
            yield LineageNode("merged run", f"and {more}")

    def _iter_search_parents(
        self, entry: RunEntry, above: tuple[str, ...]
    ) -> Iterator[LineageNode]:
        settings = entry.record.get("settings", entry.record)
        if isinstance(settings, Mapping):
            manifest = get_section(settings, "data").get("train")
            yield self._build_manifest("training data", manifest, entry.fingerprint)
            weights = get_text(settings, "model", "weights")
            yield from self._build_start(entry.record, weights, above)
        if entry.bundle_sha256 is not None:
            yield self._find_model(entry, above)

    def _iter_bundle_parents(
        self, entry: RunEntry, above: tuple[str, ...]
    ) -> Iterator[LineageNode]:
        made, config = entry.record, get_section(entry.record, "config")
        data = get_section(made, "data", "manifests")
        for key, relation in (("train", "training data"), ("val", "validation data")):
            source = data.get(f"data.{key}")
            if isinstance(source, Mapping):
                settings = get_section(config, "data").get(key) or {"path": source.get("manifest")}
                fingerprint = get_text(source, "fingerprint")
                yield self._build_manifest(relation, settings, fingerprint, source.get("rows"))
        weights = get_text(config, "model", "weights") or get_text(made, "imported_from")
        yield from self._build_start(made, weights, above)
        run, expected = get_text(config, "data", "embeddings"), find_embedded_run(made)
        yield from self._follow(run, "embeddings", above, expected, kind="embeddings")
        yield from self._iter_parents(made, above)

    def _build_start(
        self, record: Mapping[str, Any], weights: str | None, above: tuple[str, ...]
    ) -> Iterator[LineageNode]:
        """The registered model that a training began with, or its weights."""
        found = get_section(record, "registered_model")
        name, version, sha256 = (get_text(found, key) for key in ("name", "version", "sha256"))
        if name is not None and version is not None:
            uri = f"{REGISTRY_PREFIX}{name}/{version}"
            yield self._build_bundle("starting model", uri, sha256, above)
        if weights is not None:
            yield LineageNode("starting weights", weights)

    def _iter_parents(
        self, made: Mapping[str, Any], above: tuple[str, ...]
    ) -> Iterator[LineageNode]:
        """The bundle that was calibrated, and other bundles that the provenance names."""
        calibration = get_section(made, "calibration")
        run = get_text(calibration, "predictions")
        expected = ExpectedRun.from_record(calibration)
        yield from self._follow(run, "calibrated on", above, expected)
        parents: list[tuple[str, Any]] = []
        if calibration:
            parents.append(("calibrated from", calibration))
        for name in ("teacher", "parent", "parents"):
            given = made.get(name)
            several = given if isinstance(given, list) else [given]
            parents += [(name.removesuffix("s"), each) for each in several]
        for relation, parent in parents:
            url, sha256 = _read_parent(parent)
            if url is not None or sha256 is not None:
                yield self._build_bundle(relation, url, sha256, above)

    def _find_model(self, entry: RunEntry, above: tuple[str, ...]) -> LineageNode:
        return self._build_bundle("model", entry.model, entry.bundle_sha256, above)

    def _build_bundle(
        self, relation: str, url: str | None, sha256: str | None, above: tuple[str, ...]
    ) -> LineageNode:
        """The tree of a bundle: of the one in the folder with this hash, else of that at `url`."""
        found = self._bundles.get(sha256 or "")
        if found is not None:
            return self.build(found, relation, above)
        facts = [] if sha256 is None else [("SHA-256", sha256)]
        facts.append(("not found", "no bundle with this hash in the folder, nor at its path"))
        if url is not None:
            there = read_bundle_entry(url if is_registry_uri(url) else filesystem.absolute(url))
            if isinstance(there, str):
                facts.append(("cannot be read", there))
            elif sha256 is None:
                return self.build(there, relation, above, describe_path_link(url))
            elif there.bundle_sha256 == sha256:
                return self.build(there, relation, above)
            else:
                facts.append(("another bundle is at this path now", there.bundle_sha256 or "?"))
        return LineageNode(relation, f"bundle {url or '?'}", tuple(facts))

    def _follow(
        self,
        url: str | None,
        relation: str,
        above: tuple[str, ...],
        expected: ExpectedRun = _UNKNOWN_RUN,
        kind: Kind = "predictions",
    ) -> Iterator[LineageNode]:
        """The tree of another output that a record names by its path, if it is still that one."""
        if url is None:
            return
        entry, relation = self._runs.find(url), relation.replace("_", " ")
        if entry is None:
            facts = (("not found", f"not among the outputs in {self._runs.folder}"),)
            yield LineageNode(relation, f"{kind} {url}", facts)
            return
        differences = expected.describe_differences(entry)
        if differences:
            facts = (("another run is at this path now", differences),)
            yield LineageNode(relation, _build_title(entry), facts)
        else:
            link = describe_path_link(url) if expected.is_empty else None
            yield self.build(entry, relation, above, link)

    def _build_manifest(
        self, relation: str, settings: Any, fingerprint: str | None, rows: Any = None
    ) -> LineageNode:
        """A manifest as it was then, and as it is now."""
        path = get_text(settings, "path") or "?"
        known = f"{settings}{fingerprint}"
        if known not in self._manifests:
            self._manifests[known] = describe_manifest(settings, fingerprint, self._image)
        facts: Facts = [] if fingerprint is None else [("fingerprint", fingerprint)]
        if isinstance(rows, int):
            facts.append(("rows", f"{rows:,}"))
        return LineageNode(relation, f"manifest {path}", (*facts, *self._manifests[known]))


def _read_parent(parent: Any) -> tuple[str | None, str | None]:
    """URL and hash of a bundle that a provenance names, as a text or as a record."""
    if isinstance(parent, str):
        is_hash = len(parent) == _HASH_DIGITS and not set(parent) - set("0123456789abcdef")
        return (None, parent) if is_hash else (parent, None)
    texts = [get_text(parent, key) for key in ("bundle", "url", "model")]
    url = next((text for text in texts if text is not None), None)
    return url, get_text(parent, "bundle_sha256") or get_text(parent, "sha256")


def _build_title(entry: RunEntry) -> str:
    name = entry.path if entry.path != "." else entry.url
    return f"{entry.kind} {name}"


def _list_facts(entry: RunEntry) -> Facts:
    """Name and value of what is known about an output."""
    made = get_section(entry.record, "provenance") or entry.record
    config = get_section(made, "config")
    values: list[tuple[str, Any]] = [
        ("state", entry.state if entry.kind != "bundle" else None),
        ("problem", entry.problem),
        ("current", "yes" if entry.is_current else None),
        ("date", entry.date),
        ("rows", entry.rows),
        ("result", format_headline(entry) or None),
        ("rows without a prediction", entry.error_rate and format_share(entry.error_rate)),
        ("PSI", entry.psi and f"{entry.psi:.3f}"),
        ("duration", entry.seconds and format_duration(entry.seconds)),
        ("images/s", entry.images_per_second),
        ("registered model", entry.registered),
        ("SHA-256", entry.bundle_sha256 if entry.kind == "bundle" else None),
        ("git commit", entry.git_commit),
        ("versions", ", ".join(f"{name} {text}" for name, text in entry.versions.items()) or None),
    ]
    if entry.kind == "bundle":
        values += [
            ("architecture", get_text(entry.record, "architecture", "name")),
            ("classes", entry.record.get("num_classes")),
            ("strategy", get_text(made, "strategy")),
            ("seed", made.get("seed")),
            ("epochs", config.get("epochs")),
            ("calibration", get_text(made, "calibration", "method")),
        ]
    return [
        (name, f"{value:,}" if isinstance(value, int) else str(value))
        for name, value in values
        if value not in (None, "", 0.0) or (name == "seed" and value is not None)
    ]


def format_tree(node: LineageNode, prefix: str = "", branch: str = "") -> str:
    """A tree as text, with its facts below each title."""
    relation = f"{node.relation}: " if node.relation else ""
    lines = [f"{prefix}{branch}{relation}{escape_text(node.title)}"]
    inner = prefix + ("" if not branch else "   " if branch.startswith("└") else "│  ")
    stem = "│  " if node.children else "   "
    lines += [f"{inner}{stem}{name} {escape_text(value)}" for name, value in node.facts]
    for place, child in enumerate(node.children):
        is_last = place == len(node.children) - 1
        lines.append(format_tree(child, inner, "└─ " if is_last else "├─ "))
    return "\n".join(lines)
