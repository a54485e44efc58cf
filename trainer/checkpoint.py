"""Checkpoints, read: which are whole, and any rows of the training state by logical name.

The one idea: files hold rows under (kind, name, first row) and nothing says which rank held what,
so any topology reads any checkpoint; the manifest says where in which file each row lies, so a rank
reads the bytes of its own rows and no others. A checkpoint exists once it has a manifest.

ROOT/step-00000040-e0001.begun         there may be files of it (e: the writer epoch of the run)
ROOT/step-00000040-e0001/manifest.json the commit (checkpoint_writer.py)
                        /shard-00000.json, shard-00000-00000.safetensors, ...  of each rank
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from gossamer.comm.store import open_store
from gossamer.parallel.engine import Owned
from gossamer.trainer.sparsity.bits import row_bytes, unpack_rows
from torch import Tensor

MANIFEST, BEGUN = "manifest.json", ".begun"
NAME = re.compile(r"step-(\d{8,})-e(\d{4,})")
DTYPES = {"F32": torch.float32, "F64": torch.float64, "U8": torch.uint8}
"""What a file may hold, by safetensors' names."""
RNG, MASTER, MASK, WINDOW = "rng", "master", "mask", "window"
BESIDE_MASTER = ("exp_avg", "exp_avg_sq", WINDOW, MASK)
"""What there may be of a tensor besides its master: see Owned and Masks."""
READ_BYTES = 16 << 20


def list_checkpoints(root: str | Path) -> list[str]:
    """URLs of the checkpoints with a manifest, the one to resume from last: by epoch, then step."""
    return _found(root)[0]


def list_unfinished(root: str | Path) -> list[str]:
    """URLs of what was begun and has no manifest: being written, cut off or half removed."""
    return _found(root)[1]


def _found(root: str | Path) -> tuple[list[str], list[str]]:
    try:
        store = open_store(root)
    except FileNotFoundError:
        return [], []
    begun = [name.removesuffix(BEGUN) for name in store.list("step-") if name.endswith(BEGUN)]
    found: tuple[list[str], list[str]] = [], []
    for name in sorted(filter(NAME.fullmatch, begun), key=resume_order):
        is_whole = store.size(f"{name}/{MANIFEST}") is not None
        found[0 if is_whole else 1].append(f"{str(root).rstrip('/')}/{name}")
    return found


def resume_order(url: str) -> tuple[int, int]:
    """(epoch, step): a later attempt went on from wherever it did, whatever was written before."""
    found = NAME.fullmatch(url.rpartition("/")[2])
    if found is None:
        raise ValueError(f"{url} is not a checkpoint; expected a name such as step-00000040-e0001")
    return int(found[2]), int(found[1])


