"""Checkpoints: the whole training state by logical name, written whole or not at all.

The one idea: each rank writes the rows it owns under (kind, name, first row); nothing in a file
says which rank held what, so any topology can read any checkpoint. A folder counts once its
manifest, with the hash of every shard, has been renamed into place with it.

Layout: CHECKPOINTS/step-00000040-e0001/{manifest.json, shard-00000.safetensors, ...}, e = the
writer epoch of the run that wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gossamer.parallel.engine import Owned
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FOLDER = re.compile(r"step-(\d{8})-e(\d{4})")
RNG_KEY = "rng"
MOMENTS = ("exp_avg", "exp_avg_sq")


def write_checkpoint(
    root: Path, step: int, epoch: int, owned: Iterable[Owned], state: dict[str, Any]
) -> tuple[Path, int]:
    """Writes one checkpoint; every rank calls this. Returns its folder and its bytes on disk.

    state: JSON, the same on every rank (rank 0's is kept).
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    final = root / f"step-{step:08d}-e{epoch:04d}"
    temporary = root / f".{final.name}"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()

    tensors: dict[str, Tensor] = {f"{RNG_KEY}|{rank}|0": torch.get_rng_state()}
    shapes: dict[str, tuple[int, ...]] = {}
    for rows in owned:
        shapes[rows.name] = rows.shape
        for kind, values in {"master": rows.master, **rows.moments}.items():
            tensors[f"{kind}|{rows.name}|{rows.row_start}"] = values.contiguous()
    shard = temporary / _shard_name(rank)
    save_file(tensors, shard, metadata={"shapes": json.dumps(shapes)})
    _fsync(shard)

    digests = torch.zeros(world_size, 33, dtype=torch.int64)
    digests[rank, 0] = shard.stat().st_size
    digests[rank, 1:] = torch.tensor(list(_digest(shard)))
    dist.all_reduce(digests)
    num_bytes = int(digests[:, 0].sum())
    if rank == 0:
        shards = {
            _shard_name(r): {"bytes": row[0], "sha256": bytes(row[1:]).hex()}
            for r, row in enumerate(digests.tolist())
        }
        manifest = temporary / "manifest.json"
        manifest.write_text(json.dumps({"step": step, "epoch": epoch, "shards": shards, **state}))
        _fsync(manifest)
        _fsync(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _fsync(root)
    dist.barrier()
    return final, num_bytes


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoints that were written whole, the one to resume from last: by epoch, then step."""
    if not root.is_dir():
        return []
    found = [(FOLDER.fullmatch(path.name), path) for path in root.iterdir()]
    keyed = [((int(m[2]), int(m[1])), path) for m, path in found if m is not None]
    return [path for _, path in sorted(keyed)]


def prune_checkpoints(root: Path, keep_last: int) -> None:
    """Removes all but the newest `keep_last` checkpoints, and what was left half written."""
    for path in [*root.glob(".step-*"), *list_checkpoints(root)[:-keep_last]]:
        shutil.rmtree(path, ignore_errors=True)


class Checkpoint:
    """A checkpoint on disk, read by rows. `state` is what write_checkpoint was given, and more.

    Raises FileNotFoundError or ValueError, naming the file, for a shard that is missing, of another
    length or of other bytes, and for a tensor with rows that no shard holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "manifest.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; expected a checkpoint written by gossamer")
        try:
            self.state: dict[str, Any] = json.loads(path.read_text())
            shards = {
                folder / name: (described["bytes"], described["sha256"])
                for name, described in self.state["shards"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a checkpoint manifest: {error}") from error
        self._places: dict[str, list[tuple[int, int, Path]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.rng: dict[int, Tensor] = {}
        for path, (num_bytes, sha256) in shards.items():
            self._index(path, num_bytes, sha256)
        self._refuse_holes()

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def read(self, name: str, row_start: int, row_stop: int) -> Owned:
        """Rows [row_start, row_stop) of masters and moments, from whichever shards hold them."""
        if name not in self.shapes:
            raise ValueError(f"{self.folder} holds no tensor {name}; it is of another model")
        if row_stop > self.shapes[name][0]:
            raise ValueError(
                f"{self.folder} holds {name} of shape {self.shapes[name]}, which has no row"
                f" {row_stop - 1}; it is of another model"
            )
        kinds = ["master", *(k for k in MOMENTS if f"{k}|{name}" in self._places)]
        values = {kind: self._rows(f"{kind}|{name}", row_start, row_stop) for kind in kinds}
        master = values.pop("master")
        return Owned(name, self.shapes[name], row_start, row_stop, master, values)

    def _rows(self, key: str, row_start: int, row_stop: int) -> Tensor:
        parts = []
        for start, stop, path in self._places[key]:
            low, high = max(start, row_start), min(stop, row_stop)
            if low < high:
                with safe_open(path, framework="pt") as shard:
                    parts.append(shard.get_slice(f"{key}|{start}")[low - start : high - start])
        return torch.cat(parts)

    def _index(self, path: Path, num_bytes: int, sha256: str) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint file {path} is missing")
        if path.stat().st_size != num_bytes or _digest(path).hex() != sha256:
            raise ValueError(f"checkpoint file {path} does not have the bytes that were written")
        try:
            with safe_open(path, framework="pt") as shard:
                shapes = json.loads(shard.metadata()["shapes"])
                self.shapes |= {name: tuple(shape) for name, shape in shapes.items()}
                for key in shard.keys():  # noqa: SIM118
                    kind, name, start = key.split("|")
                    if kind == RNG_KEY:
                        self.rng[int(name)] = shard.get_tensor(key)
                        continue
                    rows = shard.get_slice(key).get_shape()[0]
                    place = (int(start), int(start) + rows, path)
                    self._places.setdefault(f"{kind}|{name}", []).append(place)
        except SafetensorError as error:
            raise ValueError(f"checkpoint file {path} is not safetensors: {error}") from error

    def _refuse_holes(self) -> None:
        for key, places in self._places.items():
            places.sort()
            covered = 0
            for start, stop, _ in places:
                if start != covered:
                    break
                covered = stop
            if covered != self.shapes[key.split("|")[1]][0]:
                raise ValueError(f"{self.folder}: rows {covered}.. of {key} are in no shard")


def _shard_name(rank: int) -> str:
    return f"shard-{rank:05d}.safetensors"


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
