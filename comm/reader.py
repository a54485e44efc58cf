"""Reads the state of one version without an engine: for export, folding, audits and tests.

The one idea: tensor by tensor. The frames of the newest anchor and of the deltas after it are held
as they are on the wire, and only one tensor at a time is decoded from them.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from gossamer.comm.codec.bits import tensor_bits
from gossamer.comm.codec.runs import RunCodec
from gossamer.comm.live import LiveWeights
from gossamer.comm.log import WeightLog
from gossamer.comm.manifest import LogError, PartRef
from gossamer.comm.wire import Run, WireError, unpack_frame


class StateReader:
    """The tensors of `version`. Raises LogError when the version does not exist."""

    def __init__(self, log: WeightLog, version: int) -> None:
        anchor = log.newest_anchor(version)
        refs = list(log.manifest(anchor).anchor)
        for each in range(anchor + 1, version + 1):
            refs += log.manifest(each).delta
        self._runs: dict[str, list[Run]] = defaultdict(list)
        for ref in refs:
            for run in read_runs(log, ref):
                self._runs[run.name].append(run)
        self._codec = RunCodec()

    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        return sorted(self._runs)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, decoded anew at each call. Raises LogError for a damaged frame."""
        runs = self._runs[name]
        tensor = torch.zeros(runs[0].shape, dtype=getattr(torch, runs[0].dtype))
        bits = tensor_bits(tensor)
        for run in runs:
            old = bits[run.start : run.start + run.num_elements]
            try:
                positions, new = self._codec.decode(run, old)
            except WireError as error:
                raise LogError(f"{name} cannot be decoded: {error}") from error
            old[positions] = new
        return tensor


def read_runs(log: WeightLog, ref: PartRef) -> list[Run]:
    """The runs of one frame. Raises LogError."""
    try:
        return unpack_frame(log.read_part(ref)).runs
    except WireError as error:
        raise LogError(f"{ref.name} is {error}") from error


def read_state(log: WeightLog, version: int | None = None) -> dict[str, torch.Tensor]:
    """Tensors by name at `version` (default: the head).

    Raises LogError when the version does not exist, or does not hash to what its manifest says.
    """
    version = log.head() if version is None else version
    if version is None or not log.is_committed(version):
        raise LogError(f"the log at {log.url} has no version {version}")
    reader = StateReader(log, version)
    tensors = {name: reader.tensor(name) for name in reader.names()}
    found, expected = LiveWeights(tensors).audit(), log.manifest(version).state_hash
    if found != expected:
        raise LogError(f"version {version} hashes to {found}; its manifest says {expected}")
    return tensors


def first_difference(log: WeightLog, version: int, tensors: dict[str, torch.Tensor]) -> str:
    """Which of `tensors` is not what it is at `version`, in words."""
    reader = StateReader(log, version)
    for name in reader.names():
        count = int((tensor_bits(tensors[name]) != tensor_bits(reader.tensor(name))).sum())
        if count:
            return f"{count} elements of {name} differ"
    return "yet every tensor is as the log has it"
