"""The result of `imgcls.label`: where the committed table is, and a summary for people."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from imgcls.data.storage import filesystem, storage_settings
from imgcls.data.storage.storage_settings import StorageConfig
from imgcls.errors import StorageError
from imgcls.formatting import format_count, format_share
from imgcls.runs import layout
from imgcls.runs.table_counts import RunCounts

if TYPE_CHECKING:
    import pandas as pd

_SHOWN_METRICS = ("accuracy", "mean_average_precision", "f1_macro", "expected_calibration_error")


@dataclass(frozen=True, repr=False)
class PredictResult:
    """A committed run.

    output:  its folder
    rows:    number of rows in its table
    counts:  of the table; None if the run had been committed before
    storage: settings of the store that the output is on
    """

    output: str
    rows: int
    counts: RunCounts | None
    storage: StorageConfig = field(default_factory=storage_settings.current_settings)

    @property
    def table(self) -> str:
        """Folder of the table's Parquet files."""
        return filesystem.join(self.output, layout.PREDICTIONS_FOLDER)

    @property
    def status(self) -> dict[str, int]:
        """Number of rows by status, such as `ok` and `missing`."""
        if self.counts is not None:
            return dict(sorted(self.counts.status.items()))
        with storage_settings.use_settings(self.storage):
            data = filesystem.read(filesystem.join(self.output, layout.SUCCESS_FILE))
        success = json.loads(data)
        return dict(sorted(success["status"].items()))

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of `metrics/summary.parquet` by name; accuracy only where rows have labels."""
        url = filesystem.join(self.output, layout.METRICS_FOLDER, "summary.parquet")
        with storage_settings.use_settings(self.storage), filesystem.open_read(url) as stream:
            rows = pq.read_table(stream).to_pylist()
        return {row["metric"]: row["value"] for row in rows}

    def to_pandas(self) -> pd.DataFrame:
        """Load the whole table into memory: one row per manifest row, in the manifest's order."""
        import pandas as pd

        frames = []
        with storage_settings.use_settings(self.storage):
            for name in filter(layout.is_part_name, filesystem.list_names(self.table)):
                with filesystem.open_read(filesystem.join(self.table, name)) as stream:
                    frames.append(pd.read_parquet(stream))
        return pd.concat(frames, ignore_index=True)

    def __repr__(self) -> str:
        parts = [format_count(self.rows, "row"), *self._summarize(), self.table]
        return f"<PredictResult: {', '.join(parts)}>"

    def _repr_html_(self) -> str:
        rows = [("rows", f"{self.rows:,}"), *self._read_facts(), ("table", self.table)]
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in rows
        )
        return f"<table>{cells}</table>"

    def _summarize(self) -> list[str]:
        return [f"{name} {value}" for name, value in self._read_facts()]

    def _read_facts(self) -> list[tuple[str, str]]:
        """Statuses and metrics as text; none where the output cannot be read any more."""
        try:
            statuses, metrics = self.status, self.metrics
        except StorageError:
            return []
        facts = [(name, f"{count:,}") for name, count in statuses.items()]
        return facts + [
            (name, format_share(metrics[name]))
            for name in _SHOWN_METRICS
            if metrics.get(name) is not None
        ]
