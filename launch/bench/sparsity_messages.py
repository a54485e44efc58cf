"""Bytes of one replica's message a round, with and without masks.

The one idea: a replica that is alone sends what it would send to others, so a short run of one rank
leaves real messages in its log, and their files are what is counted.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from gossamer.comm.outer.config import OuterConfig, SparseLocoConfig
from gossamer.launch.bench.sparsity_arms import Sizes
from gossamer.launch.bench.sparsity_train import config_of
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.loop import train
from gossamer.trainer.prepare import prepare_run
from gossamer.trainer.saving import RunPlace
from gossamer.trainer.session import Session
from gossamer.trainer.sparsity.config import SparsityConfig
from gossamer.trainer.sparsity.recipes import RECIPES

Row = dict[str, Any]
INNER_STEPS, STEPS = 2, 6
RULES = ("diloco", "sparseloco")
PLANS = ((None, 1.0), ("static_uniform", 0.5), ("static_uniform", 0.1), ("rigl", 0.1))


def messages_config(plan: str | None, density: float, rule: str, log: Path) -> TrainConfig:
    """Three rounds, matrices of 256 x 256; `rigl` changes masks after each but the last one."""
    sizes = Sizes(hidden=256, rows=2, corpus_chars=200_000, heldout_rows=8)
    config = config_of("dense", 1, sizes)
    sparsity = None
    if plan is not None:
        (rule_of_plan,) = RECIPES[plan].rules
        schedule = replace(rule_of_plan.schedule, density=density, every_steps=INNER_STEPS)
        sparsity = SparsityConfig(rules=(replace(rule_of_plan, schedule=schedule),))
    outer = OuterConfig(
        rule=rule,
        inner_steps=INNER_STEPS,
        url=str(log),
        sparseloco=SparseLocoConfig(density=1 / 16),
        keep_anchors=0,
    )
    return replace(
        config,
        phases=(replace(config.phases[0], max_steps=STEPS, warmup_steps=1),),
        checkpoint=replace(config.checkpoint, every_steps=STEPS),
        heldout=replace(config.heldout, every_steps=0),
        sparsity=sparsity,
        outer=outer,
    )


def count_messages(plan: str | None, density: float, rule: str) -> list[int]:
    """Bytes of the message of each round."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "rounds")
        config = messages_config(plan, density, rule, log)
        prepare_run(config, Path(folder), "bench")
        place = RunPlace(run_dir=Path(folder), name="bench")
        train(Session(config, place, None, on_checkpoint=lambda step: None))
        return [path.stat().st_size for path in sorted(log.glob("rounds/*/*.message"))]
