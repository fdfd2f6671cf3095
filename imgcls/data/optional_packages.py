"""Import of the packages that extras of imgcls install."""

from __future__ import annotations

import importlib
from types import ModuleType

from imgcls.errors import RequestError, one_line


def import_package(name: str, attribute: str, key: str, extra: str | None = None) -> ModuleType:
    """Import the package or module `name` that the configuration key `key` needs.

    attribute: a name that it has. A folder called `name` in the working directory, such as W&B
        writes, is imported as an empty package without it.
    extra: the extra of imgcls that installs it; by default it has the name of the package
    Raises RequestError if the package is not installed.
    """
    package = name.partition(".")[0]
    try:
        module = importlib.import_module(name)
        getattr(module, attribute)
    except (ImportError, AttributeError) as error:
        raise RequestError(
            f"{key}: the package {package} is not installed ({one_line(error)}). Run pip install "
            f"'imgcls[{extra or package}]' on the machine that runs the driver."
        ) from error
    return module
