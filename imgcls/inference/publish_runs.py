"""Publication of the runs of `predict --publish`: this command's, and those that it missed."""

from __future__ import annotations

from collections.abc import Sequence

from imgcls.inference.config import PredictConfig
from imgcls.inference.nights import find_past_runs
from imgcls.publishing.publish import create_sink, publish_run
from imgcls.publishing.rows import RunRows
from imgcls.runs import layout


def publish_runs(config: PredictConfig, outputs: Sequence[str]) -> None:
    """Publish the committed runs of a command, oldest first, if its configuration has a target.

    outputs: the folders that it worked on or found committed
    With `since`, earlier nights that were committed but not published are published too: a driver
    may have been killed in between, or the table could not be reached.
    """
    if config.publish is None:
        return
    missed = [] if config.since is None else _find_missed_runs(config.publish, config.since.path)
    urls = [*missed, *(url for url in outputs if layout.is_committed(url))]
    for url in dict.fromkeys(urls):
        publish_run(url, config.publish)


def _find_missed_runs(target: str, since: str) -> list[str]:
    """The runs for a target that are newer than the newest one that it has, oldest first."""
    sink = create_sink(target)
    missed: list[str] = []
    for run in reversed(find_past_runs(since).committed):
        if run.merged_runs or not run.rows or run.provenance["config"].get("publish") != target:
            continue
        if sink.find(RunRows.of_run(run)) is not None:
            break
        missed.append(run.url)
    return missed[::-1]
