"""Our own update in the benchmark: a real publisher, a real log, real live weights.

The one idea: nothing is taken apart for the stopwatch. What is timed are the calls that a trainer
and an engine make, with all their hashing, proving and undo; only decoding is timed once more on
its own, to stand beside the peers'.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

from gossamer.comm.codec import build_codec
from gossamer.comm.codec.bits import tensor_bits
from gossamer.comm.config import LogConfig
from gossamer.comm.live import LiveWeights
from gossamer.comm.log import WeightLog
from gossamer.comm.publisher import Publisher
from gossamer.comm.wire import unpack_frame
from gossamer.launch.bench.peers import Weights
from torch import Tensor


class Ours:
    """One log, its only writer and one engine, which `step` brings from version to version."""

    def __init__(self, folder: Path, start: dict[str, Tensor]) -> None:
        self._log = WeightLog.open(folder, create=True)
        # anchors cost what a full copy costs, at times of the user's choice
        config = LogConfig(anchor_every_versions=1 << 30)
        self._publisher = Publisher(self._log, config=config)
        self._live = LiveWeights({name: tensor.clone() for name, tensor in start.items()})
        self.step(start)

    @property
    def live(self) -> Weights:
        """The engine's bits."""
        return {name: tensor_bits(tensor) for name, tensor in self._live.tensors.items()}

    def step(self, weights: dict[str, Tensor]) -> tuple[bytes, dict[str, float]]:
        """Publishes and applies one version; its frames' bytes, and seconds by column."""
        published = self._publisher.publish(weights, step=0)
        manifest = self._log.manifest(published.version)
        frames = [self._log.read_part(ref) for ref in manifest.delta or manifest.anchor]
        started_s = perf_counter()
        self._decode(frames)
        decoded_s = perf_counter()
        staged = self._live.stage(manifest, frames)
        staged_s = perf_counter()
        pause_s = self._live.commit(staged).pause_s
        return b"".join(frames), {
            "encode_s": published.find_s + published.encode_s,
            "decode_s": decoded_s - started_s,
            "stage_s": staged_s - decoded_s,
            "commit_s": perf_counter() - staged_s,
            "pause_s": pause_s,
        }

    def _decode(self, frames: list[bytes]) -> None:
        """What `stage` does less its proofs."""
        live = self.live
        for frame in frames:
            for run in unpack_frame(frame).runs:
                old = live[run.name][run.start : run.start + run.num_elements]
                build_codec(run.codec).decode(run, old)
