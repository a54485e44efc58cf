"""A placement: which rank of the expert group holds which expert, layer by layer.

The one idea: it is metadata in logical names. A rank's slots hold its experts in ascending order,
so the table of ranks says everything, and a file of it fits any checkpoint.

Shapes: L MoE layers, E experts of a layer, S = E slots; slot s lies on rank s // slots_per_rank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FORMAT = "gossamer placement 1"


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Every expert once in each layer, as many on each rank; and how good that is known to be."""

    slots_LS: NDArray[np.int64]
    """Logical expert of each slot; ascending inside a rank. Read only."""
    ranks: int
    """Of one expert group."""
    layers: tuple[int, ...]
    """The model's number of each row's layer (of `model.layers.N`), ascending."""
    method: str = "contiguous"
    objective: str = ""
    """What `value` is: `balance` or `bytes`, and for which dispatch; empty when not scored."""
    value: float | None = None
    bound: float | None = None
    """No placement has a smaller value."""
    proof: str = ""
    """What proves the bound."""
    time_s: float | None = None

    def __post_init__(self) -> None:
        slots_LS = np.ascontiguousarray(self.slots_LS, dtype=np.int64)
        layers, experts = slots_LS.shape
        if self.ranks < 1 or experts % self.ranks:
            raise ValueError(f"placement: {experts} slots do not divide among {self.ranks} ranks")
        if len(self.layers) != layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"placement.layers: expected {layers} ascending numbers")
        if (np.sort(slots_LS, axis=1) != np.arange(experts)).any():
            raise ValueError(
                f"placement: expected each of the {experts} experts once in every layer"
            )
        slots_LRs = np.sort(slots_LS.reshape(layers, self.ranks, -1), axis=2)
        slots_LS = slots_LRs.reshape(layers, experts)
        slots_LS.setflags(write=False)
        object.__setattr__(self, "slots_LS", slots_LS)

    @property
    def experts(self) -> int:
        return self.slots_LS.shape[1]

    @property
    def slots_per_rank(self) -> int:
        return self.experts // self.ranks

    @property
    def rank_LE(self) -> NDArray[np.int64]:  # noqa: N802
        """The rank of each expert."""
        return np.argsort(self.slots_LS, axis=1) // self.slots_per_rank

    @property
    def gap(self) -> float | None:
        """(value - bound) / value: by how much, at most, the best placement is better."""
        if self.value is None or self.bound is None:
            return None
        return (self.value - self.bound) / self.value if self.value else 0.0

    def moved(self, other: Placement) -> int:
        """Experts, over all layers, that are on another rank in `other`."""
        return int((self.rank_LE != other.rank_LE).sum())


def from_ranks(
    rank_LE: ArrayLike, ranks: int, layers: Sequence[int] | None = None, method: str = "given"
) -> Placement:
    """The placement that puts expert e of row l on rank_LE[l][e].

    `layers`: the model's layer numbers, 0 and up if None. Raises ValueError unless every rank gets
    as many experts in each layer.
    """
    rank_LE = np.asarray(rank_LE)
    if rank_LE.ndim != 2 or not np.issubdtype(rank_LE.dtype, np.integer):
        raise ValueError("placement: expected a table of ranks, a row for each layer")
    layers = range(len(rank_LE)) if layers is None else layers
    share = rank_LE.shape[1] // ranks
    for layer, rank_E in zip(layers, rank_LE, strict=True):
        in_range = ((rank_E >= 0) & (rank_E < ranks)).all()
        if not in_range or (np.bincount(rank_E, minlength=ranks) != share).any():
            raise ValueError(
                f"placement of layer {layer}: expected {share} experts on each of {ranks} ranks"
            )
    slots_LS = np.argsort(rank_LE, axis=1, kind="stable")
    return Placement(slots_LS=slots_LS, ranks=ranks, layers=tuple(layers), method=method)


def contiguous(layers: int | Sequence[int], experts: int, ranks: int) -> Placement:
    """Expert e on rank e // (experts / ranks), as everywhere; `layers`: how many, or which."""
    numbers = tuple(range(layers)) if isinstance(layers, int) else tuple(layers)
    slots_LS = np.tile(np.arange(experts), (len(numbers), 1))
    return Placement(slots_LS=slots_LS, ranks=ranks, layers=numbers)


def save_placement(placement: Placement, path: Path) -> None:
    """Writes JSON: {"layers": {layer: [rank of expert 0, of expert 1, ...]}} and what is known."""
    table = zip(placement.layers, placement.rank_LE.tolist(), strict=True)
    data = {
        "format": FORMAT,
        "experts": placement.experts,
        "ranks": placement.ranks,
        "method": placement.method,
        "objective": placement.objective,
        "value": placement.value,
        "bound": placement.bound,
        "gap": placement.gap,
        "proof": placement.proof,
        "time_s": placement.time_s,
        "layers": {str(layer): ranks for layer, ranks in table},
    }
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(data) + "\n")
    partial.replace(path)


def load_placement(path: Path) -> Placement:
    """Reads what save_placement wrote.

    Raises ValueError, a sentence that names the file, for whatever is no placement.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, expected {FORMAT!r}")
        table = sorted((int(layer), ranks) for layer, ranks in data["layers"].items())
        if any(len(ranks) != data["experts"] for _, ranks in table):
            raise ValueError(f"expected a rank for each of {data['experts']} experts a layer")
        layers = [layer for layer, _ in table]
        slots = from_ranks(np.array([r for _, r in table]), int(data["ranks"]), layers).slots_LS
        return Placement(
            slots_LS=slots,
            ranks=int(data["ranks"]),
            layers=tuple(layers),
            method=str(data["method"]),
            objective=str(data["objective"]),
            value=data["value"],
            bound=data["bound"],
            proof=str(data["proof"]),
            time_s=data["time_s"],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a placement: {error}") from error
