"""The outer state of a replica in its checkpoints: by kind, beside the rows that it belongs to.

The one idea: shared weights, momentum, error buffers and what was sent and may count yet are all
shaped as the rows of a tensor; so they are kept and read as masters and moments are, under any
topology.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import chain

import numpy as np
import torch
from gossamer.comm.codec.part import Rows
from gossamer.comm.outer.message import Sent
from gossamer.comm.outer.replica import Replica
from gossamer.comm.outer.rule import Key
from gossamer.comm.run import Run
from gossamer.trainer.checkpoint import Checkpoint
from torch import Tensor

WEIGHTS, SHARED, OWN, PENDING = "outer_weights", "outer_shared", "outer_own", "outer_pending"
"""Kinds of rows; a buffer that a rule calls `momentum of NAME` is of `outer_own momentum of`."""


def outer_kinds(replica: Replica) -> dict[Key, dict[str, Tensor]]:
    """All that is held beside each rows, by kind, float32."""
    kinds: dict[Key, dict[str, Tensor]] = defaultdict(dict)
    if not replica.rule.on_gradients:
        for key, rows in replica.rows.items():
            kinds[key][WEIGHTS] = rows.values
            if replica.pending:
                kinds[key][PENDING] = torch.zeros_like(rows.values)
    for stem, buffers in ((SHARED, replica.rule.shared), (OWN, replica.rule.own)):
        for (buffer_name, row_start), values in buffers.items():
            prefix, _, name = buffer_name.rpartition(" ")
            kinds[name, row_start][f"{stem} {prefix}".strip()] = values
    for sent in chain.from_iterable(replica.pending.values()):
        if sent.positions is not None:  # what is sent whole does not come back
            waiting = kinds[sent.run.name, sent.run.row_start][PENDING]
            waiting.view(-1).numpy()[sent.positions] = sent.values
    return kinds


def shared_weights(checkpoint: Checkpoint, owned: list[Rows]) -> list[Rows]:
    """These rows of the shared weights; none of them under a rule on gradients."""
    kinds = _kinds(checkpoint)
    return [
        Rows(rows.name, rows.shape, rows.row_start, _read(checkpoint, rows, WEIGHTS))
        for rows in owned
        if WEIGHTS in kinds[rows.name]
    ]


def put_back(replica: Replica, checkpoint: Checkpoint, owned: list[Rows]) -> None:
    """Fills the buffers of a replica that stands where the checkpoint does."""
    kinds = _kinds(checkpoint)
    buffers = {SHARED: replica.rule.shared, OWN: replica.rule.own}
    for rows in owned:
        for kind in kinds[rows.name]:
            stem, _, prefix = kind.partition(" ")
            if stem in buffers:
                key = f"{prefix} {rows.name}".strip(), rows.row_start
                buffers[stem][key] = _read(checkpoint, rows, kind)
            elif stem == PENDING:
                _put_pending(replica, rows, _read(checkpoint, rows, kind))


def _kinds(checkpoint: Checkpoint) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for kind, name in checkpoint.kinds():
        kinds[name].append(kind)
    return kinds


def _put_pending(replica: Replica, rows: Rows, values: Tensor) -> None:
    flat = values.view(-1).numpy()
    positions = np.flatnonzero(flat).astype(np.uint32)
    if len(positions) == 0:
        return
    num_rows = len(rows.values) if len(rows.shape) > 1 else 1
    run = Run(rows.name, "float32", tuple(rows.shape), rows.row_start, num_rows)
    sent = Sent(run, 1, positions, flat[positions], 0.0)
    replica.pending.setdefault(replica.number - 1, []).append(sent)


def _read(checkpoint: Checkpoint, rows: Rows, kind: str) -> Tensor:
    return checkpoint.rows(rows.name, rows.row_start, rows.row_start + len(rows.values), kind)
