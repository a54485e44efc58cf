"""Who has which name in a log of rounds, and what all of them agreed on.

The one idea: a name is claimed by creating a file, and the newest claim is the replica: whoever had
the name before finds out when it next sends, and what it sent counts no more.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict

from gossamer.comm.log import StaleWriterError
from gossamer.comm.manifest import LogError
from gossamer.comm.outer.config import OuterConfig
from gossamer.comm.outer.exchange import Identity
from gossamer.comm.outer.record import CLAIM, LEFT, groups
from gossamer.comm.outer.seal import NO_SEAL, Seal
from gossamer.comm.signing import SignatureError
from gossamer.comm.store import Store

AGREED_FILE = "outer.json"
# what replicas need not agree on
LOCAL = (
    "replica",
    "url",
    "signing_key_path",
    "public_keys_path",
    "exchange",
    "absence",
    "expected_replicas",
    "grace_s",
    "deadline_s",
    "poll_s",
)


def join(
    store: Store,
    config: OuterConfig,
    run_id: str,
    takeover: bool = False,
    seal: Seal = NO_SEAL,
) -> Identity:
    """Claims the name `config.replica`: rank 0 of a replica does, and tells its other ranks.

    With `takeover` the caller takes the place of a replica of that name that was, or still is,
    there. Raises StaleWriterError without it, LogError where the log is of another run or its
    replicas agreed on other constants, SignatureError where they trust other keys.
    """
    agreed = {name: value for name, value in asdict(config).items() if name not in LOCAL}
    ours = {"run_id": run_id, "agreed": agreed}
    if seal.keys:
        ours["keys"] = sorted(seal.keys)
    text = seal.pack(ours, AGREED_FILE)
    if not store.put(AGREED_FILE, text):
        theirs = seal.unpack_first(store.get(AGREED_FILE), AGREED_FILE)
        _check_agreed(theirs, json.loads(text))
        if seal.keys > _checked_keys(theirs, seal):  # this one was told of more
            store.put(AGREED_FILE, text, overwrite=True)
    incarnation = newest_claims(store).get(config.replica, 0) + 1
    claim = json.dumps({"claimed_s": time.time()}).encode()
    while incarnation == 1 or takeover:
        if store.put(f"replicas/{config.replica}-e{incarnation:04d}.json", claim):
            return Identity(run_id=run_id, replica=config.replica, incarnation=incarnation)
        incarnation += 1
    raise StaleWriterError(
        f"replica {config.replica} exists: choose another name, or take it over (takeover=True)"
    )


def _checked_keys(theirs: dict, seal: Seal) -> set[str]:
    """The keys that the members trust. Raises SignatureError where this one's is not among them."""
    keys = set(theirs.get("keys", []))
    if seal.own_key is not None and seal.own_key not in keys:
        raise SignatureError(
            f"{AGREED_FILE} does not name this replica's key; expected its public key in the"
            " outer.public_keys_path of a member, and that one started again"
        )
    return keys


def newest_claims(store: Store) -> dict[str, int]:
    """The newest incarnation of every name."""
    return _newest(store, "replicas/", CLAIM)


def gone(store: Store) -> dict[str, int]:
    """Names that were left, with the newest incarnation that did."""
    return _newest(store, "left/", LEFT)


def _newest(store: Store, folder: str, pattern: str) -> dict[str, int]:
    newest: dict[str, int] = {}
    for name in store.list(folder):
        found = groups(name, pattern)
        if found:
            newest[found[0]] = max(newest.get(found[0], 0), int(found[1]))
    return newest


def _check_agreed(theirs: dict, ours: dict) -> None:
    if theirs["run_id"] != ours["run_id"]:
        raise LogError(f"outer.json is of run {theirs['run_id']}, not {ours['run_id']}")
    for name, value in ours["agreed"].items():
        found = theirs["agreed"].get(name)
        if found != value:
            raise LogError(f"the replicas of this log agreed on {name} {found!r}, not {value!r}")
