"""Who may speak to what we serve: this machine, or whoever knows a token.

The one idea: leaving loopback without a token is refused before a port is opened. A token comes
from the environment alone, so it is in no command line, config or log.
"""

from __future__ import annotations

import ipaddress
import os


def token_for(host: str, variable: str) -> str | None:
    """$variable, the token of what is to listen on `host`; None: whoever is on this machine.

    Raises ValueError where `host` is not loopback and no token is set.
    """
    token = os.environ.get(variable) or None
    if token is None and not is_loopback(host):
        raise ValueError(
            f"--host {host} can be reached from other machines; expected a token in ${variable}"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it; of a name that is no address only `localhost`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
