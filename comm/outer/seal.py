"""What a member of a log of rounds signs with, and whom it believes.

The one idea: a signature is over a file's content and its name, so nobody without a key can make a
file up, change one, or put one in another's place. Whoever can write to the store can still delete,
hold back, or claim a name: that stops rounds, and falsifies none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gossamer.comm.outer.config import OuterConfig
from gossamer.comm.signing import SignatureError, Signer, Verifier

MEMBERS = "a key that the members trust (outer.signing_key_path, outer.public_keys_path)"
SIGNATURE = "signature"


@dataclass(frozen=True, slots=True)
class Seal:
    """Nothing is signed or checked without keys."""

    signer: Signer | None = None
    verifier: Verifier | None = None

    @classmethod
    def of(cls, config: OuterConfig | None) -> Seal:
        """With the keys that a config names. Raises OSError, ValueError for a file that is none."""
        if config is None or config.signing_key_path is None:
            return cls()
        signer = Signer.from_file(config.signing_key_path)
        if config.public_keys_path is None:  # one key for all members
            return cls(signer, Verifier(signer.public_key(), MEMBERS))
        seal = cls(signer, Verifier.from_file(config.public_keys_path, MEMBERS))
        if seal.own_key not in seal.keys:
            raise ValueError(
                f"{config.public_keys_path} lacks the public key of outer.signing_key_path;"
                " expected those of all members, this one among them"
            )
        return seal

    @property
    def own_key(self) -> str | None:
        """Public, in hex."""
        return None if self.signer is None else self.signer.public_key().public_bytes_raw().hex()

    @property
    def keys(self) -> set[str]:
        """Those that are believed."""
        return set() if self.verifier is None else self.verifier.keys

    @property
    def sign(self) -> Callable[[bytes], bytes] | None:
        """What signs frames."""
        return None if self.signer is None else self.signer.sign

    def pack(self, entry: dict[str, Any], name: str) -> bytes:
        """The file `name` that holds `entry`, JSON."""
        if self.signer is not None:
            entry = entry | {SIGNATURE: self.signer.sign(_signed(entry, name)).hex()}
        return json.dumps(entry, sort_keys=True, indent=1).encode()

    def unpack(self, data: bytes, name: str) -> dict[str, Any]:
        """What the file holds, without its signature.

        Raises SignatureError where the members did not sign it, ValueError for what is no object.
        """
        entry = json.loads(data)
        if not isinstance(entry, dict):
            raise ValueError(f"{name} holds {entry!r}; expected an object")
        signature = entry.pop(SIGNATURE, None)
        if self.verifier is not None:
            try:
                found = None if signature is None else bytes.fromhex(signature)
            except (ValueError, TypeError):
                found = b""
            self.verifier.check(_signed(entry, name), found, name)
        return entry

    def unpack_first(self, data: bytes, name: str) -> dict[str, Any]:
        """As `unpack`; refuses also what is signed where this member has no key."""
        if self.signer is None and SIGNATURE in json.loads(data):
            raise SignatureError(
                f"{name} is signed; expected a key that the members trust (outer.signing_key_path)"
            )
        return self.unpack(data, name)


NO_SEAL = Seal()
"""Of those who sign nothing, and believe everybody."""


def _signed(entry: dict[str, Any], name: str) -> bytes:
    return json.dumps([name, entry], sort_keys=True, separators=(",", ":")).encode()
