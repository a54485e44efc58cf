"""A plug-in that makes vLLM's workers follow a weight log.

The one idea: vLLM's own hooks are enough. An entry point loads this file in every process of an
engine and registers the weight transfer backend `gossamer`; an engine that was started with it, and
no other, keeps its weights so that they can be written. docs/vllm.md has the traps.
"""

# What only a worker needs is imported where it is used: every process of every vLLM loads this.

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

if TYPE_CHECKING:
    from gossamer.comm.engines.pieces import Packed, Runtime
    from gossamer.comm.engines.rank import RankFollower

BACKEND = "gossamer"
SAMPLED_ELEMENTS = 4096
"""Elements of a tensor that are compared to see whether it was repacked."""


@dataclass(frozen=True, slots=True)
class Loading:
    """What became of a model's tensors once they were loaded."""

    packed: dict[nn.Module, Packed] = field(default_factory=dict)
    """Packing that can be repeated, by module and with names inside of it."""
    changed: set[str] = field(default_factory=set)
    """Run-time tensors that do not hold what the loader put there."""


LOADINGS: WeakKeyDictionary[nn.Module, Loading] = WeakKeyDictionary()


def register() -> None:
    """Entry point of `vllm.general_plugins`: once in every process, before an engine is made."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    if BACKEND in WeightTransferEngineFactory._registry:
        return
    WeightTransferEngineFactory.register_engine(BACKEND, GossamerWeightTransferEngine)
    load_model = BaseModelLoader.load_model

    @functools.wraps(load_model)
    def load_model_to_be_written(
        self: BaseModelLoader, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        transfer = vllm_config.weight_transfer_config
        if transfer is None or transfer.backend != BACKEND:
            return load_model(self, vllm_config, model_config, prefix)
        with loading_to_be_written() as loading:
            model = load_model(self, vllm_config, model_config, prefix)
        LOADINGS[model] = loading
        return model

    BaseModelLoader.load_model = load_model_to_be_written  # type: ignore[method-assign]


@contextmanager
def loading_to_be_written() -> Iterator[Loading]:
    """While models are loaded in here, their weights stay writable, and repacking is noted."""
    from gossamer.comm.engines.pieces import Packed
    from vllm.model_executor.layers import utils as layers
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.model_loader import base_loader
    from vllm.model_executor.model_loader import utils as loaders

    loading = Loading()
    pack_linear = layers.dispatch_cpu_unquantized_gemm
    pack_experts = CPUUnquantizedExperts.process_weights_after_loading
    pack_all = base_loader.process_weights_after_loading

    def keep_linear(layer: Any, remove_weight: bool) -> None:  # noqa: ANN401
        if layer.weight.ndim != 2:
            pack_linear(layer, remove_weight)
        else:
            layer.cpu_linear = nn.functional.linear

    def note_experts(self: CPUUnquantizedExperts, layer: nn.Module) -> None:
        shapes = {name: tuple(each.shape) for name, each in layer.named_parameters(recurse=False)}

        def pack(loaded: dict[str, Tensor]) -> dict[str, Tensor]:
            module = nn.Module()
            for name, tensor in loaded.items():
                setattr(module, name, nn.Parameter(tensor, requires_grad=False))
            pack_experts(self, module)
            return {name: getattr(module, name).data for name in loaded}

        pack_experts(self, layer)
        loading.packed[layer] = Packed(shapes, pack)

    def note_changes(model: nn.Module, config: ModelConfig, device: torch.device) -> None:
        before = {name: _sample(tensor) for name, tensor in _tensors(model).items()}
        pack_all(model, config, device)
        after = {name: _sample(tensor) for name, tensor in _tensors(model).items()}
        loading.changed.update(
            name
            for name in before.keys() | after.keys()
            if name not in before or name not in after or not torch.equal(before[name], after[name])
        )

    # vLLM's CPU attention uses AMX without having asked the kernel for it
    torch.cpu._init_amx()
    with ExitStack() as stack:
        for owner, name, ours in (
            (layers, "dispatch_cpu_unquantized_gemm", keep_linear),
            (CPUUnquantizedExperts, "process_weights_after_loading", note_experts),
            (base_loader, "process_weights_after_loading", note_changes),
            # equal at first, they need not stay equal
            (loaders, "maybe_retie_word_embeddings", lambda model, config: None),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, ours)
        yield loading


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights by name; other buffers (which expert is where) steer the loader."""
    buffers = {name: each for name, each in model.named_buffers() if each.is_floating_point()}
    return {**dict(model.named_parameters()), **buffers}


