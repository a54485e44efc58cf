"""One rank of `gossamer bench moe`: checks that all compute the same, times them, counts memory.

The one idea: whatever the machine is doing falls on ours and the peer alike, because they take
turns, step by step, in the same processes; and memory is not guessed from outside, but read from
PyTorch's allocator, which tells its profiler of every tensor that comes and goes.

    python -m gossamer.launch.bench.moe_world RANK FOLDER SETTINGS     SETTINGS: see `moe.py`, JSON
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from gossamer.launch.bench.moe_layers import OURS, Layer, Shape, contestants, join_deepspeed
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}
"""Of output and input gradient, relative to ours; in bfloat16 near ties go to other experts."""
MOST_PROFILED_STEPS = 20
"""What one of gloo's threads lets go of last is not reported, so a step after which some tensor
seems to have stayed is measured again, so many times at most."""


def main() -> None:
    """Writes FOLDER/rows.json on rank 0: shape, impl, peak_bytes and pairs_s of every row."""
    rank, folder, settings = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/gloo", rank=rank, world_size=settings["ep"]
    )
    join_deepspeed(settings["ep"])
    rows: list[dict[str, Any]] = []
    for case in settings["cases"]:
        shape = Shape(ep=settings["ep"], **case)
        if rank == 0:
            what = f"{shape.experts} experts at EP={shape.ep} in {shape.dtype}"
            print(what, file=sys.stderr, flush=True)
        rows += measure(shape, settings["pairs"])
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    dist.barrier()


def measure(shape: Shape, pairs: int) -> list[dict[str, Any]]:
    """A row for each contestant; pairs_s are seconds of our and the peer's step, turn by turn."""
    builds = contestants(shape.ep)
    peak_bytes = {name: peak_of(build, shape) for name, build in builds.items()}
    layers = {name: build(shape) for name, build in builds.items()}
    _check_same(layers, shape)
    steps = {name: Training(layer, shape).step for name, layer in layers.items()}
    for step in steps.values():
        _seconds(step)
    pairs_s: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(pairs):
        for name in list(steps)[1:]:
            both = (OURS, name) if turn % 2 else (name, OURS)
            taken = {each: _seconds(steps[each]) for each in both}
            pairs_s[name].append((taken[OURS], taken[name]))
    return [
        {"impl": name, "peak_bytes": peak_bytes[name], "pairs_s": pairs_s[name]}
        | {field: getattr(shape, field) for field in shape.__slots__}
        for name in steps
    ]


class Training:
    """A layer, its optimizer and its inputs."""

    def __init__(self, layer: Layer, shape: Shape) -> None:
        self._layer, self._ep = layer, shape.ep
        self._optimizer = torch.optim.AdamW(layer.module.parameters(), lr=1e-6, fused=True)
        self._x_1TD, self._grad_1TD = _inputs(shape)

    def step(self) -> None:
        """Forward, backward, the router's gradient summed over ranks, AdamW, gradients dropped."""
        self._layer(self._x_1TD).backward(self._grad_1TD)
        if self._ep > 1:
            dist.all_reduce(self._layer.gate.grad)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._x_1TD.grad = None

    @property
    def input_bytes(self) -> int:
        """Of x_1TD."""
        return self._x_1TD.nbytes

    def resting_bytes(self) -> int:
        """Weights, moments, buffers and inputs: what is there between two steps."""
        module, moments = self._layer.module, self._optimizer.state.values()
        tensors = [*module.parameters(), *module.buffers(), self._x_1TD, self._grad_1TD]
        tensors += [moment for kinds in moments for moment in kinds.values()]
        return sum(tensor.nbytes for tensor in tensors)


def peak_of(build: Callable[[Shape], Layer], shape: Shape) -> int:
    """Most bytes of live tensors in a step, weights and moments included; of the fullest rank.

    What the layer's makers needed to build it does not count.
    """
    training = Training(build(shape), shape)
    gc.collect()
    training.step()  # makes the moments
    rises = []
    for _ in range(MOST_PROFILED_STEPS):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            training.step()
        events = watched.profiler.kineto_results.events()
        changes = [event for event in events if event.name() == "[memory]"]
        changes.sort(key=lambda event: event.start_ns())
        sums = list(accumulate(event.nbytes() for event in changes))
        rises.append(max(sums))
        stayed = torch.tensor(sums[-1])
        dist.all_reduce(stayed, op=dist.ReduceOp.MAX)
        if stayed < training.input_bytes:  # less than a buffer of the layer
            break
    peak = torch.tensor(training.resting_bytes() + min(rises))
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return int(peak)


def _inputs(shape: Shape) -> tuple[Tensor, Tensor]:
    """x_1TD, which wants a gradient, and the gradient of the output; other ones on each rank."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(dist.get_rank()))
    x_1TD, grad_1TD = (draw(1, shape.tokens, shape.hidden) for _ in range(2))
    dtype = getattr(torch, shape.dtype)
    return x_1TD.to(dtype).requires_grad_(), grad_1TD.to(dtype)


def _check_same(layers: dict[str, Layer], shape: Shape) -> None:
    """Raises RuntimeError for a contestant whose output or input gradient is not ours."""
    results = {}
    for name, layer in layers.items():
        x_1TD, grad_1TD = _inputs(shape)
        y_1TD = layer(x_1TD)
        y_1TD.backward(grad_1TD)
        layer.module.zero_grad()
        assert x_1TD.grad is not None
        results[name] = (y_1TD.detach().float(), x_1TD.grad.float())
    for name, found in results.items():
        for one, mine in zip(found, results[OURS], strict=True):
            difference = float((one - mine).norm() / mine.norm())
            if not difference <= TOLERANCE[shape.dtype]:
                raise RuntimeError(f"{name} is {difference:.1e} away from ours at {shape}")


def _seconds(step: Callable[[], None]) -> float:
    dist.barrier()
    started_s = perf_counter()
    step()
    dist.barrier()
    return perf_counter() - started_s


if __name__ == "__main__":
    main()
