"""Reads the whole state of one version, for tests and for export."""

from __future__ import annotations

import torch
from gossamer.comm.live import LiveWeights
from gossamer.comm.log import LogError, WeightLog
from gossamer.comm.subscriber import Subscriber
from gossamer.comm.wire import WireError, unpack_frame


def read_state(log: WeightLog, version: int | None = None) -> dict[str, torch.Tensor]:
    """Tensors by name at `version` (default: the head): its newest anchor, then deltas.

    Raises LogError when the version does not exist.
    """
    version = log.head() if version is None else version
    if version is None or not log.is_committed(version):
        raise LogError(f"the log at {log.url} has no version {version}")
    anchor = log.newest_anchor(version)
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for ref in log.manifest(anchor).anchor:
        try:
            runs = unpack_frame(log.read_part(ref)).runs
        except WireError as error:
            raise LogError(f"{ref.name} is {error}") from error
        tensors |= {run.name: (run.shape, getattr(torch, run.dtype)) for run in runs}
    live = LiveWeights(
        {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    )
    subscriber = Subscriber(log, live)
    for each in range(anchor, version + 1):
        subscriber.commit(subscriber.fetch_and_stage(each))
    return live.tensors
