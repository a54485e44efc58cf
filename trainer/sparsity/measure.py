"""What the masks are like, and what a machine that skips zeros would have to compute.

The one idea: every rank counts the rows it owns; a few integers a matrix, added up over the ranks
when masks change, say all there is to say until they change again.

A product with a masked weight is counted as its density, forward and backward: 2 of 6 FLOPs each
for the output, the gradient of the input and that of the weight. A step that needs the dense
gradient (its flow keeps masked weights alive, or it scores what may grow) pays the last in full.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from gossamer.comm.state_hash import format_hash
from gossamer.trainer.sparsity.flow import Flow
from gossamer.trainer.sparsity.method import Band, Shapes
from gossamer.trainer.sparsity.selection import mask_hash
from gossamer.trainer.update import UpdateResult
from torch import Tensor

KEPT, FLIPPED, DEAD_ROWS = range(3)


class Measure:
    """Counts of all governed matrices, over the ranks of a replica."""

    def __init__(
        self, shapes: Shapes, experts: Mapping[str, tuple[int, int]], num_parameters: int
    ) -> None:
        """experts: (MoE layer, expert) of the names that are an expert's; num_parameters: of the
        whole model."""
        self._num_parameters = num_parameters
        self._names = sorted(shapes)
        self._index = {name: i for i, name in enumerate(self._names)}
        self._experts, self._layers = experts, _layers(self._names)
        self._size_N = torch.tensor([shapes[n][0] * shapes[n][1] for n in self._names])
        self._rows_N = torch.tensor([shapes[n][0] for n in self._names])
        self._kept_N = self._size_N.clone()
        self._changed_at_N = torch.zeros_like(self._size_N)
        self._flip_rate, self._flips = 0.0, 0
        self.mask_hash = ""
        """Of the masks that changed last, of all ranks, as they were chosen."""
        self._dead_N = torch.zeros_like(self._size_N)
        places = torch.tensor([experts.get(name, (-1, -1)) for name in self._names])
        self._layer_N, self._expert_N = places.unbind(1)
        self._sums = {"steps": 0.0, "density": 0.0, "flops": 0.0, "sparse_flops": 0.0}

    def state(self) -> dict[str, Any]:
        """JSON."""
        return {
            "kept": self._kept_N.tolist(),
            "dead": self._dead_N.tolist(),
            "changed_at": self._changed_at_N.tolist(),
            "sums": self._sums,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""
        self._kept_N, self._dead_N = torch.tensor(state["kept"]), torch.tensor(state["dead"])
        self._changed_at_N[:] = torch.tensor(state["changed_at"])
        self._sums = dict(state["sums"])

    @property
    def density(self) -> float:
        """Of all governed weights."""
        return int(self._kept_N.sum()) / int(self._size_N.sum())

    def masks_changed(
        self, step: int, names: Collection[str], bands: Sequence[Band], masks: Sequence[Tensor]
    ) -> None:
        """Masks of `names` became `masks`, which are of `bands`. A collective call."""
        counts_N3 = torch.zeros(len(self._names), 3, dtype=torch.int64)
        for band, mask in zip(bands, masks, strict=True):
            row = counts_N3[self._index[band.name]]
            row[KEPT] += mask.sum().cpu()
            row[FLIPPED] += (mask != band.mask_RC).sum().cpu()
            row[DEAD_ROWS] += (~mask.any(dim=1)).sum().cpu()
        dist.all_reduce(counts_N3)
        is_new_N = torch.tensor([name in names for name in self._names])
        self._kept_N = torch.where(is_new_N, counts_N3[:, KEPT], self._kept_N)
        self._dead_N = torch.where(is_new_N, counts_N3[:, DEAD_ROWS], self._dead_N)
        self._flips = int(counts_N3[:, FLIPPED].sum())
        steps_N = (step - self._changed_at_N).clamp(min=1)
        self._flip_rate = self._flips / int((self._size_N * steps_N)[is_new_N].sum())
        self._changed_at_N[is_new_N] = step
        new = [
            Band(band.name, band.shape, band.row_start, band.weight_RC, mask)
            for band, mask in zip(bands, masks, strict=True)
        ]
        self.mask_hash = self.hash_of(new)

    def hash_of(self, bands: Sequence[Band]) -> str:
        """Of the masks of all ranks' `bands`. A collective call."""
        hashed = torch.tensor(_signed(mask_hash(bands)))
        dist.all_reduce(hashed)  # wraps as the hash does
        return format_hash(int(hashed))

    def masks_event(self, targets: Mapping[str, float]) -> dict[str, Any]:
        """What is written when masks change.

        sad: the sum of |new - old| over all masks; flip_rate: sad over the elements of the matrices
        that were due, each times the steps since its own last change; density and target by layer,
        and by expert of each layer; state of all masks that were due as a hash.
        """
        target_N = torch.tensor([targets[name] for name in self._names], dtype=torch.float64)
        size_N = self._size_N.double()
        layers = {layer: torch.tensor(rows) for layer, rows in self._layers.items()}
        return {
            "density": self.density,
            "target": float((target_N * size_N).sum() / size_N.sum()),
            "sad": self._flips,
            "flip_rate": self._flip_rate,
            "dead_rows": int(self._dead_N.sum()),
            "dead_row_share": int(self._dead_N.sum()) / int(self._rows_N.sum()),
            "layers": list(layers),
            "layer_density": [self._share(rows) for rows in layers.values()],
            "layer_target": [
                float((target_N * size_N)[rows].sum() / size_N[rows].sum())
                for rows in layers.values()
            ],
            "expert_density": self._by_expert(self._kept_N.double()),
            "expert_target": self._by_expert(target_N * size_N),
            "mask_hash": self.mask_hash,
        }

    def after_update(
        self, result: UpdateResult, flows: Mapping[str, Flow], scored: Collection[str]
    ) -> dict[str, float]:
        """Numbers of an update that was made with these masks.

        mask_density: share of the governed weights that masks keep; sparse_flops: of a machine that
        skips weights that do not live. Of the run so far: mean_density, share of the governed
        weights that lived in the forward pass; mean_params, the same of the whole model, in
        weights; mean_sparse_share, sparse over dense FLOPs.
        """
        load_LE = torch.tensor(result.expert_load)
        tokens_N = load_LE[self._layer_N, self._expert_N].where(self._layer_N >= 0, result.tokens)
        per_weight_N = torch.tensor([saved_flops(flows[n], n in scored) for n in self._names])
        masked_N = (self._size_N - self._kept_N).double()
        saved = float((per_weight_N * tokens_N * masked_N).sum())
        sums = self._sums
        sums["steps"] += 1
        masked_lives_N = torch.tensor([lives_on(flows[name]) for name in self._names])
        live_N = torch.where(masked_lives_N, self._size_N, self._kept_N)
        sums["density"] += int(live_N.sum()) / int(self._size_N.sum())
        sums["flops"] += result.flops
        sums["sparse_flops"] += result.flops - saved
        return {
            "mask_density": self.density,
            "sparse_flops": result.flops - saved,
            "mean_density": sums["density"] / sums["steps"],
            "mean_params": self._num_parameters
            - int(self._size_N.sum()) * (1.0 - sums["density"] / sums["steps"]),
            "mean_sparse_share": sums["sparse_flops"] / sums["flops"],
        }

    def _share(self, rows: Tensor) -> float:
        return int(self._kept_N[rows].sum()) / int(self._size_N[rows].sum())

    def _by_expert(self, part_N: Tensor) -> list[list[float]]:
        """Its share of each MoE layer's experts; empty where no expert is governed."""
        sums: dict[tuple[int, int], list[float]] = {}
        parts = zip(self._names, part_N.tolist(), self._size_N.tolist(), strict=True)
        for name, part, size in parts:
            if name in self._experts:
                both = sums.setdefault(self._experts[name], [0.0, 0.0])
                both[0] += part
                both[1] += size
        layers = sorted({layer for layer, _ in sums})
        return [[p / n for (at, _), (p, n) in sorted(sums.items()) if at == of] for of in layers]


def lives_on(flow: Flow) -> bool:
    """Whether the forward pass takes anything of a masked weight."""
    return flow.kind == "dense" or flow.keep > 0.0


def saved_flops(flow: Flow, is_scored: bool) -> float:
    """FLOPs that a masked weight and token save, of 6."""
    if lives_on(flow):
        return 0.0
    return 4.0 if flow.keeps_dense or is_scored else 6.0


def _layers(names: Sequence[str]) -> dict[str, list[int]]:
    """Indices of names by layer number, in its order; "" for what is in no layer."""
    found: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        _, mark, rest = name.partition("layers.")
        found.setdefault(rest.partition(".")[0] if mark else "", []).append(i)
    return dict(sorted(found.items(), key=lambda item: int(item[0] or -1)))


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