def _sample(tensor: Tensor) -> Tensor:
    """Bits of some elements, and of the shape."""
    flat = tensor.detach().reshape(-1)
    some = flat[:: 1 + len(flat) // SAMPLED_ELEMENTS].contiguous().view(torch.uint8)
    return torch.cat([some.cpu(), torch.tensor(tensor.shape).view(torch.uint8)])


def runtime_of(model: nn.Module) -> Runtime:
    """What a rank computes with. Raises LayoutError for a model that cannot be followed."""
    from gossamer.comm.engines.pieces import LayoutError, Load, Runtime
    from vllm.model_executor.layers.attention import MLAAttention

    loading = LOADINGS.get(model)
    if loading is None:
        raise LayoutError(f"{type(model).__name__} was not loaded by a loader that is followed")
    packed: list[Packed] = []
    known: set[str] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, MLAAttention):
            raise LayoutError(f"{prefix}: latent attention keeps copies of weights, not followed")
        if module in loading.packed:
            inside = loading.packed[module]
            packed.append(inside.within(prefix))
            known.update(packed[-1].load_shapes)
    tensors = _tensors(model)
    return Runtime(tensors, cast(Load, model.load_weights), packed, loading.changed - known)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """What `init_weight_transfer_engine` is told."""

    log_url: str
    """A weight log that the engine's host can read."""
    public_key: str | None = None
    """File of the Ed25519 key that signs the log."""
    audit_every_versions: int = 0
    """Audit beside the running engine after so many versions; 0: never."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """What `update_weights` is told."""

    version: int


class GossamerWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """The half in a worker. A driver (follow.py) stages by RPC, then pauses and updates."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self,
        config: WeightTransferConfig,
        vllm_config: VllmConfig,
        device: torch.device,
        model: nn.Module,
    ) -> None:
        from vllm.v1.worker.worker_base import WorkerBase

        super().__init__(config, vllm_config, device, model)
        self.follower: RankFollower | None = None
        self._in_update = False
        for call in (gossamer_stage, gossamer_status, gossamer_roll_back, gossamer_audit):
            setattr(WorkerBase, call.__name__, call)

    @property
    def started(self) -> RankFollower:
        if self.follower is None:
            raise RuntimeError("call init_weight_transfer_engine with a log_url first")
        return self.follower

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Opens the log and learns where its tensors live. Weights stay as they are."""
        from gossamer.comm.engines.rank import RankFollower
        from gossamer.comm.log import WeightLog

        self.shutdown()
        log = WeightLog.open(init_info.log_url, public_key=init_info.public_key)
        with set_current_vllm_config(self.vllm_config):
            runtime = runtime_of(self.model)
            self.follower = RankFollower(log, runtime, init_info.audit_every_versions)

    def start_weight_update(self) -> None:
        """Nothing is prepared: staging went before."""
        self._in_update = self.started is not None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Commits a version."""
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            self._in_update = False  # the worker ends the update, too
            raise

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Commits the version once it is staged; on failure the old one stays live."""
        self.started.commit(update_info.version)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def finish_weight_update(self) -> None:
        """All ranks have committed: there is no way back."""
        self._in_update = False
        self.started.finish()

    def status(self) -> dict[str, Any]:
        """JSON; empty before init_transfer_engine."""
        if self.follower is None:
            return {}
        return {**self.follower.status(), "updating": self._in_update}

    def end_failed_update(self) -> bool:
        """Rolls back what was committed; True when the worker still thinks it is updating."""
        self.started.roll_back()
        was, self._in_update = self._in_update, False
        return was

    def shutdown(self) -> None:
        """Stops following; the weights stay."""
        if self.follower is not None:
            self.follower.close()
        self.follower = None


# Methods that workers gain for collective_rpc; what they return is JSON.


def gossamer_stage(worker: Any, version: int) -> None:  # noqa: ANN401
    """Begins to stage `version` beside the running engine."""
    worker.weight_transfer_engine.started.stage(version)


def gossamer_status(worker: Any) -> dict[str, Any]:  # noqa: ANN401
    """The rank's status; empty before init_weight_transfer_engine."""
    return worker.weight_transfer_engine.status()


def gossamer_roll_back(worker: Any) -> None:  # noqa: ANN401
    """Ends an update that failed on some rank: the version before it is live again."""
    if worker.weight_transfer_engine.end_failed_update():
        worker.finish_weight_update()


def gossamer_audit(worker: Any) -> dict[str, Any]:  # noqa: ANN401
    """State hash of the rank's live tensors, read in full."""
    follower = worker.weight_transfer_engine.started
    return {"version": follower.version, "state_hash": follower.audit()}
