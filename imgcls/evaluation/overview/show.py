"""The job of `imgcls runs`: list the outputs in a folder, or show the lineage of one."""

from __future__ import annotations

import json

from imgcls import log
from imgcls.data.storage import filesystem
from imgcls.data.storage.credentials import hide_credentials
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.evaluation.config import RunsConfig
from imgcls.evaluation.overview.image_lineage import build_image_lineage, find_entry
from imgcls.evaluation.overview.lineage import LineageBuilder, LineageNode, format_tree
from imgcls.evaluation.overview.overview import RunList, describe_counts, escape_text, list_runs


@with_config_storage
def show_runs(config: RunsConfig) -> RunList | LineageNode:
    """List the outputs in a folder, or show what one of them was made from.

    Returns the list, or with `lineage` the tree.
    Raises RequestError when there is no such folder, output or image.
    """
    runs = list_runs(config.folder, depth=config.depth)
    if config.lineage is not None:
        return _show_lineage(config, runs, config.lineage)
    if config.json_lines:
        for entry in runs.entries:
            log.show(json.dumps(entry.to_json()))
    else:
        log.show(f"{hide_credentials(runs.folder)}: {describe_counts(runs.entries)}")
        if runs.entries:
            log.show(runs.format_table())
        for note in runs.notes:
            log.emit("note", escape_text(note))
    if config.html is not None:
        from imgcls.evaluation.overview.page import render_list  # imports matplotlib

        _write_page(config, config.html, render_list(runs, config.html))
    return runs


def _show_lineage(config: RunsConfig, runs: RunList, lineage: str) -> LineageNode:
    entry = find_entry(runs, lineage)
    tree = (
        build_image_lineage(runs, lineage) if entry is None else LineageBuilder(runs).build(entry)
    )
    log.show(json.dumps(tree.to_json()) if config.json_lines else format_tree(tree))
    if config.html is not None:
        from imgcls.evaluation.overview.page import render_lineage  # imports matplotlib

        _write_page(config, config.html, render_lineage(runs, tree))
    return tree


def _write_page(config: RunsConfig, html: str, text: str) -> None:
    filesystem.write(filesystem.absolute(html), text.encode("utf-8", "replace"))
    if not config.json_lines:
        log.show(f"page  {html}")
