"""This host's folder of a run that a command names.

The one idea: a path means the same from any folder of this host, and a URL may hold no secret, for
it is printed and written down.
"""

from __future__ import annotations

from pathlib import Path

from gossamer.launch.recipe import refuse_secrets
from gossamer.trainer.run_folder import is_url, open_run


def open_here(where: str, create: bool = False) -> Path:
    """See open_run. Raises ValueError for a URL with a secret in it."""
    refuse_secrets(where, "the run's folder")
    return open_run(where, create) if is_url(where) else Path(where).resolve()
