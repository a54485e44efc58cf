"""Traces: a model's published weights before and after a few consecutive steps, in one file each.

The one idea: a trace is nothing but tensors. `STEP/NAME` in a safetensors file holds the bits of
tensor NAME after STEP recorded steps, and the file's metadata says in words how they were made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SIGMA = 0.02
"""Standard deviation of simulated weights."""
TENSOR_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Trace:
    """Published weights before (`snapshots[0]`) and after each of some consecutive steps."""

    name: str
    how: str
    """How it was made, a sentence."""
    snapshots: list[dict[str, Tensor]]


def save_trace(trace: Trace, folder: Path) -> Path:
    """Writes NAME.safetensors, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{step}/{name}": tensor
        for step, snapshot in enumerate(trace.snapshots)
        for name, tensor in snapshot.items()
    }
    path = folder / f"{trace.name}.safetensors"
    temporary = path.with_name(f".{path.name}")
    save_file(tensors, temporary, metadata={"trace": json.dumps([trace.name, trace.how])})
    temporary.replace(path)
    return path


def load_trace(path: Path) -> Trace:
    """Reads what `save_trace` wrote. Raises ValueError for any other file."""
    snapshots: dict[int, dict[str, Tensor]] = {}
    try:
        with safe_open(path, "pt") as file:
            name, how = json.loads(file.metadata()["trace"])
            for key in file.keys():
                step, _, tensor = key.partition("/")
                snapshots.setdefault(int(step), {})[tensor] = file.get_tensor(key)
        ordered = [snapshots[step] for step in range(len(snapshots))]
    except Exception as error:  # safetensors raises its own kinds
        raise ValueError(f"{path} is not a trace that gossamer recorded: {error}") from error
    return Trace(name, how, ordered)


def simulate_trace(density: float, num_tensors: int, columns: int) -> Trace:
    """One Adam-like step on tensors of weights N(0, SIGMA) that changes `density` of them in bf16.

    A density of 1 is other random weights instead: nothing in the old ones tells of the new.
    """
    random = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    is_fresh = density >= 1
    lr = 0.0 if is_fresh else _lr_for(density, draw(1 << 19) * SIGMA, draw(1 << 19))
    before, after = {}, {}
    for number in range(num_tensors):
        name = f"layers.{number}.weight"
        master = draw(TENSOR_ROWS, columns) * SIGMA
        step = draw(TENSOR_ROWS, columns)
        before[name] = master.bfloat16()
        after[name] = (step * SIGMA if is_fresh else master - lr * step).bfloat16()
    if is_fresh:
        return Trace("fresh", "other random weights", [before, after])
    how = f"simulated: weights N(0, {SIGMA}), one step of {lr:.2g} x N(0, 1)"
    return Trace(f"simulated-{100 * density:g}%", how, [before, after])


def _lr_for(density: float, master: Tensor, step: Tensor) -> float:
    """The step size at which `density` of the elements change their bf16 bits."""
    low, high = 1e-12, 1.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        changed = (master - middle * step).bfloat16() != master.bfloat16()
        low, high = (low, middle) if changed.double().mean() > density else (middle, high)
    return high
