"""Checkpoints, written: rows copied to the host, then files beside the training step.

The one idea: as in the weight log, a store is all that the ranks share. Each rank puts its files
and then `shard-<rank>.json`, which says what they are; rank 0 waits until all of those lie there
and creates the manifest. So no collective is called, and a thread may do it while the step goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from gossamer.comm.store import Store, open_store
from gossamer.comm.store.local import LocalStore
from gossamer.parallel.engine import Owned
from gossamer.trainer.checkpoint import (
    BEGUN,
    DTYPES,
    MANIFEST,
    MASK,
    MASTER,
    RNG,
    list_checkpoints,
    list_unfinished,
    manifest_digest,
    resume_order,
)
from gossamer.trainer.sparsity.bits import pack_rows
from torch import Tensor

FILE_BYTES = 64 << 20
"""Rows in one file, at most: what the writing thread holds besides the snapshot."""
POLL_S = 0.05
SHARDS_S = 600.0
"""How much longer than rank 0 another rank may take for its share, of about the same size."""
READS_AT_ONCE = 16
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Abandoned(RuntimeError):  # noqa: N818, it ends a thread and says nothing to a user
    """The write was given up because another rank's failed."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One rank's rows in host memory, by kind|name|first row, and the shapes of whole tensors."""

    tensors: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where a checkpoint goes, and which rank of how many writes."""

    root: str
    """A folder or store URL."""
    step: int
    epoch: int
    rank: int = 0
    world_size: int = 1

    @property
    def name(self) -> str:
        return f"step-{self.step:08d}-e{self.epoch:04d}"

    @property
    def url(self) -> str:
        return f"{self.root.rstrip('/')}/{self.name}"


class BackgroundWrite(Thread):
    """One rank's write in a thread, which ends with the process whatever it is at."""

    def __init__(
        self,
        target: Target,
        snapshot: Snapshot,
        state: str,
        may_commit: Callable[[], None],
        then: Callable[[], None],
    ) -> None:
        """`then` is called by rank 0 once the checkpoint is committed."""
        super().__init__(name=f"checkpoint {target.name}", daemon=True)
        self.num_bytes, self.write_s = 0, 0.0
        self.error: Exception | None = None
        self._arguments = (target, snapshot, state, may_commit)
        self._then, self._abandoned = then, Event()

    def run(self) -> None:
        target, snapshot, state, may_commit = self._arguments
        start_s = time.perf_counter()
        try:
            self.num_bytes = write_checkpoint(
                target, snapshot, state, may_commit, self._abandoned.is_set
            )
            self.write_s = time.perf_counter() - start_s
            if target.rank == 0:
                self._then()
        except Exception as error:  # raised by the step, for a thread has no caller
            self.error = error

    @property
    def fault(self) -> str:
        """What went wrong, in a sentence; empty where nothing did."""
        return "" if self.error is None else str(self.error) or type(self.error).__name__

    def abandon(self) -> None:
        """Ends the thread at its next look."""
        self._abandoned.set()


def take_snapshot(owned: Iterable[Owned], rank: int) -> Snapshot:
    """Copies what this rank owns, and its generator's state: as many bytes as its shard will have.

    A collective call where `owned` is the engine's.
    """
    tensors: dict[str, Tensor] = {f"{RNG}|{rank}|0": torch.get_rng_state()}
    shapes: dict[str, tuple[int, ...]] = {}
    for rows in owned:
        shapes[rows.name] = rows.shape
        for kind, values in {MASTER: rows.master, **rows.moments}.items():
            values = pack_rows(values) if kind == MASK else values
            copied = values.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            tensors[f"{kind}|{rows.name}|{rows.row_start}"] = copied
    return Snapshot(tensors, shapes)


def write_checkpoint(
    target: Target,
    snapshot: Snapshot,
    state: str,
    may_commit: Callable[[], None] = lambda: None,
    is_abandoned: Callable[[], bool] = lambda: False,
    file_bytes: int = FILE_BYTES,
) -> int:
    """Writes one rank's shard and empties the snapshot; rank 0 commits, and learns all bytes.

    Every rank calls this; it is no collective. state: a JSON object, rank 0's is kept. `may_commit`
    raises where a later writer has begun. Raises FileExistsError for a checkpoint that was begun
    before, TimeoutError where a rank's shard stays away, Abandoned when told to; StoreError and
    OSError are the store's.
    """
    root = open_store(target.root, create=True)
    # the folder first, so that syncing the marker's folder makes its name last, too
    store = open_store(target.url, create=True)
    root.put(target.name + BEGUN, b"{}")
    files: dict[str, dict[str, Any]] = {}
    for number, tensors in enumerate(_filled(snapshot.tensors, file_bytes)):
        if is_abandoned():
            raise Abandoned
        name = f"shard-{target.rank:05d}-{number:05d}.safetensors"
        data, places = pack_safetensors(tensors)
        _create(store, name, data)
        digest = hashlib.sha256(data).hexdigest()
        files[name] = {"bytes": len(data), "sha256": digest, "tensors": places}
    shard = {"files": files, "shapes": snapshot.shapes}
    _create(store, _described(target.rank), json.dumps(shard).encode())
    if target.rank:
        return sum(described["bytes"] for described in files.values())

    shards = _all_shards(store, target.world_size, is_abandoned)
    may_commit()
    manifest = {"step": target.step, "epoch": target.epoch, **json.loads(state), "shards": shards}
    text = json.dumps(manifest | {"sha256": manifest_digest(manifest)})
    _create(store, MANIFEST, text.encode())
    return sum(file["bytes"] for shard in shards for file in shard["files"].values())


