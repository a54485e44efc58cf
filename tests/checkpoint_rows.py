"""Rows for tests of checkpoints, as two ranks own them: any bits, a function of the step."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from gossamer.parallel.engine import Owned
from gossamer.trainer.checkpoint import Checkpoint
from gossamer.trainer.checkpoint_writer import Target, take_snapshot, write_checkpoint

SHAPES = {"a.weight": (130, 3), "b": (7,)}
KINDS = ("master", "exp_avg", "exp_avg_sq")
STATE = {"num_updates": 3, "progress": {"step": 40}, "data": None}
TWO_RANKS = ([("a.weight", 0, 64), ("a.weight", 128, 130), ("b", 0, 7)], [("a.weight", 64, 128)])
"""Rows of each rank, so that neither's files have them in order."""
FILE_BYTES = 600
"""Cuts the rows of a.weight, of 12 bytes each."""


def whole(name: str, kind: str, step: int = 40) -> torch.Tensor:
    """Any bits: -0.0, infinities and NaN among them."""
    seed = step * 100 + len(name) * 10 + KINDS.index(kind)
    values = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))
    values.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    return values


def owned(rows: list[tuple[str, int, int]], step: int = 40) -> list[Owned]:
    found = []
    for name, start, stop in rows:
        master, *moments = (whole(name, kind, step)[start:stop] for kind in KINDS)
        moments = dict(zip(KINDS[1:], moments, strict=True))
        found.append(Owned(name, SHAPES[name], start, stop, master, moments))
    return found


def write_one_rank(target: Target, rows: list[Owned], **more: object) -> int:
    snapshot = take_snapshot(rows, target.rank)
    state = json.dumps(STATE | {"progress": {"step": target.step}})
    return write_checkpoint(target, snapshot, state, file_bytes=FILE_BYTES, **more)


def write_on_two_ranks(root: str | Path, step: int = 40, epoch: int = 2) -> str:
    """A whole checkpoint; returns its URL."""
    targets = [
        Target(root=str(root), step=step, epoch=epoch, rank=rank, world_size=2) for rank in (0, 1)
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda t: write_one_rank(t, owned(TWO_RANKS[t.rank], step)), targets))
    return targets[0].url


def assert_holds(checkpoint: Checkpoint, name: str, start: int, stop: int) -> None:
    rows = checkpoint.read(name, start, stop)
    assert (rows.name, rows.shape) == (name, SHAPES[name])
    assert (rows.row_start, rows.row_stop) == (start, stop)
    assert rows.moments.keys() == set(KINDS[1:])
    for kind, values in {"master": rows.master, **rows.moments}.items():
        expected = whole(name, kind, checkpoint.step)[start:stop]
        assert torch.equal(values.view(torch.int32), expected.view(torch.int32))


def assert_whole(url: str) -> None:
    checkpoint = Checkpoint(url)
    checkpoint.verify()
    for name, shape in SHAPES.items():
        assert_holds(checkpoint, name, 0, shape[0])