class Checkpoint:
    """A checkpoint in any store, read by rows. `state` is what the writer was given, and more.

    Raises FileNotFoundError without a manifest; ValueError, naming the file, for one that was
    changed, and for a tensor with rows that no file holds. Of the other files it reads nothing:
    `verify` does.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        try:
            self._store = open_store(url)
            text = self._store.get(MANIFEST)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{url}/{MANIFEST} is missing; expected a checkpoint written by gossamer"
            ) from None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, dict[str, Any]] = {}
        # (kind|name) -> (first row, row after the last, file, first byte, dtype) of each piece
        self._places: dict[str, list[tuple[int, int, str, int, torch.dtype]]] = {}
        try:
            self.state: dict[str, Any] = json.loads(text)
            if self.state.pop("sha256") != manifest_digest(self.state):
                raise ValueError("its content has another hash")
            for shard in self.state.pop("shards"):
                self._index(shard)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{url}/{MANIFEST} is not a checkpoint manifest: {error}") from error
        self._refuse_holes()

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def verify(self, part: int = 0, num_parts: int = 1, kind: str = "") -> None:
        """Hashes every num_parts-th file from `part` on, or of these those of one kind of rows.

        Raises FileNotFoundError or ValueError naming the file that is not as it was written.
        """
        for name in sorted(self._files)[part::num_parts]:
            described = self._files[name]
            if kind and kind not in {key.partition("|")[0] for key in described["tensors"]}:
                continue
            size = self._store.size(name)
            if size is None:
                raise FileNotFoundError(f"checkpoint file {self.url}/{name} is missing")
            if size != described["bytes"] or self._digest(name, size) != described["sha256"]:
                raise self._changed(name)

    def read(self, name: str, row_start: int, row_stop: int) -> Owned:
        """Rows [row_start, row_stop) of masters and moments, from whichever files hold them."""
        kinds = [kind for kind in BESIDE_MASTER if self.has(name, kind)]
        moments = {kind: self.rows(name, row_start, row_stop, kind) for kind in kinds}
        master = self.rows(name, row_start, row_stop)
        return Owned(name, self.shapes[name], row_start, row_stop, master, moments)

    def rows(self, name: str, row_start: int, row_stop: int, kind: str = MASTER) -> Tensor:
        """Rows of one kind alone. Raises ValueError for a tensor or row that is not there."""
        if name not in self.shapes:
            raise ValueError(f"{self.url} holds no tensor {name}; it is of another model")
        if row_stop > self.shapes[name][0]:
            raise ValueError(
                f"{self.url} holds {name} of shape {self.shapes[name]}, which has no row"
                f" {row_stop - 1}; it is of another model"
            )
        shape = self.shapes[name]
        if kind == MASK:
            bits = self._rows(f"{kind}|{name}", (row_bytes(shape),), row_start, row_stop)
            return unpack_rows(bits, shape)
        return self._rows(f"{kind}|{name}", shape[1:], row_start, row_stop)

    def has(self, name: str, kind: str) -> bool:
        """Whether it holds this kind of rows of a tensor."""
        return f"{kind}|{name}" in self._places

    def rng(self, rank: int) -> Tensor | None:
        """The state of a rank's generator; None where there was no such rank."""
        key = f"{RNG}|{rank}"
        return self._rows(key, (), 0, self._places[key][-1][1]) if key in self._places else None

    def kinds(self) -> list[tuple[str, str]]:
        """(kind, tensor) of all rows: masters, moments, and what else a run keeps beside them."""
        found = (key.partition("|") for key in self._places)
        return [(kind, tensor) for kind, _, tensor in found if kind != RNG]

    def _rows(self, key: str, width: tuple[int, ...], row_start: int, row_stop: int) -> Tensor:
        pieces = []
        for start, stop, file, offset, dtype in self._places[key]:
            low, high = max(start, row_start), min(stop, row_stop)
            if low < high:
                skipped = (low - start) * math.prod(width) * dtype.itemsize
                pieces.append(self._tensor(file, offset + skipped, (high - low, *width), dtype))
        return torch.cat(pieces)

    def _tensor(self, file: str, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        data = bytearray(self._store.get(file, offset, offset + nbytes))
        if len(data) != nbytes:
            raise self._changed(file)
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def _index(self, shard: dict[str, Any]) -> None:
        self.shapes |= {name: tuple(shape) for name, shape in shard["shapes"].items()}
        self._files |= shard["files"]
        for file, described in shard["files"].items():
            for key, (dtype, shape, offset) in described["tensors"].items():
                kind_and_name, _, start = key.rpartition("|")
                place = (int(start), int(start) + shape[0], file, offset, DTYPES[dtype])
                self._places.setdefault(kind_and_name, []).append(place)

    def _refuse_holes(self) -> None:
        for key, places in self._places.items():
            kind, _, name = key.partition("|")
            places.sort(key=lambda place: place[0])
            covered = 0
            for start, stop, *_ in places:
                if start != covered:
                    break
                covered = stop
            if kind != RNG and covered != self.shapes[name][0]:
                raise ValueError(f"{self.url}: rows {covered}.. of {key} are in no shard")

    def _digest(self, name: str, size: int) -> str:
        digest = hashlib.sha256()
        for start in range(0, size, READ_BYTES):
            digest.update(self._store.get(name, start, min(start + READ_BYTES, size)))
        return digest.hexdigest()

    def _changed(self, name: str) -> ValueError:
        return ValueError(
            f"checkpoint file {self.url}/{name} does not have the bytes that were written"
        )


def manifest_digest(fields: dict[str, Any]) -> str:
    """Hash of a manifest's fields, itself apart."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
