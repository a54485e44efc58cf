"""Replicas of a toy model for tests: a quadratic whose minimum each shard of tokens moves a little.

Token n of a stream is a function of (stream, n), so two who train the same tokens change the same.
"""

import torch
from gossamer.comm.codec.part import Rows
from gossamer.comm.outer.anchor import Anchors
from gossamer.comm.outer.claim import join
from gossamer.comm.outer.config import OuterConfig, SparseLocoConfig
from gossamer.comm.outer.exchange import Identity
from gossamer.comm.outer.replica import Replica, shapes_of
from gossamer.comm.outer.round_log import LogExchange
from gossamer.comm.outer.seal import NO_SEAL
from gossamer.comm.store import open_store

SHAPES = {
    "model.layers.0.mlp.experts.0.down_proj.weight": (64, 64),
    "model.layers.0.mlp.experts.1.down_proj.weight": (64, 64),
    "model.layers.0.mlp.gate.e_score_correction_bias": (4,),
    "model.norm.weight": (24,),
}
TOKENS = 100
"""Trained in a round."""
CONFIG = OuterConfig(
    sparseloco=SparseLocoConfig(density=1 / 16),
    grace_s=60.0,
    deadline_s=120.0,
    poll_s=0.005,
    anchor_every_rounds=3,
)


def initial_rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Rows(name, shape, 0, torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
    ]


def trained_rows(replica, tokens_before, rate=0.2):
    """The rows after the inner steps on TOKENS tokens from `tokens_before` on."""
    stream = sum(replica._exchange.identity.replica.encode())
    for i, rows in enumerate(replica.rows.values()):
        generator = torch.Generator().manual_seed(stream * 10_000 + tokens_before * 10 + i)
        target = torch.randn(rows.shape, generator=generator)
        yield Rows(rows.name, rows.shape, 0, rows.values + rate * (target - rows.values))


def run_round(replica, tokens_before):
    settled = replica.round(trained_rows(replica, tokens_before), tokens_before, TOKENS, 1)
    replica.catch_up()
    return settled


def open_replica(folder, config, takeover=False, rows=None, seal=NO_SEAL):
    """A replica that joins the log in `folder`, or comes back to it from the newest anchor."""
    store = open_store(folder, create=True)
    identity = join(store, config, "toy", takeover, seal)
    rows = rows or initial_rows()
    exchange = LogExchange(store, config, identity, shapes_of(rows), seal)
    anchors = Anchors(store, identity, shapes_of(rows), seal)
    replica = Replica(config, exchange, rows, anchors)
    replica.catch_up()
    return replica


def identity_of(name, rank=0, num_ranks=1):
    return Identity(run_id="toy", replica=name, rank=rank, num_ranks=num_ranks)


def state_of(replica):
    return {name: rows.values.clone() for (name, _), rows in replica.rows.items()}
