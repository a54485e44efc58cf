"""From a name in a config to the class or function it means.

The one idea: a seam's own implementations have short names in a literal dict; anybody else's is
named by where it is, `package.module:name`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def resolve(name: str, registry: Mapping[str, str], field: str) -> Any:  # noqa: ANN401
    """Imports what `name` means: a key of `registry`, or itself an import path.

    field: the config field that holds the name. Raises ValueError, naming it, when nothing is
    found there.
    """
    path = registry.get(name, name)
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(
            f"{field} is {name!r}; expected one of {sorted(registry)} or `package.module:name`"
        )
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{field} is {name!r}, which cannot be imported: {error}") from error
