"""SGLang follows a weight log through its custom weight loader; needs no change there.

The one idea: SGLang hands whatever named tensors it is sent to a function of ours in each worker.
Sent are a manifest and its frames as bytes, applied by the map that is learnt from the model's own
load_weights. The server is started with `--custom-weight-loader gossamer.comm.engines.sglang.load`;
whoever feeds it posts `payload(...)` to /update_weights_from_tensor under that load_format.

This was written and tested against the documented contract, with a stand-in for the model. It has
not been run in an SGLang server, nor on a GPU. It knows nothing of what SGLang does to weights
behind load_weights: quantised models, and kernels that repack weights, are not for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from gossamer.comm.engines.images import bind
from gossamer.comm.engines.layout import learn
from gossamer.comm.engines.pieces import Load, Runtime, Spec
from gossamer.comm.live import ApplyError, LiveWeights
from gossamer.comm.log import WeightLog
from gossamer.comm.manifest import pack_manifest, unpack_manifest
from gossamer.comm.run import WireError
from gossamer.comm.wire import unpack_head
from torch import Tensor, nn

MANIFEST = "gossamer.manifest"
FRAME = "gossamer.frame."
ROLL_BACK = "gossamer.roll_back"


@dataclass(slots=True)
class _Followed:
    live: LiveWeights
    runtime: Runtime
    addresses: dict[str, int]
    can_roll_back: bool = False


FOLLOWED: WeakKeyDictionary[nn.Module, _Followed] = WeakKeyDictionary()


def payload(log: WeightLog, live: int | None, version: int) -> list[tuple[str, Tensor]]:
    """What brings workers that hold `live` to `version`: uint8 tensors by name.

    Raises ApplyError where no frames lead there.
    """
    hop = log.hop(live, version)
    if hop is None:
        raise ApplyError(f"no frames of the log at {log.url} make version {version} of {live}")
    parts = [(MANIFEST, pack_manifest(hop.manifest))]
    parts += [(f"{FRAME}{i}", log.read_part(ref)) for i, ref in enumerate(hop.refs)]
    return [(name, torch.from_numpy(np.frombuffer(data, np.uint8).copy())) for name, data in parts]


def take_back() -> list[tuple[str, Tensor]]:
    """What to send when the last payload failed on some rank: all go back to the version before."""
    return [(ROLL_BACK, torch.zeros(1, dtype=torch.uint8))]


def load(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """SGLang calls this in every worker. Raises; then nothing has changed.

    The first payload must be an anchor, and has no way back.
    """
    parts = {name: tensor.cpu().numpy().tobytes() for name, tensor in named_tensors}
    followed = FOLLOWED.get(model)
    if ROLL_BACK in parts:
        if followed and followed.can_roll_back:
            followed.can_roll_back = False
            followed.live.rollback()
        return
    if MANIFEST not in parts:
        raise ApplyError(f"expected a tensor {MANIFEST}, got {', '.join(sorted(parts)) or 'none'}")
    manifest = unpack_manifest(parts[MANIFEST], MANIFEST)
    frames = [parts[f"{FRAME}{i}"] for i in range(len(parts) - 1)]
    if followed is None:
        followed = FOLLOWED[model] = _follow(model, frames)
    staged = followed.live.stage(manifest, frames)
    followed.can_roll_back = False
    before = followed.live.version
    followed.runtime.check_addresses(followed.addresses)
    followed.live.commit(staged)
    followed.can_roll_back = before not in (None, followed.live.version)


def _follow(model: nn.Module, frames: list[bytes]) -> _Followed:
    """Learns where the tensors of an anchor live."""
    try:
        heads = [unpack_head(frame) for frame in frames]
    except WireError as error:
        raise ApplyError(f"the first payload is {error}") from error
    if not heads or any(head.kind != "anchor" for head in heads):
        raise ApplyError("the first payload must be an anchor; ask payload() for live=None")
    specs = {
        run.name: Spec(run.shape, getattr(torch, run.dtype)) for head in heads for run in head.runs
    }
    buffers = {name: each for name, each in model.named_buffers() if each.is_floating_point()}
    tensors = {**dict(model.named_parameters()), **buffers}
    runtime = Runtime(tensors, cast(Load, model.load_weights))
    live = LiveWeights(*bind(specs, learn(specs, runtime), runtime))
    return _Followed(live, runtime, runtime.addresses())