def prune_checkpoints(
    root: str | Path, keep_last: int, committed: str, torn: Iterable[str] = ()
) -> None:
    """Removes all but the newest `keep_last` checkpoints, the torn ones, and what is unfinished.

    Of the unfinished only those before `committed`: what comes after it is being written.
    """
    limit = resume_order(committed)
    whole = [url for url in list_checkpoints(root) if url not in set(torn)]
    unfinished = [url for url in list_unfinished(root) if resume_order(url) < limit]
    for url in [*torn, *unfinished, *whole[:-keep_last]]:
        remove_checkpoint(url)


def remove_checkpoint(url: str) -> None:
    """Removes a checkpoint: manifest first, marker last, so that what is left is found again."""
    root_url, _, name = url.rpartition("/")
    root = open_store(root_url)
    root.delete(f"{name}/{MANIFEST}")
    for file in root.list(f"{name}/"):
        root.delete(file)
    if isinstance(root, LocalStore):
        shutil.rmtree(root.root / name, ignore_errors=True)
    root.delete(name + BEGUN)


def pack_safetensors(tensors: dict[str, Tensor]) -> tuple[bytearray, dict[str, list]]:
    """A safetensors file, and (dtype, shape, first byte) of each tensor in it.

    As `safetensors.torch.save`, which holds the interpreter's lock while it copies; torch does not.
    """
    header: dict[str, dict[str, Any]] = {}
    nbytes = 0
    for key, tensor in tensors.items():
        header[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [nbytes, nbytes + tensor.nbytes],
        }
        nbytes += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    data = bytearray(first + nbytes)
    data[:first] = len(text).to_bytes(8, "little") + text
    places = {}
    for key, described in header.items():
        start, stop = (first + offset for offset in described["data_offsets"])
        target = torch.frombuffer(data, dtype=torch.uint8)[start:stop]
        target.copy_(tensors[key].reshape(-1).view(torch.uint8))
        places[key] = [described["dtype"], described["shape"], start]
    return data, places


def _filled(tensors: dict[str, Tensor], file_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The rows file by file, one kind a file, and taken out of `tensors` as they go."""
    held: dict[str, Tensor] = {}
    held_kind, held_bytes = "", 0
    for kind, name, first_row in sorted(key.split("|") for key in tensors):
        rows = tensors.pop(f"{kind}|{name}|{first_row}")
        height = max(1, file_bytes // max(1, rows[0].nbytes))
        for number, piece in enumerate(rows.split(height)):
            if held and (kind != held_kind or held_bytes + piece.nbytes > file_bytes):
                yield held
                held, held_bytes = {}, 0
            held[f"{kind}|{name}|{int(first_row) + number * height}"] = piece
            held_kind, held_bytes = kind, held_bytes + piece.nbytes
    if held:
        yield held


def _all_shards(
    store: Store, world_size: int, is_abandoned: Callable[[], bool]
) -> list[dict[str, Any]]:
    """What every rank says of its shard, once all have said it. Raises TimeoutError."""
    names = [_described(rank) for rank in range(world_size)]
    deadline_s = time.monotonic() + SHARDS_S
    while missing := set(names) - set(store.list("shard-")):
        if is_abandoned():
            raise Abandoned
        if time.monotonic() > deadline_s:
            raise TimeoutError(
                f"{min(missing)} did not come within {SHARDS_S:g} s; expected a checkpoint.url that"
                " all ranks share"
            )
        time.sleep(POLL_S)
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        return [json.loads(text) for text in pool.map(store.get, names)]


def _create(store: Store, name: str, data: bytes | bytearray) -> None:
    if not store.put(name, data):  # type: ignore[arg-type]  # a bytearray does, without a copy
        raise FileExistsError(f"checkpoint file {name} exists already; expected a new checkpoint")


def _described(rank: int) -> str:
    return f"shard-{rank:05d}.json"
