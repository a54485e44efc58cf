"""Dense to sparse: a Hugging Face folder whose every MLP becomes experts (`gossamer upcycle`).

The one idea: experts that are copies, mixed by weights that add up to one, compute the dense MLP.
A granular split cuts the width of each copy in G experts with one router row between them: top-k
then takes whole copies, and down_proj times G undoes the 1/G of weight that each piece gets.

Sparse upcycling: Komatsuzaki et al., 2023 (arXiv 2212.05055); granular: He et al., 2024
(arXiv 2410.07524).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.trainer.hf_folder import HFFolder
    from torch import Tensor
    from transformers import PretrainedConfig

SPARSE = {"qwen3": "qwen3_moe", "mistral": "mixtral", "llama": "mixtral"}
"""The family that a dense model type becomes; all but the MLPs is alike in both."""
MLP = re.compile(r"(model\.layers\.\d+\.mlp)\.(gate_proj|up_proj|down_proj)\.weight")
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Upcycling:
    """What the experts are to be."""

    experts: int
    """Experts of a layer, pieces counted."""
    top_k: int
    """Experts of a token, pieces counted."""
    granularity: int = 1
    """Experts that one copy of the MLP is cut into."""
    noise: float = 0.0
    """Standard deviation of what is added to each expert's weights, in units of theirs."""
    seed: int = 0
    """Of the router's weights and the noise."""

    def __post_init__(self) -> None:
        g = self.granularity
        if g < 1 or self.experts % g or self.top_k % g:
            raise ValueError(
                f"granularity {g} for {self.experts} experts and top-k {self.top_k}; expected a"
                " divisor of both, so that a token uses whole copies"
            )
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top-k is {self.top_k}; expected 1 to {self.experts} experts")
        if not self.noise >= 0.0:
            raise ValueError(f"noise is {self.noise}; expected 0 or more")


def upcycle(source: Path, out: Path, plan: Upcycling) -> Path:
    """Writes the sparse model of the dense one in `source` to `out`, tokenizer files included.

    Raises ValueError or FileNotFoundError for a folder that cannot be upcycled, FileExistsError
    when `out` holds a model.
    """
    from gossamer.trainer.config import ModelConfig
    from gossamer.trainer.hf_folder import HFFolder, write_shards
    from gossamer.trainer.model import hf_config, write_config

    if (out / "config.json").exists():
        raise FileExistsError(f"{out} holds a model already; expected a new folder")
    sparse = sparse_config(hf_config(ModelConfig(path=str(source)), {}), plan)
    folder = HFFolder(source)
    strange = [n for n in folder.names if n.startswith("model.layers.") and n.endswith(".bias")]
    if strange:
        raise ValueError(f"{source} holds {min(strange)}; expected a model without biases")
    dtypes: set[Any] = set()
    write_shards(out, _tensors(folder, sparse, plan, dtypes))
    for path in source.iterdir():
        is_weights = path.suffix in WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and path.name != "config.json":
            shutil.copy(path, out / path.name)
    write_config(out, sparse, max(dtypes, key=lambda dtype: dtype.itemsize))
    return out


def sparse_config(dense: PretrainedConfig, plan: Upcycling) -> PretrainedConfig:
    """The config of the sparse model. Raises ValueError for a model that has no sparse family."""
    from transformers import AutoConfig

    if dense.model_type not in SPARSE:
        raise ValueError(
            f"model type {dense.model_type} cannot be upcycled; expected {', '.join(SPARSE)}"
        )
    if dense.intermediate_size % plan.granularity:
        raise ValueError(
            f"granularity {plan.granularity} does not divide intermediate_size"
            f" {dense.intermediate_size}"
        )
    model_type = SPARSE[dense.model_type]
    if getattr(dense, "use_sliding_window", False):
        raise ValueError(
            f"use_sliding_window is true; expected false, {model_type} windows all layers"
        )
    shared = AutoConfig.for_model(model_type).to_dict().keys() | {"head_dim"}
    shared -= {"model_type", "architectures", "dtype"}
    fields = {name: value for name, value in dense.to_dict().items() if name in shared}
    width = dense.intermediate_size // plan.granularity
    if dense.model_type == "qwen3":
        fields |= {"num_experts": plan.experts, "moe_intermediate_size": width}
        fields |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    else:
        fields |= {"num_local_experts": plan.experts, "intermediate_size": width}
    fields["num_experts_per_tok"] = plan.top_k
    return AutoConfig.for_model(model_type, **fields)


def _tensors(
    folder: HFFolder, sparse: PretrainedConfig, plan: Upcycling, dtypes: set[Any]
) -> Iterator[tuple[str, Tensor]]:
    """The sparse checkpoint, in the dense one's order; notes the dtypes it meets."""
    import torch
    from gossamer.comm.names import checkpoint_name

    generator = torch.Generator().manual_seed(plan.seed)
    g = plan.granularity
    for name, dense in folder.tensors(sorted(folder.names)):
        dtypes.add(dense.dtype)
        found = MLP.fullmatch(name)
        if found is None:
            yield name, dense
            continue
        stem, projection = found.groups()
        if projection == "down_proj":  # once a layer
            copies = torch.randn(plan.experts // g, len(dense), generator=generator)
            rows = (copies * sparse.initializer_range).repeat_interleave(g, dim=0)
            yield checkpoint_name(f"{stem}.gate.weight", sparse.model_type), rows.to(dense.dtype)
            pieces = (dense.float() * g).chunk(g, dim=1)
        else:
            pieces = dense.float().chunk(g, dim=0)
        for e in range(plan.experts):
            piece = pieces[e % g]
            if plan.noise:
                noise = torch.randn(piece.shape, generator=generator)
                piece = piece + noise * (plan.noise * piece.std())
            expert = checkpoint_name(f"{stem}.experts.{e}.{projection}.weight", sparse.model_type)
            yield expert, piece.to(dense.dtype, copy=True)  # files hold no shared memory
