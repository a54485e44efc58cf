"""From a name in a config to the class or function it means.

The one idea: a seam's own implementations have short names in a literal dict; anybody else's is
named by where it is, `package.module:name`.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*")


def check_name(name: str, registry: Mapping[str, str], field: str) -> None:
    """Raises ValueError, naming the field, for neither a key of `registry` nor an import path."""
    if name not in registry and not IMPORT_PATH.fullmatch(name):
        raise ValueError(
            f"{field} is {name!r}; expected one of {sorted(registry)} or `package.module:name`"
        )


def check_module(name: str, registry: Mapping[str, str], field: str) -> None:
    """Raises ValueError for an import path of a module that is not installed; does not run it."""
    module_name = registry.get(name, name).partition(":")[0]
    try:
        found = importlib.util.find_spec(module_name)
    except ImportError:
        found = None
    if found is None:
        raise ValueError(f"{field} is {name!r}, but there is no module {module_name}")


def resolve(name: str, registry: Mapping[str, str], field: str) -> Any:  # noqa: ANN401
    """Imports what `name` means: a key of `registry`, or itself an import path.

    field: the config field that holds the name. Raises ValueError, naming it, when nothing is
    found there.
    """
    check_name(name, registry, field)
    module_name, _, attribute = registry.get(name, name).partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{field} is {name!r}, which cannot be imported: {error}") from error
