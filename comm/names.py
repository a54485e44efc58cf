"""Checkpoint names for a model's tensors, each name a view on the model's own storage.

The one idea: transformers 5 holds a layer's experts fused, checkpoints and our log hold one 2-D
matrix per expert and projection. A view under the checkpoint's name needs no copy, so whoever
writes through it writes the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

# axes: E experts, F expert width, D hidden size
FUSED = {".experts.gate_up_proj": ("gate_proj", "up_proj"), ".experts.down_proj": ("down_proj",)}
RENAMED = {
    "mixtral": (
        (".mlp.", ".block_sparse_moe."),
        (".gate_proj.", ".w1."),
        (".up_proj.", ".w3."),
        (".down_proj.", ".w2."),
    )
}
"""By model type: parts of names that are others in the model than in its checkpoints."""
KEPT_FLOAT32 = (".e_score_correction_bias",)
"""Ends of names of what is never rounded: a routing bias moves by steps that bfloat16 loses."""

EXPERT = re.compile(r"(?:^|\.)layers\.(\d+)\..*\.experts\.(\d+)\.")


def published_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of tensor `name` in a log or checkpoint whose weights have `dtype`."""
    return torch.float32 if name.endswith(KEPT_FLOAT32) else dtype


def logical_views(
    named_parameters: Iterable[tuple[str, Tensor]],
    expert_offset: int = 0,
    model_type: str = "",
    placed: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """Detached views on `named_parameters` under the checkpoint names of `model_type`.

    `...experts.gate_up_proj` [E, 2F, D] becomes `...experts.{e}.gate_proj.weight` [F, D] and
    `...experts.{e}.up_proj.weight` [F, D]; `...experts.down_proj` [E, D, F] becomes
    `...experts.{e}.down_proj.weight` [D, F], with e counted from `expert_offset` (the first logical
    expert this rank holds), or as `placed` says for the experts it names: by stem
    (`...mlp.experts`), the logical expert in each place. Mixtral has names of its own. Every other
    tensor keeps its own name.
    Gradients work as well as weights. Raises ValueError for fused experts in another layout.
    """
    views: dict[str, Tensor] = {}
    for name, tensor in named_parameters:
        if ".experts." not in name or name.rpartition(".experts.")[2][0].isdigit():
            views[name] = tensor.detach()
            continue
        stem, _, leaf = name.rpartition(".")
        projections = FUSED.get(f".experts.{leaf}") if stem.endswith(".experts") else None
        if projections is None or tensor.ndim != 3 or tensor.shape[1] % len(projections):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)}: expected fused experts as "
                "experts.gate_up_proj [E, 2F, D] and experts.down_proj [E, D, F]"
            )
        held = range(expert_offset, expert_offset + len(tensor))
        for e, expert in zip((placed or {}).get(stem, held), tensor.detach(), strict=True):
            for projection, matrix in zip(projections, expert.chunk(len(projections)), strict=True):
                views[f"{stem}.{e}.{projection}.weight"] = matrix
    return {checkpoint_name(name, model_type): view for name, view in views.items()}


def expert_places(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(MoE layer, expert) of the names of experts' tensors, as the load of a step counts them."""
    found = {name: match for name in names if (match := EXPERT.search(name))}
    layers = sorted({int(match[1]) for match in found.values()})
    return {n: (layers.index(int(match[1])), int(match[2])) for n, match in found.items()}


def checkpoint_name(name: str, model_type: str) -> str:
    """The name that checkpoints of `model_type` give to the model's tensor `name`."""
    for ours, theirs in RENAMED.get(model_type, ()):
        name = name.replace(ours, theirs)
    return name
