"""Live placement: every so many steps, are the experts where they should be, and does moving pay?

The one idea: rank 0 solves from what all ranks counted and tells the others. No bit of the training
depends on what it decides, so what it measures, the speed of this machine, may differ each time.

Shapes: L MoE layers, T sampled tokens, K slots, E experts.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gossamer.parallel.config import ParallelConfig
from gossamer.parallel.dims import ParallelDims
from gossamer.parallel.placement.apply import Copy, exchange
from gossamer.parallel.placement.placement import Placement
from gossamer.parallel.placement.problem import Problem, Topology, balance_problem, build_problem
from gossamer.parallel.placement.score import score
from gossamer.parallel.placement.trace import Trace
from gossamer.parallel.placement.worth import Speed, few_swaps, forecast, most_worth
from gossamer.trainer.moe.block import MoEBlock
from gossamer.trainer.moe.experts import GroupedExperts
from gossamer.trainer.placement import PlacedExperts
from torch import Tensor
from torch.nn import functional

SAMPLED_STEPS = 4
"""Steps whose last micro-batch is kept for the objective `bytes`."""
PROBE_BYTES = 1 << 20
"""That each rank sends to each other to measure the links."""
MOST_PAIRS = 1 << 14
"""That the experts are timed with."""
STATE_BYTES = 12
"""Of a parameter: the master and two moments, float32."""


class LivePlacement:
    """Counts after every update, decides when it is time."""

    def __init__(self, config: ParallelConfig, experts: PlacedExperts, dims: ParallelDims) -> None:
        self._config, self._experts, self._dims = config.placement, experts, dims
        self._sharers = dims.data if config.zero_stage else 1
        self._topology = Topology(nodes=dims.num_nodes, ranks_per_node=dims.ranks_per_node)
        self._speed: Speed | None = None
        self._begin()

    def _begin(self) -> None:
        self._steps, self._load_LE = 0, torch.zeros((), dtype=torch.int64)
        self._samples: list[Tensor] = []

    def after_update(
        self, step: int, load_LE: list[list[int]], extra_s: float = 0.0
    ) -> dict[str, Any] | None:
        """Counts; when `step` updates are done and it is time, decides and moves.

        `load_LE`: of all ranks. `extra_s`: what a move costs besides. A collective call. Returns
        the numbers of a decision.
        """
        every = self._config.every_steps
        if not every:
            return None
        self._steps += 1
        self._load_LE = self._load_LE + torch.tensor(load_LE)
        if self._config.objective == "bytes":
            self._samples = [*self._samples[1 - SAMPLED_STEPS :], _chosen(self._experts.blocks)]
        if step % every:
            return None
        numbers = self._decide(extra_s)
        self._begin()
        return numbers

    def _decide(self, extra_s: float) -> dict[str, Any]:
        problem = self._problem()
        pairs = int(self._load_LE.sum()) / self._steps / self._dims.data
        speed = self._speed = self._speed or self._measure(pairs)
        numbers: dict[str, Any] = {"is_moved": False}
        told = torch.zeros(1 + self._experts.placement.slots_LS.size, dtype=torch.int64)
        if dist.get_rank() == 0:
            numbers, chosen = self._solve(problem, speed, pairs, extra_s)
            if chosen is not None:
                told[0], told[1:] = 1, torch.tensor(chosen.slots_LS).flatten()
        dist.broadcast(told, src=0)
        if told[0]:
            now = self._experts.placement
            slots_LS = told[1:].view(now.slots_LS.shape).numpy()
            chosen = Placement(slots_LS=slots_LS, ranks=now.ranks, layers=now.layers)
            moved = self._experts.place(chosen)
            probe_bytes = self._dims.world_size * PROBE_BYTES
            self._speed = speed.after(int(moved["busiest_bytes"]), moved["move_s"], probe_bytes)
            numbers |= moved | {"is_moved": True}
        return numbers

    def _solve(
        self, problem: Problem, speed: Speed, pairs_per_step: float, extra_s: float
    ) -> tuple[dict[str, Any], Placement | None]:
        """What is best, by the numbers; None where staying is."""
        from gossamer.parallel.placement.solve import place  # only rank 0 needs solvers

        start_s, now = time.perf_counter(), self._experts.placement
        solved = place(problem, self._config.method, self._config.time_limit_s)
        found = [solved, few_swaps(problem, now)]
        held = self._experts.blocks[0].experts.parameters()
        expert_bytes = STATE_BYTES * sum(weight[0].numel() for weight in held) / self._sharers
        forecasts = [
            forecast(problem, now, then, speed, pairs_per_step, expert_bytes, extra_s)
            for then in found
        ]
        best = most_worth(forecasts, self._config.every_steps)
        shown = 0 if best is None else best
        after, expected = found[shown], forecasts[shown]
        numbers = {
            "reason": "live",
            "is_moved": best is not None,
            "objective": problem.name,
            "method": after.method,
            "max_over_mean": score(problem, now).max_over_mean,
            "max_over_mean_after": score(problem, after).max_over_mean,
            "bound": solved.bound,
            "saved_s_per_step": expected.saved_s,
            "cost_s": expected.cost_s,
            "moved_experts": expected.moved_experts,
            "solve_s": time.perf_counter() - start_s,
            "pair_s": speed.pair_s,
            "bytes_per_s": speed.bytes_per_s,
            "least_move_s": speed.move_s,
        }
        return numbers, None if best is None else after

    def _problem(self) -> Problem:
        """From the counters, or from the sampled tokens of all ranks."""
        layers = self._experts.placement.layers
        if self._config.objective == "balance":
            return balance_problem(self._load_LE.numpy(), self._topology, layers)
        rank_T, expert_LTK = _gathered(self._samples)
        rows = self._experts.blocks[0].experts.down_proj
        trace = Trace(
            expert_LTK=expert_LTK.numpy().astype(np.int16),
            step_T=np.zeros(len(rank_T), np.int64),
            rank_T=rank_T.numpy(),
            layers=layers,
            num_experts=self._experts.placement.experts,
        )
        return build_problem(
            trace,
            self._topology,
            objective="bytes",
            dispatch="two_level" if self._dims.dispatch.levels == 2 else "one_level",
            sources=self._config.sources,
            row_bytes=rows.shape[1] * rows.element_size(),
        )

    def _measure(self, pairs_per_step: float) -> Speed:
        """Of rank 0's experts and of an exchange between all ranks, each after a warm-up."""
        pairs_per_layer = pairs_per_step / len(self._experts.blocks)
        pair_s = _pair_seconds(self._experts.blocks[0], int(pairs_per_layer / self._dims.expert))
        ranks = range(self._dims.world_size)
        shard = torch.zeros(len(ranks) * PROBE_BYTES, dtype=torch.uint8)
        work = [
            (Copy(a, b * PROBE_BYTES, b, a * PROBE_BYTES, PROBE_BYTES), [shard])
            for a in ranks
            for b in ranks
        ]
        for _ in range(2):
            dist.barrier()
            start_s = time.perf_counter()
            sent = exchange(work)
            elapsed_s = time.perf_counter() - start_s
        move_s = self._experts.place(self._experts.placement)["move_s"]  # of nothing
        return Speed(pair_s=pair_s, bytes_per_s=sent / elapsed_s, move_s=move_s)


