"""Import of the optional packages that loggers use."""

from __future__ import annotations

import importlib
from types import ModuleType

from imgcls.errors import RequestError, one_line


def import_package(name: str, attribute: str, key: str) -> ModuleType:
    """Import the package `name` that the configuration key `key` needs.

    attribute: a name that the package has. A folder called `name` in the working directory, such
        as W&B writes, is imported as an empty package without it.
    Raises RequestError if the package is not installed.
    """
    try:
        package = importlib.import_module(name)
        getattr(package, attribute)
    except (ImportError, AttributeError) as error:
        raise RequestError(
            f"{key}: the package {name} is not installed ({one_line(error)}). Run pip install "
            f"'imgcls[{name}]' on the machine that runs the driver."
        ) from error
    return package
