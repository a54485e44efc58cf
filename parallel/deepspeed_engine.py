"""The Engine seam on DeepSpeed: ZeRO stages 0, 1 and 2 with expert parallelism of our own.

The one idea: DeepSpeed reduces gradients, shards optimizer state and gathers weights; what it holds
is read and written here, and only here, as rows of logical tensors. Losses are sums that the caller
has divided by the global token count, so DeepSpeed's mean over the world is undone by a factor.

ZeRO: Rajbhandari et al., 2020 (arXiv 1910.02054).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups as deepspeed_groups
from gossamer.parallel.config import ParallelConfig
from gossamer.parallel.dims import ParallelDims
from gossamer.parallel.engine import LogicalSegments, Owned, ReadRows
from gossamer.parallel.exact_norm import SquareSums
from gossamer.parallel.flat_layout import FlatLayout, Segment
from gossamer.parallel.flat_rows import exchange_gradients, write_owned
from gossamer.parallel.flat_state import StateGroup, gather_run
from gossamer.parallel.gather import gather_texts
from gossamer.parallel.masks import WEIGHT, Masks
from gossamer.parallel.placement.apply import Copy, copies, exchange
from torch import Tensor, nn


class ExpertBlock(Protocol):
    """What is asked of an MoE block, which is a module."""

    @property
    def num_experts(self) -> int:
        """Of all ranks together."""
        ...

    @property
    def experts(self) -> nn.Module:
        """Holds this rank's experts' parameters and no others."""
        ...


class DeepSpeedEngine:
    """See Engine. One engine per process: DeepSpeed's groups and hooks are global."""

    def __init__(
        self,
        module: nn.Module,
        expert_blocks: Iterable[ExpertBlock],
        segments: LogicalSegments,
        dims: ParallelDims,
        config: ParallelConfig,
        build_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        decays: Callable[[str, Tensor], bool],
    ) -> None:
        self.num_updates = 0
        self.on_gradient: Callable[[list[Owned]], None] | None = None
        self._dims, self._stage = dims, config.zero_stage
        _mark_expert_parallel(expert_blocks, dims)
        optimizer = build_optimizer(_parameter_groups(module, decays))
        self._parameters = dict(module.named_parameters())
        self._engine = _initialize(module, optimizer, config)
        self.module: nn.Module = self._engine
        self._optimizer = optimizer
        self._states = list(
            self._zero_states(segments) if self._stage else self._replicated_states(segments)
        )
        self.masks = Masks(optimizer, lambda: self._states, self._refresh_weights)
        segments_held = [s for state in self._states for s in state.layout.segments]
        self._most_elements = max(math.prod(s.shape) for s in segments_held)
        local = [s.name for s in segments_held]
        names = sorted({n for text in gather_texts("\n".join(local)) for n in text.split("\n")})
        self._name_index = {name: i for i, name in enumerate(names)}

    # --- training -------------------------------------------------------------------------------

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * self._dims.world_size, scale_wrt_gas=False)
        if not is_last:
            self._engine.step()

    def step(self, lr: float, max_norm: float) -> float:
        if self.on_gradient is not None:
            exchange_gradients(self._states, self.on_gradient)
        for (state, start), gradient in self._gradients():
            local = start - (0 if state.is_replicated else state.local_start)
            self.masks.take_gradient(state, local, gradient.detach().view(-1))
        norm = self._gradient_norm()
        self.masks.close_step(math.isfinite(norm))
        if not math.isfinite(norm):
            self._drop_gradients()
            raise FloatingPointError(f"the gradient norm is {norm}; expected a finite number")
        if max_norm and norm > max_norm:
            for _, gradient in self._gradients():
                gradient.mul_(max_norm / norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        self.num_updates += 1
        return norm

    def _gradients(self) -> Iterator[tuple[tuple[StateGroup, int], Tensor]]:
        """((group, flat offset), gradient) for every piece of gradient this rank keeps."""
        for index, state in enumerate(self._states):
            if self._stage == 0:
                gradient = state.parameter.grad
                if gradient is not None:
                    yield (state, 0), gradient
                continue
            start = state.local_start
            for piece in self._engine.optimizer.averaged_gradients[index]:
                yield (state, start), piece
                start += piece.numel()

    def _drop_gradients(self) -> None:
        """As DeepSpeed does where it finds an overflow itself."""
        zero = self._engine.optimizer
        zero.zero_grad(set_to_none=True)
        if self._stage:
            zero.micro_step_id = -1
            zero._release_preflattened_grad_buffers()
            for kept in (zero.averaged_gradients, zero.all_grad_tensors):
                kept.update(dict.fromkeys(kept))

    def _gradient_norm(self) -> float:
        """Norm over logical tensors, added in name order; the same bits wherever they are cut."""
        most = torch.zeros((), dtype=torch.float64)
        for _, gradient in self._gradients():
            if gradient.numel():
                most = torch.maximum(most, gradient.detach().abs().max().double().cpu())
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        squares = SquareSums(float(most), self._most_elements)
        square_by_name = torch.zeros(len(self._name_index), 2, dtype=torch.float64)
        for (state, start), gradient in self._gradients():
            if state.is_replicated and state.partition != 0:
                continue
            flat = gradient.detach().view(-1)
            for segment in state.layout.segments:
                low, high = max(segment.start, start), min(segment.stop, start + flat.numel())
                if low < high:
                    piece = flat[low - start : high - start]
                    square_by_name[self._name_index[segment.name]] += squares.of(piece).cpu()
        dist.all_reduce(square_by_name)
        return sum(square_by_name.sum(dim=1).tolist()) ** 0.5

    # --- state ----------------------------------------------------------------------------------

    def owned(self, with_moments: bool) -> Iterator[Owned]:
        for state in self._states:
            for run in state.layout.runs():
                name, shape = run.segment.name, run.segment.shape
                seen = self.masks.seen(state, name)
                beside = self.masks.beside(state, name) if with_moments else {}
                buffers = self._buffers(state, with_moments) | seen | beside
                tensors = gather_run(state, run, buffers)
                if tensors is None:
                    continue
                rows = (run.row_stop - run.row_start, *shape[1:])
                shaped = {key: flat.view(rows) for key, flat in tensors.items()}
                master, weight = shaped.pop("master"), shaped.pop(WEIGHT, None)
                yield Owned(name, shape, run.row_start, run.row_stop, master, shaped, weight)

    def write(self, read: ReadRows, num_updates: int | None) -> None:
        if num_updates is None:
            write_owned(self._states, read, self.masks.master)
            self.masks.apply()
            self._refresh_weights()
            return
        for state in self._states:
            self._optimizer.state.pop(state.parameter, None)
            if num_updates:
                self._create_moments(state, num_updates)
            for segment in state.layout.segments:
                rows = state.layout.rows_in(segment, state.local_start, state.local_stop)
                if rows is None:
                    continue
                source = read(segment.name, *rows)
                if source.shape != segment.shape:
                    raise ValueError(
                        f"{segment.name} has shape {source.shape} where it is read from; expected"
                        f" {segment.shape} as in the model"
                    )
                first = segment.start + rows[0] * segment.row_elements
                targets = self._buffers(state, with_moments=num_updates > 0)
                for key, target in (targets | self.masks.beside(state, segment.name)).items():
                    values = source.master if key == "master" else source.moments[key]
                    low = max(first, state.local_start)
                    high = min(first + values.numel(), state.local_stop)
                    target[low - state.local_start : high - state.local_start].copy_(
                        values.reshape(-1)[low - first : high - first]
                    )
        self.num_updates = num_updates
        self.masks.apply()
        self._refresh_weights()

    def move(self, before: Sequence[LogicalSegments], after: Sequence[LogicalSegments]) -> int:
        work: list[tuple[Copy, list[Tensor]]] = []
        states, mine = list(self._states), self._dims.expert_rank
        for index, state in enumerate(states):
            was, will_be = (
                [_place(rank, state.offsets) for rank in ranks] for ranks in (before, after)
            )
            if was[mine] != state.layout.segments:
                raise ValueError("move: expected `before` to be what this rank holds")
            if was == will_be:
                continue
            held = self._buffers(state, with_moments=True) | self.masks.beside(state)
            shards = list(held.values())
            size = None if state.is_replicated else state.layout.partition_size
            work += ((copy, shards) for copy in copies(was, will_be, self._dims, size))
            layout = FlatLayout(will_be[mine], state.layout.partition_size)
            states[index] = replace(state, layout=layout)
        num_bytes, self._states = exchange(work), states
        if work:
            self.masks.apply()
            self._refresh_weights()
        return num_bytes

    def _refresh_weights(self) -> None:
        """What the optimizer's parameters hold becomes the model's weights on all ranks."""
        if self._stage:
            self._engine.optimizer.update_lp_params()

    def _buffers(self, state: StateGroup, with_moments: bool) -> dict[str, Tensor]:
        """This rank's flat shard of masters and, if asked for and there, of moments."""
        buffers = {"master": self.masks.master(state)}
        if with_moments:
            moments = self._optimizer.state.get(state.parameter, {})
            buffers |= {k: moments[k].view(-1) for k in ("exp_avg", "exp_avg_sq") if k in moments}
        return buffers

    def _create_moments(self, state: StateGroup, num_updates: int) -> None:
        self._optimizer.state[state.parameter] = {
            "step": torch.tensor(float(num_updates)),
            "exp_avg": torch.zeros_like(state.parameter),
            "exp_avg_sq": torch.zeros_like(state.parameter),
        }

    def _zero_states(self, segments: LogicalSegments) -> Iterator[StateGroup]:
        """State groups of DeepSpeed's stage 1 and 2 optimizer."""
        zero, names = self._engine.optimizer, {id(p): n for n, p in self._parameters.items()}
        for i, parameters in enumerate(zero.round_robin_bit16_groups):
            starts = zip(parameters, zero.round_robin_bit16_offsets[i], strict=True)
            offsets = {names[id(parameter)]: int(start) for parameter, start in starts}
            size, group = int(zero.partition_size[i]), zero.real_dp_process_group[i]
            partition = dist.get_rank(group)
            yield StateGroup(
                layout=FlatLayout(_place(segments, offsets), size),
                offsets=offsets,
                parameter=zero.single_partition_of_fp32_groups[i],
                local_start=partition * size,
                local_stop=(partition + 1) * size,
                partition=partition,
                process_group=group,
                is_replicated=False,
            )

    def _replicated_states(self, segments: LogicalSegments) -> Iterator[StateGroup]:
        """State groups without ZeRO: one per parameter, the same on every rank that holds it."""
        for name, parameter in self._parameters.items():
            expert_group = getattr(parameter, "group_name", None)
            group = (
                deepspeed_groups._get_expert_data_parallel_group(expert_group)
                if expert_group
                else dist.group.WORLD
            )
            yield StateGroup(
                layout=FlatLayout(
                    _place(segments, {name: 0}),
                    -(-parameter.numel() // dist.get_world_size(group)),
                ),
                offsets={name: 0},
                parameter=parameter,
                local_start=0,
                local_stop=parameter.numel(),
                partition=dist.get_rank(group),
                process_group=group,
                is_replicated=True,
            )


def _place(segments: LogicalSegments, offsets: dict[str, int]) -> tuple[Segment, ...]:
    """The logical tensors of the parameters that start at `offsets`."""
    placed: list[Segment] = []
    for parameter, start in offsets.items():
        for name, shape in segments[parameter]:
            placed.append(Segment(name, shape, start))
            start = placed[-1].stop
    return tuple(placed)


def _parameter_groups(
    module: nn.Module, decays: Callable[[str, Tensor], bool]
) -> list[dict[str, Any]]:
    """Dense and expert parameters apart (DeepSpeed reduces them apart), decayed or not apart."""
    found: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        expert_group = getattr(parameter, "group_name", "")
        key = (expert_group, decays(name, parameter))
        group = found.setdefault(key, {"params": [], "name": expert_group or "dense"})
        group["params"].append(parameter)
        if expert_group:
            group["moe"] = True
        if not key[1]:
            group["weight_decay"] = 0.0
    return list(found.values())


def _mark_expert_parallel(blocks: Iterable[ExpertBlock], dims: ParallelDims) -> None:
    """Makes DeepSpeed see expert-parallel blocks: it looks for its MoE class and parameter tags.

    With EP=1 experts are reduced over the whole world like any other parameter: no marks.
    """
    if dims.expert == 1:
        return
    name = f"ep_size_{dims.expert}"
    for block in blocks:
        for parameter in block.experts.parameters():
            vars(parameter).update(allreduce=False, group_name=name)
        block.__class__ = _marked_class(type(block), dims.expert, name)


def _marked_class(block_class: type, ep_size: int, group_name: str) -> type:
    def set_deepspeed_parallelism(self: MoE, data_first: bool = False) -> None:
        if group_name not in deepspeed_groups._get_expert_parallel_group_dict():
            deepspeed_groups._create_expert_and_data_parallel(
                ep_size, use_data_before_expert_parallel_=data_first
            )

    members = {"set_deepspeed_parallelism": set_deepspeed_parallelism}
    return type(block_class.__name__, (block_class, MoE), members)


def _initialize(
    module: nn.Module, optimizer: torch.optim.Optimizer, config: ParallelConfig
) -> deepspeed.DeepSpeedEngine:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # else it builds a shared-memory op at run time, which wants a C++ compiler and half a minute
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = {
        # sizes are ours: DeepSpeed only checks that they multiply
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.compute_dtype == "bfloat16"},
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": config.reduce_bucket_elements,
            "allgather_bucket_size": config.reduce_bucket_elements,
            "overlap_comm": False,
        },
    }
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return engine
