"""Ed25519 signatures of frames and manifests; keys are PEM files.

The one idea: a reader that was given a public key believes nothing else. Whoever can write to the
bucket, or sits on the way to it, can then hold versions back but not make one up.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from gossamer.comm.manifest import LogError

PUBLIC_KEY = re.compile(rb"-----BEGIN.*?-----END[^\n]*-----\n?", re.DOTALL)


class SignatureError(LogError, ValueError):
    """Something unsigned, or signed by another key."""


class Signer:
    """Holds a private key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def from_file(cls, path: str | Path) -> Signer:
        """The private key of a PEM file without a password. Raises ValueError for another file."""
        try:
            key = load_pem_private_key(Path(path).read_bytes(), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(f"{path}: expected an Ed25519 private key, PEM, without a password")
        return cls(key)

    def sign(self, data: bytes) -> bytes:
        """64 bytes."""
        return self._key.sign(data)

    def public_key(self) -> Ed25519PublicKey:
        """By which others check what it signs."""
        return self._key.public_key()


class Verifier:
    """Holds public keys: what any of them signed is believed."""

    def __init__(self, key: Ed25519PublicKey, name: str, *others: Ed25519PublicKey) -> None:
        self._keys = key, *others
        self._name = name

    @classmethod
    def from_file(cls, path: str | Path, name: str | None = None) -> Verifier:
        """The public keys of a PEM file, called `name`. Raises ValueError for another file."""
        keys = []
        for text in PUBLIC_KEY.findall(Path(path).read_bytes()) or [b""]:
            try:
                key = load_pem_public_key(text)
            except (ValueError, UnsupportedAlgorithm):
                key = None
            if not isinstance(key, Ed25519PublicKey):
                raise ValueError(f"{path}: expected an Ed25519 public key, PEM")
            keys.append(key)
        return cls(keys[0], name or str(path), *keys[1:])

    @property
    def keys(self) -> set[str]:
        """The keys, in hex."""
        return {key.public_bytes_raw().hex() for key in self._keys}

    def check(self, data: bytes, signature: bytes | None, name: str) -> None:
        """Raises SignatureError, naming the file `name`, unless one of the keys signed `data`."""
        if signature is None:
            raise SignatureError(f"{name} is not signed; expected a signature by {self._name}")
        if not any(_is_by(key, signature, data) for key in self._keys):
            raise SignatureError(f"{name} is forged: its signature is not by {self._name}")


def _is_by(key: Ed25519PublicKey, signature: bytes, data: bytes) -> bool:
    try:
        key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def write_keys(path: str | Path) -> Path:
    """A new private key at `path`, readable by its owner alone; its public key at `path`.pub.

    Returns the path of the public key. Raises FileExistsError where either is there already.
    """
    key = Ed25519PrivateKey.generate()
    public = Path(f"{path}.pub")
    if public.exists():
        raise FileExistsError(f"{public} exists already; expected a path without keys")
    secret_text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(secret_text)
    form = PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, form))
    return public
