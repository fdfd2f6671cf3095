"""DAG for Airflow 3: list new images, predict them, and merge all nights into one table.

Copy it into the folder of DAGs and nightly.yaml to CONFIG. The workers of Airflow need imgcls; the
work itself runs on the Ray cluster in RAY_ADDRESS, or on the Airflow worker if that is not set.

Exit code 1 is retried, and resumes the run. 2 (a wrong request) and 3 (a quality gate refused the
commit) fail at once: the same command would end in the same way.
"""

from __future__ import annotations

import datetime
import shlex
import subprocess

from airflow.sdk import dag, task
from airflow.sdk.exceptions import AirflowException, AirflowFailException

CONFIG = "/srv/labels/nightly.yaml"
BUILD = (
    "imgcls manifest build s3://photos/incoming --output s3://photos/manifests/tonight --overwrite"
)
PREDICT = f"imgcls predict --config {CONFIG} --date {{date}}"
COMPACT = "imgcls history compact s3://photos/labels --output s3://photos/latest --overwrite"
REASONS = {2: "the request is wrong", 3: "a quality gate refused the commit"}


def run(command: str) -> None:
    """Run a command; its output is in the log of the task."""
    code = subprocess.run(shlex.split(command), check=False).returncode
    if code in REASONS:
        raise AirflowFailException(f"exit code {code}: {REASONS[code]}; not retried")
    if code:
        raise AirflowException(f"exit code {code}: the next try resumes")


@dag(
    schedule="15 2 * * *",
    start_date=datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC),
    catchup=False,  # one run labels all that earlier nights have missed
    max_active_runs=1,
    default_args={"retries": 3, "retry_delay": datetime.timedelta(minutes=5)},
    tags=["imgcls"],
)
def nightly_labels() -> None:
    """Build, predict, compact."""

    @task
    def build() -> None:
        run(BUILD)

    @task
    def predict(ds: str | None = None) -> None:  # Airflow passes the date of the run
        run(PREDICT.format(date=ds))

    @task
    def compact() -> None:
        run(COMPACT)

    build() >> predict() >> compact()


nightly_labels()