def _pair_seconds(block: MoEBlock, num_pairs: int) -> float:
    """Of a pair in the experts of a layer, forward and backward, spread evenly; on copies."""
    held = [weight.detach().clone() for weight in block.experts.parameters()]
    experts, (num_local, _, width) = GroupedExperts(*held), held[0].shape
    count_e = torch.full((num_local,), max(1, min(num_pairs, MOST_PAIRS) // num_local))
    x_RD = held[0].new_ones((int(count_e.sum()), width)).requires_grad_()
    for _ in range(2):
        start_s = time.perf_counter()
        y_RD = experts(x_RD, count_e)
        y_RD.backward(torch.ones_like(y_RD))
        elapsed_s = time.perf_counter() - start_s
    return elapsed_s / len(x_RD)


def _chosen(blocks: list[MoEBlock]) -> Tensor:
    """expert_LTK of the last micro-batch, int32, without padding; -1 fills up."""
    chosen = [block.statistics.expert_TK.int().cpu() for block in blocks]
    slots = max(expert_TK.shape[1] for expert_TK in chosen)
    return torch.stack([_widened(expert_TK, slots) for expert_TK in chosen])


def _widened(expert_TK: Tensor, slots: int) -> Tensor:
    return functional.pad(expert_TK, (0, slots - expert_TK.shape[-1]), value=-1)


def _gathered(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(rank_T, expert_LTK) of all ranks' samples."""
    slots = torch.tensor(max(sample.shape[-1] for sample in samples))
    dist.all_reduce(slots, op=dist.ReduceOp.MAX)
    mine = torch.cat([_widened(sample, int(slots)) for sample in samples], dim=1)
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    sizes[dist.get_rank()] = mine.shape[1]
    dist.all_reduce(sizes)
    padded = functional.pad(mine, (0, 0, 0, int(sizes.max()) - mine.shape[1]))
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    kept = [each[:, :size] for each, size in zip(gathered, sizes.tolist(), strict=True)]
    return torch.arange(len(sizes)).repeat_interleave(sizes), torch.cat(kept, dim=1)
