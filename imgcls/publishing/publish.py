"""The job of `imgcls publish`: the rows of a committed run, added to a table in one transaction.

`predict --publish` calls the same functions: `check_target` before it starts Ray, and `publish_run`
after `_SUCCESS` is written.
"""

from __future__ import annotations

import pyarrow as pa

from imgcls import log
from imgcls.data.storage.storage_settings import with_config_storage
from imgcls.errors import RequestError
from imgcls.formatting import format_count
from imgcls.publishing.config import PublishConfig
from imgcls.publishing.delta_sink import DeltaSink
from imgcls.publishing.hub_sink import HubSink
from imgcls.publishing.iceberg_sink import IcebergSink
from imgcls.publishing.rows import RunRows, add_published_columns
from imgcls.publishing.sink import Publication, Sink

SINKS: dict[str, type[Sink]] = {sink.prefix: sink for sink in (DeltaSink, IcebergSink, HubSink)}


@with_config_storage
def publish(config: PublishConfig) -> Publication:
    """Add the rows of a committed run to a table, unless they are there.

    Raises RequestError (exit code 2) for a run that is not committed, a target that cannot be
    written or whose columns do not fit; StorageError or RunFailed (exit code 1) where the same
    command may succeed later.
    """
    sink = create_sink(config.to)
    rows = RunRows.open(config.run)
    sink.check(rows.schema, rows.run.url)
    return _publish_rows(rows, sink)


def create_sink(target: str) -> Sink:
    """The sink that a target names; raises RequestError for another kind of target."""
    prefix, _, name = target.partition(":")
    if prefix not in SINKS or not name:
        known = ", ".join(sink.syntax for sink in SINKS.values())
        raise RequestError(f"publish {target}: is not a target. Pass one of {known}")
    return SINKS[prefix](name)


def check_target(target: str, schema: pa.Schema, place: str) -> None:
    """Raise RequestError where a run with these columns could not be published.

    place: where the columns come from, with which errors begin
    """
    create_sink(target).check(add_published_columns(schema, place), place)


def publish_run(url: str, target: str) -> Publication:
    """Publish the committed run in a folder."""
    return _publish_rows(RunRows.open(url), create_sink(target))


def _publish_rows(rows: RunRows, sink: Sink) -> Publication:
    count, run = format_count(rows.run.rows, "row"), rows.run.url
    if rows.run.rows == 0:
        log.emit("published", f"{run}: has no rows; nothing to publish", run=run)
        return Publication("unchanged", None)
    done = sink.publish(rows)
    texts = {
        "published": f"{count}: {sink.target}, version {done.version}",
        "replaced": f"{count}, which replace those of an earlier commit: {sink.target}, version "
        f"{done.version}",
        "unchanged": f"{run}: published before to {sink.target}; nothing to do",
    }
    log.emit(
        "published",
        texts[done.action],
        run=run,
        target=sink.target,
        action=done.action,
        version=done.version,
    )
    return done
