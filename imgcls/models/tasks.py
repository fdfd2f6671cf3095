"""Registry of the tasks, by the name that a bundle has."""

from __future__ import annotations

from imgcls.models.bundle import BundleSpec, TaskName
from imgcls.models.multilabel import MULTILABEL
from imgcls.models.single_label import SINGLE_LABEL
from imgcls.models.task import Task

TASKS: dict[TaskName, Task] = {task.name: task for task in (SINGLE_LABEL, MULTILABEL)}
"""All tasks by name."""


def find_task(spec: BundleSpec) -> Task:
    """The task of a bundle."""
    return TASKS[spec.task]
