"""`gossamer bench rl`: samples a second and who waits, synchronous beside asynchronous RL.

The one idea: every row is a real run by `gossamer rl` (Ray, engines as actors, the weight log), and
its numbers are read off the events that every run writes.

Columns: `samples_per_s` learned from, over all steps but the first two; `trainer_idle`, the share
of that time in which the trainer waits for its batch (its scoring and packing are in it);
`step_to_token_s`, from the end of an optimizer step to the first logits of an engine with the new
weights, median over versions and engines, with the slowest tenth in `step_to_token_p90_s`;
`pause_s`, how long an engine stands still to take a version, median; `staleness_mean`, versions.
`sparsity`: what a few steps change, by learning rate, from `change` events.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from gossamer.launch.bench.sync import machine
from gossamer.launch.meter import Meter
from gossamer.launch.summary import Event, of_kind, read_events

COMMAND = "gossamer bench rl"
MODES = {"synchronous": 0, "asynchronous": 1}
"""And their max_staleness."""
ENGINES, QUICK_ENGINES = (1, 2, 3, 4), (1,)
STEPS, QUICK_STEPS = 14, 4
WARM_STEPS = 2
RATES, QUICK_RATES = (1e-6, 1e-5, 1e-4, 1e-3), (1e-4,)
SHARES = ("changed_share", "kept_share", "seen_share", "ever_share", "net_share")
MODEL = {
    "model_type": "qwen3_moe",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 160,
    "intermediate_size": 256,
    "tie_word_embeddings": False,
}
RL: dict[str, Any] = {
    "prompts_per_step": 32,
    "samples_per_prompt": 8,
    "prompts_per_unit": 8,
    "max_new_tokens": 24,
    "seq_len": 128,
    "reward": "gossamer.launch.bench.rl_engine:any_difference",
    "drop_constant_groups": False,
}


def bench_rl(json_path: Path, quick: bool) -> None:
    """Runs one small run after another and writes the JSON. One thread a process."""
    engines, steps = (QUICK_ENGINES, QUICK_STEPS) if quick else (ENGINES, STEPS)
    rates = QUICK_RATES if quick else RATES
    load = os.getloadavg()[0]
    rows, sparsity = [], []
    runs = [(mode, count) for mode in MODES for count in engines]
    with Meter("runs") as meter:
        for mode, count in runs:
            rows.append(
                {"mode": mode, "engines": count, **measured(run(steps, count, MODES[mode]))}
            )
            meter(len(rows), len(runs) + len(rates))
        for lr in rates:
            sparsity.append({"lr": lr, **changed(run(steps, 1, 0, lr, changes=1))})
            meter(len(runs) + len(sparsity), len(runs) + len(rates))
    result = {
        "command": " ".join([COMMAND, *["--quick"] * quick]),
        "machine": machine(),
        "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
        "batch": {**RL, "steps": steps},
        "rows": rows,
        "sparsity": sparsity,
    }
    partial = json_path.with_name(f".{json_path.name}")
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(json_path)


def recipe(steps: int, engines: int, max_staleness: int, lr: float, changes: int) -> dict[str, Any]:
    """One rank, random weights, sums in words."""
    phase = {"name": "rl", "kind": "grpo", "max_steps": steps, "lr": lr}
    train = {
        "model": {"hf": MODEL},
        "tokenizer": {"vocab_size": 300},
        "task": {"size": 2000, "heldout_permille": 5, "min_heldout": 1},
        "data": {"task_share": 0.0, "corpus_chars": 100_000},
        "rl": {**RL, "max_staleness": max_staleness},
        "phases": [phase],
        "checkpoint": {"every_steps": 10_000},
        "metrics": {"wandb_mode": "disabled", "changes_every_steps": changes},
    }
    engine = "gossamer.launch.bench.rl_engine:TimedEngine"
    # as many engines as asked for on however few cores there are
    rollout = {"engine": engine, "engines": engines, "num_cpus": 0.0}
    return {"name": "bench-rl", "train": train, "rollout": rollout}


def run(
    steps: int, engines: int, max_staleness: int, lr: float = 1e-5, changes: int = 0
) -> list[Event]:
    """The events of one run. Raises RuntimeError, with its last words, if it fails."""
    with tempfile.TemporaryDirectory(prefix="gossamer-bench-") as folder:
        path, run_dir = Path(folder, "recipe.yaml"), Path(folder, "run")
        path.write_text(json.dumps(recipe(steps, engines, max_staleness, lr, changes)))
        command = [sys.executable, "-m", "gossamer.launch.cli", "rl", str(path)]
        done = subprocess.run(
            [*command, "--run-dir", str(run_dir)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"a run of the benchmark failed: {done.stderr.strip()[-500:]}")
        return read_events(run_dir)


def measured(events: list[Event]) -> dict[str, float]:
    """The columns of a row; see above."""
    steps = of_kind(events, "train_step")[WARM_STEPS:]
    elapsed_s = sum(step["step_s"] for step in steps)
    told = of_kind(events, "publish")
    published = {e["version"]: e["time_s"] - e["publish_s"] for e in told}
    first = min(published) + WARM_STEPS
    delays_s = [
        e["time_s"] - published[e["version"]]
        for e in of_kind(events, "first_token")
        if e["version"] > first
    ]
    pauses_s = [
        e["pause_s"] for e in of_kind(events, "engine", what="commit") if e["version"] > first
    ]
    size = RL["prompts_per_step"] * RL["samples_per_prompt"]
    return {
        "samples_per_s": len(steps) * size / elapsed_s,
        "trainer_idle": sum(step["wait_s"] for step in steps) / elapsed_s,
        "step_to_token_s": median(delays_s),
        "step_to_token_p90_s": quantiles(delays_s, n=10)[-1] if len(delays_s) > 1 else delays_s[0],
        "pause_s": median(pauses_s),
        "staleness_mean": sum(step["staleness_mean"] for step in steps) / len(steps),
        "steps": len(steps),
    }


def changed(events: list[Event]) -> dict[str, Any]:
    """Of the last measurement the shares, with those of single steps as means over all but the
    first, and by expert the share that differs from the start."""
    told = of_kind(events, "change")
    last = told[-1]
    later = told[1:] or told
    shares = {name: last[name] for name in SHARES}
    for name in ("changed_share", "kept_share"):
        shares[name] = sum(each[name] for each in later) / len(later)
    numbers = zip(last["groups"], last["elements"], last["net"], strict=True)
    experts = {group: net / elements for group, elements, net in numbers if "expert" in group}
    return {
        "steps": last["step"] - last["since_step"],
        **shares,
        "expert_net_min": min(experts.values()),
        "expert_net_max": max(experts.values()),
    }
