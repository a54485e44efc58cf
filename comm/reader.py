"""Reads the state of one version without an engine: for export, folding, audits and tests.

The one idea: tensor by tensor. The frames of the newest anchor and of the deltas after it are held
as they are on the wire, and only one tensor at a time is decoded from them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial

import torch
from gossamer.comm.codec import Codec, build_codec
from gossamer.comm.codec.bits import tensor_bits
from gossamer.comm.log import WeightLog
from gossamer.comm.manifest import LogError, PartRef
from gossamer.comm.run import Run, WireError
from gossamer.comm.state_hash import format_hash, hash_elements, tensor_seed
from gossamer.comm.wire import Frame, head_nbytes, unpack_frame, unpack_head

# most heads are shorter, and one request is quicker than two
LIKELY_HEAD_BYTES = 1 << 16


class StateReader:
    """The tensors of `version`. Raises LogError when the version does not exist."""

    def __init__(self, log: WeightLog, version: int) -> None:
        self._manifest = log.manifest(version)
        anchor = log.newest_anchor(version)
        refs = list(log.manifest(anchor).anchor)
        for each in range(anchor + 1, version + 1):
            refs += log.manifest(each).delta
        self._runs: dict[str, list[Run]] = defaultdict(list)
        for ref in refs:
            for run in read_frame(log, ref).runs:
                self._runs[run.name].append(run)
        self._codecs: dict[str, Codec] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor), sorted; decoded anew each time.

        Raises LogError for a damaged frame, and behind the last tensor where all of them do not
        hash to what the manifest says.
        """
        total = 0
        for name in sorted(self._runs):
            tensor = self._decode(name)
            seed = tensor_seed(name, self._runs[name][0].dtype, tuple(tensor.shape))
            total += hash_elements(tensor_bits(tensor), seed)
            yield name, tensor
        if format_hash(total) != self._manifest.state_hash:
            raise LogError(
                f"version {self._manifest.version} hashes to {format_hash(total)}; "
                f"its manifest says {self._manifest.state_hash}"
            )

    def _decode(self, name: str) -> torch.Tensor:
        runs = self._runs[name]
        tensor = torch.zeros(runs[0].shape, dtype=getattr(torch, runs[0].dtype))
        bits = tensor_bits(tensor)
        for run in runs:
            old = bits[run.start : run.start + run.num_elements]
            try:
                if run.codec not in self._codecs:
                    self._codecs[run.codec] = build_codec(run.codec)
                positions, new = self._codecs[run.codec].decode(run, old)
            except WireError as error:
                raise LogError(f"{name} cannot be decoded: {error}") from error
            old[slice(None) if positions is None else positions] = new
        return tensor


def read_frame(log: WeightLog, ref: PartRef) -> Frame:
    """One frame of a committed version. Raises LogError, SignatureError."""
    try:
        return unpack_frame(log.read_part(ref))
    except WireError as error:
        raise LogError(f"{ref.name} is {error}") from error


def read_head(log: WeightLog, ref: PartRef) -> Frame:
    """A frame without its payload, which is not fetched; so its digest proves nothing."""
    return head_of(partial(log.store.get, ref.name), ref.nbytes, ref.name)


def head_of(get: Callable[[int, int], bytes], nbytes: int, name: str) -> Frame:
    """The head of the frame `name`, of which `get(start, stop)` gives ranges. Raises LogError."""
    data = get(0, min(nbytes, LIKELY_HEAD_BYTES))
    try:
        stop = head_nbytes(data)
        return unpack_head(data if stop <= len(data) else data + get(len(data), stop))
    except WireError as error:
        raise LogError(f"{name} is {error}") from error


def read_state(log: WeightLog, version: int | None = None) -> dict[str, torch.Tensor]:
    """Tensors by name at `version` (default: the head).

    Raises LogError when the version does not exist, or does not hash to what its manifest says.
    """
    version = log.head() if version is None else version
    if version is None or not log.is_committed(version):
        raise LogError(f"the log at {log.url} has no version {version}")
    return dict(StateReader(log, version))
