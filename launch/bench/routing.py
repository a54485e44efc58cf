"""Routing traces for `gossamer bench placement`: recorded from runs of ours, and made up.

The one idea: what is recorded is what a tiny recipe's own trace option writes; what is made up has
a structure that is known: topics that like groups of experts, popularity that drifts step by step.

    python -m gossamer.launch.bench.routing NAME FOLDER STEPS      records one of RECORDED
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gossamer.parallel.placement.trace import Trace

RECORDED = {
    "tiny_qwen3_moe": ("tiny_qwen3_moe",),
    "tiny_deepseek_v3": ("tiny_deepseek_v3",),
    "qwen3_moe, 64 experts": (
        "tiny_qwen3_moe",
        "train.model.hf.num_experts=64",
        "train.model.hf.num_experts_per_tok=8",
        "train.model.hf.moe_intermediate_size=16",
    ),
}
"""A shipped recipe and overrides. One process records: the tokens are then dealt out to ranks."""
STEPS, QUICK_STEPS = 60, 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """How a trace is made up."""

    layers: int
    experts: int
    top_k: int
    tokens: int
    """Of a step."""
    steps: int
    topics: int = 16
    liking: float = 2.5
    """What a topic adds to the logits of its own group of experts; 0 = no structure."""
    skew: float = 0.5
    """Standard deviation of an expert's log popularity."""
    drift: float = 0.05
    """Standard deviation of what a step adds to it, the spread staying the same."""


def make_trace(how: Made, seed: int = 1) -> Trace:
    """Tokens of one topic each; the groups of experts of a topic differ layer by layer."""
    random = np.random.default_rng(seed)
    keep = np.sqrt(1 - how.drift**2)
    topic_ST = random.integers(0, how.topics, (how.steps, how.tokens))
    layers = []
    for _ in range(how.layers):
        group_E = random.permutation(np.arange(how.experts) % how.topics)
        popular_E = random.standard_normal(how.experts)
        steps = []
        for topic_T in topic_ST:
            logits_TE = how.skew * popular_E + how.liking * (group_E == topic_T[:, None])
            logits_TE = logits_TE + random.gumbel(size=logits_TE.shape)
            steps.append(np.argpartition(-logits_TE, how.top_k, axis=1)[:, : how.top_k])
            popular_E = keep * popular_E + how.drift * random.standard_normal(how.experts)
        layers.append(np.concatenate(steps))
    tokens = how.steps * how.tokens
    return Trace(
        expert_LTK=np.stack(layers).astype(np.int16),
        step_T=np.repeat(np.arange(how.steps), how.tokens),
        rank_T=np.zeros(tokens, np.int64),
        layers=tuple(range(how.layers)),
        num_experts=how.experts,
    )


def record(name: str, folder: Path, steps: int) -> None:
    """Trains in this process; writes FOLDER/router_trace_rank0.jsonl when all is done."""
    import torch.distributed as dist
    from gossamer.launch.recipe import load_recipe
    from gossamer.trainer.prepare import prepare_run
    from gossamer.trainer.session import RunPlace, Session

    recipe, *overrides = RECORDED[name]
    one_process = ["train.parallel.expert=1", "train.metrics.wandb_mode=disabled"]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # DeepSpeed asks for them
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        here = [
            f"train.model.moe.trace_path={partial}/trace",
            f"train.model.moe.trace_steps={steps}",
        ]
        config = load_recipe(recipe, [*overrides, *one_process, *here]).train
        dist.init_process_group("gloo", init_method=f"file://{partial}/gloo", rank=0, world_size=1)
        prepare_run(config, Path(partial), recipe)
        place = RunPlace(run_dir=Path(partial), name=recipe)
        session = Session(config, place, None, lambda _: None)
        for _ in range(steps):
            session.update(config.phases[0])
        Path(partial, "trace").rename(folder)


if __name__ == "__main__":
    record(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
