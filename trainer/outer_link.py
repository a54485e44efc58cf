"""A rank's way to the other replicas, with what it costs: seconds, and bytes on the wire.

The one idea: bytes are counted where they leave, at the store or in the group, so that claims,
records and anchors are among them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol, cast

import torch
import torch.distributed as dist
from gossamer.comm.outer.anchor import Anchors
from gossamer.comm.outer.claim import join
from gossamer.comm.outer.collective import CollectiveExchange
from gossamer.comm.outer.config import OuterConfig
from gossamer.comm.outer.exchange import Exchange, Identity, Settled
from gossamer.comm.outer.message import Message
from gossamer.comm.outer.record import Shapes
from gossamer.comm.outer.round_log import LogExchange
from gossamer.comm.outer.seal import Seal
from gossamer.comm.store import Store, open_store
from gossamer.parallel.dims import ParallelDims
from gossamer.trainer.data.config import DataConfig
from gossamer.trainer.outer_course import Course
from gossamer.trainer.run_folder import inside
from gossamer.trainer.saving import RunPlace

ROUNDS_FOLDER = "rounds"


class Meter(Protocol):
    """Bytes of this rank so far."""

    sent: int
    read: int


class MeteredStore:
    """A store that counts the bytes of files written and read."""

    def __init__(self, store: Store) -> None:
        self.sent = self.read = 0
        self._store = store
        self.list, self.size, self.delete = store.list, store.size, store.delete

    def put(self, name: str, data: bytes, overwrite: bool = False) -> bool:
        self.sent += len(data)
        return self._store.put(name, data, overwrite)

    def get(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        data = self._store.get(name, start, stop)
        self.read += len(data)
        return data


class TimedExchange:
    """An exchange that says how long it kept its replica waiting."""

    def __init__(self, exchange: Exchange) -> None:
        self.identity: Identity = exchange.identity
        self.next_round = exchange.next_round
        self.wait_s, self.sent_at_s = 0.0, 0.0
        self._exchange = exchange

    def send(self, message: Message) -> None:
        self._exchange.send(message)
        self.sent_at_s = time.perf_counter()

    def settle(self, number: int) -> Settled:
        start_s = time.perf_counter()
        settled = self._exchange.settle(number)
        self.wait_s += time.perf_counter() - start_s
        return settled


@dataclass(frozen=True, slots=True)
class Link:
    """What a rank speaks through."""

    exchange: TimedExchange
    meter: Meter
    anchors: Anchors | None = None
    """None where membership is fixed."""
    course: Course | None = None
    """The log as it is read to go on; None where membership is fixed."""


def open_link(
    config: OuterConfig,
    place: RunPlace,
    data: DataConfig,
    dims: ParallelDims,
    shapes: Shapes,
    number: int,
) -> Link:
    """Meets the others: claims the replica's name in the log, or joins the group.

    `shapes` are those of all tensors, `number` is the round that a group begins with. A collective
    call. Raises StaleWriterError where the name is another's, LogError for another run's log, or
    one whose members trust other keys.
    """
    if config.exchange == "collective":
        identity = Identity(
            run_id=place.name, replica=config.replica, rank=dims.rank, num_ranks=dims.world_size
        )
        group = _group(config, place, data, dims.rank)
        collective = CollectiveExchange(group, identity, shapes, number)
        return Link(TimedExchange(collective), collective)
    url = config.url or inside(place.run_dir, ROUNDS_FOLDER)
    store, seal = MeteredStore(open_store(url, create=True)), Seal.of(config)
    incarnation = torch.zeros(1, dtype=torch.int64)
    if dims.rank == 0:
        takeover = place.attempt > 1 or place.resume_from is not None
        incarnation += join(store, config, place.name, takeover, seal).incarnation
    dist.broadcast(incarnation, src=0)
    identity = Identity(
        run_id=place.name,
        replica=config.replica,
        rank=dims.rank,
        num_ranks=dims.world_size,
        incarnation=int(incarnation),
    )
    log = LogExchange(store, config, identity, shapes, seal)
    anchors = Anchors(store, identity, shapes, seal)
    return Link(TimedExchange(log), store, anchors, Course(log, anchors, store))


def _group(config: OuterConfig, place: RunPlace, data: DataConfig, rank: int) -> dist.ProcessGroup:
    """The same rank of every replica, by gloo; replicas are numbered by data.replica_index."""
    url = config.url or inside(place.run_dir, ROUNDS_FOLDER)
    index, size = data.replica_index, data.num_replicas
    timeout = timedelta(seconds=config.deadline_s)
    store: dist.Store
    if url.startswith("tcp://"):
        host, _, port = url.removeprefix("tcp://").rpartition(":")
        is_host = index == rank == 0
        store = dist.TCPStore(host, int(port), None, is_host, timeout, wait_for_workers=False)
    else:
        Path(url).mkdir(parents=True, exist_ok=True)
        # a file of its own for each attempt: a dead one's addresses are in the last
        store = dist.FileStore(str(Path(url) / f"meeting-{place.attempt}"))
        store.set_timeout(timeout)
    group = dist.ProcessGroupGloo(dist.PrefixStore(f"rank-{rank}", store), index, size, timeout)
    return cast("dist.ProcessGroup", group)  # as much of it as is needed
