"""A routing trace on request: which experts each token went to, layer by layer, step by step.

The one idea: the JSON lines of Megatron-Core's router trace, so that its tools and ours read both:
{"step", "stage": "pre_dispatch", "block": "decoder", "layer", "rank", "num_tokens", "topk",
"top_indices"}, one file a rank (each rank has tokens of its own), one line for each step, layer
and micro-batch. Unlike there, padding is left out. A resumed run appends: of lines with the same
step, those of the later attempt come last.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from gossamer.trainer.moe.block import MoEBlock
from torch import nn

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class RoutingTrace:
    """Appends to FOLDER/router_trace_rank{rank}.jsonl until `num_steps` steps are done."""

    def __init__(self, folder: Path, rank: int, num_steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"router_trace_rank{rank}.jsonl"
        self._rank, self._num_steps = rank, num_steps

    def write(self, step: int, module: nn.Module) -> None:
        """What the MoE blocks of `module` did in their last forward pass, of step `step`."""
        if step >= self._num_steps:
            return
        records: list[str] = []
        for name, block in module.named_modules():
            if not isinstance(block, MoEBlock):
                continue
            number = LAYER.search(f"{name}.")
            chosen = block.statistics.expert_TK
            record = {
                "step": step,
                "stage": "pre_dispatch",
                "block": "decoder",
                "layer": int(number[1]) if number else len(records),
                "rank": self._rank,
                "num_tokens": chosen.shape[0],
                "topk": chosen.shape[1],
                "top_indices": chosen.tolist(),
            }
            records.append(json.dumps(record, separators=(",", ":")) + "\n")
        with self._path.open("a") as file:
            file.writelines(records)
