"""Trains one arm of `gossamer bench sparsity` as a run of its own, on one rank.

The one idea: nothing here is special to the benchmark; it is `gossamer train` without Ray, and the
answer is what the run's metrics.jsonl says.
"""

from __future__ import annotations

import json
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist
from gossamer.launch.bench.sparsity_arms import Sizes, arms, hf_of, steps_of
from gossamer.trainer.config import CheckpointConfig, ModelConfig, TrainConfig
from gossamer.trainer.data.config import DataConfig, TokenizerConfig
from gossamer.trainer.loop import train
from gossamer.trainer.prepare import prepare_run
from gossamer.trainer.saving import RunPlace
from gossamer.trainer.session import Session
from gossamer.trainer.step.config import HeldoutConfig, MetricsConfig, PhaseConfig

Answer = dict[str, Any]


def config_of(arm: str, seed: int, sizes: Sizes) -> TrainConfig:
    """The run of an arm."""
    plan = arms(sizes)[arm]
    steps = steps_of(plan, sizes)
    phase = PhaseConfig(
        name="pretrain",
        kind="next_token",
        max_steps=steps,
        lr=sizes.lr,
        warmup_steps=max(1, steps // 20),
        final_lr_share=0.1,
    )
    return TrainConfig(
        phases=(phase,),
        model=ModelConfig(hf=hf_of(sizes)),
        seed=seed,
        tokenizer=TokenizerConfig(vocab_size=sizes.vocab_size, train_chars=200_000),
        data=DataConfig(
            seq_len=sizes.seq_len,
            num_rows=sizes.rows,
            task_share=0.0,
            corpus_chars=sizes.corpus_chars,
        ),
        heldout=HeldoutConfig(every_steps=steps, num_rows=sizes.heldout_rows, permille=100),
        checkpoint=CheckpointConfig(every_steps=steps, keep_last=1),
        metrics=MetricsConfig(wandb_mode="disabled", peak_flops=1.0),  # so that mfu is FLOP/s
        sparsity=None if plan is None else replace(plan, seed=seed),
    )


def train_arm(arm: str, seed: int, sizes: Sizes) -> Answer:
    """Losses in nats a token; flops of the whole run, without masked weights; flip_rate and sad are
    means over mask changes, of the share of mask bits that flip per step, and of bits per change.
    """
    config = config_of(arm, seed, sizes)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        prepare_run(config, run_dir, "bench")
        place = RunPlace(run_dir=run_dir, name="bench")
        train(Session(config, place, None, on_checkpoint=lambda step: None))
        events = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    steps = [each for each in events if each["event"] == "train_step"]
    changes = [each for each in events if each["event"] == "masks" and each["step"]]
    evals = [each for each in events if each["event"] == "eval"]
    last = steps[-1]
    return {
        "steps": len(steps),
        "tokens": sum(each["tokens"] for each in steps),
        "loss": evals[-1]["loss"],
        "density": last.get("mask_density", 1.0),
        "mean_density": last.get("mean_density", 1.0),
        "flops_share": last.get("mean_sparse_share", 1.0),
        "flops": sum(each.get("sparse_flops", each["mfu"] * each["step_s"]) for each in steps),
        "flip_rate": mean(each["flip_rate"] for each in changes) if changes else 0.0,
        "sad": mean(each["sad"] for each in changes) if changes else 0.0,
        "dead_row_share": changes[-1]["dead_row_share"] if changes else 0.0,
        "step_s": median(each["step_s"] for each in steps),
    }


def in_this_process(answer: Path, work: Callable[..., Any], *arguments: object) -> None:
    """Writes work(*arguments), on one rank, as JSON, and ends the process."""
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
    try:
        init = f"file://{answer}.store"
        dist.init_process_group("gloo", init_method=init, rank=0, world_size=1)
        answer.write_text(json.dumps(work(*arguments)))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # gloo's and DeepSpeed's threads would go on
